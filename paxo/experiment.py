"""An experiment file's settings, and the verbs that act on one.

An experiment file defines `experiment() -> Experiment`. With more than one training run it also
defines `run(settings, workdir)`; the default is one `fit`, in `paxo.runs`.
"""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

from paxo import distributed
from paxo.data.limits import TokenLimits
from paxo.data.records import EXTRA_AXES
from paxo.models.config import Attention, Float, LoraSettings, ModelConfig, Remat
from paxo.models.heads import head_widths
from paxo.objectives import Objective
from paxo.overrides import SettingsError, apply_overrides
from paxo.provenance import forget_unless_begun, log_to, write_run_folder
from paxo.training.optimizers import AdamW


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model that is trained, and its first weights.

    Attributes:
        path: folder in Hugging Face's layout, or a hub name; None for a model from scratch.
        config: shape of a model from scratch.
        tokenizer: folder or hub name of the tokenizer, where it is not that of `path`.
        chat_template: Jinja template used for messages where the tokenizer has none.
        param_dtype: dtype in which parameters are kept.
        compute_dtype: dtype of activations and matrix products.
        remat: what the backward pass computes again, see `ModelConfig`.
        unroll: whether the scan over layers is unrolled; None decides by size.
        attention: how attention is computed, see `ModelConfig`.
        heads: extra outputs besides those that the objective cannot do without, or widths of these,
            as in `embeddings:8` (see `paxo.models.heads`).
        lora: adapters that are trained in place of the model's own weights; None trains these. One
            of its settings is enough to switch it on: `--set model.lora.rank=16`.
    """

    path: str | None = None
    config: ModelConfig | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    param_dtype: Float = "float32"
    compute_dtype: Float = "float32"
    remat: Remat = "none"
    unroll: bool | None = None
    attention: Attention = "auto"
    heads: tuple[str, ...] = ()
    lora: LoraSettings | None = None

    def __post_init__(self):
        head_widths(self.heads)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where preferences come from and how they become rows.

    Attributes:
        path: JSONL, Parquet, a folder, `tfds:NAME:SPLIT` or `hf:OWNER/NAME:SPLIT`.
        heldout_path: the same for held-out records; None sets a share of `path` apart.
        heldout: that share, by prompt: records of one prompt never lie on both sides.
        limits: greatest lengths and what is done about longer records.
        on_error: "raise" at the first bad record, or "skip" and count.
        extras: numeric columns that the objective names: a number a record or one a completion;
            other shapes are told after the name, as in `advantages:KT`, a list for each completion
            with a number for each scored token (KK for pairs of completions, KD and D for vectors).
        max_records: read only so many; None reads all.
        row_length: L, tokens of a row; None lets it follow from the lengths.
        slots: S, scored tokens of a row; None likewise.
        window: groups that are shuffled into each other and packed together.
        shuffle: False keeps the order of the file.
    """

    path: str | None = None
    heldout_path: str | None = None
    heldout: float = 0.1
    limits: TokenLimits = dataclasses.field(default_factory=TokenLimits)
    on_error: Literal["raise", "skip"] = "raise"
    extras: tuple[str, ...] = ()
    max_records: int | None = None
    row_length: int | None = None
    slots: int | None = None
    window: int = 256
    shuffle: bool = True

    def __post_init__(self):
        if not 0 <= self.heldout < 1:
            raise ValueError(f"data.heldout is a share in [0, 1); got {self.heldout}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"data.on_error must be 'raise' or 'skip'; got {self.on_error!r}")
        for name in self.extras:
            _, told, axes = name.partition(":")
            if told and axes not in EXTRA_AXES:
                raise ValueError(
                    f"data.extras: {name!r} has axes other than {', '.join(EXTRA_AXES)}"
                )
        if self.window < 1:
            raise ValueError(f"data.window must be at least 1; got {self.window}")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long, in what portions, and what is kept.

    Attributes:
        num_steps: steps of the run.
        rows_per_batch: R, packed rows a step over all devices.
        microbatches: parts in which a step's rows are run, to save memory.
        seed: of shuffles, initial weights and random keys.
        log_every: steps between lines of metrics.
        evaluate_every: steps between evaluations; 0 only at the end.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that are kept.
        best_metric: evaluation metric by which the best checkpoint is kept too; None for none.
    """

    num_steps: int
    rows_per_batch: int = 8
    microbatches: int = 1
    seed: int = 0
    log_every: int = 1
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    best_metric: str | None = None

    def __post_init__(self):
        for name in (
            "num_steps",
            "rows_per_batch",
            "microbatches",
            "log_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1; got {getattr(self, name)}")
        if self.evaluate_every < 0:
            raise ValueError(
                f"train.evaluate_every must not be negative; got {self.evaluate_every}"
            )
        if self.rows_per_batch % self.microbatches:
            raise ValueError(
                f"train.microbatches must divide train.rows_per_batch; got {self.microbatches} and "
                f"{self.rows_per_batch}"
            )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; one may be -1 and takes what is left.

    Attributes:
        data: copies of the parameters; rows are split over them.
        fsdp: ways in which parameters are split along their width; rows are split over it too.
        tensor: ways in which heads, the SwiGLU and the vocabulary are split.
        slice_axis: which of these goes over the slower network where the devices lie on several
            slices (TPU slices, or nodes of GPUs); its size is a multiple of their number.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice_axis: Literal["data", "fsdp", "tensor"] = "data"


@dataclasses.dataclass(frozen=True)
class ReferenceSettings:
    """The frozen policy under a role, "reference" or "previous".

    Attributes:
        path: folder or hub name of another model of the same family and tokenizer; None takes the
            weights that training starts from.
        store: folder in which its log-probs are kept, so that they are computed once for all
            epochs and runs; None takes `<workdir>/logps`, "off" computes them in every step. Hidden
            states, which divergences of whole distributions need, are never kept.
        attach: give it to the objective even where that can do without (GRPO's KL penalty).
        dtype: in which its parameters are kept; None keeps them as the model's. With "bfloat16" a
            reference in every step costs half the memory, but a policy that has not moved no longer
            has a log-ratio of exactly 0 to it.
        mesh: other sizes of mesh axes for it, such as more `fsdp`; None takes those of the run. It
            holds the same rows on each process.
    """

    path: str | None = None
    store: str | None = None
    attach: bool = False
    dtype: Float | None = None
    mesh: MeshSettings | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All settings of a run. Nothing is allocated or read before it runs.

    Attributes:
        objective: what is minimised, from `paxo.objective` or `paxo.weighted_sum`.
        optimizer: from `paxo.adamw`.
        model: what is trained.
        data: on what.
        train: how long.
        reference: the frozen policy that the objective may ask for.
        previous: another one, the snapshot of self-play in rounds. The first round, and every one
            that starts from its snapshot's weights, needs no `path`; `reference.path` then names
            the policy of before the first round.
        mesh: devices.
        export: whether `<workdir>/export` is written at the end.
    """

    objective: Objective
    optimizer: AdamW
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    reference: ReferenceSettings = ReferenceSettings()
    previous: ReferenceSettings = ReferenceSettings()
    mesh: MeshSettings = MeshSettings()
    export: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind = field.type
            if isinstance(kind, type) and not isinstance(getattr(self, field.name), kind):
                got = getattr(self, field.name)
                raise TypeError(
                    f"Experiment.{field.name} must be a {kind.__name__}; got {got!r} "
                    f"({type(got).__name__})"
                )


def load(file: str | pathlib.Path) -> ModuleType:
    """The module of an experiment file.

    Raises:
        SettingsError: if it defines no `experiment()`.
    """
    file = pathlib.Path(file)
    spec = importlib.util.spec_from_file_location(f"paxo.experiments.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise SettingsError(
            f"{file}: an experiment is a Python file; got {file.suffix or 'no suffix'}"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not callable(getattr(module, "experiment", None)):
        raise SettingsError(
            f"{file}: defines no function experiment() that returns paxo.Experiment"
        )
    return module


def settings_of(module: ModuleType, overrides: Sequence[str]) -> Any:
    """The settings of an experiment file with `name=value` overrides applied.

    They are a `paxo.Experiment`, or, in a file that defines its own `run`, any frozen dataclass.
    """
    settings = module.experiment()
    its_own = hasattr(module, "run") and dataclasses.is_dataclass(settings)
    if not isinstance(settings, Experiment) and not its_own:
        raise SettingsError(
            f"{module.__file__}: experiment() must return a paxo.Experiment; got "
            f"{type(settings).__name__}"
        )
    return apply_overrides(settings, overrides)


def run_file(
    file: str | pathlib.Path, overrides: Sequence[str], workdir: str | pathlib.Path
) -> None:
    """`paxo run`: runs an experiment file, or goes on with what is in `workdir`.

    Several processes need a `workdir` that all of them see, or a bucket's address ("gs://..."):
    what a run goes on from (checkpoints, rounds, evaluations) then lies there, and the rest, logs
    and plots and exports, in `runs/<its last part>` on process 0.
    """
    import jax

    module = load(file)
    settings = settings_of(module, overrides)
    workdir = _local_folder(workdir)
    distributed.on_first(lambda: write_run_folder(workdir, file, settings, overrides))
    try:
        with log_to(workdir):
            _runner(module)(settings, workdir)
    except Exception:
        if jax.process_index() == 0:
            forget_unless_begun(workdir)
        raise


def _local_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder itself; of a bucket one on this machine, which names the bucket."""
    from paxo.training.checkpoint import BUCKET

    if "://" not in str(workdir):
        return pathlib.Path(workdir)
    address = str(workdir).rstrip("/")
    folder = pathlib.Path("runs", address.rpartition("/")[2])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUCKET).write_text(address + "\n")
    return folder


def inspect_file(file: str | pathlib.Path, overrides: Sequence[str], num: int) -> None:
    """`paxo inspect`: prints records as the model will see them, and figures about the set."""
    from paxo import runs

    module = load(file)
    runs.inspect(settings_of(module, overrides), num, getattr(module, "records", None))


def export_run(
    workdir: str | pathlib.Path, step: int | None, out: str | pathlib.Path | None
) -> None:
    """`paxo export`: writes a checkpoint of a run as a Hugging Face folder."""
    from paxo import artifacts

    folder = pathlib.Path(out) if out else pathlib.Path(workdir, "export")
    artifacts.export_checkpoint(pathlib.Path(workdir), step, folder)


def sample_run(
    source: str | pathlib.Path,
    *,
    prompts: Sequence[str],
    num: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """`paxo sample`: prints completions of a run's last checkpoint or of a model folder."""
    from paxo import artifacts

    artifacts.print_samples(
        source, prompts, num=num, max_tokens=max_tokens, temperature=temperature, seed=seed
    )


def plan_file(
    file: str | pathlib.Path,
    overrides: Sequence[str],
    *,
    topology: str,
    model: str | None,
    compiled: int,
    out: str | pathlib.Path | None,
) -> None:
    """`paxo plan`: prints and saves what a run needs and takes on a topology."""
    from paxo.plan import page, planning

    settings = settings_of(load(file), overrides)
    made = planning.plan(settings, topology, model=model, compiled=compiled)
    name = made["topology"]["name"].replace(":", "-")
    folder = pathlib.Path(out or pathlib.Path("runs", pathlib.Path(file).stem, f"plan-{name}"))
    page.write_plan(made, folder)
    page.print_plan(made)


def _runner(module: ModuleType) -> Callable[[Experiment, pathlib.Path], Any]:
    if hasattr(module, "run"):
        return module.run
    from paxo import runs

    return runs.run
