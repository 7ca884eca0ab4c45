"""The same loss and gradient on one device, on a mesh, under pmap, whole and in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.losses.contract import stateful, whole_batch
from paxo.losses.pairwise import log_ratios, margin
from paxo.models.sharding import make_mesh, param_shardings
from paxo.numerics import Mean, masked, valid_rows
from paxo.objectives import Objective, Term, objective, weighted_sum
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state, state_shardings
from paxo.training.step import compile_step, make_train_step, place_rows, pmap_step
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.made import made_batch, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_compiles")


@whole_batch
def centred_loss(policy_logps, reference_logps, *, where=None):
    """Couples groups: every margin is measured from the mean margin of the batch."""
    margins = margin(log_ratios(policy_logps, reference_logps, where))
    valid = valid_rows(where)
    center = Mean.over(margins, valid).value
    return masked(jax.nn.softplus(-(margins - 2 * center)), valid)


def _zero_shift(*, rate):
    return jnp.zeros(())


@stateful(_zero_shift)
def shifted_loss(policy_logps, reference_logps, *, rate=0.5, where=None, state=None):
    """Remembers a running mean of the log-ratios and subtracts it."""
    ratios = log_ratios(policy_logps, reference_logps, where)
    shift = (1 - rate) * state + rate * Mean.over(jax.lax.stop_gradient(ratios), where).value
    valid = valid_rows(where)
    loss = masked(
        jax.nn.softplus(-(ratios[..., 0] - shift)) + jax.nn.softplus(ratios[..., 1] - shift), valid
    )
    return loss, shift


def token_nll(policy_token_logps, token_mask, *, where=None):
    """Token-level arrays through the step."""
    return Mean(
        -jnp.sum(masked(policy_token_logps, token_mask)), jnp.sum(token_mask, dtype=jnp.float32)
    )


OBJECTIVES = {
    "dpo": objective("dpo", beta=0.5),
    "dpo + nll": weighted_sum((objective("dpo"), 1.0), (objective("nll"), 0.2)),
    "whole_batch": Objective((Term("centred", centred_loss, {}),)),
    "stateful": Objective((Term("shifted", shifted_loss, {"rate": 0.5}),)),
    "token-level": Objective((Term("token_nll", token_nll, {}),)),
}
RATE = 0.1
# The two ways in which gradients are made, whole and in parts; the other objectives in parts.
IN_EVERY_WAY = ("dpo", "whole_batch")
CASES = [
    (name, placement, microbatches)
    for name in OBJECTIVES
    for placement in ("one device", "2x2x2 mesh", "pmap over 4")
    for microbatches in (1, 4)
    if (name in IN_EVERY_WAY or microbatches == 4)
    and (placement, microbatches) != ("one device", 1)
]


@functools.cache
def made_run(name):
    policy, params = tiny_policy(num_layers=1)
    _, other = tiny_policy(seed=7, num_layers=1)
    groups = made_batch(24, rows=16, length=32, longest=5)
    batch = attach_logps(groups, "reference", make_scorer(policy, other))
    optimizer = optax.sgd(RATE)
    state = init_state(params, OBJECTIVES[name], optimizer, jax.random.key(3))
    return policy, optimizer, state, jax.tree.map(np.asarray, batch)


@functools.cache
def found(name, placement, microbatches):
    """Gradients, memory and report of one step; plain SGD moves by rate * gradient."""
    policy, optimizer, state, batch = made_run(name)
    axis_name = "rows" if placement == "pmap over 4" else None
    step = make_train_step(
        policy, OBJECTIVES[name], optimizer, microbatches=microbatches, axis_name=axis_name
    )
    if placement == "one device":
        after, report = jax.jit(step)(state, batch)
    elif placement == "pmap over 4":
        after, report = pmap_step(step, axis_name, jax.devices()[:4])(state, batch)
    else:
        mesh = make_mesh(2, 2, 2)
        placed = param_shardings(policy.logical_axes, state.params, mesh)
        shardings = state_shardings(state, placed, optimizer)
        assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings.params))
        compiled = compile_step(step, mesh, shardings, donate=False)
        after, report = compiled(jax.device_put(state, shardings), place_rows(batch, mesh))
    moved = jax.tree.map(
        lambda a, b: (np.asarray(a) - np.asarray(b)) / RATE, state.params, after.params
    )
    return moved, jax.device_get(after.objective_state), {k: float(v) for k, v in report.items()}


@pytest.mark.parametrize(("name", "placement", "microbatches"), CASES)
def test_step_is_that_of_one_device_on_the_whole_batch(name, placement, microbatches):
    grads, memory, report = found(name, placement, microbatches)
    wanted, wanted_memory, wanted_report = found(name, "one device", 1)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        # Reading the gradient off the parameters has an error of eps * |parameter| / rate.
        np.testing.assert_allclose(a, b, atol=1e-5 * largest + 2e-6)
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(wanted_memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert report == pytest.approx(wanted_report, rel=1e-5, abs=1e-6)


def test_donated_state_is_used_up_and_the_second_call_does_not_compile():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run("dpo")
    mesh = make_mesh(devices=jax.devices()[:1])
    placed = param_shardings(policy.logical_axes, state.params, mesh)
    shardings = state_shardings(state, placed, optimizer)
    step = compile_step(make_train_step(policy, goal, optimizer), mesh, shardings)
    start = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    state, _ = step(start, place_rows(batch, mesh))
    assert all(x.is_deleted() for x in jax.tree.leaves(start.params))
    with compilations() as compiled:
        state, _ = step(state, place_rows(batch, mesh))
    assert not compiled.count


def test_missing_role_names_the_call_that_adds_it():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run("dpo")
    batch = dataclasses.replace(batch, fixed_logps={})
    step = make_train_step(policy, goal, optimizer)
    with pytest.raises(ValueError, match=r"needs log-probs of role 'reference'.*paxo.attach_logps"):
        jax.jit(step)(state, batch)


def test_missing_extra_names_the_setting_that_adds_it():
    def needs_offsets(policy_logps, offsets, *, where=None):
        return policy_logps[..., 0] + offsets

    goal = Objective((Term("odpo", needs_offsets, {}),))
    policy, optimizer, state, batch = made_run("dpo")
    with pytest.raises(ValueError, match=r"needs offsets, which nobody provides.*data.extras"):
        jax.jit(make_train_step(policy, goal, optimizer))(state, batch)


def test_rows_that_cannot_be_split_are_refused():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run("dpo")
    with pytest.raises(ValueError, match="16 rows of a batch cannot be split into 3 microbatches"):
        jax.jit(make_train_step(policy, goal, optimizer, microbatches=3))(state, batch)
