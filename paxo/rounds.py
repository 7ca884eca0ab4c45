"""A self-play run from settings: prompts, model, judges, rounds, evaluation, plots, export.

An experiment file gives the settings and says who judges:

    def experiment(): return SelfPlay(method=paxo.online.method("egpo"), ...)
    def run(settings, workdir): rounds.run(settings, workdir, judges=lambda model: Judges(...))
"""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paxo import artifacts
from paxo.data.packing import pack_groups, pad_rows
from paxo.data.records import TokenGroup
from paxo.data.row_shape import RowShape
from paxo.evaluation.report import print_table, write_results
from paxo.evaluation.self_play import PANELS, plot_rounds
from paxo.experiment import MeshSettings, ModelSettings
from paxo.judges.checks import CheckedJudge
from paxo.loading import Model, load_model
from paxo.models.heads import HEADS
from paxo.models.sharding import make_mesh, param_shardings
from paxo.online import Drawer, Group, Method, PlayResult, Prompt, RoundError, RoundSettings, play
from paxo.online.collect import Judges
from paxo.online.drawing import padded_size
from paxo.overrides import SettingsError
from paxo.prompts import PromptSettings, read_prompts
from paxo.round_evaluation import EvaluationSettings, Evaluator, evaluations
from paxo.sampling import SamplingConfig
from paxo.scoring import params_fingerprint
from paxo.training.checkpoint import Checkpointer, checkpoint_folder
from paxo.training.optimizers import AdamW
from paxo.training.writers import make_writer
from paxo.types import Params, PreferenceBatch

logger = logging.getLogger(__name__)

FEWEST_ROWS = 4  # numbers of rows are multiples of it: each number compiles a step
GROUP_FIELDS = tuple(field.name for field in dataclasses.fields(Group))


