import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.sampling import draw, filtered, greedy
from paxo.sampling.distribution import BLOCK, SORTED_TOP_K, log_prob, uniforms


def drawn(probabilities, number, seed=0):
    logits = jnp.broadcast_to(jnp.log(probabilities), (number, len(probabilities)))
    return jax.jit(draw)(logits, jax.random.uniform(jax.random.key(seed), (number, 2)))


def test_draws_follow_the_distribution():
    probabilities = jnp.array([0.5, 0.2, 0.0, 0.3])
    token, logp = drawn(probabilities, 20_000)
    found = np.bincount(token, minlength=4) / 20_000
    # Four standard errors of a share of 0.5.
    np.testing.assert_allclose(found, probabilities, atol=4 * 0.5 / 20_000**0.5)
    assert found[2] == 0
    np.testing.assert_allclose(logp, jnp.log(probabilities)[token], rtol=1e-5)


def test_draws_over_several_blocks_follow_the_distribution():
    size, number = 3 * BLOCK + 5, 50_000
    probabilities = np.random.default_rng(0).dirichlet(np.full(size, 0.3))
    probabilities[BLOCK : 2 * BLOCK] = 0  # a block that is never drawn
    probabilities /= probabilities.sum()
    token, logp = drawn(jnp.array(probabilities, jnp.float32), number)
    counts = np.bincount(token, minlength=size)
    assert counts[probabilities == 0].sum() == 0
    expected = number * probabilities
    often = expected > 5
    statistic = np.sum((counts - expected)[often] ** 2 / expected[often])
    # Mean and standard deviation of a chi-square with as many degrees of freedom.
    assert abs(statistic - often.sum()) < 4 * (2 * often.sum()) ** 0.5
    np.testing.assert_allclose(logp, np.log(probabilities[token]), atol=1e-4)


def test_tokens_less_likely_than_one_float32_number_can_tell_are_drawn_alike():
    # One token has nearly all; 256 others share 2e-5, 8e-8 each. Uniform numbers are multiples of
    # 2 ** -23, so only 168 of them lie so near to 1.
    size, number = 3 * BLOCK, 100_000
    weights = jnp.full(size, 8e-8).at[0].set(1.0).at[1:BLOCK].set(0.0)
    uniform = jax.random.uniform(jax.random.key(0), (number, 2))
    near_one = 1 - 2.0**-23 * (1 + jnp.floor(167 * uniform[:, 0]))
    uniform = uniform.at[:, 0].set(near_one)
    token = jax.jit(jax.vmap(lambda u: draw(jnp.log(weights), u)[0]))(uniform)
    counts = np.bincount(np.asarray(token), minlength=size)[BLOCK:]
    expected = number / (2 * BLOCK)
    # Poisson counts, most of them by chance within five standard deviations.
    assert np.abs(counts - counts.mean()).max() < 5 * expected**0.5
    assert counts.min() > 0


def test_uniform_numbers_at_their_limits_stay_in_the_support():
    logits = jnp.full(BLOCK + 9, -jnp.inf).at[jnp.array([3, BLOCK + 2])].set(0.0)
    for value, token in ((0.0, 3), (1.0, BLOCK + 2)):
        assert int(draw(logits, jnp.full(2, value))[0]) == token


def test_temperature_divides_the_logits():
    np.testing.assert_allclose(filtered(jnp.array([1.0, 3.0]), temperature=2.0), [0.5, 1.5])


def kept_by_sorting(logits, top_k, top_p, min_p):
    """The textbook's way, in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits)
    if 0 < top_k < len(logits):
        logits[order[top_k:]] = -np.inf
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    ordered = probabilities[order]
    logits[order[np.cumsum(ordered) - ordered >= top_p]] = -np.inf
    logits[probabilities < min_p * probabilities.max()] = -np.inf
    return np.isfinite(logits)


@pytest.mark.parametrize("top_k", [0, 1, 7, SORTED_TOP_K + 10])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_truncation_keeps_what_sorting_keeps(top_k, top_p, min_p):
    logits = 3 * jax.random.normal(jax.random.key(1), (4, 3, 400))
    out = filtered(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = np.asarray(jnp.isfinite(out))
    for row, found in zip(np.asarray(logits).reshape(-1, 400), kept.reshape(-1, 400)):
        np.testing.assert_array_equal(found, kept_by_sorting(row, top_k, top_p, min_p))
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(logits)[kept])


def test_truncation_keeps_ties_and_overlooks_infinities():
    tied = jnp.log(jnp.array([0.2, 0.4, 0.2, 0.2]))
    assert jnp.isfinite(filtered(tied, top_k=2)).tolist() == [True] * 4
    assert jnp.isfinite(filtered(tied, top_p=0.5)).tolist() == [True] * 4
    assert jnp.isfinite(filtered(tied, top_p=0.39)).tolist() == [False, True, False, False]
    few = jnp.array([-jnp.inf, 0.0, -jnp.inf, -1.0])
    for shape in ({"top_k": 3}, {"top_p": 0.99999}, {"min_p": 1e-9}):
        np.testing.assert_array_equal(filtered(few, **shape), few)


def test_greedy_takes_the_first_of_the_most_likely():
    logits = jax.random.normal(jax.random.key(0), (5, 300)).at[:, 17].set(9.0).at[:, 250].set(9.0)
    np.testing.assert_array_equal(greedy(logits), [17] * 5)
    np.testing.assert_array_equal(greedy(logits[:, :17]), jnp.argmax(logits[:, :17], -1))
    assert int(greedy(jnp.array([jnp.nan, 1.0]))) in (0, 1)


def test_log_prob_is_that_of_softmax():
    logits = jax.random.normal(jax.random.key(0), (5, 30))
    token = jnp.array([0, 3, 29, 4, 4])
    wanted = jax.nn.log_softmax(logits)[jnp.arange(5), token]
    np.testing.assert_allclose(log_prob(logits, token), wanted, rtol=1e-6)


def test_uniform_numbers_depend_on_prompt_id_candidate_and_position_alone():
    found = uniforms(jax.random.key(0), jnp.array([4, 9, 4]), 3, 5, jnp.float32)
    assert found.shape == (3, 3, 5, 2)
    np.testing.assert_array_equal(found[0], found[2])
    alone = uniforms(jax.random.key(0), jnp.array([9]), 2, 7, jnp.float32)
    np.testing.assert_array_equal(found[1, :2], alone[0, :, :5])
    assert len(np.unique(found[:2])) == 2 * 3 * 5 * 2
    other = uniforms(jax.random.key(1), jnp.array([9]), 2, 7, jnp.float32)
    assert (other != alone).all()


def test_float64_logits_stay_float64():
    with jax.enable_x64(True):
        logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        assert logits.dtype == jnp.float64
        kept = filtered(logits, top_p=0.7, top_k=3, min_p=0.1)
        assert kept.dtype == jnp.float64
        assert draw(kept, jnp.array([0.3, 0.6]))[1].dtype == jnp.float64
        assert jnp.isfinite(kept).tolist() == [True, True, False]
