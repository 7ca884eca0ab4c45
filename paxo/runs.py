"""The default run: load, score the reference, train, evaluate, export. Here everything meets.

`train` alone is one training run; experiments with several (SFT, then DPO) call it for each.
"""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from paxo import artifacts
from paxo.data import inspect as inspect_lib
from paxo.data.batching import Batches, DataState
from paxo.data.packing import group_sizes, packing_overhead
from paxo.data.sources import load_records, open_source
from paxo.data.tokenise import load_tokenizer, tokenise
from paxo.data.unpaired import Mismatched
from paxo.evaluation.estimates import Estimate
from paxo.evaluation.heldout import nll_per_token, reward_accuracy, sign_accuracy
from paxo.evaluation.report import print_table, write_results
from paxo.experiment import Experiment, ReferenceSettings, TrainSettings
from paxo.loading import (
    Model,
    batches,
    heldout_batches,
    load_data,
    load_model,
    mismatch_of,
    row_shape,
    token_limits,
)
from paxo.logp_store import LogpStore
from paxo.models.heads import HEADS
from paxo.models.pretrained import read_config, resolve_model
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import HIDDEN_ROLE, Objective
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


def run(settings: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """One training run on preferences, with held-out accuracy before and after, and an export.

    Returns:
        What `results.json` holds.
    """
    start = time.perf_counter()
    mesh = _mesh(settings)
    if settings.data.path is not None:
        open_source(settings.data.path)  # a wrong path shall not cost the loading of a model first
    # Of the arrays that the objective may do without, only those that the settings ask for.
    needed = [name for name in HEADS if settings.objective.arrays.get(name, False)]
    heads = [*needed, *settings.model.heads]
    model = load_model(settings.model, mesh, settings.train.seed, heads)
    data = load_data(settings.data, model, settings.objective)
    check_candidates(settings.objective, data.shape.candidates)
    artifacts.save_model_card(
        workdir, model.config, model.tokenizer, model.folder, data.heldout or data.groups
    )
    first = snapshot(model.params)
    scorers = _scorers(settings, model, first, mesh, workdir)
    attach = functools.partial(_attached, settings.objective, scorers) if scorers else None
    # Rewards are read from sums alone.
    attach_sums = functools.partial(_attached, None, scorers)

    pairs = any(len(group.labels) > 1 for group in data.heldout)
    signs = settings.objective.unpaired and not pairs
    figure = "heldout_accuracy" if pairs or signs else "heldout_nll"

    def measure(params: Params) -> Estimate | None:
        if not data.heldout:
            return None
        scorer = make_scorer(model.policy, params, mesh=mesh)
        rows = heldout_batches(data, settings.train.rows_per_batch)
        if not pairs and not signs:
            return nll_per_token(scorer, rows)
        accuracy = sign_accuracy if signs else reward_accuracy
        return accuracy(
            scorer,
            map(attach_sums, rows),
            scale=settings.objective.reward_scale,
            per_token=settings.objective.reward_per_token,
        )

    measured: dict[int, Estimate | None] = {}

    def evaluate(state: TrainState) -> dict[str, float]:
        found = measured[int(state.step)] = measure(state.params)
        name = "eval/loss" if figure == "heldout_nll" else "eval/rewards/accuracies"
        return {} if found is None else {name: found.value}

    before = measure(first)
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
        evaluate=evaluate,
        frozen=_frozen(settings.objective, scorers),
    )
    if int(state.step) not in measured:  # a finished run was started again
        evaluate(state)
    after = measured[int(state.step)]
    results: dict[str, Any] = {"num_steps": settings.train.num_steps}
    if before is not None and after is not None:
        results |= {
            figure: {"before": before.value, "after": after.value},
            f"{figure}_interval": {
                "before": [before.low, before.high],
                "after": [after.low, after.high],
            },
            f"heldout_{'pairs' if pairs else 'examples'}": after.count,
        }
    if settings.export:
        artifacts.export_model(
            state.params, model.config, workdir / "export", model.tokenizer, model.folder
        )
    results["seconds"] = time.perf_counter() - start
    if jax.process_index() == 0:
        write_results(workdir / "results.json", results)
        if before is not None and after is not None:
            _print_heldout(figure, before, after)
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
    frozen: Params | None = None,
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
        frozen: parameters that take part but are not trained; copied too.

    Returns:
        The state after the last step.
    """
    transformation = optimizer.build(settings.num_steps)
    make = functools.partial(init_state, objective=objective, optimizer=transformation)
    key = jax.random.key(settings.seed)
    frozen = {} if frozen is None else frozen
    begin = lambda params, key, frozen: make(params, key=key, frozen=frozen)  # noqa: E731
    abstract = jax.eval_shape(begin, params, key, frozen)
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
            state = jax.jit(begin, out_shardings=shardings)(snapshot(params), key, snapshot(frozen))
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


def check_candidates(objective: Objective, candidates: int) -> None:
    """Refuses data whose groups a loss cannot take, before anything is computed.

    Raises:
        SettingsError: for a loss of pairs on demonstrations, say; it tells what the loss says.
    """
    one = jax.ShapeDtypeStruct((1, candidates), jax.numpy.float32)
    for term in objective.terms:
        names = [name for name, required in term.arrays.items() if required]
        summed = all(name.endswith(("_logps", "lengths", "labels")) for name in names)
        if not summed or any("token" in name for name in names):
            continue  # its other arrays have shapes that only a batch tells
        given = dict.fromkeys(names, one) | {"where": one.update(dtype=bool)}
        try:
            jax.eval_shape(lambda arrays, term=term: term(arrays)[0], given)
        except AssertionError as error:
            raise SettingsError(
                f"objective {term.name!r} does not take groups of {candidates} candidates, as "
                f"data.path holds ({' '.join(str(error).split())}); a pair has the columns prompt, "
                "chosen and rejected, and `paxo methods` tells what each objective compares"
            ) from error


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
    mismatch = mismatch_of(settings.objective, settings.data, config)
    shape = row_shape(tokenised.groups, settings.data, config, mismatch)
    sizes = group_sizes(tokenised.groups)
    if mismatch is not None:
        sizes = sizes.plus(Mismatched(tokenised.groups, mismatch, seed=0).epoch(0).added)
    overhead = packing_overhead(sizes, shape, settings.data.window)
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
            f"{ways} ways in which the mesh splits rows times "
            f"train.microbatches={settings.train.microbatches}"
        )
    return mesh


def _scorers(
    settings: Experiment, model: Model, first: Params, mesh: Mesh, workdir: pathlib.Path
) -> dict[str, FixedScorer | StoredScorer]:
    """Role -> the scorer of its frozen policy, for all roles that are attached to batches."""
    objective = settings.objective
    given = {"reference": settings.reference, "previous": settings.previous}
    unknown = sorted(set(objective.frozen_roles) - set(given))
    if unknown:
        raise SettingsError(
            f"objective {objective.name!r} needs the roles {unknown}, but settings give "
            f"{', '.join(given)} only: a file with such policies defines run(settings, workdir) "
            "and attaches them itself"
        )
    asked = {role for role in objective.optional_roles if role in given and given[role].attach}
    for role in sorted({*objective.optional_roles} - asked):
        logger.info(
            "objective %r goes without role %r, which is optional; %s.attach=True gives it",
            objective.name,
            role,
            role,
        )
    made: dict[tuple, FixedScorer | StoredScorer] = {}
    scorers = {}
    for role, chosen in given.items():
        if role not in objective.frozen_roles and role not in asked:
            continue
        same = chosen.path, chosen.store
        if role == "previous" and chosen.path is None:
            logger.info("role 'previous' is the policy that training starts from")
        if same not in made:
            if chosen.store in {store for _, store in made} - {None, "off"}:
                raise SettingsError(
                    f"{role}.store={chosen.store} is that of another policy, but a store is "
                    "written by one: name another folder"
                )
            # A store is written by one scorer: those of other policies have folders of their own.
            folder = workdir / "logps" / ("" if not made else role)
            made[same] = _scorer(settings, chosen, model, first, mesh, folder)
        scorers[role] = made[same]
    return scorers


def _scorer(
    settings: Experiment,
    chosen: ReferenceSettings,
    model: Model,
    first: Params,
    mesh: Mesh,
    folder: pathlib.Path,
) -> FixedScorer | StoredScorer:
    """The scorer of one frozen policy, with its log-probs kept in `folder` or another."""
    if chosen.path is not None:
        other = load_model(dataclasses.replace(settings.model, path=chosen.path), mesh)
        scorer = make_scorer(other.policy, other.params, mesh=mesh)
        config = other.config
    else:
        scorer, config = make_scorer(model.policy, first, mesh=mesh), model.config
    if chosen.store == "off":
        return scorer
    # All that the values depend on besides the token ids.
    fingerprint = (
        f"{scorer.fingerprint()} {model.tokenizer.fingerprint()} {config.compute_dtype} {config}"
    )
    store = LogpStore(chosen.store or folder, fingerprint, process=jax.process_index())
    return StoredScorer(scorer, store)


def _attached(
    objective: Objective | None, scorers: dict[str, Any], batch: PreferenceBatch
) -> PreferenceBatch:
    """The batch with what the objective reads of each role; with None only the sums."""
    for role, scorer in scorers.items():
        tokens = objective is not None and objective.reads_tokens(role)
        hidden = objective is not None and objective.reads_hidden(role)
        batch = attach_logps(batch, role, scorer, tokens=tokens, hidden=hidden)
    return batch


def _frozen(objective: Objective, scorers: dict[str, Any]) -> Params:
    """What the step keeps of frozen policies: the head that makes distributions of hidden states.

    The hidden states themselves are a thousand times larger than log-probs and stored nowhere: the
    frozen policy's trunk runs in every step.
    """
    if not objective.reads_hidden(HIDDEN_ROLE) or HIDDEN_ROLE not in scorers:
        return {}
    scorer = scorers[HIDDEN_ROLE]
    fixed = scorer.scorer if isinstance(scorer, StoredScorer) else scorer
    return {"reference_head": fixed.policy.unembed(fixed.params)}


def _print_heldout(figure: str, before: Estimate, after: Estimate) -> None:
    title, column = {
        "heldout_accuracy": ("held-out reward accuracy", "pairs"),
        "heldout_nll": ("held-out negative log-likelihood (nats per token)", "examples"),
    }[figure]
    rows = [
        (name, e.value, f"[{e.low:.3f}, {e.high:.3f}]", str(e.count))
        for name, e in (("before", before), ("after", after))
    ]
    print_table(title, ("", "mean", "95 % interval", column), rows)
