import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.models.sharding import make_mesh, param_shardings
from paxo.sampling import BeamConfig, SamplingConfig, make_beam_search, make_sampler
from paxo.sampling.beams import _search
from paxo.types import Decode, Finish, Policy
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.made import tiny_policy
from tests.sampling_test import logits_of, made_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

STOP = (2,)
SMALL = {"vocab_size": 5}
T = 3


def small_prompts(lengths=(3, 1)):
    prompts = made_prompts(lengths, width=4)
    return prompts.__class__(prompts.tokens % 5, prompts.lengths, prompts.ids)


def searched(prompts=None, reference=None, mesh=None, params=None, **changes):
    policy, own = tiny_policy(**SMALL)
    config = BeamConfig(**{"max_new_tokens": T, "num_beams": 4, "num_returned": 4} | changes)
    search = make_beam_search(policy, config, STOP, mesh=mesh)
    prompts = small_prompts() if prompts is None else prompts
    return search(own if params is None else params, prompts, reference_params=reference)


@functools.cache
def all_completions(prompt, seed=0):
    """Every completion, ended by the stop token or cut at T tokens, with its log-probs."""
    policy, _ = tiny_policy(**SMALL)
    _, params = tiny_policy(seed, **SMALL)
    whole = list(itertools.product(range(5), repeat=T))
    tokens = jnp.array([[*prompt, *completion] for completion in whole])
    logps = np.asarray(jax.nn.log_softmax(logits_of(policy, params, tokens)))
    found = {}
    for row, completion in zip(logps, whole):
        length = completion.index(2) + 1 if 2 in completion else T
        at = [row[len(prompt) - 1 + i, completion[i]] for i in range(length)]
        found[completion[:length]] = np.array(at)
    return found


