import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.data.tokenise import load_tokenizer
from paxo.models.policy import make_policy
from paxo.models.pretrained import load_params, read_config
from paxo.models.sharding import make_mesh, param_shardings
from paxo.sampling import SamplingConfig, filtered, make_mixture_sampler, make_sampler
from paxo.sampling.decoding import check_prompts
from paxo.sampling.sampler import _sample
from paxo.types import Decode, Finish, Policy, PromptBatch
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.made import tiny_policy

pytestmark = pytest.mark.usefixtures("quick_compiles")

STOP = (2,)
VOCABULARY = 40
T = 24


def made_prompts(lengths=(3, 7, 5, 1), width=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCABULARY, (len(lengths), width))
    tokens[np.arange(width) >= np.array(lengths)[:, None]] = 0
    return PromptBatch(jnp.array(tokens, jnp.int32), jnp.array(lengths), jnp.arange(len(lengths)))


def sampled(prompts=None, key=0, params=None, stop=STOP, mesh=None, policy=None, **changes):
    tiny, own = tiny_policy()
    config = SamplingConfig(**{"max_new_tokens": T, "num_candidates": 3, **changes})
    prompts = made_prompts() if prompts is None else prompts
    sampler = make_sampler(policy or tiny, config, stop, mesh=mesh)
    return sampler(own if params is None else params, prompts, jax.random.key(key))


def mixed(mix, key=0):
    policy, params = tiny_policy()
    _, reference = tiny_policy(1)
    config = SamplingConfig(max_new_tokens=T, num_candidates=3, temperature=0.8)
    sampler = make_mixture_sampler(policy, config, STOP)
    keys = {"reference_params": reference, "mix": mix}
    return sampler(params, made_prompts(), jax.random.key(key), **keys)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(policy, params, tokens):
    """`[N, L, V]` of right-padded sequences, each without a cache or a neighbour."""
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return policy.head(params, policy.trunk(params, tokens, positions, ones, ones - 1))


def predicting_logits(policy, params, prompts, out):
    """`[B, K, T, V]` logits that predict each token, from a run over the whole sequences."""
    (b, k, t), width = out.tokens.shape, prompts.tokens.shape[1]
    whole = np.zeros((b, k, width + t), np.int32)
    lengths = np.asarray(prompts.lengths)
    for i, length in enumerate(lengths):
        whole[i, :, :length] = prompts.tokens[i, :length]
        whole[i, :, length : length + t] = out.tokens[i]
    logits = logits_of(policy, params, jnp.array(whole.reshape(b * k, -1)))
    at = np.repeat(lengths, k)[:, None] - 1 + np.arange(t)
    return np.take_along_axis(np.asarray(logits), at[..., None], 1).reshape(b, k, t, -1)


def chosen(logps, out):
    """`[B, K, T, V] -> [B, K, T]` of the drawn tokens, 0 on padding."""
    picked = np.take_along_axis(np.asarray(logps), np.asarray(out.tokens)[..., None], -1)[..., 0]
    return np.where(out.mask, picked, 0)


def rows(out):
    """Token lists of all completions."""
    flat = zip(
        out.tokens.reshape(-1, out.tokens.shape[-1]), out.mask.reshape(-1, out.mask.shape[-1])
    )
    return [np.asarray(tokens)[np.asarray(mask)].tolist() for tokens, mask in flat]


# --- tokens and log-probs ---------------------------------------------------------------------


def test_greedy_tokens_are_the_argmax_of_each_sequence_run_alone():
    policy, params = tiny_policy()
    out = sampled(temperature=0.0)
    logits = predicting_logits(policy, params, made_prompts(), out)
    np.testing.assert_array_equal(np.where(out.mask, logits.argmax(-1), 0), out.tokens)
    assert (out.logps == 0).all()
    own = chosen(jax.nn.log_softmax(logits), out)
    np.testing.assert_allclose(out.token_logps["policy"], own, atol=1e-4)


