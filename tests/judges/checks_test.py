"""The contract of a judge's answer, and the place where it is enforced."""

import re

import numpy as np
import pytest

from paxo.judges.checks import (
    CheckedJudge,
    JudgeError,
    batch_sizes,
    checked_preferences,
    checked_scores,
    checked_wanted,
    preferences_of_pairs,
    wanted_pairs,
)

NAN = np.nan


def antisymmetric(num: int, *, batch: int = 2, dtype=np.float64, seed: int = 0) -> np.ndarray:
    half = np.random.default_rng(seed).random((batch, num, num)).astype(dtype)
    upper = np.triu(half, 1)
    return (upper + np.tril(1 - np.swapaxes(upper, 1, 2), -1) + np.eye(num) / 2).astype(dtype)


def only(*pairs: tuple[int, int], num: int = 3) -> np.ndarray:
    wanted = np.zeros((num, num), bool)
    for pair in pairs:
        wanted[pair] = True
    return wanted


def saying(answer):
    return lambda prompts, completions, wanted=None: answer


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_good_answer_comes_back_as_it_was(dtype):
    answer = antisymmetric(4, dtype=dtype)
    found = checked_preferences(answer, (2, 4))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, answer)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_made_exact_and_the_smaller_probability_keeps_its_digits(dtype):
    margins = np.random.default_rng(1).normal(0, 6, 500).astype(dtype)
    above, below = 1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(margins))
    assert (above + below != 1).any()
    answer = np.full((500, 2, 2), 0.5, dtype)
    answer[:, 0, 1], answer[:, 1, 0] = above, below
    found = checked_preferences(answer, (500, 2))
    np.testing.assert_array_equal(found + np.swapaxes(found, 1, 2), 1)
    smaller = np.minimum(found[:, 0, 1], found[:, 1, 0])
    np.testing.assert_array_equal(smaller, np.minimum(above, below))


@pytest.mark.parametrize("given", [0.0, NAN, 0.7, -3.0])
def test_the_half_that_was_wanted_decides_where_the_other_was_not_computed(given):
    answer = np.array([[[0.5, 0.7], [given, 0.5]]])
    found = checked_preferences(answer, (1, 2), only((0, 1), num=2))
    assert found[0, 0, 1] == 0.7
    assert found[0, 1, 0] == 1 - 0.7


def test_within_rounding_the_wanted_half_counts():
    answer = np.array([[[0.5, 0.2], [0.8 + 1e-7, 0.5]]])
    assert checked_preferences(answer, (1, 2), only((1, 0), num=2))[0, 1, 0] == 0.8 + 1e-7
    assert checked_preferences(answer, (1, 2), only((0, 1), num=2))[0, 0, 1] == 0.2


def test_what_was_not_wanted_may_be_missing_in_both_orders():
    answer = np.array([[[0.5, 0.7, NAN], [0.3, NAN, NAN], [NAN, NAN, 0.5]]])
    found = checked_preferences(answer, (1, 3), only((1, 0)))
    np.testing.assert_array_equal(found, [[[0.5, 0.7, NAN], [0.3, 0.5, NAN], [NAN, NAN, 0.5]]])


@pytest.mark.parametrize("rubbish", [0.0, 7.0, -np.inf])
def test_rubbish_where_nothing_was_wanted_becomes_a_missing_answer(rubbish):
    answer = np.full((1, 3, 3), rubbish)
    answer[0, 1, 2], answer[0, 2, 0] = 1.0, np.inf
    found = checked_preferences(answer, (1, 3), only((1, 2)))
    np.testing.assert_array_equal(found, [[[0.5, NAN, NAN], [NAN, 0.5, 1], [NAN, 0, 0.5]]])


def test_an_answer_to_the_other_order_answers_a_pair_of_which_both_orders_are_wanted():
    answer = np.array([[[0.5, NAN], [0.25, 0.5]]])
    assert checked_preferences(answer, (1, 2))[0, 0, 1] == 0.75


def test_a_missing_answer_that_was_wanted_is_named_or_kept():
    answer = antisymmetric(3)
    answer[1, 0, 2] = answer[1, 2, 0] = NAN
    wanted = only((2, 0), (0, 1))
    with pytest.raises(JudgeError, match=r"judge 'mine', prompt 1, pair \(2, 0\): expected an ans"):
        checked_preferences(answer, (2, 3), wanted, name="mine")
    kept = checked_preferences(answer, (2, 3), wanted, missing="keep")
    np.testing.assert_array_equal(np.isnan(kept), np.isnan(answer))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (
            (1, 0, 2),
            1.5,
            "prompt 1, pair (0, 2): expected a probability in [0, 1]; got P[i, j] = 1",
        ),
        ((0, 2, 1), -0.1, "prompt 0, pair (2, 1): expected a probability in [0, 1]"),
        ((1, 2, 2), 1.0, "prompt 1, pair (2, 2): expected 1/2 on the diagonal; got 1.0"),
        ((1, 0, 1), np.inf, "prompt 1, pair (0, 1): expected a probability in [0, 1]; got P[i, j]"),
    ],
)
def test_a_broken_entry_is_named_with_judge_prompt_and_pair(place, value, says):
    answer = antisymmetric(3)
    answer[place] = value
    with pytest.raises(JudgeError, match=re.escape("judge 'mine', " + says)):
        checked_preferences(answer, (2, 3), name="mine")


