"""Adapters beside a frozen decoder: what they compute, what is trained, and how they merge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from paxo.models.config import LoraSettings
from paxo.models.heads import with_heads
from paxo.models.lora import init_lora, merge_lora, with_lora
from paxo.models.policy import make_policy
from paxo.models.pretrained import export, load_params
from paxo.models.sharding import make_mesh, param_shardings
from paxo.numerics import Mean, masked
from paxo.objectives import Objective, Term, objective
from paxo.sampling import SamplingConfig, make_sampler
from paxo.scoring import attach_logps, make_scorer
from paxo.training.optimizers import adamw
from paxo.training.state import init_state, snapshot, state_shardings
from paxo.training.step import compile_step, make_train_step, place_rows
from paxo.types import PromptBatch
from tests.compiling import quick_compiles  # noqa: F401
from tests.made import TINY, made_batch

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = dataclasses.replace(TINY, unroll=False, tie_embeddings=False, attention_bias=True)
LORA = LoraSettings(rank=3, alpha=6.0, base_dtype="float32")
GOAL = objective("dpo", beta=0.5)


@functools.cache
def model(**changes):
    """A policy with adapters that are not 0, its parameters, and the decoder's policy."""
    lora = dataclasses.replace(LORA, **changes)
    base = make_policy(CONFIG)
    policy = with_lora(base, CONFIG, lora)
    params = policy.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 8)
    filled = {
        name: pair | {"lora_b": 0.3 * jax.random.normal(key, pair["lora_b"].shape)}
        for key, (name, pair) in zip(keys, params["lora"].items())
    }
    return policy, params | {"lora": filled}, base


@functools.cache
def batch():
    """Packed rows with the log-probs of the decoder without adapters."""
    policy, params, base = model()
    rows = made_batch(12, rows=8, length=32, longest=5)
    scorer = make_scorer(base, policy.split(params)[1])
    return jax.tree.map(np.asarray, attach_logps(rows, "reference", scorer))


@functools.partial(jax.jit, static_argnums=0)
def logits(policy, params, rows):
    hidden = policy.trunk(params, rows.tokens, rows.positions, rows.group, rows.branch)
    return policy.head(params, hidden)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_adapters_at_zero_give_the_bases_logits_to_the_bit(compute_dtype):
    config = dataclasses.replace(CONFIG, compute_dtype=compute_dtype)
    base = make_policy(config)
    weights = jax.tree.map(lambda x: x.astype(compute_dtype), base.init(jax.random.key(0)))
    policy = with_lora(base, config, LORA)
    params = weights | {"lora": init_lora(jax.random.key(5), config, LORA)}
    assert all(np.any(pair["lora_a"] != 0) for pair in params["lora"].values())
    np.testing.assert_array_equal(logits(policy, params, batch()), logits(base, weights, batch()))


def test_merged_weights_give_the_logits_of_the_adapters(tmp_path):
    policy, params, base = model()
    with_adapters = logits(policy, params, batch())
    alone = logits(base, policy.split(params)[1], batch())
    assert np.abs(with_adapters - alone).max() > 0.1
    export(merge_lora(params, CONFIG, LORA), CONFIG, tmp_path / "merged")
    merged = load_params(tmp_path / "merged", CONFIG)
    close = 1e-5 * np.abs(with_adapters).max()
    np.testing.assert_allclose(logits(base, merged, batch()), with_adapters, atol=close)


def test_merging_goes_through_float32_and_ends_in_the_dtype_of_the_parameters():
    policy, params, _ = model()
    trained, frozen = policy.split(params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    merged = merge_lora(policy.join(trained, narrow), CONFIG, LORA)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"float32"}
    pair = params["lora"]["down"]
    added = LORA.scale * pair["lora_a"][1] @ pair["lora_b"][1]
    found = merged["layers"]["mlp"]["down"]["kernel"][1]
    wanted = narrow["layers"]["mlp"]["down"]["kernel"][1].astype(jnp.float32) + added
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert merge_lora(params, half, LORA)["norm"]["scale"].dtype == jnp.bfloat16


