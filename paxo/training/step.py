"""One training step, the same for every objective, mesh and number of microbatches.

Totals and counts are kept apart: the counts of the whole batch follow from its masks and are known
before any gradient, so gradients of microbatches, devices and hosts are sums that need no weights.

Losses that couple groups see the whole global batch. All microbatches are scored, the small arrays
`[R, G, K]` gathered, the loss called once, and its gradient sent back through each microbatch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paxo import metrics as metrics_lib
from paxo import scoring
from paxo.head_outputs import head_outputs
from paxo.numerics import Mean
from paxo.objectives import Objective
from paxo.rows import ROWS, place_rows
from paxo.training import one_pass
from paxo.training.inputs import TOKEN_QUANTITIES, check_batch, has_kls
from paxo.training.state import TrainState, as_transformation
from paxo.types import Array, Params, Policy, PreferenceBatch

__all__ = [
    "CompiledStep",
    "batch_metrics",
    "check_batch",
    "compile_step",
    "make_train_step",
    "place_rows",
    "pmap_step",
]

Step = Callable[[TrainState, PreferenceBatch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    policy: Policy,
    objective: Objective,
    optimizer: Any,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Step:
    """A pure `step(state, batch) -> (state, metrics)`, neither compiled nor placed.

    Args:
        policy: the model to be trained.
        objective: what is minimised.
        optimizer: an Optax transformation, or settings such as `adamw(...)`.
        microbatches: parts in which the batch is run, to save memory; the result is that of the
            whole batch. Must divide the number of rows.
        axis_name: mapped axis over which the rows are split, under `pmap_step`.

    Raises:
        ValueError: when traced, if the batch lacks an array that the objective names, or its rows
            cannot be split.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1; got {microbatches}")
    transformation = as_transformation(optimizer)
    gradients = _coupled_gradients if objective.whole_batch else _separable_gradients

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, dict[str, Array]]:
        check_batch(objective, batch, policy.heads, state.frozen or {})
        key = jax.random.fold_in(state.key, state.step)
        run = _Run(policy, objective, state, key, microbatches, axis_name)
        grads, loss, means, objective_state = gradients(run, batch)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        report = {"loss": loss, **{name: mean.value for name, mean in means.items()}}
        report |= batch_metrics(batch, axis_name) | {"grad_norm": optax.tree.norm(grads)}
        if hasattr(transformation, "schedule"):
            report["learning_rate"] = jnp.asarray(transformation.schedule(state.step), jnp.float32)
        new_state = state.replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            objective_state=objective_state,
            step=state.step + 1,
        )
        return new_state, report

    return step