def test_log_probs_are_those_of_the_sequence_run_alone():
    policy, params = tiny_policy()
    out = sampled()
    logits = predicting_logits(policy, params, made_prompts(), out)
    np.testing.assert_allclose(out.logps, chosen(jax.nn.log_softmax(logits), out), atol=1e-4)
    np.testing.assert_array_equal(out.logps, out.token_logps["policy"])


def test_drawn_and_own_log_probs_differ_by_temperature_and_truncation():
    policy, params = tiny_policy()
    shape = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
    out = sampled(**shape)
    logits = predicting_logits(policy, params, made_prompts(), out)
    drawn = jax.nn.log_softmax(filtered(jnp.array(logits), **shape))
    np.testing.assert_allclose(out.logps, chosen(drawn, out), atol=1e-4)
    own = chosen(jax.nn.log_softmax(logits), out)
    np.testing.assert_allclose(out.token_logps["policy"], own, atol=1e-4)
    assert np.abs(out.logps - own).max() > 0.1


def test_scanned_layers_give_the_tokens_of_unrolled_ones():
    scanned, _ = tiny_policy(unroll=False)
    np.testing.assert_array_equal(sampled(policy=scanned).tokens, sampled().tokens)


def test_bfloat16_model_gives_float32_log_probs():
    policy, _ = tiny_policy(compute_dtype="bfloat16")
    out = sampled(policy=policy)
    assert out.logps.dtype == jnp.float32
    assert (out.logps[out.mask] < 0).all()
    assert jnp.isfinite(out.logps).all()


# --- where a completion ends ------------------------------------------------------------------


def test_stop_token_ends_a_completion_and_only_there_it_is_finished():
    out = sampled(key=1)
    assert out.finished.any()
    assert not out.finished.all()
    finish = np.asarray(out.finish).ravel()
    for tokens, reason in zip(rows(out), finish):
        stopped = reason == Finish.STOP_TOKEN
        assert stopped == (STOP[0] in tokens)
        assert tokens.count(STOP[0]) == int(stopped)
        assert tokens[-1] == STOP[0] if stopped else len(tokens) == T
    assert (np.asarray(out.tokens)[~np.asarray(out.mask)] == 0).all()
    assert set(finish.tolist()) == {Finish.STOP_TOKEN, Finish.LENGTH}


def test_stop_sequence_ends_a_completion_with_its_last_token():
    free = rows(sampled())
    pair, triple = tuple(free[0][3:5]), tuple(free[4][6:9])
    # Begins in the prompt, and so does not count.
    across = (int(made_prompts().tokens[1, 6]), free[3][0])
    out = sampled(stop_sequences=(pair, triple, across))
    for before, after, reason in zip(free, rows(out), np.asarray(out.finish).ravel()):
        ends = [
            i
            for i in range(1, len(before) + 1)
            if tuple(before[max(0, i - 2) : i]) == pair
            or tuple(before[max(0, i - 3) : i]) == triple
        ]
        end = min(ends, default=len(before))
        assert after == before[:end]
        assert (reason == Finish.STOP_SEQUENCE) == bool(ends)
    assert int(out.finish[0, 0]) == Finish.STOP_SEQUENCE
    assert int(out.finish[1, 1]) == Finish.STOP_SEQUENCE


def test_stop_token_goes_before_a_stop_sequence_that_it_ends():
    free = sampled(key=1)
    stopped = np.asarray(free.finish) == Finish.STOP_TOKEN
    b, k = np.argwhere(stopped & (np.asarray(free.mask).sum(-1) > 1))[0]
    tokens = np.asarray(free.tokens[b, k])[np.asarray(free.mask[b, k])]
    out = sampled(key=1, stop_sequences=(tuple(tokens[-2:].tolist()),))
    assert int(out.finish[b, k]) == Finish.STOP_TOKEN


def test_minimum_length_keeps_the_stop_token_away():
    out = sampled(min_new_tokens=6)
    assert not (out.tokens[..., :6] == STOP[0]).any()
    assert (out.mask.sum(-1) >= 7).all()
    assert out.finished.any()


