"""Losses that anchor each reward: their formulas, optima and gradients."""

import math

import numpy as np

from paxo.losses.anchored import apo_down_loss, apo_zero_loss, cal_dpo_loss, nca_pair_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
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
U, V = (BETA * RATIOS).T


def test_nca_is_the_published_sum_and_infonca_of_two_is_dpo():
    expected = softplus(-U) + 0.5 * softplus(U) + 0.5 * softplus(V)
    close(exact(nca_pair_loss, POLICY, REFERENCE, beta=BETA), expected)
    close(exact(dpo_loss, POLICY, REFERENCE, beta=BETA), np.logaddexp(U, V) - U)


def test_nca_draws_the_chosen_reward_to_log_two_and_the_rejected_down():
    found = gradient(nca_pair_loss, POLICY, REFERENCE, beta=BETA)
    close(found, BETA * np.stack([1.5 * sigmoid(U) - 1, 0.5 * sigmoid(V)], -1))
    best = gradient(nca_pair_loss, np.array([math.log(2), 0.0]), np.zeros(2), beta=1.0)
    close(best, [0.0, 0.25])


def test_apo_zero_moves_both_rewards_away_from_zero():
    close(exact(apo_zero_loss, POLICY, REFERENCE, beta=BETA), sigmoid(-U) + sigmoid(V))
    found = gradient(apo_zero_loss, POLICY, REFERENCE, beta=BETA)
    close(found, BETA * np.stack([-sigmoid(U) * sigmoid(-U), sigmoid(V) * sigmoid(-V)], -1))


def test_apo_zero_stays_between_nought_and_two():
    extreme = np.array([[1e4, -1e4], [-1e4, 1e4]])
    close(exact(apo_zero_loss, extreme, np.zeros((2, 2))), [0.0, 2.0])


def test_apo_down_lowers_the_chosen_reward_and_the_rejected_one_below_it():
    close(exact(apo_down_loss, POLICY, REFERENCE, beta=BETA), sigmoid(U) + sigmoid(V - U))
    found = gradient(apo_down_loss, POLICY, REFERENCE, beta=BETA)
    pull = sigmoid(U - V) * sigmoid(V - U)
    close(found, BETA * np.stack([sigmoid(U) * sigmoid(-U) - pull, pull], -1))
    close(gradient(apo_down_loss, np.zeros(2), np.zeros(2), beta=BETA), [0.0, BETA / 4])


def test_cal_dpo_adds_half_of_the_hard_sppo_loss_to_a_logistic_without_beta():
    target = 1 / (2 * BETA)
    sppo_hard = (RATIOS[:, 0] - target) ** 2 + (RATIOS[:, 1] + target) ** 2
    expected = softplus(-MARGINS) + sppo_hard / 2
    close(exact(cal_dpo_loss, POLICY, REFERENCE, beta=BETA), expected)


def test_cal_dpo_has_the_mean_of_the_authors_code():
    # Theirs: two squared errors averaged over the batch, added to the logistic of each pair.
    target = 1 / (2 * BETA)
    mse = np.mean((RATIOS[:, 0] - target) ** 2), np.mean((RATIOS[:, 1] + target) ** 2)
    theirs = softplus(-MARGINS) + 0.5 * mse[0] + 0.5 * mse[1]
    close(np.mean(exact(cal_dpo_loss, POLICY, REFERENCE, beta=BETA)), np.mean(theirs))
