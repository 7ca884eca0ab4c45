"""Operations, memory and traffic from shapes, against the compiler and against closed forms."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from paxo.models.sharding import make_mesh
from paxo.plan import compiled
from paxo.plan.estimate import work_of
from paxo.plan.flops import Work, mean_keys, scorer_flops, step_flops, useful_flops
from paxo.plan.memory import memory_of
from tests.plan.planned import CONFIG, made_run, made_settings


@pytest.fixture(scope="module")
def programs():
    """Step and scorer of a small run with unrolled layers, so that every loop has one turn."""
    run = made_run(made_settings(remat="full"))
    mesh = make_mesh(devices=jax.devices()[:1])
    lower = {"step": compiled.lower_step, "scorer": compiled.lower_scorer}
    return run, {name: function(run, mesh).compile() for name, function in lower.items()}


@pytest.mark.parametrize(("name", "flops"), [("step", step_flops), ("scorer", scorer_flops)])
def test_operations_are_those_that_the_compiler_counts(programs, name, flops):
    run, made = programs
    counted = made[name].cost_analysis()["flops"]
    np.testing.assert_allclose(flops(run.config, work_of(run, "cpu")), counted, rtol=0.05)


def test_bytes_between_programs_are_those_of_the_compiled_arguments(programs):
    run, made = programs
    memory = memory_of(run, "cpu")
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(run.batch))
    kept = memory.resident["parameters"] + memory.resident["moments"]
    arguments = made["step"].memory_analysis().argument_size_in_bytes
    assert abs(arguments - (kept + batch)) < 1024  # step number, key, alignment
    # The scorer reads the tokens, not the labels.
    arguments = made["scorer"].memory_analysis().argument_size_in_bytes
    assert 0 <= memory.resident["reference"] + batch - arguments < batch


def test_mean_keys_counts_the_pairs_of_the_attention_mask():
    prompt, completion, candidates = 40, 24, 3
    branch = np.repeat(np.arange(candidates + 1), [prompt, *[completion] * candidates])
    sees = np.tril(np.ones((branch.size, branch.size), bool))
    sees &= (branch == 0) | (branch == branch[:, None])
    # A token sees itself too: half a key more than the continuous count.
    assert mean_keys(prompt, completion, candidates) + 0.5 == sees.sum() / branch.size


def test_a_step_is_three_forward_passes_and_remat_adds_less_than_one():
    work = Work(tokens=1e3, scored=0, keys=0, needed_keys=0)
    forward = scorer_flops(CONFIG, work)
    plain, full = (
        step_flops(dataclasses.replace(CONFIG, remat=remat), work) for remat in ("none", "full")
    )
    assert plain == 3 * forward == useful_flops(CONFIG, work)
    assert 3.5 * forward < full < 4 * forward


def test_adapters_on_a_frozen_base_save_a_third_of_its_operations():
    work = Work(tokens=1e3, scored=1e3, keys=0, needed_keys=0, in_chunks=False)
    adapted = dataclasses.replace(work, adapter_params=10)
    base = 2 * scorer_flops(CONFIG, work)
    assert step_flops(CONFIG, adapted) == base + 3 * 2 * 1e3 * 10