def test_halves_that_do_not_add_up_are_named_with_both_values():
    answer = antisymmetric(3)
    answer[1, 0, 1], answer[1, 1, 0] = 0.75, 0.5
    with pytest.raises(
        JudgeError, match=r"prompt 1, pair \(0, 1\).*= 0.75, P\[j, i\] = 0.5 \(2 of"
    ):
        checked_preferences(answer, (2, 3))


@pytest.mark.parametrize("shape", [(2, 3), (3, 3, 3), (2, 3, 2), (2, 3, 3, 1)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(JudgeError, match=re.escape("(2, 3, 3), [B, K, K] for 2 prompts with 3")):
        checked_preferences(np.full(shape, 0.5), (2, 3))


def test_text_is_no_probability():
    with pytest.raises(JudgeError, match="expected probabilities; got dtype <U1"):
        checked_preferences(np.full((1, 2, 2), "A"), (1, 2))


def test_lists_of_unequal_lengths_are_named():
    with pytest.raises(JudgeError, match="judge 'mine': expected an array; got lists of unequal"):
        checked_preferences([[[0.5, 0.5], [0.5]]], (1, 2), name="mine")
    with pytest.raises(JudgeError, match="judge 'mine': expected an array; got lists of unequal"):
        checked_scores([[0.5, 0.5], [0.5]], (2, 2), name="mine")


@pytest.mark.parametrize("num", [1, 2, 5])
def test_answers_of_pairs_fill_both_orders_exactly(num):
    pairs = wanted_pairs(None, num)
    assert len(pairs) == num * (num - 1) // 2
    answers = np.random.default_rng(0).random((7, len(pairs)))
    found = preferences_of_pairs(answers, pairs, num)
    np.testing.assert_array_equal(found + np.swapaxes(found, 1, 2), 1)
    np.testing.assert_array_equal(found, checked_preferences(found, (7, num)))


def test_each_pair_is_asked_once_whichever_orders_are_wanted():
    assert wanted_pairs(only((0, 1), (1, 0), (2, 1), (1, 1)), 3) == [(0, 1), (1, 2)]
    assert wanted_pairs(np.zeros((3, 3)), 3) == []
    assert np.isnan(preferences_of_pairs(np.zeros((1, 0)), [], 2)[0, 0, 1])


def test_a_checked_judge_hands_on_what_is_wanted_as_bools():
    seen = []

    def judge(prompts, completions, wanted=None):
        seen.append(wanted)
        return antisymmetric(2, batch=1)

    wanted = np.array([[0, 1], [0, 0]])
    CheckedJudge(judge)(["p"], [["a", "b"]], wanted)
    CheckedJudge(judge)(["p"], [["a", "b"]])
    assert seen[0].dtype == bool
    np.testing.assert_array_equal(seen[0], wanted)
    assert seen[1] is None


def test_a_judge_that_dies_is_named_and_its_error_is_kept():
    def judge(prompts, completions, wanted=None):
        raise KeyError("gone")

    with pytest.raises(JudgeError, match=r"judge 'mine' failed on 1 prompts with 2.*KeyError"):
        CheckedJudge(judge, "mine")(["p"], [["a", "b"]])


def test_missing_answers_pass_a_checked_judge_only_where_they_are_kept():
    holes = preferences_of_pairs([[NAN]], [(0, 1)], 2)
    with pytest.raises(JudgeError, match="wanted"):
        CheckedJudge(saying(holes))(["p"], [["a", "b"]])
    assert np.isnan(CheckedJudge(saying(holes), missing="keep")(["p"], [["a", "b"]])[0, 0, 1])


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        (["p"], [], "1 prompts, but completions of 0"),
        ([], [], "no prompt"),
        (["p"], [[]], "prompt 0: there is no completion"),
        (["p", "q"], [["a", "b"], ["a"]], "prompt 1: expected 2 completions, as prompt 0"),
    ],
)
def test_ragged_completions_are_named(prompts, completions, says):
    with pytest.raises(JudgeError, match=says):
        batch_sizes(prompts, completions)


def test_settings_are_checked_when_a_judge_is_built():
    with pytest.raises(ValueError, match="missing"):
        CheckedJudge(saying(None), missing="tie")
    with pytest.raises(TypeError, match="callable; got int"):
        CheckedJudge(3)
    with pytest.raises(JudgeError, match=r"wanted must have shape \(2, 2\)"):
        checked_wanted(np.ones((3, 3)), 2)


@pytest.mark.parametrize(
    ("scores", "width", "says"),
    [
        ([[1.0, 2.0, 3.0]], False, r"expected scores of shape \(1, 2\); got \(1, 3\)"),
        ([[1.0, NAN]], False, "prompt 0, completion 1: expected a score; got nan"),
        ([[1.0, 2.0]], True, r"shape \(1, 2, D\); got \(1, 2\)"),
        ([[[1.0], [NAN]]], True, "completion 1"),
    ],
)
def test_scores_are_checked_alike(scores, width, says):
    with pytest.raises(JudgeError, match=says):
        checked_scores(scores, (1, 2), width=width)
