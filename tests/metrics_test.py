"""Best and worst candidates, and what is reported of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from paxo.metrics import accuracies, best_and_worst, implicit_rewards, preference_metrics


def test_best_and_worst_have_the_highest_and_the_lowest_label():
    labels, where = jnp.array([[0.2, 0.9, -1.0], [3.0, 1.0, 2.0]]), jnp.ones((2, 3), bool)
    best, worst, differ = best_and_worst(labels, where)
    assert (best.tolist(), worst.tolist(), differ.tolist()) == ([1, 0], [2, 1], [True, True])


def test_masked_candidates_are_neither_best_nor_worst():
    labels = jnp.array([[9.0, 1.0, 2.0, -9.0], [jnp.nan, 1.0, 2.0, jnp.inf]])
    where = jnp.array([[False, True, True, False]] * 2)
    best, worst, differ = best_and_worst(labels, where)
    assert (best.tolist(), worst.tolist(), differ.tolist()) == ([2, 2], [1, 1], [True, True])


def test_ties_single_candidates_and_empty_groups_do_not_differ():
    labels = jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    where = jnp.array([[True, True], [True, False], [False, False]])
    assert not best_and_worst(labels, where)[2].any()


def test_a_tie_of_rewards_is_half_right():
    found = accuracies(jnp.array([2.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0]))
    assert found.tolist() == [1.0, 0.5, 0.0]


def made_inputs():
    """Ragged groups: a pair, its swap, one candidate only, none at all, and a tie of labels."""
    return {
        "policy_logps": jnp.array(
            [[-4.0, -6.0], [-3.0, -9.0], [-2.0, jnp.nan], [jnp.nan] * 2, [-1, -2]]
        ),
        "reference_logps": jnp.array(
            [[-5.0, -5.0], [-3.0, -4.0], [-1.0, jnp.inf], [0.0] * 2, [-1, -2]]
        ),
        "lengths": jnp.array([[2.0, 3.0], [4.0, 5.0], [1.0, 0.0], [0.0, 0.0], [6.0, 7.0]]),
        "labels": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]),
        "where": jnp.array([[True, True], [True, True], [True, False], [False] * 2, [True, True]]),
    }


def test_ragged_groups_count_where_they_have_a_chosen_and_a_rejected():
    found = preference_metrics(made_inputs(), scale=0.5)
    totals = {name: (float(m.total), float(m.count)) for name, m in found.items()}
    # rewards: group 0 (0.5, -0.5), 1 (-2.5, 0.0) as its second is chosen, 2 -0.5, 4 a tie of 0
    assert totals == {
        "rewards/chosen": (0.5 - 2.5 - 0.5 + 0.0, 4),
        "rewards/rejected": (-0.5 + 0.0, 2),
        "rewards/margins": (1.0 - 2.5, 2),
        "rewards/accuracies": (1.0, 2),
        "logps/chosen": (-4.0 - 9.0 - 2.0 - 1.0, 4),
        "logps/rejected": (-6.0 - 3.0, 2),
        "length/chosen": (2 + 5 + 1 + 6, 4),
        "length/rejected": (3 + 4, 2),
    }


def test_supervised_examples_have_no_rejected_candidate():
    inputs = {
        "policy_logps": jnp.array([[-4.0], [-2.0]]),
        "lengths": jnp.array([[2.0], [4.0]]),
        "labels": jnp.ones((2, 1)),
        "where": jnp.array([[True], [False]]),
    }
    found = preference_metrics(inputs, per_token=True)
    assert set(found) == {"rewards/chosen", "logps/chosen", "length/chosen"}
    assert float(found["rewards/chosen"].value) == -2.0
    assert float(found["logps/chosen"].value) == -4.0


def test_rewards_are_scaled_log_ratios_or_means_over_tokens():
    inputs = made_inputs()
    np.testing.assert_allclose(implicit_rewards(inputs, 0.1)[0], [0.1, -0.1], rtol=1e-6)
    del inputs["reference_logps"]
    found = implicit_rewards(inputs, 2.0, per_token=True)[0]
    np.testing.assert_allclose(found, [2 * -4 / 2, 2 * -6 / 3])


def test_many_candidates_compare_the_best_with_the_worst():
    inputs = {
        "policy_logps": jnp.array([[-1.0, -2.0, -4.0, -8.0]]),
        "lengths": jnp.ones((1, 4)),
        "labels": jnp.array([[2.0, 5.0, 1.0, 9.0]]),
        "where": jnp.array([[True, True, True, False]]),
    }
    found = preference_metrics(inputs)
    assert float(found["rewards/margins"].value) == pytest.approx(-2.0 + 4.0)


def test_unpaired_objectives_report_by_the_sign_of_the_label_and_leave_mismatched_out():
    inputs = {
        "policy_logps": jnp.array([[-4.0, -9.0], [-6.0, -9.0], [-3.0, jnp.nan]]),
        "reference_logps": jnp.array([[-5.0, -1.0], [-4.0, -1.0], [-3.5, jnp.nan]]),
        "lengths": jnp.array([[2.0, 7.0], [4.0, 7.0], [6.0, 0.0]]),
        "labels": jnp.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, jnp.nan]]),
        "where": jnp.array([[True, True], [True, True], [True, False]]),
    }
    found = preference_metrics(inputs, scale=2.0, unpaired=True)
    values = {name: (float(mean.value), float(mean.count)) for name, mean in found.items()}
    assert values == {
        "rewards/chosen": (2.0, 1), "rewards/rejected": (-1.5, 2),
        "logps/chosen": (-4.0, 1), "logps/rejected": (-4.5, 2),
        "length/chosen": (2.0, 1), "length/rejected": (5.0, 2),
        "rewards/accuracies": (pytest.approx(2 / 3), 3),
    }  # fmt: skip