def test_minimum_length_overlooks_stop_sequences():
    free = rows(sampled())[0]
    early, late = tuple(free[2:4]), tuple(free[8:10])
    out = sampled(min_new_tokens=6, stop_sequences=(early, late), stop=())
    assert rows(out)[0] == free[:10]
    assert int(out.finish[0, 0]) == Finish.STOP_SEQUENCE


STEPS = []


def counting_policy():
    """Notes its steps; token 1 until prompt i has `params[i]` tokens, then the stop token."""

    def hidden(ends, index):
        return jax.nn.one_hot(jnp.where(index + 1 >= ends, 2, 1), 4)

    def prefill(ends, tokens, lengths, candidates, max_new):
        return jnp.zeros(()), hidden(ends, 0)

    def step(ends, cache, tokens, index):
        jax.debug.callback(lambda i: STEPS.append(int(i)), index)
        return cache, jnp.broadcast_to(hidden(ends, index + 1)[:, None], (*tokens.shape, 4))

    head = lambda ends, hidden: 100.0 * hidden  # noqa: E731
    return Policy(None, None, head, None, None, Decode(prefill, step))


def test_decoding_ends_with_the_last_row_that_is_done():
    policy = counting_policy()
    for ends, steps in (((2, 5, 3, 1), 4), ((1, 1, 1, 1), 0), ((99, 99, 1, 99), T - 1)):
        STEPS.clear()
        out = sampled(policy=policy, params=jnp.array(ends))
        jax.effects_barrier()
        assert out.mask.sum(-1).tolist() == [[min(n, T)] * 3 for n in ends]
        assert len(STEPS) == steps


# --- the cache -------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_for_all_its_candidates():
    policy, params = tiny_policy()
    prompts = made_prompts()
    prefill = jax.jit(policy.decode.prefill, static_argnums=(3, 4))

    def flops(times, candidates):
        tokens, lengths = (jnp.repeat(x, times, 0) for x in (prompts.tokens, prompts.lengths))
        lowered = prefill.lower(params, tokens, lengths, candidates, T)
        return lowered.cost_analysis()["flops"]

    one = flops(1, 1)
    assert flops(1, 16) == pytest.approx(one, rel=0.01)
    assert flops(16, 1) == pytest.approx(16 * one, rel=0.1)


def test_the_cache_lies_over_the_mesh():
    policy, params = tiny_policy()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
    prompts = made_prompts()
    prefill = jax.jit(policy.decode.prefill, static_argnums=(3, 4))
    with jax.set_mesh(mesh):
        cache, _ = prefill(placed, prompts.tokens, prompts.lengths, 3, T)
    assert len(cache.layers) == 4  # keys and values of the prompts and of what is drawn
    for x in cache.layers:
        # Layers, rows over data and fsdp, heads of keys over tensor, positions, numbers of a head.
        parts = [whole / part for whole, part in zip(x.shape, x.sharding.shard_shape(x.shape))]
        assert parts == [1, 4, 2, 1, 1], (x.shape, x.sharding)


# --- random keys ------------------------------------------------------------------------------


def test_tokens_do_not_depend_on_batch_size_padding_or_number_of_candidates():
    whole = sampled(num_candidates=3)
    prompts = made_prompts()
    one = PromptBatch(prompts.tokens[1:2, :7], prompts.lengths[1:2], prompts.ids[1:2])
    alone = sampled(one, num_candidates=1)
    np.testing.assert_array_equal(alone.tokens[0, 0], whole.tokens[1, 0])
    wide = PromptBatch(jnp.pad(prompts.tokens, ((0, 0), (0, 9))), prompts.lengths, prompts.ids)
    longer = sampled(wide, num_candidates=3, max_new_tokens=T + 8)
    np.testing.assert_array_equal(longer.tokens[..., :T], whole.tokens)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_tokens_on_a_mesh_are_those_of_one_device(sizes):
    policy, params = tiny_policy()
    mesh = make_mesh(**sizes)
    placed = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
    prompts = made_prompts((3, 7, 5, 1, 2))  # which the devices do not divide
    out = sampled(prompts, params=placed, mesh=mesh, top_p=0.9)
    alone = sampled(prompts, top_p=0.9)
    np.testing.assert_array_equal(out.tokens, alone.tokens)
    np.testing.assert_array_equal(out.finish, alone.finish)
    np.testing.assert_allclose(out.logps, alone.logps, atol=1e-4)
    even = sampled(made_prompts((3,) * 8), params=placed, mesh=mesh, top_p=0.9)
    assert len(even.tokens.sharding.device_set) == 8
    assert not even.tokens.sharding.is_fully_replicated


