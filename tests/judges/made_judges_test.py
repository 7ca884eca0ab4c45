"""Judges from rewards, from matrices, and ensembles of judges: answers known in closed form."""

import math

import numpy as np
import pytest

from paxo.judges import (
    CheckedJudge,
    JudgeEnsemble,
    JudgeError,
    MatrixJudge,
    RewardEnsemble,
    RewardJudge,
    RuleJudge,
    bradley_terry,
    cyclic_matrix,
)

TEXTS = [["a", "bb", "ccc"], ["dddd", "e", "f"]]


def lengths(prompts, completions):
    return [[float(len(text)) for text in row] for row in completions]


def saying(*probabilities):
    """A judge of two completions that gives prompt b the b-th probability."""
    return lambda prompts, completions, wanted=None: np.array(
        [[[0.5, p], [1 - p, 0.5]] for p in probabilities]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bradley_terry_is_the_sigmoid_of_the_difference_and_exactly_antisymmetric(dtype):
    scores = np.random.default_rng(0).normal(0, 5, (40, 4)).astype(dtype)
    found = bradley_terry(scores)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found + np.swapaxes(found, 1, 2), 1)
    difference = scores[:, :, None].astype(float) - scores[:, None, :]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-difference)), rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("margin", [700.0, 1e4, math.inf])
def test_bradley_terry_is_finite_at_any_margin_and_equal_rewards_tie(margin):
    with np.errstate(all="raise"):
        found = bradley_terry(np.array([margin, 0.0, margin]))
    assert found[0, 1] == 1
    assert found[1, 0] == (math.exp(-700) if margin == 700 else 0)
    assert found[0, 2] == 0.5


def test_the_temperature_divides_the_reward():
    judge = RewardJudge(lengths, temperature=2.0)
    assert judge(["p", "q"], TEXTS)[0, 1, 0] == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_a_reward_judge_scores_a_batch_in_one_call():
    calls = []

    def score(prompts, completions):
        calls.append(len(prompts))
        return lengths(prompts, completions)

    found = RewardJudge(score)(["p", "q"], TEXTS, wanted=np.eye(3))
    assert calls == [2]
    np.testing.assert_array_equal(found, bradley_terry(lengths(None, TEXTS)))


@pytest.mark.parametrize(
    ("scores", "says"), [([[1.0, math.nan]], "completion 1"), ([1.0, 2.0], r"shape \(1, 2\)")]
)
def test_a_reward_that_is_no_number_is_named(scores, says):
    with pytest.raises(JudgeError, match="'rewards'.*" + says):
        RewardJudge(lambda p, c: scores)(["p"], [["a", "b"]])


@pytest.mark.parametrize("num", [3, 5, 7])
def test_in_a_circle_every_class_wins_and_loses_alike_so_no_reward_tells_them_apart(num):
    matrix = cyclic_matrix(num, win=0.8)
    np.testing.assert_array_equal(matrix + matrix.T, 1)
    np.testing.assert_allclose(matrix.mean(1), 0.5)
    assert matrix[1, 0] == 0.8
    assert matrix[0, num - 1] == 0.8


def test_completions_are_compared_by_their_classes():
    judge = MatrixJudge(cyclic_matrix(win=0.9), lambda prompt, text: len(text) - len(prompt))
    found = judge(["", "p"], [["", "a", "bb"], ["a", "bb", "a"]])
    np.testing.assert_array_equal(found[0], cyclic_matrix(win=0.9))
    np.testing.assert_array_equal(found[1], cyclic_matrix(win=0.9)[np.ix_([0, 1, 0], [0, 1, 0])])
    np.testing.assert_array_equal(
        found, CheckedJudge(judge)(["", "p"], [["", "a", "bb"], ["a", "bb", "a"]])
    )


