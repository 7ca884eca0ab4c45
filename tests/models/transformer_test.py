"""The decoder: packed rows, rematerialisation, cached decoding, and its parts in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paxo.data.packing import sequence_tokens
from paxo.models import attention, transformer
from paxo.models.config import RopeScaling
from paxo.scoring import sequence_logps
from tests.made import TINY, made_batch, tiny_policy


def blocks_of_eight(monkeypatch):
    monkeypatch.setattr(attention, "SIZES", {"cpu": attention.Sizes(0, 8, 2**11)})


def assert_trees_close(found, expected, tolerance):
    """To `tolerance` of the largest entry of all."""
    largest = max(np.abs(np.asarray(x, np.float32)).max() for x in jax.tree.leaves(expected))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


def plain_rows(sequences):
    """One sequence a row: tokens, positions, group, branch."""
    longest = max(map(len, sequences))
    tokens = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    group = (np.arange(longest) < np.array([[len(s)] for s in sequences])).astype(np.int32)
    positions = np.broadcast_to(np.arange(longest), tokens.shape)
    return tokens, positions, group, np.zeros_like(group)


def alone_logps(policy, params, prompts, completions):
    """Log-prob of each completion, from the logits of the whole sequence in a row of its own."""
    tokens, *labels = plain_rows([np.concatenate(pair) for pair in zip(prompts, completions)])
    logits = policy.head(params, policy.trunk(params, tokens, *labels))
    logps = jax.nn.log_softmax(logits)[:, :-1]
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
    index = np.arange(1, tokens.shape[1])
    first = np.array([[len(p)] for p in prompts])
    last = first + np.array([[len(c)] for c in completions])
    return jnp.sum(jnp.where((index >= first) & (index < last), logps, 0), -1)


def weighted(logps, weights):
    return jnp.sum(logps * weights), logps


@pytest.mark.parametrize("by_blocks", [False, True], ids=["dense", "blocks"])
def test_packed_groups_give_the_log_probs_and_gradients_of_sequences_alone(by_blocks, monkeypatch):
    if by_blocks:
        blocks_of_eight(monkeypatch)
    policy, params = tiny_policy()
    batch = made_batch(9, rows=3, length=60, candidates=3, ragged=True)
    *places, prompts, completions = zip(*sequence_tokens(batch))
    assert len(prompts) > 12
    places = tuple(map(np.array, places))
    weights = jnp.array(np.random.default_rng(0).normal(size=len(prompts)), jnp.float32)

    def packed(params):
        return weighted(sequence_logps(policy, params, batch)[places], weights)

    def alone(params):
        return weighted(alone_logps(policy, params, prompts, completions), weights)

    found, expected = (
        jax.jit(jax.grad(function, has_aux=True))(params) for function in (packed, alone)
    )
    assert_trees_close(found[0], expected[0], 1e-5)
    assert_trees_close(found[1], expected[1], 1e-5)


def logp_gradient(batch, **changes):
    policy, params = tiny_policy(**changes)
    return jax.jit(jax.grad(lambda params: jnp.sum(sequence_logps(policy, params, batch))))(params)


def test_rolled_and_rematerialised_layers_give_the_gradient_of_kept_unrolled_ones():
    batch = made_batch(4, rows=2, length=32)
    expected = logp_gradient(batch, remat="none", unroll=True)
    for remat, unroll in (("none", False), ("full", False), ("full", True), ("dots", False)):
        found = logp_gradient(batch, remat=remat, unroll=unroll)
        assert_trees_close(found, expected, 1e-6)


def test_blocks_of_attention_are_rematerialised_in_rolled_layers(monkeypatch):
    batch = made_batch(4, rows=2, length=32)
    expected = logp_gradient(batch)
    blocks_of_eight(monkeypatch)
    assert_trees_close(logp_gradient(batch, remat="full", unroll=False), expected, 1e-5)


@pytest.mark.parametrize("by_blocks", [False, True], ids=["dense", "blocks"])
def test_decoding_with_a_cache_gives_the_hidden_states_of_the_whole_sequence(
    by_blocks, monkeypatch
):
    if by_blocks:
        blocks_of_eight(monkeypatch)
    policy, params = tiny_policy()
    rng = np.random.default_rng(0)
    lengths, num_new, candidates = np.array([10, 3, 1]), 4, 2
    prompts = rng.integers(3, 40, (3, 10)) * (np.arange(10) < lengths[:, None])
    new = rng.integers(3, 40, (3, candidates, num_new))

    cache, hidden = jax.jit(policy.decode.prefill, static_argnums=(3, 4))(
        params, prompts, lengths, candidates, num_new
    )
    states = [np.broadcast_to(hidden[:, None], (3, candidates, hidden.shape[-1]))]
    step = jax.jit(policy.decode.step)
    for i in range(num_new):
        cache, hidden = step(params, cache, new[:, :, i], i)
        states.append(hidden)
    states = np.stack(states, 2)

    whole = [
        np.concatenate([prompts[b, :n], new[b, k]]) for b, n in enumerate(lengths) for k in (0, 1)
    ]
    expected = np.asarray(policy.trunk(params, *plain_rows(whole)))
    for row, (b, k) in enumerate(np.ndindex(3, candidates)):
        # The last prompt token's state predicts the first new token.
        full = expected[row, lengths[b] - 1 :][: num_new + 1]
        np.testing.assert_allclose(states[b, k], full, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("params_too", [False, True], ids=["compute", "parameters"])
def test_bfloat16_is_close_to_float32(params_too):
    batch = made_batch(4, rows=2, length=32)
    policy, params = tiny_policy()
    changes = {"compute_dtype": "bfloat16"} | ({"param_dtype": "bfloat16"} if params_too else {})
    half, _ = tiny_policy(**changes)
    dtype = jnp.bfloat16 if params_too else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(0)))} == {jnp.dtype(dtype)}

    def run(policy, params):
        total = lambda p: weighted(sequence_logps(policy, p, batch), 1.0)  # noqa: E731
        return jax.jit(jax.grad(total, has_aux=True))(params)

    grads, logps = run(half, jax.tree.map(lambda x: x.astype(dtype), params))
    expected_grads, expected = run(policy, params)
    assert logps.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % an operation, of which some dozens follow one another.
    assert_trees_close(logps, expected, 0.03)
    assert_trees_close(grads, expected_grads, 0.06)


def test_rms_norm_divides_by_the_root_mean_square():
    norm = transformer.RMSNorm(dataclasses.replace(TINY, hidden_size=4, norm_eps=0.75))
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0, 0.0])
    # The mean square of (3, 1, -1, 1) is 3, and 3 + 0.75 is 15 / 4.
    expected = np.array([3.0, 2.0, -3.0, 0.0]) / np.sqrt(15 / 4)
    np.testing.assert_allclose(norm(jnp.array([3.0, 1.0, -1.0, 1.0])), expected, rtol=1e-6)


def test_rms_norm_squares_in_float32():
    norm = transformer.RMSNorm(dataclasses.replace(TINY, hidden_size=4096, norm_eps=1e-12))
    x = jnp.ones(4096, jnp.bfloat16)  # a sum of ones in bfloat16 stops at 256
    np.testing.assert_array_equal(norm(x), jnp.ones(4096, jnp.bfloat16))


def test_rotation_turns_each_pair_of_halves_by_its_angle():
    config = dataclasses.replace(TINY, head_dim=4, rope_theta=100.0)
    frequencies = transformer.rotary_frequencies(config)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    x = jnp.array([1.0, 0.0, 0.0, 2.0])  # pairs (x0, x2) = (1, 0) and (x1, x3) = (0, 2)
    turned = transformer.rotate(x.reshape(1, 1, 1, 4), jnp.array([[3]]), frequencies).ravel()
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(turned, expected, rtol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    frequencies = transformer.rotary_frequencies(dataclasses.replace(TINY, head_dim=8))
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def product(at_q, at_k):
        turned = (
            transformer.rotate(x, jnp.array([[p]]), frequencies) for x, p in ((q, at_q), (k, at_k))
        )
        return float(jnp.sum(jnp.multiply(*turned)))

    assert product(0, 0) == pytest.approx(float(jnp.sum(q * k)), rel=1e-5)
    assert product(9, 4) == pytest.approx(product(25, 20), rel=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)


def test_llama_3_scaling_slows_long_wavelengths_and_blends_those_between():
    config = dataclasses.replace(TINY, head_dim=6, rope_theta=1000.0)
    plain = transformer.rotary_frequencies(config)  # 1, 0.1, 0.01
    # Wavelengths 6.3, 63 and 628 of 96 original positions: 15, 1.53 and 0.15 turns.
    scaling = RopeScaling(8.0, 1.0, 4.0, 96)
    found = transformer.rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    blend = (96 / (2 * np.pi / 0.1) - 1) / (4 - 1)
    expected = [1.0, 0.1 * (blend + (1 - blend) / 8), 0.01 / 8]
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_layers_are_stacked_and_drawn_independently():
    state = nnx.state(transformer.Decoder(TINY, rngs=nnx.Rngs(0)), nnx.Param)
    kernel = np.asarray(state["layers"]["attention"]["qkv"]["kernel"][...])
    assert kernel.shape == (2, 16, 2, 4, 4)  # [N, D, G, Q + 2, H]
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.2
    assert kernel.std() == pytest.approx(TINY.initializer_range, rel=0.1)
