"""A run's own programs: what the compiler says of them, and how far the estimates agree."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from paxo.experiment import MeshSettings, ReferenceSettings
from paxo.models.sharding import make_mesh
from paxo.overrides import apply_overrides
from paxo.plan import compiled
from paxo.plan.estimate import work_of
from paxo.plan.flops import scorer_flops, step_flops
from paxo.plan.memory import memory_of
from tests.plan.planned import made_run, made_settings, made_topology


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


def test_a_scorer_lies_beside_the_state_of_the_training():
    here = len(jax.local_devices(backend="cpu"))
    topology = made_topology(here, platform="cpu")
    run = made_run(made_settings(remat="full", rows=4 * here, mesh=(here, 1, 1)))
    found = compiled.compile_programs(run, topology, ("scorer",))["scorer"]
    resident = memory_of(run, "cpu").resident
    # The other frozen policies and the training state, down to the step's number and the key.
    assert 0 <= found.beside - resident["parameters"] - resident["moments"] <= 64
    assert found.peak == found.arguments + found.temporaries + found.outputs + found.beside
    assert found.temporaries > 0
    assert found.failure is None


def test_a_scorer_is_compiled_on_the_mesh_of_its_reference():
    here = len(jax.local_devices(backend="cpu"))
    settings = made_settings(rows=here, mesh=(here, 1, 1))
    mesh = MeshSettings(data=1, fsdp=here // 2, tensor=2)
    own = dataclasses.replace(settings, reference=ReferenceSettings(mesh=mesh))
    topology = made_topology(here, platform="cpu")
    alike, apart = (
        compiled.compile_programs(made_run(s), topology, ("scorer",))["scorer"]
        for s in (settings, own)
    )
    resident = memory_of(made_run(own), "cpu").resident
    batch = alike.arguments - memory_of(made_run(settings), "cpu").resident["reference"]
    assert here > 1
    assert batch > 1024
    # Two devices share the rows of each.
    assert abs(apart.arguments - 2 * batch - resident["reference"]) < 512
    assert apart.beside == alike.beside  # the training state


def test_programs_with_adapters_are_lowered_as_well():
    run = made_run(apply_overrides(made_settings(), ["model.lora.rank=4"]))
    mesh = make_mesh(devices=jax.devices()[:1])
    for lower in (compiled.lower_step, compiled.lower_scorer, compiled.lower_sampler):
        assert "bf16" in lower(run, mesh).as_text()


def test_the_sampler_is_lowered_for_the_prompts_of_a_round():
    run = made_run()
    mesh = make_mesh(devices=jax.devices()[:1])
    text = compiled.lower_sampler(run, mesh).as_text()
    prompts, longest = run.prompts.tokens.shape
    assert f"tensor<{prompts}x{longest}xi32>" in text
    assert f"tensor<{prompts}x2x32xi32>" in text  # two candidates of at most 32 tokens


@pytest.mark.parametrize(
    ("said", "failure", "gib"),
    [
        (
            "Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm "
            "capacity by 2.75G.",
            "Used 18.50G of 15.75G hbm",
            18.5 + 1,
        ),
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (22.00G) exceeds available HBM (15.75G). HLO module: jit_step.",
            "HLO temporaries (22.00G) exceeds available HBM (15.75G)",
            22 + 2 + 1,
        ),
    ],
)
def test_a_program_that_does_not_fit_is_a_figure_and_not_an_error(said, failure, gib):
    class TooLarge:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    found = compiled._compiled("step", TooLarge, inputs=2 * 2.0**30, beside=2.0**30, mesh_shape={})
    assert found.failure == failure
    assert found.peak == gib * 2**30
    assert math.isnan(found.flops)


def test_other_errors_of_the_compiler_are_not_hidden():
    class Broken:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiled._compiled("step", Broken, inputs=0.0, beside=0.0, mesh_shape={})


def test_a_program_that_cannot_be_read_leaves_its_traffic_out(caplog):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operand")

    assert compiled._received(Unreadable(), {"fsdp": 2}) == {}
    assert "collectives cannot be read: INTERNAL: async-update" in caplog.text
