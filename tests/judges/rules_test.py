"""The judge that is a program."""

import numpy as np

from paxo.judges.rules import RuleJudge, preferences_from_scores


def test_a_preference_is_one_zero_or_a_half_by_the_scores():
    found = preferences_from_scores(np.array([[2.0, 1.0, 2.0]]))
    assert found.tolist() == [[[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]]


def test_preferences_of_both_orders_add_up_to_one():
    scores = np.random.default_rng(0).integers(0, 4, (5, 6)).astype(float)
    found = preferences_from_scores(scores)
    assert found.shape == (5, 6, 6)
    np.testing.assert_array_equal(found + np.swapaxes(found, -1, -2), 1)


def test_infinite_scores_are_compared_too():
    found = preferences_from_scores(np.array([-np.inf, 0.0, -np.inf]))
    assert found[0].tolist() == [0.5, 0, 0.5]
    assert found[1].tolist() == [1, 0.5, 1]


def test_the_judge_scores_each_completion_with_its_own_prompt():
    judge = RuleJudge(lambda prompt, completion: completion.count(prompt))
    prompts, completions = ["a", "b"], [["aa", "ab"], ["aa", "ab"]]
    assert judge.scores(prompts, completions).tolist() == [[2, 1], [0, 1]]
    assert judge(prompts, completions)[:, 0, 1].tolist() == [1, 0]


def test_the_answer_does_not_depend_on_the_order_of_presentation_nor_on_what_is_wanted():
    judge = RuleJudge(lambda prompt, completion: len(completion))
    texts = [["one", "three", "five", "to"]]
    order = [2, 0, 3, 1]
    whole = judge(["p"], texts)
    turned = judge(["p"], [[texts[0][i] for i in order]])
    np.testing.assert_array_equal(turned, whole[:, order][:, :, order])
    np.testing.assert_array_equal(judge(["p"], texts, wanted=np.eye(4)), whole)
