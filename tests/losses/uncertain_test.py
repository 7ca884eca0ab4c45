"""UPO: flip rates of each pair, and where they come from."""

import math

import numpy as np
import pytest

from paxo.losses.imitation import iterative_rpo_loss
from paxo.losses.noisy import cdpo_loss
from paxo.losses.pairwise import dpo_loss
from paxo.losses.uncertain import flip_rates_from, information_gain, upo_loss
from tests.losses.pairs import (
    LENGTHS,
    MARGINS,
    POLICY,
    REFERENCE,
    check_gradient,
    close,
    exact,
    gradient,
    softplus,
)
from tests.losses.tabular import made_logits, pairs, softmax, tilted

FLIPS = np.array([0.0, 0.1, 0.5, 0.3])


def test_it_is_conservative_dpo_with_a_flip_rate_per_pair():
    found = exact(upo_loss, POLICY, REFERENCE, LENGTHS, FLIPS, beta=0.3)
    z = 0.3 * MARGINS
    close(found, (1 - FLIPS) * softplus(-z) + FLIPS * softplus(z))
    constant = exact(upo_loss, POLICY, REFERENCE, LENGTHS, np.full(4, 0.2), beta=0.3)
    close(constant, exact(cdpo_loss, POLICY, REFERENCE, beta=0.3, label_smoothing=0.2))
    check_gradient(upo_loss, POLICY, REFERENCE, LENGTHS, FLIPS, beta=0.3, lam=0.2)


def test_sure_pairs_are_dpo_and_torn_ones_even():
    sure = exact(upo_loss, POLICY, REFERENCE, LENGTHS, np.zeros(4), beta=0.3)
    close(sure, exact(dpo_loss, POLICY, REFERENCE, beta=0.3))
    torn = [
        exact(upo_loss, x, y, LENGTHS, np.full(4, 0.5), beta=0.3)
        for x, y in ((POLICY, REFERENCE), (POLICY[:, ::-1], REFERENCE[:, ::-1]))
    ]
    close(*torn)
    assert (torn[0] >= math.log(2)).all()


def test_likelihood_is_the_chosens_mean_and_raises_it():
    found = exact(upo_loss, POLICY, REFERENCE, LENGTHS, np.zeros(4), beta=0.3, lam=0.7)
    close(found, exact(iterative_rpo_loss, POLICY, REFERENCE, LENGTHS, beta=0.3, alpha=0.7))


def test_soft_labels_of_a_bradley_terry_judge_have_their_minimum_at_the_best_policy():
    rewards, reference = np.random.default_rng(0).standard_normal(5), made_logits(1)
    best, beta = tilted(reference, rewards, 1 / 0.4), 0.4
    flips = 1 / (1 + np.exp(rewards[:, None] - rewards))
    policy, fixed = np.asarray(pairs(best)), np.asarray(pairs(reference))
    found = gradient(upo_loss, policy, fixed, np.ones_like(policy), flips, beta=beta)
    close(found, np.zeros_like(policy), atol=1e-6)
    assert softmax(best).max() > 0.3


def test_no_gradient_flows_through_the_flip_rates():
    found = gradient(upo_loss, POLICY, REFERENCE, LENGTHS, FLIPS, argnum=3, beta=0.3)
    assert not found.any()


def test_information_gain_is_the_entropy_that_the_passes_do_not_share():
    p = np.random.default_rng(0).uniform(0.05, 0.95, (10, 6))
    entropy = lambda x: -(x * np.log(x) + (1 - x) * np.log(1 - x))  # noqa: E731
    found = np.asarray(information_gain(np.stack([p, 1 - p], -1)))
    np.testing.assert_allclose(found, entropy(p.mean(0)) - entropy(p).mean(0), rtol=1e-4)
    assert (found > 0).all()
    assert (found <= math.log(2)).all()
    same = np.broadcast_to(np.array([0.8, 0.2]), (10, 3, 2))
    np.testing.assert_allclose(information_gain(same), np.zeros(3), atol=1e-6)
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert float(information_gain(certain)) == pytest.approx(math.log(2))
    np.testing.assert_allclose(
        flip_rates_from(np.array([0.0, math.log(2) / 2, 9.0])), [0, 0.25, 0.5], rtol=1e-6
    )