@pytest.mark.parametrize("value", [3, -1, 0.5])
def test_a_class_outside_the_matrix_is_named(value):
    judge = MatrixJudge(cyclic_matrix(), lambda prompt, text: value)
    with pytest.raises(JudgeError, match=f"prompt 0, completion 0: expected a class.*got {value}"):
        judge(["p"], [["a", "b"]])


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (np.full((2, 3), 0.5), r"\[C, C\]; got \(2, 3\)"),
        ([[0.5, 0.9], [0.9, 0.5]], r"pair \(0, 1\)"),
        ([[0.0, 1.0], [0.0, 0.5]], "diagonal"),
        ([[0.5, math.nan], [math.nan, 0.5]], "wanted"),
    ],
)
def test_a_matrix_that_is_no_preference_is_refused_when_the_judge_is_built(matrix, says):
    with pytest.raises(ValueError, match=says):
        MatrixJudge(matrix, lambda prompt, text: 0)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: cyclic_matrix(4), "odd"),
        (lambda: cyclic_matrix(win=0.5), r"\(0.5, 1\]"),
        (lambda: RewardJudge(lengths, temperature=0), "temperature"),
        (lambda: RewardEnsemble([]), "at least one member"),
        (lambda: RewardEnsemble([3]), "member 0 must be callable"),
        (lambda: RewardEnsemble([lengths], "median"), "mean, wco, uwo; got 'median'"),
        (lambda: RewardEnsemble([lengths], lam=-1), "lam"),
        (lambda: RewardEnsemble([lengths], ddof=2), "ddof"),
        (lambda: RewardEnsemble([lengths], temperature=-1), "temperature"),
        (lambda: JudgeEnsemble([]), "at least one member"),
        (lambda: JudgeEnsemble([saying(0.5)], "min"), "'min'"),
        (lambda: JudgeEnsemble([saying(0.5)], lam=-1), "lam"),
    ],
)
def test_settings_are_checked_when_a_judge_is_built(build, says):
    with pytest.raises((ValueError, TypeError), match=says):
        build()


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", [2.0, 1.0]), ("wco", [1.0, 0.0]), ("uwo", [2 - 0.5 * 1.0, 1 - 0.5 * 1.0])],
)
def test_rewards_of_an_ensemble_are_combined_before_they_are_compared(how, expected):
    members = [lambda p, c: [[1.0, 0.0]], lambda p, c: [[3.0, 2.0]]]
    judge = RewardEnsemble(members, how)
    np.testing.assert_allclose(judge.scores(["p"], [["a", "b"]]), [expected])
    assert judge(["p"], [["a", "b"]])[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-1)))


def test_uncertainty_weighting_punishes_the_completion_that_members_disagree_on():
    members = [lambda p, c: [[0.0, 1.0]], lambda p, c: [[4.0, 1.0]]]
    assert RewardEnsemble(members, "mean")(["p"], [["a", "b"]])[0, 0, 1] > 0.5
    assert RewardEnsemble(members, "uwo")(["p"], [["a", "b"]])[0, 0, 1] < 0.5


def test_a_faulty_member_is_named_by_its_number():
    with pytest.raises(JudgeError, match="reward ensemble, member 1"):
        RewardEnsemble([lengths, lambda p, c: [[1.0, math.nan]]])(["p"], [["a", "b"]])
    with pytest.raises(JudgeError, match=r"judge ensemble, member 1.*prompt 0"):
        JudgeEnsemble([saying(0.5), lambda p, c, w=None: np.full((1, 2, 2), 0.6)])(
            ["p"], [["a", "b"]]
        )


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # members say (.6, .9), (.6, .2), (.1, .3): means .75, .4, .2; variances .0225, .04, .01
        ("mean", [0.75, 0.4, 0.2]),
        ("wco", [0.6, 0.5, 0.3]),
        ("uwo", [0.75 - 2 * 0.0225, 0.4 + 2 * 0.04, 0.2 + 2 * 0.01]),
    ],
)
def test_preferences_of_an_ensemble_are_combined_alike_from_both_sides(how, expected):
    judge = JudgeEnsemble([saying(0.6, 0.6, 0.1), saying(0.9, 0.2, 0.3)], how, lam=2.0)
    found = judge(["p"] * 3, [["a", "b"]] * 3)
    np.testing.assert_allclose(found[:, 0, 1], expected)
    np.testing.assert_array_equal(found + np.swapaxes(found, 1, 2), 1)


def test_the_variance_draws_no_further_than_a_tie():
    judge = JudgeEnsemble([saying(0.0, 1.0), saying(1.0, 0.9)], "uwo", lam=1e3)
    assert judge(["p"] * 2, [["a", "b"]] * 2)[:, 0, 1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("how", ["mean", "wco", "uwo"])
def test_an_ensemble_of_one_is_its_member_and_a_missing_answer_stays_missing(how):
    judge = RuleJudge(lambda prompt, text: len(text))
    np.testing.assert_array_equal(
        JudgeEnsemble([judge], how)(["p", "q"], TEXTS), judge(["p", "q"], TEXTS)
    )
    found = JudgeEnsemble([saying(math.nan), saying(0.9)], how)(["p"], [["a", "b"]])
    assert np.isnan(found[0, 0, 1])
    assert found[0, 0, 0] == 0.5


def test_members_are_asked_for_the_wanted_comparisons_only():
    seen = []

    def member(prompts, completions, wanted=None):
        seen.append(wanted)
        return np.full((1, 2, 2), 0.5)

    wanted = np.array([[False, True], [False, False]])
    JudgeEnsemble([member, member])(["p"], [["a", "b"]], wanted)
    np.testing.assert_array_equal(seen, [wanted, wanted])