@dataclasses.dataclass(frozen=True)
class SelfPlay:
    """All settings of a self-play run.

    Attributes:
        method: a row of `paxo.online.METHODS`.
        optimizer: from `paxo.adamw`, built for all steps of the run.
        model: the policy that is trained, and the first reference.
        rounds: how many rounds, of what.
        sampling: how completions are drawn; `num_candidates` is the method's business.
        prompts: what is answered.
        evaluation: what is measured.
        allow_unfinished: whether completions that the length limit cut are trained on.
        sample_batch: prompts drawn for at a time.
        row_length: L, tokens of a packed row; None takes 512, or more where a group needs it.
        microbatches: parts in which a step's rows are run.
        log_every: steps between lines of metrics of single steps; 0 for none.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that are kept.
        mesh: devices.
        export: whether `<workdir>/export` is written at the end.
    """

    method: Method
    optimizer: AdamW
    model: ModelSettings
    rounds: RoundSettings
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(64))
    prompts: PromptSettings = dataclasses.field(default_factory=PromptSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    allow_unfinished: bool = True
    sample_batch: int = 64
    row_length: int | None = None
    microbatches: int = 1
    log_every: int = 0
    checkpoint_every: int = 20
    keep: int = 2
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    export: bool = True

    def __post_init__(self):
        if self.microbatches < 1 or self.checkpoint_every < 1 or self.keep < 1:
            raise ValueError(
                "microbatches, checkpoint_every and keep must be at least 1; got "
                f"{self.microbatches}, {self.checkpoint_every}, {self.keep}"
            )


def run(
    settings: SelfPlay,
    workdir: pathlib.Path,
    *,
    judges: Callable[[Model], Judges],
    model: Model | None = None,
    prompts: Sequence[Prompt] | None = None,
    frozen: Mapping[str, Params] | None = None,
    figures: Callable[[Sequence[Sequence[Any]]], Mapping[str, float]] | None = None,
    panels: Mapping[str, str] | None = None,
    exact: Mapping[str, float] | None = None,
) -> PlayResult:
    """One self-play run: rounds, evaluation, `rounds.png`, `results.json`, an export.

    Args:
        settings: all of them.
        workdir: the run folder; the same again goes on with what is there.
        judges: `(model) -> Judges`; answers of its judge are checked here.
        model: the first policy, where it is not loaded from the settings.
        prompts: to train on and, the last ones, to evaluate on; read from `prompts.path` otherwise.
        frozen: role -> further frozen policies.
        figures: `(completions as judges see them [B][E]) -> figures` of an evaluation, besides the
            usual ones.
        panels: further figure -> title for the plot.
        exact: figure -> value to be reached, for the plot.

    Returns:
        The state after the last round, the anchors, and the evaluations.

    Raises:
        RoundError: a round could not be judged or paired. Plot and results tell what was before it,
            and the run goes on from there when started again.
    """
    report = functools.partial(
        _report, settings, workdir, time.perf_counter(), panels or {}, exact or {}
    )
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    if model is None:
        needed = [n for n in HEADS if settings.method.objective.arrays.get(n, False)]
        model = load_model(settings.model, mesh, settings.rounds.seed, needed)
    if prompts is None:
        prompts = read_prompts(settings.prompts, model.tokenizer)
    count = settings.evaluation.num_prompts
    if len(prompts) <= count:
        raise SettingsError(
            f"evaluation.num_prompts={count} leaves none of {len(prompts)} prompts to train on"
        )
    train, held_out = prompts[: len(prompts) - count], prompts[len(prompts) - count :]
    told = judges(model)
    if told.judge is not None and not isinstance(told.judge, CheckedJudge):
        told = dataclasses.replace(told, judge=CheckedJudge(told.judge, missing="keep"))
    told = dataclasses.replace(told, allow_unfinished=settings.allow_unfinished)
    drawer = Drawer(
        model.policy,
        settings.sampling,
        model.tokenizer.stop_ids,
        mesh=mesh,
        batch_size=settings.sample_batch,
    )
    pack = make_pack(settings, prompts, mesh)
    groups = [_plain_group(p) for p in (held_out or train)[:4]]
    artifacts.save_model_card(
        workdir,
        model.config,
        model.tokenizer,
        model.folder,
        groups,
        lora=model.lora,
        base=settings.model.path or "",
    )
    first, (_, base) = model.params, model.policy.split(model.params)
    evaluate = None
    if held_out:
        drawer.check(held_out)
        evaluate = Evaluator(
            settings, held_out, drawer, told, make_pack(settings, held_out, mesh, 1), mesh, first,
            figures,
        )  # fmt: skip
    steps = settings.rounds.num_rounds * settings.rounds.steps_per_round(settings.method)
    with Checkpointer(
        checkpoint_folder(workdir),
        every=settings.checkpoint_every,
        keep=settings.keep,
        frozen={name: params_fingerprint(x) for name, x in base.items()},
    ) as checkpointer:
        try:
            result = play(
                model.policy,
                first,
                settings.method,
                settings.optimizer,
                train,
                settings.rounds,
                draw=drawer,
                judges=told,
                pack=pack,
                mesh=mesh,
                param_shardings=param_shardings(model.policy.logical_axes, first, mesh),
                workdir=workdir,
                microbatches=settings.microbatches,
                frozen=frozen,
                evaluate=evaluate,
                checkpointer=checkpointer,
                make_writer=lambda step, number: make_writer(
                    workdir, steps, step, settings.method.name, resume_round=number
                ),
                log_every=settings.log_every,
            )
        except RoundError:
            if evaluations(workdir):
                report()
            raise
    if settings.export:
        artifacts.export_model(
            model.policy.join(result.state.params, result.state.frozen),
            model.config,
            workdir / "export",
            model.tokenizer,
            model.folder,
            lora=model.lora,
        )
    report()
    return result


def make_pack(
    settings: SelfPlay, prompts: Sequence[Prompt], mesh: jax.sharding.Mesh, size: int | None = None
) -> Callable[[Sequence[Group]], Any]:
    """`groups -> PreferenceBatch`, in rows of one shape and few different numbers.

    The shape follows from the settings and prompts alone, so that a run that is resumed packs the
    same.

    Args:
        settings: the method's number of candidates, the longest completion, the row length.
        prompts: all that groups will be made of.
        mesh: the number of rows is a multiple of the ways in which it splits them.
        size: candidates of a group; the method's where None.
    """
    data = settings.method.uses("data") or settings.method.reset > 0
    answers = [len(c) for p in prompts for c in p.completions] if data else []
    longest = max([settings.sampling.max_new_tokens, *answers])
    prompt = [
        len(p.ids) + (max(answers, default=0) if settings.method.reset else 0) for p in prompts
    ]
    shape = row_shape(
        settings.row_length,
        settings.method.group_size if size is None else size,
        prompt=max(prompt),
        usual_prompt=int(np.median(prompt)),
        completion=longest,
    )
    multiple = row_multiple(mesh.shape["data"] * mesh.shape["fsdp"], settings.microbatches)

    def pack(groups: Sequence[Group]):
        batch = packed(groups, shape)
        return pad_rows(batch, padded_size(len(batch.tokens), multiple))

    return pack


def packed(groups: Sequence[Group], shape: RowShape) -> PreferenceBatch:
    """Groups in as few rows of a shape as they take."""
    fields = [TokenGroup(**{k: getattr(g, k) for k in GROUP_FIELDS}) for g in groups]
    return pack_groups(fields, shape)[0]


def row_shape(
    row_length: int | None, size: int, *, prompt: int, usual_prompt: int, completion: int
) -> RowShape:
    """The sizes of a row that holds groups of so many candidates.

    Args:
        row_length: L, as set; None takes 512, or more where a group needs it.
        size: candidates of a group.
        prompt: tokens of the longest one.
        usual_prompt: tokens of the median one.
        completion: tokens of the longest one.

    Raises:
        SettingsError: if a group of one or two candidates may be longer than the row.

    >>> row_shape(None, 2, prompt=40, usual_prompt=20, completion=24).length
    512
    """
    needed = prompt + size * completion
    length = row_length or max(512, needed)
    if length < needed and size <= 2:
        raise SettingsError(
            f"row_length={length} is shorter than a group may be: {prompt} prompt tokens and "
            f"{size} completions of {completion} tokens; raise it to {needed}"
        )
    share = size * completion / (size * completion + usual_prompt)
    return RowShape(
        length=length,
        slots=min(length, -(-int(length * share) // 8) * 8),
        groups=max(1, length // (usual_prompt + size * max(completion // 4, 1))),
        candidates=size,
        max_completion=completion,
    )


def row_multiple(ways: int, microbatches: int) -> int:
    """What the number of a step's rows is a multiple of, where a mesh splits them in `ways`.

    >>> row_multiple(1, 1), row_multiple(3, 1), row_multiple(8, 2)
    (4, 6, 16)
    """
    multiple = ways * microbatches
    return multiple * -(-FEWEST_ROWS // multiple)


def _plain_group(prompt: Prompt) -> TokenGroup:
    return TokenGroup(prompt.ids, (), (), (), {}, prompt.index, f"prompt {prompt.index}")


def _report(settings, workdir, start, panels, exact) -> None:
    """`results.json`, `rounds.png`, a table, of the rounds so far."""
    if jax.process_index() != 0:
        return
    history, seconds = evaluations(workdir), time.perf_counter() - start
    results = {
        "method": settings.method.name,
        "num_rounds": settings.rounds.num_rounds,
        "last": history[-1] if history else {},
        "history": history,
        "exact": dict(exact),
        "seconds": seconds,
    }
    write_results(workdir / "results.json", results)
    if history:
        title = f"{settings.method.name} after {history[-1]['round']} rounds"
        plot_rounds(
            workdir / "rounds.png", history, panels=PANELS | panels, exact=exact, title=title
        )
        rows = [
            (told, row[name], _interval(row, name))
            for row in history[-1:]
            for name, told in (PANELS | panels).items()
            if name in row
        ]
        print_table(title, ("", "mean", "95 % interval"), rows)
    logger.info("results of these %.0f s are in %s", seconds, workdir)


def _interval(row: Mapping[str, float], name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None else f"[{low:.3f}, {high:.3f}]"
