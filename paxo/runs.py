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
from paxo.experiment import Experiment, TrainSettings
from paxo.frozen import attached, frozen_params, frozen_scorers, frozen_shardings
from paxo.loading import (
    batches,
    heldout_batches,
    load_data,
    load_model,
    mismatch_of,
    row_shape,
    token_limits,
)
from paxo.models.heads import HEADS
from paxo.models.pretrained import read_config, resolve_model
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import Objective
from paxo.overrides import SettingsError
from paxo.reward_scoring import HeadScorer, save_heads
from paxo.rows import place_rows
from paxo.scoring import make_scorer, params_fingerprint
from paxo.training.checkpoint import Checkpointer, checkpoint_folder
from paxo.training.loop import fit
from paxo.training.optimizers import AdamW
from paxo.training.state import TrainState, init_state, snapshot, state_shardings
from paxo.training.step import compile_step, make_train_step
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
        workdir,
        model.config,
        model.tokenizer,
        model.folder,
        data.heldout or data.groups,
        lora=model.lora,
        base=settings.model.path or "",
    )
    with frozen_scorers(settings, model, mesh, workdir) as scorers:
        attach = functools.partial(attached, settings.objective, scorers) if scorers else None
        # Rewards are read from sums alone.
        attach_sums = functools.partial(attached, None, scorers)

        reward_head = _reward_head(settings.objective)
        pairs = any(len(group.labels) > 1 for group in data.heldout)
        signs = settings.objective.unpaired and not pairs
        figure = "heldout_accuracy" if pairs or signs else "heldout_nll"

        def measure(params: Params) -> Estimate | None:
            if not data.heldout:
                return None
            rows = heldout_batches(data, settings.train.rows_per_batch, mesh)
            place = functools.partial(place_rows, mesh=mesh)
            if reward_head and pairs:
                scorer = HeadScorer(model.policy, params, reward_head, mesh)
                return reward_accuracy(scorer, map(place, rows))
            scorer = make_scorer(model.policy, params, mesh=mesh)
            if not pairs and not signs:
                return nll_per_token(scorer, map(place, rows))
            accuracy = sign_accuracy if signs else reward_accuracy
            return accuracy(
                scorer,
                map(place, map(attach_sums, rows)),
                scale=settings.objective.reward_scale,
                per_token=settings.objective.reward_per_token,
            )

        measured: dict[int, Estimate | None] = {}

        def evaluate(state: TrainState) -> dict[str, float]:
            whole = model.policy.join(state.params, state.frozen)
            found = measured[int(state.step)] = measure(whole)
            name = "eval/loss" if figure == "heldout_nll" else "eval/rewards/accuracies"
            return {} if found is None else {name: found.value}

        before = measure(model.params)
        state = train(
            model.policy,
            model.params,
            settings.objective,
            settings.optimizer,
            batches(data, settings.data, settings.train, mesh),
            settings.train,
            mesh,
            workdir,
            attach=attach,
            evaluate=evaluate,
            frozen=frozen_params(settings.objective, scorers),
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
                model.policy.join(state.params, state.frozen),
                model.config,
                workdir / "export",
                model.tokenizer,
                model.folder,
                lora=model.lora,
            )
            if heads and jax.process_index() == 0:
                save_heads(state.params, workdir / "export" / "heads.safetensors")
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
        params: first parameters; those that are trained are copied, none are used up.
        objective: what is minimised.
        optimizer: settings, built for `settings.num_steps`.
        batches: rows of host arrays, at their beginning.
        settings: steps, rows, seeds, intervals.
        mesh: devices.
        workdir: folder of checkpoints and metrics.
        attach: adds log-probs of frozen policies to a batch.
        evaluate: measures a state.
        name: what the progress bar says.
        frozen: further parameters that take part but are not trained, such as a reference's head.

    Returns:
        The state after the last step.
    """
    transformation = optimizer.build(settings.num_steps)
    begin = functools.partial(init_state, objective=objective, optimizer=transformation)
    key = jax.random.key(settings.seed)
    placed, placed_base = policy.split(param_shardings(policy.logical_axes, params, mesh))
    params, base = policy.split(params)
    frozen = base | ({} if frozen is None else frozen)
    placed_frozen = placed_base | frozen_shardings(frozen, mesh)
    abstract = jax.eval_shape(begin, params, key=key)
    shardings = state_shardings(
        abstract.replace(frozen=frozen), placed, transformation, placed_frozen
    )
    frozen = jax.device_put(frozen, shardings.frozen)
    changing = shardings.replace(frozen={})
    body = make_train_step(policy, objective, transformation, microbatches=settings.microbatches)
    with Checkpointer(
        checkpoint_folder(workdir),
        every=settings.checkpoint_every,
        keep=settings.keep,
        best_metric=settings.best_metric,
        frozen={name: params_fingerprint(x) for name, x in frozen.items()},
    ) as checkpointer:
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, changing
        )
        restored = checkpointer.restore_latest(wanted.replace(frozen=frozen))
        if restored is None:
            state = jax.jit(begin, out_shardings=changing)(snapshot(params), key=key)
            state = state.replace(frozen=frozen)
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
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.train.rows_per_batch % (ways * settings.train.microbatches):
        raise SettingsError(
            f"train.rows_per_batch={settings.train.rows_per_batch} must be a multiple of the "
            f"{ways} ways in which the mesh splits rows times "
            f"train.microbatches={settings.train.microbatches}"
        )
    return mesh


def _reward_head(objective: Objective) -> str | None:
    """The head that says what a candidate is worth, where the policy's log-probs do not."""
    heads = [name for name in ("scores", "embeddings") if name in objective.arrays]
    policy = {"policy_logps", "policy_token_logps"} & objective.arrays.keys()
    return heads[0] if heads and not policy else None


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
