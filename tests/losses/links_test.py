"""Other functions of DPO's margin: where they are flat, least, or not monotone."""

import math

import numpy as np
import pytest

from paxo.losses.links import discopop_loss, exo_pair_loss, rso_hinge_loss
from paxo.losses.noisy import cdpo_loss
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


def slope(loss, z, beta=0.5, **options):
    """d loss / d z."""
    return gradient(loss, *pair_at(z, beta), beta=beta, **options)[..., 0] / beta


def test_rso_hinge_ends_at_a_margin_of_one_over_gamma():
    close(exact(rso_hinge_loss, POLICY, REFERENCE, gamma=0.3), np.maximum(0.0, 1 - 0.3 * MARGINS))
    policy, reference = pair_at([0.999, 1.0, 1.5, -3.0], beta=0.3)
    assert not exact(rso_hinge_loss, policy, reference, gamma=0.3)[1:3].any()
    found = gradient(rso_hinge_loss, policy, reference, gamma=0.3)
    close(found[:, 0], [-0.3, 0.0, 0.0, -0.3])


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.4])
def test_exo_is_the_divergence_from_the_policys_to_the_smoothed_preference(eps):
    z = 0.3 * MARGINS
    p = sigmoid(z)
    expected = p * np.log(p / (1 - eps)) + (1 - p) * np.log((1 - p) / eps)
    found = exact(exo_pair_loss, POLICY, REFERENCE, beta=0.3, eps=eps)
    close(found, expected, 1e-10)
    close(found, p * z - softplus(z) - p * math.log(1 - eps) - (1 - p) * math.log(eps), 1e-10)


def test_exo_is_zero_where_conservative_dpo_is_least():
    best = logit(0.9)
    policy, reference = pair_at([best], beta=0.5)
    close(exact(exo_pair_loss, policy, reference, beta=0.5, eps=0.1), 0.0, atol=1e-12)
    for loss, options in ((exo_pair_loss, {"eps": 0.1}), (cdpo_loss, {"label_smoothing": 0.1})):
        close(slope(loss, [best], **options), 0.0, atol=1e-12)


def test_exos_gradient_vanishes_on_both_sides_unlike_conservative_dpos():
    z = np.array([-200.0, -3.0, 1.0, 200.0])
    p = sigmoid(z)
    close(slope(exo_pair_loss, z, eps=0.1), p * (1 - p) * (z - logit(0.9)), 1e-10, 1e-12)
    assert abs(slope(cdpo_loss, z[:1], label_smoothing=0.1))[0] > 0.8


def test_exo_equals_the_authors_code_up_to_its_constant():
    # Their log-target (0, -10) is not normalised: eps = 1 / (1 + e^10).
    p = sigmoid(0.3 * MARGINS)
    theirs = p * (np.log(p) - 0) + (1 - p) * (np.log(1 - p) + 10)
    found = exact(exo_pair_loss, POLICY, REFERENCE, beta=0.3, eps=1 / (1 + math.exp(10)))
    close(found - math.log1p(math.exp(-10)), theirs, 1e-10)


@pytest.mark.parametrize("tau", [0.05, 1.0, 2.5])
def test_discopop_mixes_logistic_and_exponential_loss(tau):
    z = 0.3 * MARGINS
    g = sigmoid(z / tau)
    expected = (1 - g) * softplus(-z) + g * np.exp(-z)
    close(exact(discopop_loss, POLICY, REFERENCE, beta=0.3, tau=tau), expected, 1e-11)


def test_discopop_shrinks_the_margin_at_the_start_of_training():
    tau = 0.05
    close(slope(discopop_loss, [0.0], tau=tau), (1 - math.log(2)) / (4 * tau) - 0.75)
    policy, reference = pair_at([-0.1186, 0.0720], beta=0.5)
    values = exact(discopop_loss, policy, reference, beta=0.5, tau=tau)
    np.testing.assert_allclose(values, [0.7859, 0.8783], atol=5e-5)
    assert (abs(slope(discopop_loss, [-0.1186, 0.0720], tau=tau)) < 2e-3).all()


def test_discopop_falls_everywhere_with_a_wide_transition():
    z = np.linspace(-5, 5, 41)
    assert (slope(discopop_loss, z, tau=1.0) < 0).all()
    threshold = (1 - math.log(2)) / 3
    assert slope(discopop_loss, [0.0], tau=threshold * 0.99)[0] > 0
    assert slope(discopop_loss, [0.0], tau=threshold * 1.01)[0] < 0
