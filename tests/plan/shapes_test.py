"""A run as shapes: what it holds, and where it lies."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from paxo.experiment import MeshSettings
from paxo.overrides import SettingsError, apply_overrides
from paxo.plan.kinds import first_layout
from paxo.plan.layout import abstract_mesh, model_config
from paxo.plan.memory import CATEGORIES, memory_of
from paxo.plan.shapes import bytes_per_device, placement, relaid
from paxo.scoring import default_chunk
from paxo.training.step import check_batch
from tests.plan.planned import CONFIG, made_run, made_settings


def count(params):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_split_parameters_are_counted_to_the_byte():
    run = made_run(made_settings(mesh=(2, 4, 2), rows=8))
    d, n = CONFIG.hidden_size, CONFIG.num_layers
    norms = d * (2 * n + 1)  # on every device
    split = (count(run.params) - norms) // 8  # over fsdp and tensor, not over data
    found = memory_of(run, "tpu").resident
    assert found["parameters"] == 4 * (split + norms)
    scalars = found["moments"] - 2 * found["parameters"]
    assert 0 < scalars <= 16  # the optimiser's counts of steps
    assert found["reference"] == 4 * (split + norms)


def test_an_axis_that_its_devices_do_not_divide_is_counted_as_replicated():
    half, quarter = (made_run(made_settings(mesh=(1, 1, ways), num_kv_heads=2)) for ways in (2, 4))
    size = lambda run: bytes_per_device(  # noqa: E731
        run.params["layers"]["attention"]["qkv"]["kernel"],
        placement(run, abstract_mesh(run.layout, "tpu")).params["layers"]["attention"]["qkv"][
            "kernel"
        ],
    )
    kernel = CONFIG.num_layers * CONFIG.hidden_size * CONFIG.head_dim * (4 + 2 * 2) * 4
    assert (size(half), size(quarter)) == (kernel // 2, kernel)


def test_a_reference_is_a_second_copy_of_the_weights_where_the_objective_has_one():
    with_one, without = (
        memory_of(made_run(made_settings(name)), "tpu").resident for name in ("dpo", "simpo")
    )
    assert with_one["reference"] == with_one["parameters"] == without["parameters"]
    assert without["reference"] == 0
    settings = apply_overrides(made_settings(), ["reference.dtype=bfloat16"])
    found = memory_of(made_run(settings), "tpu").resident
    assert found["reference"] == found["parameters"] // 2


def on_its_own_mesh(settings, **sizes):
    reference = dataclasses.replace(settings.reference, mesh=MeshSettings(**sizes))
    return dataclasses.replace(settings, reference=reference)


def test_a_reference_may_lie_on_a_mesh_of_its_own():
    alike = made_run(made_settings(rows=8, mesh=(8, 1, 1)))
    split = made_run(on_its_own_mesh(alike.settings, data=2, fsdp=-1))
    assert split.scoring.layout.mesh_shape == {"data": 2, "fsdp": 4, "tensor": 1}
    assert alike.scoring.layout == split.layout == alike.layout
    whole, found = memory_of(alike, "tpu"), memory_of(split, "tpu")
    norms = CONFIG.hidden_size * (2 * CONFIG.num_layers + 1)
    assert whole.resident["reference"] == 4 * count(alike.params)
    assert found.resident["reference"] == (count(alike.params) - norms) + 4 * norms
    assert found.resident["parameters"] == whole.resident["parameters"]
    assert whole.scorer["collectives"] == 0 < found.scorer["collectives"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, r"reference.mesh .* is of 3 devices, the topology of 2"),
        ({"fsdp": -1}, r"reference.mesh sizes are at least 1, and one may be -1"),
        ({"data": 2}, "split.* rows in 2 ways, which do not divide the 3 rows of a batch"),
    ],
)
def test_a_mesh_of_a_reference_that_cannot_be_is_refused_in_words(sizes, words):
    run = made_run(on_its_own_mesh(made_settings(rows=3, mesh=(1, 1, 2)), **sizes))
    with pytest.raises(SettingsError, match=words):
        memory_of(run, "cpu")


@pytest.mark.parametrize(
    ("objective", "candidates"), [("dpo", 2), ("nll", 1), ("kto", 2), ("simpo", 2), ("tdpo1", 2)]
)
def test_a_batch_has_what_its_objective_reads(objective, candidates):
    run = made_run(made_settings(objective))
    assert run.kind.candidates == candidates == run.batch.where.shape[-1]
    check_batch(run.settings.objective, run.batch, run.policy.heads, run.state.frozen)


def test_a_references_head_in_the_step_is_split_over_width_and_vocabulary():
    run = made_run(made_settings("tdpo1", mesh=(1, 2, 2)))
    placed = placement(run, abstract_mesh(run.layout, "tpu")).state.frozen
    whole = run.config.hidden_size * run.config.vocab_size * 4
    assert bytes_per_device(run.state.frozen, placed) == whole // 4


def test_extras_and_heads_of_an_objective_are_part_of_the_shapes():
    settings = apply_overrides(made_settings("bradley_terry"), ["data.extras=weights,grid:KT"])
    run = made_run(settings)
    assert "heads" in run.params
    rows, groups, candidates = run.batch.where.shape
    assert run.batch.extras["weights"].shape == (rows, groups, candidates)
    assert run.batch.extras["grid"].shape == (rows, groups, candidates, 32)


def test_adapters_are_trained_alone_and_their_reference_is_the_frozen_base():
    settings = apply_overrides(made_settings(rows=8, mesh=(1, 8, 1)), ["model.lora.rank=4"])
    run = made_run(settings)
    found = memory_of(run, "tpu").resident
    base = made_run(made_settings(rows=8, mesh=(1, 8, 1)))
    full = memory_of(base, "tpu").resident
    assert {*run.state.params} == {"lora"}
    assert count(run.state.frozen) == count(base.params)
    assert found["frozen"] == full["parameters"] // 2  # bfloat16
    assert found["reference"] == 0
    assert found["parameters"] < full["parameters"] / 4
    assert 0 < found["moments"] - 2 * found["parameters"] <= 16
    # A reference of another model, or in another dtype, is a copy of its own.
    for change, size in (("path=elsewhere", 1), ("dtype=float32", 2)):
        other = made_run(apply_overrides(settings, [f"reference.{change}"]))
        assert memory_of(other, "tpu").resident["reference"] == size * found["frozen"]


def test_another_layout_has_the_same_state():
    run = made_run(made_settings(rows=8))
    other = relaid(run, first_layout(made_settings(rows=4, remat="full"), CONFIG, 1))
    assert other.state is run.state
    assert other.batch.tokens.shape == (4, 128)
    assert other.config.remat == other.layout.remat == "none"


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        (["mesh.fsdp=3"], 4, "is of 3 devices, the topology of 4"),
        (["mesh.fsdp=-1"], 4, "one may be -1"),
        (["mesh.data=-1"], 16, "must be a multiple of the 16 ways"),
        (["mesh.data=2", "train.microbatches=4"], 2, "--set train.rows_per_batch=8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_words(changes, devices, words):
    start = ["mesh.data=1"] if "mesh.fsdp=3" in changes else ["mesh.data=-1"]
    settings = apply_overrides(made_settings(), [*start, *changes])
    with pytest.raises(SettingsError, match=words):
        first_layout(settings, CONFIG, devices)


def test_a_model_is_named_by_its_shape_or_by_the_settings():
    settings = apply_overrides(made_settings(), ["model.compute_dtype=bfloat16"])
    named = model_config(settings, "llama3-8b")
    assert (named.num_layers, named.compute_dtype) == (32, "bfloat16")
    assert model_config(settings, None).hidden_size == CONFIG.hidden_size
    with pytest.raises(SettingsError, match="--model: unknown model 'llama3-9b'"):
        model_config(settings, "llama3-9b")


def test_shapes_are_traced_for_the_platform_that_they_are_meant_for():
    run = made_run(made_settings())
    chunks = {}
    for platform in ("cpu", "tpu"):
        with jax.sharding.use_abstract_mesh(abstract_mesh(run.layout, platform)):
            chunks[platform] = default_chunk(1, 10**6)
    assert chunks == {"cpu": 128, "tpu": 1024}


@pytest.mark.parametrize(
    ("more", "less", "category"),
    [
        ({"remat": "none"}, {"remat": "dots"}, "activations"),
        ({"remat": "dots"}, {"remat": "full"}, "activations"),
        ({"rows": 16}, {"rows": 16, "parts": 4}, "activations"),
        ({"rows": 8, "mesh": (4, 2, 1)}, {"rows": 8, "mesh": (2, 4, 1)}, "parameters"),
        ({"rows": 8, "mesh": (1, 8, 1)}, {"rows": 8, "mesh": (1, 4, 2)}, "collectives"),
        ({"rows": 8, "mesh": (1, 4, 1)}, {"rows": 8, "mesh": (1, 4, 2)}, "cache"),
    ],
)
def test_what_a_layout_saves(more, less, category):
    large, small = (
        memory_of(made_run(made_settings(num_layers=8, **changes)), "tpu").by_category()
        for changes in (more, less)
    )
    assert set(large) == {*CATEGORIES}
    assert small[category] < large[category]


def test_the_cache_holds_a_prompt_once_for_its_candidates():
    run = made_run()
    prompts = run.prompts.tokens.shape[0]
    cache = jax.eval_shape(
        lambda params, tokens, lengths: run.policy.decode.prefill(params, tokens, lengths, 2, 32),
        run.params,
        run.prompts.tokens,
        run.prompts.lengths,
    )[0]
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert held == memory_of(run, "cpu").sampler["cache"]
    assert prompts == math.ceil(run.groups * 4)
    assert jnp.dtype(cache.lengths.dtype) == jnp.int32
