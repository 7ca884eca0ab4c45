"""The default run: load, score the reference, train, evaluate, export. Here everything meets.

`train` alone is one training run; experiments with several (SFT, then DPO) call it for each.
"""

import dataclasses
import functools
import hashlib
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from paxo import artifacts
from paxo.data import inspect as inspect_lib
from paxo.data.batching import Batches, DataState, epoch_batches
from paxo.data.packing import choose_shape, group_sizes, packing_overhead
from paxo.data.records import Record, TokenGroup
from paxo.data.row_shape import RowShape
from paxo.data.sources import load_records
from paxo.data.tokenise import TextTokenizer, TokenisedSet, load_tokenizer, tokenise
from paxo.evaluation.estimates import Estimate
from paxo.evaluation.heldout import reward_accuracy
from paxo.evaluation.report import print_table, write_results
from paxo.experiment import DataSettings, Experiment, ModelSettings, TrainSettings
from paxo.logp_store import LogpStore
from paxo.models.config import ModelConfig
from paxo.models.policy import make_policy, param_shapes
from paxo.models.pretrained import load_params, read_config, resolve_model
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import Objective
from paxo.overrides import SettingsError
from paxo.scoring import FixedScorer, StoredScorer, attach_logps, make_scorer
from paxo.training.checkpoint import Checkpointer
from paxo.training.loop import fit
from paxo.training.optimizers import AdamW
from paxo.training.state import TrainState, init_state, snapshot, state_shardings
from paxo.training.step import compile_step, make_train_step, place_rows
from paxo.training.writers import make_writer
from paxo.types import Params, Policy, PreferenceBatch

logger = logging.getLogger(__name__)

Attach = Callable[[PreferenceBatch], PreferenceBatch]


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy with its first parameters on a mesh, and what they were made from.

    Attributes:
        policy: the model.
        config: its shape.
        params: its parameters.
        tokenizer: its tokenizer.
        folder: where weights or tokenizer came from, for the export.
    """

    policy: Policy
    config: ModelConfig
    params: Params
    tokenizer: TextTokenizer
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenised groups, those held out, and the shape of the rows they are packed in."""

    groups: Sequence[TokenGroup]
    heldout: Sequence[TokenGroup]
    shape: RowShape


