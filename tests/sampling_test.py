import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.sampling import SamplingConfig, draw, make_sampler, truncated
from paxo.types import PromptBatch
from tests.made import tiny_policy

STOP = (2,)


def made_prompts(lengths=(3, 7, 5, 1), width=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 40, (len(lengths), width))
    tokens[np.arange(width) >= np.array(lengths)[:, None]] = 0
    return PromptBatch(jnp.array(tokens, jnp.int32), jnp.array(lengths), jnp.arange(len(lengths)))


def sampled(prompts=None, key=0, **changes):
    policy, params = tiny_policy()
    config = SamplingConfig(**{"max_new_tokens": 12, "num_candidates": 3, **changes})
    prompts = made_prompts() if prompts is None else prompts
    return make_sampler(policy, config, STOP)(params, prompts, jax.random.key(key))


def alone_logits(policy, params, sequence):
    tokens = jnp.array([sequence], jnp.int32)
    ones = jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    return policy.head(params, policy.trunk(params, tokens, positions, ones, ones - 1))[0]


def test_greedy_tokens_are_the_argmax_of_each_sequence_run_alone():
    policy, params = tiny_policy()
    prompts = made_prompts()
    out = sampled(prompts, temperature=0.0, num_candidates=1)
    for b, length in enumerate(prompts.lengths):
        sequence = prompts.tokens[b, :length].tolist()
        drawn = out.tokens[b, 0][out.mask[b, 0]].tolist()
        for token in drawn:
            assert int(jnp.argmax(alone_logits(policy, params, sequence)[-1])) == token
            sequence.append(token)


def test_log_probs_are_those_of_the_sequence_run_alone():
    policy, params = tiny_policy()
    prompts = made_prompts()
    out = sampled(prompts)
    for b, length in enumerate(prompts.lengths):
        for k in range(3):
            drawn = out.tokens[b, k][out.mask[b, k]].tolist()
            sequence = prompts.tokens[b, :length].tolist() + drawn
            logps = jax.nn.log_softmax(alone_logits(policy, params, sequence), -1)
            wanted = [logps[length - 1 + i, t] for i, t in enumerate(drawn)]
            np.testing.assert_allclose(out.logps[b, k][out.mask[b, k]], wanted, atol=1e-4)


def test_stop_token_ends_a_completion_and_only_there_it_is_finished():
    out = sampled(key=1, max_new_tokens=40)
    tokens, mask, finished = np.asarray(out.tokens), np.asarray(out.mask), np.asarray(out.finished)
    assert finished.any()
    for row, m, done in zip(tokens.reshape(-1, 40), mask.reshape(-1, 40), finished.ravel()):
        stops = np.flatnonzero(row == STOP[0])
        assert done == (len(stops) > 0)
        assert m.sum() == (stops[0] + 1 if done else 40)
        assert (row[~m] == 0).all()


def test_tokens_do_not_depend_on_batch_size_padding_or_number_of_candidates():
    whole = sampled(num_candidates=3)
    prompts = made_prompts()
    one = PromptBatch(prompts.tokens[1:2, :7], prompts.lengths[1:2], prompts.ids[1:2])
    alone = sampled(one, num_candidates=1)
    np.testing.assert_array_equal(alone.tokens[0, 0], whole.tokens[1, 0])
    wide = PromptBatch(jnp.pad(prompts.tokens, ((0, 0), (0, 9))), prompts.lengths, prompts.ids)
    np.testing.assert_array_equal(sampled(wide, num_candidates=3).tokens, whole.tokens)


def test_candidates_and_keys_differ_and_the_same_key_repeats():
    a, b = sampled(key=0), sampled(key=1)
    assert (a.tokens[:, 0] != a.tokens[:, 1]).any()
    assert (a.tokens != b.tokens).any()
    np.testing.assert_array_equal(a.tokens, sampled(key=0).tokens)


def test_minimum_length_keeps_the_stop_token_away():
    out = sampled(min_new_tokens=6, max_new_tokens=12)
    assert not (out.tokens[..., :6] == STOP[0]).any()


def test_draws_follow_the_distribution():
    probabilities = jnp.array([0.5, 0.2, 0.0, 0.3])
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    config = SamplingConfig(max_new_tokens=1)
    token, logp = draw(jnp.log(jnp.broadcast_to(probabilities, (n, 4))), keys, 0, config)
    found = np.bincount(token, minlength=4) / n
    # Three standard errors of a share of 0.5.
    np.testing.assert_allclose(found, probabilities, atol=3 * 0.5 / n**0.5)
    assert found[2] == 0
    np.testing.assert_allclose(logp, jnp.log(probabilities)[token], rtol=1e-5)


def test_temperature_divides_the_logits():
    logits = jnp.array([[1.0, 3.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    _, logp = draw(logits, keys, 0, SamplingConfig(max_new_tokens=1, temperature=2.0))
    both = jax.nn.log_softmax(logits[0] / 2)
    assert float(logp[0]) in [pytest.approx(float(x)) for x in both]


def test_top_k_and_top_p_keep_the_smallest_sets():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
    assert jnp.isfinite(truncated(logits, 2, 1.0)).tolist() == [False, True, True, False]
    assert jnp.isfinite(truncated(logits, 0, 0.69)).tolist() == [False, True, True, False]
    assert jnp.isfinite(truncated(logits, 0, 0.71)).tolist() == [False, True, True, True]
    assert jnp.isfinite(truncated(logits, 0, 1e-6)).tolist() == [False, True, False, False]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"sampling.top_p must lie in \(0, 1\]; got 0"):
        SamplingConfig(max_new_tokens=4, top_p=0.0)
    with pytest.raises(ValueError, match="stop_ids is empty"):
        make_sampler(tiny_policy()[0], SamplingConfig(max_new_tokens=4), ())


def test_second_round_does_not_compile_again():
    from paxo import sampling

    sampled()
    before = sampling._sample._cache_size()
    sampled(key=5)
    assert sampling._sample._cache_size() == before
