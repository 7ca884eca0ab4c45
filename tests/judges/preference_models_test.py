"""General and pairwise preference models as judges, with made functions in their places."""

import math

import numpy as np
import pytest

from paxo.judges import CheckedJudge, EmbeddingJudge, JudgeError, PairModelJudge

TURNED = np.array([0.0, 2.0, 4.0]) * math.pi / 3
CIRCLE = np.stack([np.cos(TURNED), np.sin(TURNED)], -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def embedded(vectors):
    return lambda prompts, completions: vectors


def test_embeddings_on_a_circle_give_preferences_in_a_circle():
    found = EmbeddingJudge(embedded(CIRCLE[None]), temperature=0.5)(["p"], [["a", "b", "c"]])[0]
    p = sigmoid(math.sin(2 * math.pi / 3) / 0.5)
    np.testing.assert_allclose(
        found, [[0.5, p, 1 - p], [1 - p, 0.5, p], [p, 1 - p, 0.5]], rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embedding_preferences_are_exactly_antisymmetric_and_keep_their_tails(dtype):
    vectors = np.random.default_rng(0).normal(0, 2, (20, 4, 6)).astype(dtype)
    judge = EmbeddingJudge(embedded(vectors))
    found = judge(["p"] * 20, [["a", "b", "c", "d"]] * 20)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found + np.swapaxes(found, 1, 2), 1)
    np.testing.assert_array_equal(found, CheckedJudge(judge)(["p"] * 20, [list("abcd")] * 20))
    even, odd = vectors[..., 0::2].astype(float), vectors[..., 1::2].astype(float)
    scores = even @ np.swapaxes(odd, 1, 2) - odd @ np.swapaxes(even, 1, 2)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, sigmoid(scores / 0.1), rtol=2e-3, atol=1e-30)


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (np.zeros((1, 2, 3)), "even width; got 3"),
        (np.zeros((1, 2)), r"\(1, 2, D\); got \(1, 2\)"),
        (np.full((1, 2, 2), np.nan), "completion 0: expected a score; got nan"),
    ],
)
def test_embeddings_of_a_wrong_shape_are_named(vectors, says):
    with pytest.raises(JudgeError, match=says):
        EmbeddingJudge(embedded(vectors))(["p"], [["a", "b"]])
    with pytest.raises(ValueError, match="temperature"):
        EmbeddingJudge(embedded(vectors), temperature=0.0)


def test_a_pair_model_is_asked_in_both_orders_for_what_is_wanted_and_the_mean_counts():
    asked = []

    def verdicts(prompts, firsts, seconds):
        asked.extend(zip(prompts, firsts, seconds))
        return [[len(a) + 1.0, len(b)] for a, b in zip(firsts, seconds)]  # likes the first by 1

    judge = PairModelJudge(verdicts)
    wanted = np.zeros((3, 3), bool)
    wanted[2, 0] = wanted[0, 2] = True
    found = judge(["p", "q"], [["aaa", "b", "c"], ["a", "b", "cc"]], wanted)
    assert sorted(asked) == [
        ("p", "aaa", "c"), ("p", "c", "aaa"), ("q", "a", "cc"), ("q", "cc", "a"),
    ]  # fmt: skip
    expected = [(sigmoid(3) + 1 - sigmoid(-1)) / 2, (sigmoid(0) + 1 - sigmoid(2)) / 2]
    np.testing.assert_allclose(found[:, 0, 2], expected)
    np.testing.assert_array_equal(found[:, 0, 2] + found[:, 2, 0], 1)
    assert np.isnan(found[:, 1, [0, 2]]).all()
    assert judge.counts["compared"] == 2
    inconsistency = sigmoid(3) + sigmoid(-1) - 1 + sigmoid(0) + sigmoid(2) - 1
    assert judge.counts["inconsistency"] == pytest.approx(inconsistency)


def test_a_pair_model_is_not_called_for_nothing():
    def never(*args):
        raise AssertionError("called")

    found = PairModelJudge(never)(["p"], [["a", "b"]], np.zeros((2, 2), bool))
    np.testing.assert_array_equal(found, [[[0.5, np.nan], [np.nan, 0.5]]])


@pytest.mark.parametrize("answer", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, np.nan], [0.0, 0.0]]])
def test_verdicts_of_a_wrong_shape_are_named(answer):
    with pytest.raises(JudgeError, match="pairwise preference model"):
        PairModelJudge(lambda *args: answer)(["p"], [["a", "b"]])