@pytest.mark.slow
def test_no_text_of_a_real_model_depends_on_what_it_is_drawn_with(shared_data):
    folder = shared_data / "model_stories260k"
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    policy, params = make_policy(config), load_params(folder, config)
    starts = (
        "Once upon a time",
        "Lily and Tom went to the park. They saw",
        "The",
        "One day, a dog",
    )
    ends = ("", " and", " who", " in", " but", " with", " as", " so")
    ids = [tokenizer.encode_prompt(start + end) for start in starts for end in ends]

    def draw(chosen, width=24, candidates=8, mesh=None, length=32):
        own = params
        if mesh is not None:
            own = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
        tokens = np.zeros((len(chosen), width), np.int32)
        for row, i in zip(tokens, chosen):
            row[: len(ids[i])] = ids[i]
        prompts = PromptBatch(tokens, np.array([len(ids[i]) for i in chosen]), np.array(chosen))
        settings = SamplingConfig(max_new_tokens=length, num_candidates=candidates)
        sampler = make_sampler(policy, settings, tokenizer.stop_ids, mesh=mesh)
        out = sampler(own, prompts, jax.random.key(7))
        return np.where(out.mask, out.tokens, -1)[..., :32]

    every = list(range(len(ids)))
    whole = draw(every)
    assert whole.shape == (32, 8, 32)
    in_parts = np.concatenate([draw(every[i : i + 8]) for i in range(0, 32, 8)])
    np.testing.assert_array_equal(in_parts, whole)
    np.testing.assert_array_equal(draw(every[::-1], width=64)[::-1], whole)
    np.testing.assert_array_equal(draw(every, candidates=2), whole[:, :2])
    np.testing.assert_array_equal(draw(every, length=48), whole)
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        np.testing.assert_array_equal(draw(every, mesh=make_mesh(**sizes)), whole)


def test_candidates_and_keys_differ_and_the_same_key_repeats():
    a, b = sampled(key=0), sampled(key=1)
    assert (a.tokens[:, 0] != a.tokens[:, 1]).any()
    assert (a.tokens != b.tokens).any()
    np.testing.assert_array_equal(a.tokens, sampled(key=0).tokens)


def test_second_round_does_not_compile_again():
    policy, _ = tiny_policy()
    sampled()
    mixed(0.25)
    other = jax.block_until_ready(policy.init(jax.random.key(7)))
    prompts = jax.block_until_ready(made_prompts(seed=3))
    before = _sample._cache_size()
    with compilations() as compiled:
        sampled(prompts, key=5, params=other)
        mixed(0.5)
    assert _sample._cache_size() == before
    assert compiled.count <= 3  # the seed's key and the weights' array, not the sampler


# --- mixtures ---------------------------------------------------------------------------------


def test_mixture_is_geometric_and_carries_the_log_probs_of_both():
    policy, params = tiny_policy()
    _, reference = tiny_policy(1)
    out = mixed(0.25)
    own, theirs = (
        jax.nn.log_softmax(predicting_logits(policy, p, made_prompts(), out))
        for p in (params, reference)
    )
    mixture = jax.nn.log_softmax((0.75 * own + 0.25 * theirs) / 0.8)
    np.testing.assert_allclose(out.logps, chosen(mixture, out), atol=1e-4)
    np.testing.assert_allclose(out.token_logps["policy"], chosen(own, out), atol=1e-4)
    np.testing.assert_allclose(out.token_logps["reference"], chosen(theirs, out), atol=1e-4)


