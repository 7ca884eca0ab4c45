"""The same loss and gradient on one device, on a mesh, under pmap, whole and in microbatches."""

import dataclasses

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
from tests.made import made_batch, tiny_policy


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
    "ipo": objective("ipo"),
    "simpo": objective("simpo"),
    "nll": objective("nll"),
    "dpo + nll": weighted_sum((objective("dpo"), 1.0), (objective("nll"), 0.2)),
    "whole_batch": Objective((Term("centred", centred_loss, {}),)),
    "stateful": Objective((Term("shifted", shifted_loss, {"rate": 0.5}),)),
    "token-level": Objective((Term("token_nll", token_nll, {}),)),
}
RATE = 0.1


def made_run(goal):
    policy, params = tiny_policy()
    _, other = tiny_policy(seed=7)
    batch = attach_logps(made_batch(24, rows=16), "reference", make_scorer(policy, other))
    optimizer = optax.sgd(RATE)
    state = init_state(params, goal, optimizer, jax.random.key(3))
    return policy, optimizer, state, jax.tree.map(np.asarray, batch)


def gradient_and_loss(before, after, report):
    """Plain SGD moves by rate * gradient, so the gradient can be read off the new parameters."""
    grads = jax.tree.map(
        lambda a, b: (np.asarray(a) - np.asarray(b)) / RATE, before, jax.device_get(after.params)
    )
    return grads, float(report["loss"]), jax.device_get(after.objective_state)


def assert_same(found, expected):
    (grads, loss, memory), (grads_e, loss_e, memory_e) = found, expected
    assert loss == pytest.approx(loss_e, rel=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads_e))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_e)):
        # SGD's read-off has an error of eps * |parameter| / rate of its own.
        np.testing.assert_allclose(a, b, atol=1e-5 * largest + 2e-6)
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(memory_e)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.fixture(scope="module", params=OBJECTIVES, ids=list(OBJECTIVES))
def case(request):
    goal = OBJECTIVES[request.param]
    policy, optimizer, state, batch = made_run(goal)
    after, report = jax.jit(make_train_step(policy, goal, optimizer))(state, batch)
    before = jax.device_get(state.params)
    return goal, policy, optimizer, state, batch, before, gradient_and_loss(before, after, report)


def test_four_microbatches_equal_the_whole_batch(case):
    goal, policy, optimizer, state, batch, before, expected = case
    step = jax.jit(make_train_step(policy, goal, optimizer, microbatches=4))
    assert_same(gradient_and_loss(before, *step(state, batch)), expected)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_mesh_of_2x2x2_equals_one_device(case, microbatches):
    goal, policy, optimizer, state, batch, before, expected = case
    mesh = make_mesh(2, 2, 2)
    step = make_train_step(policy, goal, optimizer, microbatches=microbatches)
    placed = param_shardings(policy.logical_axes, state.params, mesh)
    shardings = state_shardings(state, placed, optimizer)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings.params))
    compiled = compile_step(step, mesh, shardings, donate=False)
    after = compiled(jax.device_put(state, shardings), place_rows(batch, mesh))
    assert_same(gradient_and_loss(before, *after), expected)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_pmap_over_four_devices_equals_one_device(case, microbatches):
    goal, policy, optimizer, state, batch, before, expected = case
    body = make_train_step(policy, goal, optimizer, microbatches=microbatches, axis_name="rows")
    step = pmap_step(body, "rows", jax.devices()[:4])
    assert_same(gradient_and_loss(before, *step(state, batch)), expected)


def test_metrics_are_equal_under_every_placement():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run(goal)
    one = jax.jit(make_train_step(policy, goal, optimizer))(state, batch)[1]
    micro = jax.jit(make_train_step(policy, goal, optimizer, microbatches=4))(state, batch)[1]
    body = make_train_step(policy, goal, optimizer, axis_name="rows")
    mapped = pmap_step(body, "rows", jax.devices()[:4])(state, batch)[1]
    for name in one:
        assert float(micro[name]) == pytest.approx(float(one[name]), rel=1e-5), name
        assert float(mapped[name]) == pytest.approx(float(one[name]), rel=1e-5), name


def test_donated_state_is_used_up_and_the_second_call_does_not_compile():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run(goal)
    mesh = make_mesh(devices=jax.devices()[:1])
    placed = param_shardings(policy.logical_axes, state.params, mesh)
    shardings = state_shardings(state, placed, optimizer)
    step = compile_step(make_train_step(policy, goal, optimizer), mesh, shardings)
    start = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    state, _ = step(start, place_rows(batch, mesh))
    assert all(x.is_deleted() for x in jax.tree.leaves(start.params))
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.compiler, "backend_compile_and_load", None)
        step(state, place_rows(batch, mesh))


def test_missing_role_names_the_call_that_adds_it():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run(goal)
    batch = dataclasses.replace(batch, fixed_logps={})
    step = make_train_step(policy, goal, optimizer)
    with pytest.raises(ValueError, match=r"needs log-probs of role 'reference'.*paxo.attach_logps"):
        jax.jit(step)(state, batch)


def test_missing_extra_names_the_setting_that_adds_it():
    def needs_offsets(policy_logps, offsets, *, where=None):
        return policy_logps[..., 0] + offsets

    goal = Objective((Term("odpo", needs_offsets, {}),))
    policy, optimizer, state, batch = made_run(OBJECTIVES["dpo"])
    with pytest.raises(ValueError, match=r"needs offsets, which nobody provides.*data.extras"):
        jax.jit(make_train_step(policy, goal, optimizer))(state, batch)


def test_rows_that_cannot_be_split_are_refused():
    goal = OBJECTIVES["dpo"]
    policy, optimizer, state, batch = made_run(goal)
    with pytest.raises(ValueError, match="16 rows of a batch cannot be split into 3 microbatches"):
        jax.jit(make_train_step(policy, goal, optimizer, microbatches=3))(state, batch)
