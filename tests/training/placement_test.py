"""The same loss and gradient on one device, on a mesh, under pmap, whole and in microbatches."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from paxo.models import sharding
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import Objective, Term
from paxo.training.state import state_shardings
from paxo.training.step import compile_step, make_train_step, place_rows, pmap_step
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.training.placed import (
    MESHES,
    OBJECTIVES,
    PUBLISHED,
    assert_same_step,
    made_run,
    step_on,
    told,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The two ways in which gradients are made, whole and in parts; the other objectives in parts.
IN_EVERY_WAY = ("dpo", "whole_batch")
CASES = [
    (name, placement, microbatches)
    for name in ("dpo", "dpo + nll", "whole_batch", "stateful", "token-level")
    for placement in ("one device", (2, 2, 2), "pmap over 4")
    for microbatches in (1, 4)
    if (name in IN_EVERY_WAY or microbatches == 4)
    and (placement, microbatches) != ("one device", 1)
] + [("published", (2, 2, 2), 1), ("dpo", (1, 1, 8), 1), ("divergence", (2, 2, 2), 1)]


@functools.cache
def found(name, placement, microbatches):
    """Gradients, memory and report of one step."""
    if placement in MESHES:
        return step_on(make_mesh(*placement), name, microbatches)
    policy, optimizer, state, batch = made_run(name)
    axis_name = "rows" if placement == "pmap over 4" else None
    step = make_train_step(
        policy, OBJECTIVES[name], optimizer, microbatches=microbatches, axis_name=axis_name
    )
    if placement == "one device":
        after, report = jax.jit(step)(state, batch)
    else:
        after, report = pmap_step(step, axis_name, jax.devices()[:4])(state, batch)
    return told(state, after.params, after.objective_state, report)


@pytest.mark.parametrize(("name", "placement", "microbatches"), CASES)
def test_step_is_that_of_one_device_on_the_whole_batch(name, placement, microbatches):
    assert_same_step(found(name, placement, microbatches), found(name, "one device", 1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_step_on_every_mesh_of_eight_devices_is_that_of_one(name, sizes):
    assert_same_step(found(name, sizes, 1), found(name, "one device", 1))


def test_sizes_that_a_mesh_does_not_divide_are_replicated_with_one_line_each(caplog):
    sharding._log_replicated.cache_clear()
    # Four devices divide neither 41 tokens nor 2 key-value heads.
    with caplog.at_level(logging.WARNING, sharding.__name__):
        got = step_on(make_mesh(1, 2, 4), "dpo", vocab_size=41)
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == sorted(
        [
            "axis 'vocab' of size 41 is replicated: 4 devices do not divide it",
            "axis 'activation_vocab' of size 41 is replicated: 4 devices do not divide it",
            "axis 'kv_heads' of size 2 is replicated: 4 devices do not divide it",
            "axis 'activation_kv_heads' of size 2 is replicated: 4 devices do not divide it",
        ]
    )
    assert_same_step(got, step_on(make_mesh(devices=jax.devices()[:1]), "dpo", vocab_size=41))


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
