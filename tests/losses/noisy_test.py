"""Losses for noisy pairs: what label smoothing, unbiasing and weighting promise."""

import math

import numpy as np
import pytest

from paxo.losses.noisy import cdpo_loss, robust_dpo_loss, wpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
    MARGINS,
    POLICY,
    REFERENCE,
    close,
    exact,
    gradient,
    logit,
    pair_at,
    sigmoid,
    softplus,
)

Z = 0.3 * MARGINS


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_cdpo_is_the_cross_entropy_to_a_smoothed_label(eps):
    expected = (1 - eps) * softplus(-Z) + eps * softplus(Z)
    close(exact(cdpo_loss, POLICY, REFERENCE, beta=0.3, label_smoothing=eps), expected)
    p, entropy = sigmoid(Z), -(eps * math.log(eps or 1) + (1 - eps) * math.log(1 - eps))
    divergence = (1 - eps) * np.log((1 - eps) / p) + eps * np.log((eps or 1) / (1 - p))
    close(expected, divergence + entropy)


def test_cdpo_is_least_at_the_logit_of_the_smoothed_label_and_turns_round_there():
    eps = 0.2
    best = logit(1 - eps)
    policy, reference = pair_at([best, best - 0.5, best + 0.5], beta=0.3)
    value = exact(cdpo_loss, policy, reference, beta=0.3, label_smoothing=eps)
    close(value[0], -(eps * math.log(eps) + (1 - eps) * math.log(1 - eps)))
    slope = gradient(cdpo_loss, policy, reference, beta=0.3, label_smoothing=eps)[:, 0]
    close(slope[0], 0.0, atol=1e-12)
    assert slope[1] < 0 < slope[2]


def test_cdpo_with_the_pair_swapped_has_the_other_flip_rate():
    swapped = exact(cdpo_loss, POLICY[:, ::-1], REFERENCE[:, ::-1], beta=0.3, label_smoothing=0.9)
    close(swapped, exact(cdpo_loss, POLICY, REFERENCE, beta=0.3, label_smoothing=0.1))


@pytest.mark.parametrize("eps", [0.05, 0.3, 0.45])
def test_robust_dpo_is_dpo_on_average_over_flipped_labels(eps):
    given = exact(robust_dpo_loss, POLICY, REFERENCE, beta=0.3, eps=eps)
    flipped = exact(robust_dpo_loss, POLICY[:, ::-1], REFERENCE[:, ::-1], beta=0.3, eps=eps)
    close((1 - eps) * given + eps * flipped, exact(dpo_loss, POLICY, REFERENCE, beta=0.3), 1e-11)
    two_terms = ((1 - eps) * softplus(-Z) - eps * softplus(Z)) / (1 - 2 * eps)
    close(given, two_terms, 1e-11)


def test_robust_dpo_falls_without_bound_and_its_gradient_never_vanishes():
    eps, (policy, reference) = 0.2, pair_at([-50.0, 0.0, 50.0, 5000.0], beta=0.1)
    value = exact(robust_dpo_loss, policy, reference, beta=0.1, eps=eps)
    close(value[-1], -5000 * eps / (1 - 2 * eps))
    slope = gradient(robust_dpo_loss, policy, reference, beta=0.1, eps=eps)[:, 0]
    assert (slope <= -0.1 * eps / (1 - 2 * eps) + 1e-12).all()


# WPO: completions of two and three tokens, the rest of the array padding.
MASK = np.array([[True, True, False], [True, True, True]])
TOKENS = np.array([[-0.5, -1.5, -9.0], [-2.0, -0.25, -0.5]])
COLLISIONS = np.array([[-0.75, -1.0, 5.0], [-1.25, -0.5, -0.25]])
ALIGNMENT = (0.25 - 0.5) / 2 + (-0.75 + 0.25 - 0.25) / 3


def wpo(tokens=TOKENS, collisions=COLLISIONS, mask=MASK, policy=POLICY[0], **options):
    return exact(wpo_loss, policy, REFERENCE[0], tokens, collisions, mask, beta=0.3, **options)


def test_wpo_weighs_conservative_dpo_by_the_mean_alignment_of_both_completions():
    dpo = exact(cdpo_loss, POLICY[0], REFERENCE[0], beta=0.3, label_smoothing=0.1)
    close(wpo(label_smoothing=0.1), math.exp(ALIGNMENT) * dpo)


def test_wpo_clips_the_product_and_not_at_all_with_a_clip_of_zero():
    dpo = exact(dpo_loss, POLICY[0], REFERENCE[0], beta=0.3)
    likely = TOKENS + 1.0
    close(wpo(likely), dpo)
    close(wpo(likely, clip_max=1.25), 1.25 * dpo)
    close(wpo(likely, clip_max=0.0), math.exp(ALIGNMENT + 2) * dpo)


def test_wpo_is_dpo_for_a_uniform_and_for_a_deterministic_policy():
    dpo = exact(dpo_loss, POLICY[0], REFERENCE[0], beta=0.3)
    uniform = np.full((2, 3), math.log(1 / 50))
    close(wpo(uniform, uniform), dpo)
    close(wpo(np.zeros((2, 3)), np.zeros((2, 3))), dpo)


def test_wpo_weighs_tokens_that_the_policy_samples_by_one_on_average():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    collision = np.log(np.sum(probabilities**2))
    dpo = exact(dpo_loss, POLICY[0], REFERENCE[0], beta=0.3)
    weights = [
        # One token drawn by the policy, against a completion of which it is certain.
        wpo(
            np.array([[math.log(p)], [0.0]]),
            np.array([[collision], [0.0]]),
            np.ones((2, 1), bool),
            clip_max=0.0,
        )
        / dpo
        for p in probabilities
    ]
    close(np.sum(probabilities * weights), 1.0)


def test_no_gradient_flows_through_wpos_weight():
    arrays = (POLICY[0], REFERENCE[0], TOKENS, COLLISIONS, MASK)
    dpo = gradient(dpo_loss, POLICY[0], REFERENCE[0], beta=0.3)
    close(gradient(wpo_loss, *arrays, beta=0.3), math.exp(ALIGNMENT) * dpo)
    for argnum in (2, 3):
        assert not gradient(wpo_loss, *arrays, argnum=argnum, beta=0.3).any()
