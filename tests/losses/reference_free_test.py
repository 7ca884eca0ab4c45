"""Losses without a reference: closed forms, identities, limits and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.likelihood import nll_loss
from paxo.losses.links import rso_hinge_loss
from paxo.losses.pairwise import dpo_loss, simpo_loss
from paxo.losses.reference_free import (
    alphapo_loss,
    asft_loss,
    cpo_loss,
    cpo_simpo_loss,
    orpo_loss,
    slic_hf_loss,
)

POLICY = np.array([[-4.0, -9.0], [-7.5, -2.25], [-3.0, -3.0]], np.float32)
LENGTHS = np.array([[4, 6], [5, 3], [2, 2]], np.float32)
EQUAL = -1.5 * LENGTHS  # the same mean log-prob everywhere
# Mean log-probs from certain to hopeless, every pair of them.
MEANS = np.array([-100.0, -10.0, -1.0, -1e-4, -1e-7, 0.0], np.float32)
GRID = np.stack(np.meshgrid(MEANS, MEANS), -1).reshape(-1, 2)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def by_pair(formula):
    """`formula(s_w, s_l, n_w, n_l)` of each pair, in Python floats."""
    return [formula(*map(float, s), *map(float, n)) for s, n in zip(POLICY, LENGTHS)]


def log_odds(a):
    return a - math.log(-math.expm1(a))


def gradient_of(loss, **settings):
    return jax.grad(lambda s: jnp.sum(loss(s, LENGTHS, **settings)))(jnp.asarray(POLICY))


def test_slic_is_a_hinge_at_delta_beside_the_likelihood_of_the_chosen():
    expected = by_pair(lambda s, t, n, m: max(0.0, 2.5 - s + t) - 0.3 * s)
    found = slic_hf_loss(POLICY, LENGTHS, delta=2.5, lam=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_slic_without_likelihood_is_the_hinge_of_rso_without_a_reference():
    hinge = rso_hinge_loss(POLICY, np.zeros_like(POLICY), gamma=1.0)
    found = slic_hf_loss(POLICY, LENGTHS, delta=1.0, lam=0.0)
    np.testing.assert_array_equal(found, hinge)


def test_slic_raises_the_third_candidate_where_there_is_one():
    policy = np.concatenate([POLICY, POLICY[:, :1] - 2], axis=1)
    lengths = np.concatenate([LENGTHS, LENGTHS[:, :1]], axis=1)
    more = slic_hf_loss(policy, lengths, lam=0.5) - slic_hf_loss(POLICY, LENGTHS, lam=0.5)
    np.testing.assert_allclose(more, 0.5 * 2, rtol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(slic_hf_loss(s, lengths, lam=0.5)))(jnp.asarray(policy))
    np.testing.assert_allclose(gradient[:, 2], -0.5)
    np.testing.assert_array_equal(gradient[0, :2], [0, 0])  # 5 nats apart: past the margin


def test_cpo_preference_is_dpo_without_a_reference_and_log_two_at_equal_log_probs():
    found = cpo_loss(POLICY, LENGTHS, cpo_alpha=0.0)
    np.testing.assert_allclose(found, dpo_loss(POLICY, np.zeros_like(POLICY)), rtol=1e-6)
    assert float(found[2]) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("link", "of"),
    [
        ("sigmoid", lambda s, t, n, m, sign: softplus(-sign * 0.1 * (s - t))),
        ("hinge", lambda s, t, n, m, sign: max(0.0, 1 - sign * 0.1 * (s - t))),
        ("ipo", lambda s, t, n, m, sign: (sign * (s / n - t / m) - 5.0) ** 2),
    ],
)
def test_cpo_links_and_their_smoothing(link, of):
    expected = by_pair(lambda *pair: 0.8 * of(*pair, 1) + 0.2 * of(*pair, -1))
    found = cpo_loss(POLICY, LENGTHS, cpo_alpha=0.0, link=link, label_smoothing=0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cpo_with_the_token_mean_is_the_published_code():
    labels = np.array([[1.0, 0.0]] * 3)
    nll = nll_loss(POLICY, LENGTHS, labels).value
    found = jnp.mean(cpo_loss(POLICY, LENGTHS, cpo_alpha=0.0)) + 0.7 * nll
    preference = np.mean(by_pair(lambda s, t, n, m: softplus(-0.1 * (s - t))))
    tokens = -(4.0 + 7.5 + 3.0) / (4 + 5 + 2)  # cross-entropy over the batch's chosen tokens
    assert float(found) == pytest.approx(preference - 0.7 * tokens, rel=1e-6)


@pytest.mark.parametrize("loss", [cpo_loss, cpo_simpo_loss])
def test_likelihood_terms_by_sequence_and_by_sum(loss):
    without = loss(POLICY, LENGTHS, cpo_alpha=0.0)
    for reduction, of in (("sequence_mean", lambda s, n: -s / n), ("sum", lambda s, n: -s)):
        found = loss(POLICY, LENGTHS, cpo_alpha=2.0, nll_reduction=reduction) - without
        expected = by_pair(lambda s, t, n, m, of=of: 2.0 * of(s, n))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cpo_simpo_is_simpo_beside_the_likelihood():
    simpo = simpo_loss(POLICY, LENGTHS, beta=10.0, gamma_beta_ratio=0.54)
    np.testing.assert_array_equal(cpo_simpo_loss(POLICY, LENGTHS, cpo_alpha=0.0), simpo)
    ones = np.ones_like(LENGTHS)
    same = cpo_simpo_loss(POLICY, ones, beta=0.1, gamma_beta_ratio=0.0, cpo_alpha=1.0)
    np.testing.assert_allclose(same, cpo_loss(POLICY, ones), rtol=1e-6)


@pytest.mark.parametrize("alpha", [-1.0, 0.25, 2.0])
def test_alphapo_is_its_formula(alpha):
    bent = lambda a: (1 - math.exp(-alpha * a)) / alpha  # noqa: E731
    expected = by_pair(lambda s, t, n, m: softplus(0.3 - 2.0 * (bent(s / n) - bent(t / m))))
    found = alphapo_loss(POLICY, LENGTHS, alpha=alpha, beta=2.0, gamma=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, -1e-6])
def test_alphapo_tends_to_simpo_as_its_bend_vanishes(alpha):
    simpo = simpo_loss(POLICY, LENGTHS, beta=2.0, gamma_beta_ratio=0.15)
    found = alphapo_loss(POLICY, LENGTHS, alpha=alpha, beta=2.0, gamma=0.3)
    np.testing.assert_allclose(found, simpo, rtol=1e-5)


def test_alphapo_gradient_weighs_a_completion_by_the_slope_of_its_reward():
    def expected(s, t, n, m):
        bent = [(1 - math.exp(-0.5 * a)) / 0.5 for a in (s / n, t / m)]
        weight = 2.0 / (1 + math.exp(2.0 * (bent[0] - bent[1]) - 0.1))
        return -weight * math.exp(-0.5 * s / n) / n, weight * math.exp(-0.5 * t / m) / m

    found = gradient_of(alphapo_loss, alpha=0.5, beta=2.0, gamma=0.1)
    np.testing.assert_allclose(found, by_pair(expected), rtol=1e-5)


def test_alphapo_on_hopeless_completions_stays_finite():
    value, gradient = jax.value_and_grad(alphapo_loss)(
        jnp.array([-1e4, -2e4]), jnp.ones(2), alpha=1.0
    )
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, [0, 0])  # both exponents are cut


def test_odds_ratio_is_log_two_at_equal_means_and_falls_with_the_chosen():
    bare = {"lam": 1.0, "nll_reduction": "sequence_mean"}
    np.testing.assert_allclose(orpo_loss(EQUAL, LENGTHS, **bare) - 1.5, math.log(2), rtol=1e-6)
    chosen = jnp.linspace(-5.0, -0.01, 50)
    pairs = jnp.stack([chosen, jnp.full_like(chosen, -1.0)], -1)
    for candidate, sign in ((0, -1), (1, 1)):
        ordered = pairs if candidate == 0 else pairs[:, ::-1]
        ratio = orpo_loss(ordered, jnp.ones_like(pairs), **bare) + ordered[:, 0]
        assert (sign * jnp.diff(ratio) > 0).all()


def test_orpo_is_its_formula():
    expected = by_pair(
        lambda s, t, n, m: -s / n + 0.1 * softplus(log_odds(t / m) - log_odds(s / n))
    )
    np.testing.assert_allclose(orpo_loss(POLICY, LENGTHS), expected, rtol=1e-6)


def test_odds_near_certainty_keep_their_digits():
    # log1p(-exp(a)) in float32 is off by a per mille at a = -1e-4: log(1e-4) must come out exactly.
    means = (-1e-4, -3e-4)
    found = orpo_loss(jnp.array(means), jnp.ones(2), lam=1.0) - 1e-4
    expected = softplus(log_odds(means[1]) - log_odds(means[0]))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_odds_ratio_of_improbable_completions_is_the_logistic_of_their_means():
    found = orpo_loss(jnp.array([-41.0, -40.0]), jnp.ones(2), lam=1.0) - 41.0
    assert float(found) == pytest.approx(softplus(1.0), rel=1e-5)


def test_asft_bracket_is_likelihood_plus_unlikelihood():
    expected = by_pair(lambda s, t, n, m: -s / n - 2 * (s / n + math.log(-math.expm1(t / m))))
    np.testing.assert_allclose(asft_loss(POLICY, LENGTHS, lam=2.0), expected, rtol=1e-6)


def test_asft_is_orpo_less_the_log_of_either_but_not_both():
    # OR = bracket + log(p_w (1 - p_l) + p_l (1 - p_w)), so never above it
    orpo = orpo_loss(POLICY, LENGTHS, lam=1.0)
    asft = asft_loss(POLICY, LENGTHS, lam=1.0)
    chosen, rejected = np.exp(POLICY / LENGTHS).T
    either = np.log(chosen * (1 - rejected) + rejected * (1 - chosen))
    np.testing.assert_allclose(orpo, asft + either, rtol=1e-5)
    assert (orpo <= asft).all()


def test_asft_gradients_of_the_two_completions_are_independent():
    # of the chosen: -(1 + lam) per nat of its mean, whatever the rejected
    found = gradient_of(asft_loss, lam=0.5)
    np.testing.assert_allclose(found[:, 0], -1.5 / LENGTHS[:, 0], rtol=1e-6)
    p = np.exp(POLICY[:, 1] / LENGTHS[:, 1])
    np.testing.assert_allclose(found[:, 1], 0.5 * p / (1 - p) / LENGTHS[:, 1], rtol=1e-5)


LOSSES = {
    "slic_hf": lambda s, n: slic_hf_loss(s, n, delta=2.0),
    "cpo": cpo_loss,
    "cpo smoothed": lambda s, n: cpo_loss(s, n, label_smoothing=0.2),
    "cpo ipo": lambda s, n: cpo_loss(s, n, link="ipo", label_smoothing=0.2),
    "cpo_simpo": cpo_simpo_loss,
    "alphapo": alphapo_loss,
    "alphapo 0": lambda s, n: alphapo_loss(s, n, alpha=0.0),
    "orpo": orpo_loss,
    "asft": asft_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_the_finite_differences_in_float64(loss):
    with jax.enable_x64(True):
        policy, lengths = (jnp.asarray(x, jnp.float64) for x in (POLICY, LENGTHS))
        check_grads(jax.jit(lambda s: loss(s, lengths)), (policy,), 1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_certain_and_hopeless_completions_have_finite_losses_and_gradients(loss):
    ones = np.ones_like(GRID)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(loss(s, ones)))(jnp.asarray(GRID))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_empty_completion_is_finite(loss):
    value, gradient = jax.value_and_grad(loss)(jnp.array([-3.0, 0.0]), jnp.array([2.0, 0.0]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