def run(settings: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """One training run on preferences, with held-out accuracy before and after, and an export.

    Returns:
        What `results.json` holds.
    """
    start = time.perf_counter()
    mesh = _mesh(settings)
    model = load_model(settings.model, mesh, settings.train.seed)
    data = load_data(settings.data, model)
    artifacts.save_model_card(
        workdir, model.config, model.tokenizer, model.folder, data.heldout or data.groups
    )
    first = snapshot(model.params)
    reference = (
        _reference(settings, model, first, mesh, workdir) if settings.objective.roles else None
    )
    attach = functools.partial(_attached, settings.objective, reference) if reference else None

    def evaluate_params(params: Params) -> Estimate:
        batches = heldout_batches(data, settings.train.rows_per_batch)
        scorer = make_scorer(model.policy, params, mesh=mesh)
        return reward_accuracy(
            scorer, map(attach or (lambda b: b), batches), **_reward(settings.objective)
        )

    measured = any(len(group.labels) > 1 for group in data.heldout)
    before = evaluate_params(first) if measured else None
    state = train(
        model.policy,
        model.params,
        settings.objective,
        settings.optimizer,
        batches(data, settings.data, settings.train),
        settings.train,
        mesh,
        workdir,
        attach=attach,
        evaluate=lambda state: _metrics(evaluate_params(state.params)) if measured else {},
    )
    after = evaluate_params(state.params) if measured else None
    results: dict[str, Any] = {"num_steps": settings.train.num_steps}
    if before is not None and after is not None:
        results |= {
            "heldout_accuracy": {"before": before.value, "after": after.value},
            "heldout_accuracy_interval": {
                "before": [before.low, before.high],
                "after": [after.low, after.high],
            },
            "heldout_pairs": after.count,
        }
    if settings.export:
        artifacts.export_model(
            state.params, model.config, workdir / "export", model.tokenizer, model.folder
        )
    results["seconds"] = time.perf_counter() - start
    if jax.process_index() == 0:
        write_results(workdir / "results.json", results)
        rows = [("before", before), ("after", after)] if before else []
        table = [(name, e.value, f"[{e.low:.3f}, {e.high:.3f}]", str(e.count)) for name, e in rows]
        if table:
            print_table(
                "held-out reward accuracy", ("", "accuracy", "95 % interval", "pairs"), table
            )
        logger.info("finished in %.0f s; results in %s", results["seconds"], workdir)
    return results


def train(
    policy: Policy,
    params: Params,
    objective: Objective,
    optimizer: AdamW,
    batches: Batches,
    settings: TrainSettings,
    mesh: Mesh,
    workdir: pathlib.Path,
    *,
    attach: Attach | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    name: str = "train",
) -> TrainState:
    """One training run from `params`, or from the newest checkpoint in `workdir`.

    Args:
        policy: the model.
        params: first parameters; they are copied, not used up.
        objective: what is minimised.
        optimizer: settings, built for `settings.num_steps`.
        batches: rows of host arrays, at their beginning.
        settings: steps, rows, seeds, intervals.
        mesh: devices.
        workdir: folder of checkpoints and metrics.
        attach: adds log-probs of frozen policies to a batch.
        evaluate: measures a state.
        name: what the progress bar says.

    Returns:
        The state after the last step.
    """
    transformation = optimizer.build(settings.num_steps)
    make = functools.partial(init_state, objective=objective, optimizer=transformation)
    key = jax.random.key(settings.seed)
    abstract = jax.eval_shape(lambda p, k: make(p, key=k), params, key)
    placed = param_shardings(policy.logical_axes, abstract.params, mesh)
    shardings = state_shardings(abstract, placed, transformation)
    body = make_train_step(policy, objective, transformation, microbatches=settings.microbatches)
    with Checkpointer(
        workdir / "checkpoints",
        every=settings.checkpoint_every,
        keep=settings.keep,
        best_metric=settings.best_metric,
    ) as checkpointer:
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        restored = checkpointer.restore_latest(wanted)
        if restored is None:
            state = jax.jit(lambda p, k: make(p, key=k), out_shardings=shardings)(
                snapshot(params), key
            )
        else:
            state, position, _ = restored
            batches.restore(DataState.from_dict(position))
        writer = make_writer(workdir, settings.num_steps, int(state.step), name)
        try:
            return fit(
                compile_step(body, mesh, shardings),
                state,
                batches,
                num_steps=settings.num_steps,
                place=functools.partial(place_rows, mesh=mesh),
                attach=attach,
                writer=writer,
                checkpointer=checkpointer,
                evaluate=evaluate,
                evaluate_every=settings.evaluate_every,
                log_every=settings.log_every,
            )
        finally:
            writer.close()
            batches.close()


def load_model(settings: ModelSettings, mesh: Mesh, seed: int = 0) -> Model:
    """A pretrained model from its folder, or one from scratch, on a mesh.

    Raises:
        SettingsError: if the settings name neither, or no tokenizer.
    """
    changes = {n: getattr(settings, n) for n in ("param_dtype", "compute_dtype", "remat", "unroll")}
    if settings.path is None and settings.config is None:
        raise SettingsError(
            "model.path is not set: name a folder or a hub model, --set model.path=..."
        )
    source = settings.tokenizer or settings.path
    if source is None:
        raise SettingsError("model.tokenizer is not set: a model from scratch needs one")
    folder = resolve_model(source)
    tokenizer = load_tokenizer(folder, chat_template=settings.chat_template)
    if settings.path is not None:
        weights = resolve_model(settings.path)
        config = dataclasses.replace(read_config(weights), **changes)
        policy = make_policy(config)
        placed = param_shardings(policy.logical_axes, param_shapes(config), mesh)
        params = load_params(weights, config, dtype=settings.param_dtype, shardings=placed)
    else:
        config = dataclasses.replace(settings.config, **changes)
        policy = make_policy(config)
        params = init_params(policy, config, mesh, jax.random.key(seed))
    return Model(policy, config, params, tokenizer, folder)


def init_params(policy: Policy, config: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Random parameters, made where they will lie."""
    placed = param_shardings(policy.logical_axes, param_shapes(config), mesh)
    return jax.jit(policy.init, out_shardings=placed)(key)


def load_data(settings: DataSettings, model: Model) -> Data:
    """Reads, tokenises and splits the records, and chooses the shape of the rows."""
    _, tokenised = read_data(settings, model.tokenizer, model.config)
    groups = tokenised.groups
    if settings.heldout_path is not None:
        other = dataclasses.replace(settings, path=settings.heldout_path)
        heldout = read_data(other, model.tokenizer, model.config)[1].groups
    else:
        heldout = [g for g in groups if _share(g) < settings.heldout]
        groups = [g for g in groups if _share(g) >= settings.heldout]
    if not groups:
        raise SettingsError(f"data.heldout={settings.heldout} leaves no record to train on")
    return Data(groups, heldout, row_shape([*groups, *heldout], settings, model.config))


def read_data(
    settings: DataSettings, tokenizer: TextTokenizer, config: ModelConfig
) -> tuple[list[Record], TokenisedSet]:
    """Records of `settings.path` and their tokens, within the model's positions and vocabulary."""
    if settings.path is None:
        raise SettingsError("data.path is not set: name a data set, --set data.path=...")
    records, _ = load_records(
        settings.path,
        on_error=settings.on_error,
        extras=settings.extras,
        limit=settings.max_records,
    )
    return records, tokenise(
        records, tokenizer, token_limits(settings, config), on_error=settings.on_error
    )


def token_limits(settings: DataSettings, config: ModelConfig):
    """The limits of the settings, no longer than the model's positions and a given row."""
    limits = settings.limits
    longest = min(limits.max_sequence or config.max_positions, config.max_positions)
    group = limits.max_group if settings.row_length is None else settings.row_length
    return dataclasses.replace(
        limits, max_sequence=longest, max_group=group, vocab_size=config.vocab_size
    )


def row_shape(
    groups: Sequence[TokenGroup], settings: DataSettings, config: ModelConfig
) -> RowShape:
    """The shape of the rows for these groups, logged with the share of padding it costs."""
    shape = choose_shape(
        groups,
        row_length=settings.row_length,
        slots=settings.slots,
        window=settings.window,
        width=config.hidden_size,
    )
    found = packing_overhead(group_sizes(groups), shape, settings.window)
    logger.info(
        "rows of %d tokens with %d scored: %d groups need %.2f times their tokens, %.2f times "
        "their scored tokens",
        shape.length, shape.slots, len(groups), found.positions, found.slots,
    )  # fmt: skip
    return shape


def batches(data: Data, settings: DataSettings, train_settings: TrainSettings) -> Batches:
    """The endless batches of a run, this process's rows of them."""
    return Batches(
        data.groups,
        data.shape,
        train_settings.rows_per_batch,
        seed=train_settings.seed,
        shuffle=settings.shuffle,
        window=settings.window,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def heldout_batches(data: Data, rows_per_batch: int) -> Iterator[PreferenceBatch]:
    """The held-out groups once, in batches of host arrays."""
    here = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return (batch for batch, _ in epoch_batches(data.heldout, data.shape, rows_per_batch, **here))


def inspect(settings: Experiment, num: int, records: Callable[[Experiment], Any] | None) -> None:
    """Prints `num` records with their masks, and figures about the whole set.

    Args:
        settings: of the experiment; its model's tokenizer and data are read, its weights are not.
        num: records to print.
        records: `(settings) -> (records, tokenizer)` of a file that makes its data itself.
    """
    config = settings.model.config
    if records is not None:
        read, tokenizer = records(settings)
        skipped: dict[str, int] = {}
    else:
        if settings.data.path is None:
            raise SettingsError("data.path is not set: name a data set, --set data.path=...")
        source = settings.model.tokenizer or settings.model.path
        if source is None:
            raise SettingsError("model.path is not set: name a model, --set model.path=...")
        tokenizer = load_tokenizer(
            resolve_model(source), chat_template=settings.model.chat_template
        )
        if settings.model.path is not None:
            config = read_config(resolve_model(settings.model.path))
        read, skipped = load_records(
            settings.data.path,
            on_error="skip",
            extras=settings.data.extras,
            limit=settings.data.max_records,
        )
    tokenised = tokenise(read, tokenizer, token_limits(settings.data, config), on_error="skip")
    shape = row_shape(tokenised.groups, settings.data, config)
    overhead = packing_overhead(group_sizes(tokenised.groups), shape, settings.data.window)
    report = inspect_lib.inspect(
        read, tokenised, tokenizer, skipped=skipped, padding_share=1 - 1 / overhead.positions
    )
    inspect_lib.print_report(report, tokenised.groups[:num], tokenizer)


def _mesh(settings: Experiment) -> Mesh:
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.train.rows_per_batch % (ways * settings.train.microbatches):
        raise SettingsError(
            f"train.rows_per_batch={settings.train.rows_per_batch} must be a multiple of the "
            f"{ways} ways in which the mesh splits rows times microbatches={settings.train.microbatches}"
        )
    return mesh


def _reference(
    settings: Experiment, model: Model, first: Params, mesh: Mesh, workdir: pathlib.Path
) -> FixedScorer | StoredScorer:
    """The scorer of the role "reference"."""
    unknown = set(settings.objective.roles) - {"reference"}
    if unknown:
        raise SettingsError(
            f"objective {settings.objective.name!r} needs the roles {sorted(unknown)}: a file with "
            "such policies defines run(settings, workdir) and attaches them itself"
        )
    if settings.reference.path is not None:
        other = dataclasses.replace(settings.model, path=settings.reference.path)
        reference = load_model(other, mesh)
        scorer = make_scorer(reference.policy, reference.params, mesh=mesh)
        config = reference.config
    else:
        scorer, config = make_scorer(model.policy, first, mesh=mesh), model.config
    if settings.reference.store == "none":
        return scorer
    # All that the values depend on besides the token ids.
    fingerprint = (
        f"{scorer.fingerprint()} {model.tokenizer.fingerprint()} {config.compute_dtype} {config}"
    )
    folder = settings.reference.store or workdir / "logps"
    return StoredScorer(scorer, LogpStore(folder, fingerprint, process=jax.process_index()))


def _attached(objective: Objective, scorer: Any, batch: PreferenceBatch) -> PreferenceBatch:
    return attach_logps(batch, "reference", scorer, tokens="reference" in objective.token_roles)


def _reward(objective: Objective) -> dict[str, Any]:
    return {"scale": objective.reward_scale, "per_token": objective.reward_per_token}


def _metrics(accuracy: Estimate) -> dict[str, float]:
    return {"eval/rewards/accuracies": accuracy.value}


def _share(group: TokenGroup) -> float:
    """A number in [0, 1) that follows from the prompt alone."""
    digest = hashlib.blake2b(group.prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