def test_mixture_of_weight_zero_or_one_is_one_of_the_policies():
    np.testing.assert_array_equal(mixed(0.0).tokens, sampled(temperature=0.8).tokens)
    reference = sampled(params=tiny_policy(1)[1], temperature=0.8)
    np.testing.assert_array_equal(mixed(1).tokens, reference.tokens)
    assert (mixed(0.5).tokens != reference.tokens).any()


def test_mixture_with_another_architecture():
    policy, params = tiny_policy()
    other, reference = tiny_policy(1, num_layers=1)
    config = SamplingConfig(max_new_tokens=5)
    sampler = make_mixture_sampler(policy, config, STOP, reference=other)
    sampler = functools.partial(sampler, reference_params=reference, mix=1.0)
    out = sampler(params, made_prompts(), jax.random.key(0))
    theirs = jax.nn.log_softmax(predicting_logits(other, reference, made_prompts(), out))
    np.testing.assert_allclose(out.logps, chosen(theirs, out), atol=1e-4)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.0}, r"sampling.top_p must lie in \(0, 1\]; got 0"),
        ({"min_p": 1.5}, r"sampling.min_p must lie in \[0, 1\]; got 1.5"),
        ({"temperature": -1.0}, "sampling.temperature must be at least 0; got -1"),
        ({"temperature": float("nan")}, "sampling.temperature must be at least 0; got nan"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens must be at least 1; got 0"),
        ({"min_new_tokens": 5}, "min_new_tokens must not exceed max_new_tokens; got 5 and 4"),
        ({"stop_sequences": ((),)}, "stop_sequences holds an empty sequence"),
        ({"stop_sequences": ("ab",)}, "runs of token ids; got the text 'ab': tokenise it"),
        ({"top_k": 1.5}, "sampling.top_k must be a whole number; got 1.5"),
        ({"max_new_tokens": 4.0}, "sampling.max_new_tokens must be a whole number; got 4.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(tiny_policy()[0], SamplingConfig(**({"max_new_tokens": 4} | changes)), STOP)


def test_a_sampler_that_could_never_finish_is_refused():
    config = SamplingConfig(max_new_tokens=4)
    with pytest.raises(ValueError, match="stop_ids is empty"):
        make_sampler(tiny_policy()[0], config, ())
    with pytest.raises(ValueError, match=r"stop tokens \[40\] lie outside of the 40 tokens"):
        sampled(stop=(2, 40))
    with pytest.raises(ValueError, match="min_new_tokens forbids all 40 tokens"):
        sampled(stop=tuple(range(VOCABULARY)), min_new_tokens=1)


def test_prompts_that_do_not_fit_are_refused():
    prompts = made_prompts()
    with pytest.raises(ValueError, match="a prompt of 7 tokens and max_new_tokens=58 exceed the"):
        sampled(max_new_tokens=58)
    check_prompts((tiny_policy()[0],), prompts, 57)
    empty = dataclasses.replace(prompts, lengths=prompts.lengths.at[0].set(0))
    with pytest.raises(ValueError, match=r"must lie in 1..8, .*; they lie in 0..7"):
        sampled(empty)
    with pytest.raises(ValueError, match=r"must lie in 1..8, .*; they lie in 1..9"):
        sampled(dataclasses.replace(prompts, lengths=prompts.lengths.at[0].set(9)))
    with pytest.raises(ValueError, match=r"prompts are empty: tokens have shape \(0, 8\)"):
        sampled(jax.tree.map(lambda x: x[:0], prompts))
    with pytest.raises(ValueError, match=r"got shapes \(4, 8\), \(4,\) and \(3,\)"):
        sampled(dataclasses.replace(prompts, ids=prompts.ids[:3]))


def test_mixture_of_different_vocabularies_or_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"mix is the reference's weight .*; got 1.5"):
        mixed(1.5)
    policy, params = tiny_policy()
    other, reference = tiny_policy(1, vocab_size=41)
    config = SamplingConfig(max_new_tokens=4)
    sampler = make_mixture_sampler(policy, config, STOP, reference=other)
    with pytest.raises(ValueError, match="different vocabularies: 40 and 41 tokens"):
        sampler(params, made_prompts(), jax.random.key(0), reference_params=reference, mix=0.5)