class CompiledStep:
    """A step on a mesh: rows split over `data` and `fsdp`, the state donated.

    What is frozen is never donated and comes back as it was: others may hold the same arrays.
    """

    def __init__(self, step: Step, mesh: Mesh, shardings: TrainState, *, donate: bool = True):
        self.mesh = mesh
        rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
        changing = shardings.replace(frozen={})

        def run(state: TrainState, frozen: Params, batch: PreferenceBatch):
            state, report = step(state.replace(frozen=frozen), batch)
            return state.replace(frozen={}), report

        self._jitted = jax.jit(
            run,
            in_shardings=(changing, shardings.frozen, rows),
            out_shardings=(changing, everywhere),
            donate_argnums=0 if donate else (),
        )

    def __call__(
        self, state: TrainState, batch: PreferenceBatch
    ) -> tuple[TrainState, dict[str, Array]]:
        """Runs the step; `state` is used up, but for what is frozen, unless it is not donated."""
        with jax.set_mesh(self.mesh):
            after, report = self._jitted(state.replace(frozen={}), state.frozen, batch)
        return after.replace(frozen=state.frozen), report

    def lower(self, state: TrainState, batch: PreferenceBatch) -> Any:
        """The lowered program of these (or only their shapes), to be compiled and looked at."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(state.replace(frozen={}), state.frozen, batch)


def compile_step(
    step: Step, mesh: Mesh, shardings: TrainState, *, donate: bool = True
) -> CompiledStep:
    """Places `step` on a mesh.

    Args:
        step: from `make_train_step`, without an axis name.
        mesh: with axes `data, fsdp, tensor`; the first two split the rows.
        shardings: from `state_shardings`.
        donate: reuse the state's memory for the new one. An extragradient half step must not.
    """
    return CompiledStep(step, mesh, shardings, donate=donate)


def pmap_step(step: Step, axis_name: str, devices: Any = None) -> Step:
    """The same step on replicated devices: `make_train_step(..., axis_name=axis_name)`.

    Args:
        step: built with the same `axis_name`.
        axis_name: mapped axis over which the rows are split.
        devices: all local ones where None.
    """
    devices = jax.local_devices() if devices is None else devices
    mapped = jax.pmap(step, axis_name=axis_name, in_axes=(None, 0), out_axes=None, devices=devices)

    def run(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, dict[str, Array]]:
        rows, ways = batch.tokens.shape[0], len(devices)
        if rows % ways:
            raise ValueError(f"{rows} rows cannot be split over {ways} devices")
        return mapped(
            state, jax.tree.map(lambda x: x.reshape(ways, rows // ways, *x.shape[1:]), batch)
        )

    return run


def batch_metrics(batch: PreferenceBatch, axis_name: str | None = None) -> dict[str, Array]:
    """`num_tokens`, `num_groups` and `padding/share` of the global batch."""
    tokens = Mean(jnp.sum(batch.group != 0, dtype=jnp.float32), jnp.float32(batch.group.size))
    groups = jnp.sum(jnp.any(batch.where, -1), dtype=jnp.float32)
    tokens, groups = _total((tokens, groups), axis_name)
    return {"num_tokens": tokens.total, "num_groups": groups, "padding/share": 1 - tokens.value}


class _Run:
    """What the parts of one step share."""

    def __init__(self, policy, objective, state, key, microbatches, axis_name):
        self.policy, self.objective, self.state = policy, objective, state
        self.key, self.microbatches, self.axis_name = key, microbatches, axis_name
        self.report = functools.partial(
            metrics_lib.preference_metrics,
            scale=objective.reward_scale,
            per_token=objective.reward_per_token,
            unpaired=objective.unpaired,
        )

    def scores(self, params: Params, batch: PreferenceBatch) -> dict[str, Array]:
        """The arrays that depend on the parameters, by the names that losses give them."""
        params = self.join(params)
        hidden = scoring.all_hidden(self.policy, params, batch)
        head = scoring.head_of(self.policy, params)
        return self.readings(hidden, head, params.get("heads", {}), batch)

    def join(self, params: Params) -> Params:
        """Trained and frozen parameters as the policy takes them."""
        return self.policy.join(params, self.state.frozen or {})

    def readings(
        self,
        hidden: Array,
        head: scoring.Head,
        heads: Params,
        batch: PreferenceBatch,
        *,
        keep_logits: bool = False,
    ) -> dict[str, Array]:
        """`scores` from hidden states `[R, L, D]`, the head and the parameters of further heads."""
        frozen = self.state.frozen or {}
        wanted = {
            name: TOKEN_QUANTITIES[name]
            for name in self.objective.arrays
            if name in TOKEN_QUANTITIES and (name != "token_kls" or has_kls(batch, frozen))
        }
        names = [name for name in self.policy.heads if name in self.objective.arrays]
        by_token = scoring.figures(
            scoring.predicting(hidden, batch),
            head,
            batch,
            sorted({"logps", *wanted.values()}),
            reference_head=frozen.get("reference_head"),
            keep_logits=keep_logits,
        )
        out = {"policy_logps": scoring.slot_sums(by_token["logps"], batch)}
        out |= head_outputs(self.policy, {"heads": heads}, batch, names, hidden)
        return out | {name: scoring.by_candidate(by_token[q], batch) for name, q in wanted.items()}

    def given(self, batch: PreferenceBatch) -> dict[str, Array]:
        """The arrays that do not: labels, masks, lengths, frozen policies' log-probs, extras."""
        out = {"labels": batch.labels, "where": batch.where, "lengths": scoring.slot_lengths(batch)}
        out |= {f"{role}_logps": x for role, x in batch.fixed_logps.items()} | dict(batch.extras)
        arrays = self.objective.arrays
        if "token_mask" in arrays:
            ones = jnp.ones(batch.score_slot.shape, bool)
            out["token_mask"] = scoring.by_candidate(ones, batch)
        for role, x in batch.fixed_token_logps.items():
            if self.objective.reads_tokens(role):
                out[f"{role}_token_logps"] = scoring.by_candidate(x, batch)
        if "key" in arrays:
            out["key"] = self.key
        return out


