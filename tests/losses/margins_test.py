"""Moved margins: offsets, other objectives, DPO-Positive's penalty, two betas, joint log-probs."""

import numpy as np
import pytest

from paxo.losses.length import r_dpo_loss
from paxo.losses.margins import dove_loss, dpop_loss, flex_dpo_loss, modpo_loss, odpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
    LENGTHS,
    MARGINS,
    POLICY,
    RATIOS,
    REFERENCE,
    close,
    exact,
    gradient,
    sigmoid,
    softplus,
)

BETA = 0.3
REWARDS = np.array([[3.0, 1.0], [0.5, 0.25], [7.0, 2.0], [4.0, 3.5]])
GAPS = REWARDS[:, 0] - REWARDS[:, 1]


def test_odpo_asks_for_the_scaled_gap_or_its_logarithm():
    linear = exact(odpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, alpha=0.7, offset="linear")
    close(linear, softplus(0.7 * GAPS - BETA * MARGINS))
    log = exact(odpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, alpha=0.7)
    close(log, softplus(0.7 * np.log(GAPS) - BETA * MARGINS))


@pytest.mark.parametrize("rewards", [[2.0, 2.0], [1.0, 3.0]])
def test_odpo_takes_a_tie_and_a_reversed_pair_as_the_smallest_gap(rewards):
    found = exact(odpo_loss, POLICY[0], REFERENCE[0], np.array(rewards), beta=BETA, min_gap=0.01)
    close(found, softplus(np.log(0.01) - BETA * MARGINS[0]))


def test_odpo_with_linear_offsets_is_modpo_with_unit_weights():
    odpo = exact(odpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, offset="linear")
    close(odpo, exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, w0=1.0, w1=1.0))


def test_odpo_offset_by_lengths_is_r_dpo():
    odpo = exact(odpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, alpha=-0.1, offset="linear")
    close(odpo, exact(r_dpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, alpha=0.1))


def test_modpo_compares_what_is_left_of_each_reward():
    rest = (BETA * RATIOS - 0.4 * REWARDS) / 0.6
    found = exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, w0=0.6, w1=0.4)
    close(found, softplus(-(rest[:, 0] - rest[:, 1])))


def test_modpo_with_a_hinge_is_the_hinge_of_the_same_margin():
    logistic = exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, w0=0.6, w1=0.4)
    hinge = exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, w0=0.6, w1=0.4, link="hinge")
    close(hinge, np.maximum(0, 1 + np.log(np.expm1(logistic))))


def test_modpo_depends_on_the_ratios_of_beta_and_weights():
    found = exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=BETA, w0=0.6, w1=0.4)
    close(found, exact(modpo_loss, POLICY, REFERENCE, REWARDS, beta=3 * BETA, w0=1.8, w1=1.2))


def test_modpo_is_least_where_the_weighted_sum_of_objectives_is_optimal():
    # Pairs labelled by a Bradley-Terry judge of the first objective's rewards a, with the second's
    # rewards b given: beta log(pi/ref) = w0 a + w1 b leaves no expected gradient.
    w0, w1, reference = 0.7, 0.3, np.array([-1.0, -2.0])
    a, b = np.array([0.4, -0.9]), np.array([-1.5, 2.0])
    optimum = reference + (w0 * a + w1 * b) / BETA
    wins = sigmoid(a[0] - a[1])
    options = {"beta": BETA, "w0": w0, "w1": w1}
    won = gradient(modpo_loss, optimum, reference, b, **options)
    lost = gradient(modpo_loss, optimum[::-1], reference[::-1], b[::-1], **options)[::-1]
    close(wins * won + (1 - wins) * lost, np.zeros(2), atol=1e-12)


@pytest.mark.parametrize("loss", [odpo_loss, modpo_loss])
def test_no_gradient_flows_through_given_rewards(loss):
    assert not gradient(loss, POLICY, REFERENCE, REWARDS, argnum=2).any()


def test_dpop_charges_a_fallen_chosen_completion_inside_the_sigmoid():
    penalty = np.maximum(0, REFERENCE[:, 0] - POLICY[:, 0])
    found = exact(dpop_loss, POLICY, REFERENCE, beta=BETA, lam=5.0)
    close(found, softplus(-BETA * (MARGINS - 5 * penalty)))
    dpo = exact(dpo_loss, POLICY, REFERENCE, beta=BETA)
    risen = RATIOS[:, 0] >= 0
    assert 0 < risen.sum() < 4
    close(found[risen], dpo[risen])
    assert (found[~risen] > dpo[~risen]).all()


def test_dpop_multiplies_the_push_on_a_fallen_chosen_completion():
    u = BETA * (MARGINS - 5 * np.maximum(0, -RATIOS[:, 0]))
    more = np.where(RATIOS[:, 0] < 0, 6.0, 1.0)
    found = gradient(dpop_loss, POLICY, REFERENCE, beta=BETA, lam=5.0)
    close(found, BETA * sigmoid(-u)[:, None] * np.stack([-more, np.ones(4)], -1))


def test_flex_dpo_damps_the_push_on_the_rejected_completion():
    u = 0.2 * RATIOS[:, 0] - 0.05 * RATIOS[:, 1]
    close(exact(flex_dpo_loss, POLICY, REFERENCE, beta_w=0.2, beta_l=0.05), softplus(-u))
    found = gradient(flex_dpo_loss, POLICY, REFERENCE, beta_w=0.2, beta_l=0.05)
    close(found, sigmoid(-u)[:, None] * np.array([-0.2, 0.05]))
    alone = exact(flex_dpo_loss, POLICY, REFERENCE, beta_w=0.2, beta_l=0.0)
    close(alone, softplus(-0.2 * RATIOS[:, 0]))


def test_dove_is_dpo_on_responses_only_where_the_instructions_are_the_same():
    same = np.array([[-3.0, -3.0]])
    arrays = (POLICY + same, REFERENCE + 2 * same)
    close(exact(dove_loss, *arrays, beta=BETA), exact(dpo_loss, POLICY, REFERENCE, beta=BETA))
    policy, reference = np.array([[-3.0, -8.0]]), np.array([[-4.0, -7.0]])
    found = exact(dove_loss, POLICY + policy, REFERENCE + reference, beta=BETA)
    # The instructions' log-ratios, 1 and -1, are part of the margin.
    close(found, softplus(-BETA * (MARGINS + 2)))