def prompt_lists(prompts):
    return [tuple(t[:n].tolist()) for t, n in zip(np.asarray(prompts.tokens), prompts.lengths)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("with_reference", [False, True])
def test_a_search_wide_enough_finds_the_best_of_all_completions(length_penalty, with_reference):
    """The argmax over the whole tree, of likelihood and of the implicit reward."""
    prompts = small_prompts()
    reference = tiny_policy(1, **SMALL)[1] if with_reference else None
    out = searched(prompts, reference, num_beams=25, length_penalty=length_penalty)
    for b, prompt in enumerate(prompt_lists(prompts)):
        ours, theirs = all_completions(prompt), all_completions(prompt, 1)
        scores = {
            completion: (logps - with_reference * theirs[completion]).sum()
            / len(logps) ** length_penalty
            for completion, logps in ours.items()
        }
        best = sorted(scores, key=scores.get, reverse=True)[:4]
        drawn = out.completions
        for k, completion in enumerate(best):
            tokens = np.asarray(drawn.tokens[b, k])[np.asarray(drawn.mask[b, k])]
            assert tuple(tokens.tolist()) == completion
            np.testing.assert_allclose(out.scores[b, k], scores[completion], atol=1e-5)
            found = np.asarray(drawn.token_logps["policy"][b, k, : len(completion)])
            np.testing.assert_allclose(found, ours[completion], atol=1e-5)
            ended = Finish.STOP_TOKEN if completion[-1] == 2 else Finish.LENGTH
            assert int(drawn.finish[b, k]) == ended
            if with_reference:
                found = drawn.token_logps["reference"][b, k, : len(completion)]
                np.testing.assert_allclose(found, theirs[completion], atol=1e-5)
    assert (drawn.logps == 0).all()


def test_one_beam_takes_the_greedy_tokens():
    policy, params = tiny_policy()
    prompts = made_prompts()
    config = BeamConfig(max_new_tokens=16, num_beams=1, min_new_tokens=16)
    beam = make_beam_search(policy, config, STOP)(params, prompts).completions
    config = SamplingConfig(max_new_tokens=16, temperature=0.0, min_new_tokens=16)
    greedy = make_sampler(policy, config, STOP)(params, prompts, jax.random.key(0))
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    own = beam.token_logps["policy"]
    np.testing.assert_allclose(own, greedy.token_logps["policy"], atol=1e-4)


def tree_policy(tree):
    """`tree[depth]: {path: probabilities}` as a policy whose cache is the path itself."""
    depth = max(map(len, tree)) + 1
    table = np.full((3**depth, 3), 1 / 3)
    for path, probabilities in tree.items():
        table[code(path)] = probabilities
    table = jnp.log(jnp.array(table, jnp.float32))

    def prefill(params, tokens, lengths, candidates, max_new):
        return jnp.zeros((len(tokens), candidates), jnp.int32), jnp.broadcast_to(table[0], (1, 3))

    def step(params, paths, tokens, index):
        paths = paths * 3 + tokens + 1
        return paths, table[jnp.minimum(paths, len(table) - 1)]

    select = lambda paths, rows: jnp.take_along_axis(paths, rows, 1)  # noqa: E731
    return Policy(None, None, lambda p, h: h, None, None, Decode(prefill, step, select=select))


def code(path):
    number = 0
    for token in path:
        number = number * 3 + token + 1
    return number


def test_two_beams_find_what_one_beam_misses():
    # Greedily 0 (0.5) then at best 0.4: 0.2. Over 1 (0.4) then certainly 0: 0.4.
    tree = {(): (0.5, 0.4, 0.1), (0,): (0.4, 0.3, 0.3), (1,): (1.0, 0.0, 0.0)}
    prompts = small_prompts((1,))
    for width, wanted, probability in ((1, [0, 0], 0.2), (2, [1, 0], 0.4)):
        config = BeamConfig(max_new_tokens=2, num_beams=width)
        out = make_beam_search(tree_policy(tree), config, STOP)({}, prompts)
        assert out.completions.tokens[0, 0].tolist() == wanted
        assert float(out.scores[0, 0]) == pytest.approx(np.log(probability), abs=1e-6)


def test_length_penalty_prefers_the_longer_completion():
    # Stop at once 0.5; or 0 (0.45) and then stop for certain: 0.45, a mean of log 0.45 / 2.
    tree = {(): (0.45, 0.05, 0.5), (0,): (0.0, 0.0, 1.0)}
    prompts = small_prompts((1,))
    for penalty, wanted, score in ((0.0, [2, 0], np.log(0.5)), (1.0, [0, 2], np.log(0.45) / 2)):
        config = BeamConfig(max_new_tokens=2, num_beams=2, length_penalty=penalty)
        out = make_beam_search(tree_policy(tree), config, STOP)({}, prompts)
        assert out.completions.tokens[0, 0].tolist() == wanted
        assert float(out.scores[0, 0]) == pytest.approx(score, abs=1e-6)


def test_a_search_with_fewer_completions_than_beams_says_so():
    tree = {(): (0.0, 0.0, 1.0)}
    config = BeamConfig(max_new_tokens=2, num_beams=3, num_returned=3)
    out = make_beam_search(tree_policy(tree), config, STOP)({}, small_prompts((1,)))
    assert out.scores[0].tolist() == [0.0, -np.inf, -np.inf]
    assert out.completions.mask[0].tolist() == [[True, False], [False, False], [False, False]]
    assert not out.completions.finished[0, 1:].any()


def test_top_k_keeps_tokens_unlikely_under_both_away():
    prompts, reference = small_prompts(), tiny_policy(1, **SMALL)[1]
    out = searched(prompts, reference, top_k=2, num_beams=25)
    for b, prompt in enumerate(prompt_lists(prompts)):
        ours = all_completions(prompt)
        # The two most likely first tokens, each from any completion that begins with it.
        first = {completion[0]: logps[0] for completion, logps in ours.items()}
        likely = sorted(first, key=first.get)[-2:]
        assert set(np.asarray(out.completions.tokens[b, :, 0]).tolist()) <= {*likely}


def test_stop_sequences_and_minimum_length():
    free = searched(num_beams=2, num_returned=1, min_new_tokens=3)
    assert free.completions.mask.all()
    assert not free.completions.finished.any()
    pair = tuple(np.asarray(free.completions.tokens[0, 0, :2]).tolist())
    out = searched(num_beams=25, num_returned=25, stop_sequences=(pair,))
    tokens, mask = np.asarray(out.completions.tokens[0]), np.asarray(out.completions.mask[0])
    ended = [tuple(t[m].tolist()) for t, m in zip(tokens, mask)]
    assert pair in ended
    assert not any(row[:2] == pair and len(row) > 2 for row in ended)
    assert int(out.completions.finish[0, ended.index(pair)]) == Finish.STOP_SEQUENCE


def test_beams_on_a_mesh_are_those_of_one_device_and_nothing_compiles_again():
    policy, params = tiny_policy(**SMALL)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, param_shardings(policy.logical_axes, params, mesh))
    prompts = small_prompts((3, 1, 2))
    alone, out = searched(prompts), searched(prompts, params=placed, mesh=mesh)
    np.testing.assert_array_equal(alone.completions.tokens, out.completions.tokens)
    np.testing.assert_allclose(alone.scores, out.scores, atol=1e-5)
    size = _search._cache_size()
    with compilations() as compiled:
        searched(prompts, params=jax.tree.map(lambda x: x, params))
    assert _search._cache_size() == size
    assert compiled.count == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "beams.num_beams must be at least 1; got 0"),
        ({"num_returned": 5}, "beams.num_returned must not exceed num_beams; got 5 and 4"),
        ({"length_penalty": -1.0}, "beams.length_penalty must be at least 0; got -1"),
        ({"min_new_tokens": 9}, "beams.min_new_tokens must not exceed max_new_tokens; got 9 and 3"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BeamConfig(**{"max_new_tokens": T, "num_beams": 4} | changes)


def test_a_policy_that_cannot_reorder_its_cache_and_prompts_too_long_are_refused():
    without = Policy(None, None, None, None, None, Decode(None, None))
    with pytest.raises(ValueError, match=r"beam search needs policy.decode.select"):
        make_beam_search(without, BeamConfig(4, 2), STOP)
    with pytest.raises(ValueError, match="a prompt of 3 tokens and max_new_tokens=62 exceed the"):
        searched(max_new_tokens=62)