def _separable_gradients(run: _Run, batch: PreferenceBatch):
    """Groups do not depend on one another: loss and gradient microbatch by microbatch."""
    state = run.state
    shapes = jax.eval_shape(run.scores, state.params, batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    counts = [term({**run.given(batch), **zeros})[0].count for term in run.objective.terms]
    counts = _total(counts, run.axis_name)

    def loss_of(scores: Mapping[str, Array], part: PreferenceBatch):
        inputs = {**run.given(part), **scores}
        means = [term(inputs)[0] for term in run.objective.terms]
        loss = sum(
            term.weight * Mean(mean.total, count).value
            for term, mean, count in zip(run.objective.terms, means, counts)
        )
        return loss, run.report(jax.lax.stop_gradient(inputs))

    def of_rows(hidden, head, heads, rows: PreferenceBatch):
        return loss_of(run.readings(hidden, head, heads, rows, keep_logits=True), rows)

    def of_part(part: PreferenceBatch):
        parts = one_pass.parts(run.policy, run.join(state.params), part, _ways())
        if parts is None:
            (loss, means), grads = jax.value_and_grad(
                lambda params: loss_of(run.scores(params, part), part), has_aux=True
            )(state.params)
        else:
            split = functools.partial(_split, parts=parts)
            (loss, means), grads = one_pass.value_and_gradient(
                run.policy, state.params, part, of_rows, split, join=run.join
            )
        return grads, loss, means

    grads, loss, means = _sum_over_parts(of_part, batch, run.microbatches)
    grads, loss, means = _total((grads, loss, means), run.axis_name)
    return _as_params(grads, state.params), loss, means, state.objective_state


def _coupled_gradients(run: _Run, batch: PreferenceBatch):
    """The loss sees the scores of the whole global batch at once."""
    state, parts = run.state, run.microbatches
    if parts == 1:
        scores, backward = jax.vjp(lambda params: run.scores(params, batch), state.params)
    else:
        stacked = jax.lax.map(functools.partial(run.scores, state.params), _split(batch, parts))
        scores = jax.tree.map(_join, stacked)
    given = run.given(batch)
    key = given.pop("key", None)
    whole = _gathered({**given, **scores}, run.axis_name)
    fixed = {name: x for name, x in whole.items() if name not in scores} | (
        {"key": key} if "key" in run.objective.arrays else {}
    )

    def loss_of(scores: Mapping[str, Array]):
        inputs = {**fixed, **scores}
        results = [
            term(inputs, memory) for term, memory in zip(run.objective.terms, state.objective_state)
        ]
        loss = sum(
            term.weight * mean.value for term, (mean, _) in zip(run.objective.terms, results)
        )
        return loss, (run.report(inputs), tuple(memory for _, memory in results))

    differentiable = {name: whole[name] for name in scores}
    (loss, (means, memory)), cotangents = jax.value_and_grad(loss_of, has_aux=True)(differentiable)
    own = _own_rows(cotangents, batch.tokens.shape[0], run.axis_name)
    if parts == 1:
        (grads,) = backward(own)
    else:

        def of_part(part_and_cotangents):
            part, cotangent = part_and_cotangents
            return jax.vjp(lambda params: run.scores(params, part), state.params)[1](cotangent)[0]

        grads = _sum_over_parts(of_part, (batch, own), parts)
    memory = tuple(() if m is None else m for m in memory)
    return _as_params(_total(grads, run.axis_name), state.params), loss, means, memory


def _sum_over_parts(of_part: Callable, batch: Any, parts: int) -> Any:
    """Σ of_part(part), in at least float32."""
    if parts == 1:
        return of_part(batch)
    split = _split(batch, parts)
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    shapes = jax.eval_shape(
        lambda part: jax.tree.map(wide, of_part(part)), jax.tree.map(lambda x: x[0], split)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, part):
        return jax.tree.map(lambda a, b: a + wide(b), total, of_part(part)), None

    return jax.lax.scan(add, zeros, split)[0]


def _ways() -> int:
    """Devices over which a mesh splits the rows."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp"))


def _split(batch: Any, parts: int) -> Any:
    """`[R, ...] -> [parts, R / parts, ...]`; part i takes rows i, i + parts, ...

    Taken with a stride, each part has rows of every device and nothing moves between them.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows of a batch cannot be split into {parts} microbatches")
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _total(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _gathered(tree: Any, axis_name: str | None) -> Any:
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, axis=0, tiled=True), tree)


def _own_rows(tree: Any, rows: int, axis_name: str | None) -> Any:
    if axis_name is None:
        return tree
    start = jax.lax.axis_index(axis_name) * rows
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), tree)


def _as_params(grads: Params, params: Params) -> Params:
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
