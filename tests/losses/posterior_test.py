"""BRAIn: importance weights, its gradient, the posterior as fixed point."""

import jax
import numpy as np

from paxo.losses.posterior import brain_loss
from tests.losses.tabular import (
    assert_close,
    float64,  # noqa: F401  (a fixture)
    gradient,
    log_softmax,
    made_logits,
    softmax,
    tilted,
)

POLICY, REFERENCE, PROPOSAL = made_logits(1), made_logits(2), made_logits(3)
REWARDS = np.random.default_rng(4).standard_normal(5)
WEIGHTS = softmax(REWARDS / 0.7 + REFERENCE - PROPOSAL)


def test_gradient_is_the_difference_of_the_two_weights():
    found = jax.grad(brain_loss)(POLICY, REFERENCE, PROPOSAL, REWARDS, scale=0.7)
    assert_close(found, -(WEIGHTS - softmax(POLICY - PROPOSAL)))
    assert_close(found.sum(), 0)


def test_it_is_the_cross_entropy_of_the_two_weights():
    found = brain_loss(POLICY, REFERENCE, PROPOSAL, REWARDS, scale=0.7)
    assert_close(found, -WEIGHTS @ log_softmax(POLICY - PROPOSAL))
    at_posterior = brain_loss(
        tilted(REFERENCE, REWARDS, 1 / 0.7), REFERENCE, PROPOSAL, REWARDS, scale=0.7
    )
    assert_close(at_posterior, -WEIGHTS @ np.log(WEIGHTS))


def test_posterior_is_stationary_whoever_sampled():
    posterior = tilted(REFERENCE, REWARDS, 1 / 0.7)  # and the minimum, as the loss is convex
    for proposal in (PROPOSAL, REFERENCE, POLICY):
        loss = lambda s: brain_loss(s, REFERENCE, proposal, REWARDS, scale=0.7)  # noqa: B023, E731
        assert_close(gradient(loss, posterior), np.zeros(5))
        assert np.abs(gradient(loss, tilted(REFERENCE, REWARDS, 1.0))).max() > 1e-2


def test_weights_that_sum_to_one_give_the_exact_gradient_of_the_kl():
    # KL(posterior|policy) over all completions, each listed once: the proposal cancels.
    posterior = tilted(REFERENCE, REWARDS, 1 / 0.7)
    exact = gradient(lambda s: -np.exp(posterior) @ s, POLICY)
    uniform = np.full(5, -np.log(5.0))
    loss = lambda s: brain_loss(s, REFERENCE, uniform, REWARDS, scale=0.7)  # noqa: E731
    assert_close(gradient(loss, POLICY), exact)


def test_of_two_it_is_dpo_against_the_sampler_with_a_soft_label():
    s, q, u, r = (x[:2] for x in (POLICY, REFERENCE, PROPOSAL, REWARDS))
    p = 1 / (1 + np.exp(-np.subtract(*(r / 0.7 + q - u))))
    z = np.subtract(*(s - u))
    wanted = p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z)
    assert_close(brain_loss(s, q, u, r, scale=0.7), wanted)


def test_candidates_that_are_not_there_have_no_weight():
    where = np.array([True, False, True, True, False])
    kept = brain_loss(*(x[where] for x in (POLICY, REFERENCE, PROPOSAL, REWARDS)))
    filled = [np.where(where, x, np.nan) for x in (POLICY, REFERENCE, PROPOSAL, REWARDS)]
    assert_close(brain_loss(*filled, where=where), kept)
    assert float(brain_loss(*filled, where=np.zeros(5, bool))) == 0