def test_only_the_named_projections_have_adapters_and_the_scale_may_be_rank_stabilized():
    policy, params, base = model(targets=("out",), rank_stabilized=True)
    assert params["lora"].keys() == {"out"}
    scale = 6.0 / 3**0.5
    merged = policy.split(params)[1]
    pair, kernel = params["lora"]["out"], merged["layers"]["attention"]["out"]["kernel"]
    added = scale * jnp.einsum("nkqhr,nrd->nkqhd", pair["lora_a"], pair["lora_b"])
    layers = jax.tree.map(lambda x: x, merged["layers"])
    layers["attention"]["out"]["kernel"] = kernel + added
    np.testing.assert_allclose(
        logits(policy, params, batch()),
        logits(base, merged | {"layers": layers}, batch()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_sampler_draws_with_the_adapters():
    policy, params, base = model()
    prompts = PromptBatch(
        np.array([[5, 6, 7], [8, 9, 0]], np.int32), np.array([3, 2], np.int32), np.arange(2)
    )
    config = SamplingConfig(max_new_tokens=6, num_candidates=2)
    key = jax.random.key(0)
    merged = merge_lora(params, CONFIG, LORA)
    with_adapters = make_sampler(policy, config, (1,))(params, prompts, key)
    wanted = make_sampler(base, config, (1,))(merged, prompts, key)
    np.testing.assert_array_equal(with_adapters.tokens, wanted.tokens)
    np.testing.assert_allclose(with_adapters.logps, wanted.logps, atol=1e-5)


@functools.cache
def stepped(placement):
    """State before and after an AdamW step, and the report."""
    policy, params, _ = model()
    optimizer = adamw(1e-2)
    trained, frozen = policy.split(params)
    state = init_state(snapshot(trained), GOAL, optimizer, jax.random.key(0), frozen=frozen)
    mesh = make_mesh(*placement, devices=jax.devices()[: np.prod(placement)])
    placed, base = policy.split(param_shardings(policy.logical_axes, params, mesh))
    shardings = state_shardings(state, placed, optimizer, base)
    state = jax.device_put(state, shardings)
    step = compile_step(make_train_step(policy, GOAL, optimizer), mesh, shardings)
    before = jax.tree.map(np.array, state.params)
    after, report = step(state, place_rows(batch(), mesh))
    return state, before, after, {name: float(x) for name, x in report.items()}


def test_the_optimiser_sees_adapters_alone_and_the_base_stays_the_very_same_arrays():
    state, before, after, report = stepped((1, 1, 1))
    assert after.params.keys() == {"lora"}
    assert report["grad_norm"] > 0.1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after.params)
    assert all(change > 1e-3 for change in jax.tree.leaves(moved))
    size = sum(x.size for x in jax.tree.leaves(after.params))
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * size
    # Donation spares the base, which a reference may hold too.
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    for mine, theirs in zip(jax.tree.leaves(after.frozen), jax.tree.leaves(state.frozen)):
        assert mine is theirs
        assert not mine.is_deleted()


def test_the_step_on_a_mesh_is_that_of_one_device():
    state, _, after, report = stepped((2, 2, 2))
    _, _, wanted, wanted_report = stepped((1, 1, 1))
    pair = after.params["lora"]["gate_up"]
    names = [x.sharding.spec for x in (pair["lora_a"], pair["lora_b"])]
    assert names == [P(None, "fsdp", None), P(None, None, None, "tensor")]
    kernel = state.frozen["layers"]["mlp"]["gate_up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", None, "tensor")
    assert report == pytest.approx(wanted_report, rel=1e-5, abs=1e-6)
    # The first moment after one step is a tenth of the clipped gradient.
    grads, wanted_grads = (optax.tree_utils.tree_get(x.opt_state, "mu") for x in (after, wanted))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted_grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads)):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


@pytest.mark.parametrize("heads_first", [True, False])
def test_heads_beside_adapters_are_trained_in_full(heads_first):
    def regress(scores, labels, *, where=None):
        squares = masked((scores - labels) ** 2, where)
        return Mean(jnp.sum(squares), jnp.sum(where, dtype=jnp.float32))

    policy = make_policy(CONFIG)
    parts = [
        lambda policy: with_heads(policy, CONFIG.hidden_size, ["scores"]),
        lambda policy: with_lora(policy, CONFIG, LORA),
    ]
    for part in parts if heads_first else parts[::-1]:
        policy = part(policy)
    trained, frozen = policy.split(policy.init(jax.random.key(0)))
    assert trained.keys() == policy.split(policy.logical_axes)[0].keys() == {"heads", "lora"}
    goal, optimizer = Objective((Term("regress", regress, {}),)), optax.sgd(0.1)
    state = init_state(trained, goal, optimizer, jax.random.key(0), frozen=frozen)
    step = make_train_step(policy, goal, optimizer)
    after = (
        jax.eval_shape(step, state, batch())[0] if heads_first else jax.jit(step)(state, batch())[0]
    )
    assert jax.tree.structure(after.params) == jax.tree.structure(trained)
    if not heads_first:
        for moved in (
            after.params["heads"]["scores"]["kernel"],
            after.params["lora"]["qkv"]["lora_b"],
        ):
            assert np.abs(moved).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1; got 0"),
        ({"alpha": 0.0}, "lora.alpha must be above 0"),
        ({"targets": ("q",)}, "some of qkv, out, gate_up, down, each once"),
        ({"targets": ()}, "some of qkv, out, gate_up, down, each once"),
        ({"base_dtype": "int8"}, "float32 or bfloat16; got 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**changes)
