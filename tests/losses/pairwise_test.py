"""Pairwise losses against closed forms, their limits and their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.pairwise import dpo_loss, ipo_loss, log_ratios, margin, simpo_loss


def softplus(x):
    """log(1 + e^x) of one number."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Chosen and rejected log-probs under policy and reference, and their lengths.
POLICY = np.array([[-4.0, -6.5], [-9.0, -2.0], [-3.0, -3.0]], np.float32)
REFERENCE = np.array([[-5.0, -5.0], [-7.5, -2.25], [-1.0, -4.0]], np.float32)
LENGTHS = np.array([[4, 5], [3, 8], [2, 1]], np.float32)


def by_pair(formula):
    """`formula(s_w, s_l, q_w, q_l, n_w, n_l)` of each pair."""
    return [
        formula(*s, *q, *n)
        for s, q, n in zip(POLICY.tolist(), REFERENCE.tolist(), LENGTHS.tolist())
    ]


def test_dpo_is_minus_log_sigmoid_of_the_scaled_margin():
    expected = by_pair(lambda s, t, q, u, *_: -math.log(sigmoid(0.3 * ((s - q) - (t - u)))))
    np.testing.assert_allclose(dpo_loss(POLICY, REFERENCE, beta=0.3), expected, rtol=1e-6)


def test_ipo_is_the_squared_distance_from_the_target_margin():
    summed = by_pair(lambda s, t, q, u, *_: ((s - q) - (t - u) - 1 / (2 * 0.25)) ** 2)
    averaged = by_pair(lambda s, t, q, u, n, m: ((s - q) / n - (t - u) / m - 1 / (2 * 0.25)) ** 2)
    np.testing.assert_allclose(ipo_loss(POLICY, REFERENCE, tau=0.25), summed, rtol=1e-5)
    np.testing.assert_allclose(ipo_loss(POLICY, REFERENCE, LENGTHS, tau=0.25), averaged, rtol=1e-5)
    literal = ipo_loss(POLICY, REFERENCE, LENGTHS, tau=0.25, length_normalize=False)
    np.testing.assert_allclose(literal, summed, rtol=1e-5)


def test_simpo_is_the_logistic_loss_of_the_mean_log_prob_ahead_of_its_target():
    x = by_pair(lambda s, t, q, u, n, m: 2.5 * (s / n - t / m) - 2.5 * 0.1)
    found = simpo_loss(POLICY, LENGTHS, beta=2.5, gamma_beta_ratio=0.1)
    np.testing.assert_allclose(found, [softplus(-v) for v in x], rtol=1e-5)
    smoothed = simpo_loss(POLICY, LENGTHS, beta=2.5, gamma_beta_ratio=0.1, label_smoothing=0.2)
    both = [0.8 * softplus(-v) + 0.2 * softplus(v) for v in x]
    np.testing.assert_allclose(smoothed, both, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_dpo_is_log_two_when_policy_equals_reference(beta):
    np.testing.assert_allclose(dpo_loss(POLICY, POLICY, beta=beta), [math.log(2)] * 3, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ipo_is_a_quarter_over_tau_squared_when_policy_equals_reference(tau):
    np.testing.assert_allclose(ipo_loss(POLICY, POLICY, tau=tau), [1 / (4 * tau**2)] * 3, rtol=1e-6)
    averaged = ipo_loss(POLICY, POLICY, LENGTHS, tau=tau)
    np.testing.assert_allclose(averaged, [1 / (4 * tau**2)] * 3, rtol=1e-6)


def test_simpo_with_a_hinge_wants_a_margin_of_one_beyond_its_target():
    margins = 2.5 * (margin(POLICY / LENGTHS) - 0.1)
    found = simpo_loss(POLICY, LENGTHS, beta=2.5, gamma_beta_ratio=0.1, link="hinge")
    np.testing.assert_allclose(found, np.maximum(0, 1 - margins), rtol=1e-5)


def test_simpo_at_equal_mean_log_probs_is_softplus_of_the_target():
    # gamma = beta * ratio = 1.375, the value in the paper's Mistral recipe: 1.600413
    found = simpo_loss(-1.5 * LENGTHS, LENGTHS, beta=2.5, gamma_beta_ratio=0.55)
    np.testing.assert_allclose(found, [softplus(1.375)] * 3, rtol=1e-6)


def test_dpo_of_a_pair_and_its_swap_differ_by_the_margin():
    loss, swapped = (dpo_loss(POLICY[:, i], REFERENCE[:, i], beta=0.7) for i in ([0, 1], [1, 0]))
    z = 0.7 * margin(log_ratios(POLICY, REFERENCE))
    np.testing.assert_allclose(loss - swapped, -z, rtol=1e-5)


def test_dpo_falls_and_is_convex_in_the_margin():
    margins = jnp.linspace(-30.0, 30.0, 61)
    loss = dpo_loss(jnp.stack([margins, 0 * margins], -1), jnp.zeros((61, 2)), beta=1.0)
    assert (jnp.diff(loss) < 0).all()
    assert (jnp.diff(loss, 2) > -1e-5).all()


def test_dpo_tends_to_log_two_as_beta_vanishes():
    np.testing.assert_allclose(dpo_loss(POLICY, REFERENCE, beta=1e-9), math.log(2), rtol=1e-6)


def test_ipo_is_0_at_its_target_and_both_forms_agree_on_single_tokens():
    at_target = np.array([[1 / (2 * 0.1), 0.0]], np.float32)
    assert ipo_loss(at_target, np.zeros((1, 2), np.float32), tau=0.1) == 0
    ones = np.ones_like(LENGTHS)
    np.testing.assert_array_equal(ipo_loss(POLICY, REFERENCE, ones), ipo_loss(POLICY, REFERENCE))


def test_simpo_without_target_on_single_tokens_is_dpo_without_a_reference():
    simpo = simpo_loss(POLICY, np.ones_like(LENGTHS), beta=0.4, gamma_beta_ratio=0.0)
    dpo = dpo_loss(POLICY, np.zeros_like(REFERENCE), beta=0.4)
    np.testing.assert_allclose(simpo, dpo, rtol=1e-6)


def test_smoothed_simpo_is_least_where_the_margin_is_the_logit_of_the_flip_rate():
    # (1 - e) softplus(-x) + e softplus(x) has its minimum H(e) at x = log((1 - e) / e)
    flips = 0.2
    best = math.log((1 - flips) / flips)
    policy = jnp.array([best / 2.0, 0.0])
    settings = {"beta": 2.0, "gamma_beta_ratio": 0.0, "label_smoothing": flips}
    loss, gradient = jax.value_and_grad(simpo_loss)(policy, jnp.ones(2), **settings)
    entropy = -flips * math.log(flips) - (1 - flips) * math.log(1 - flips)
    assert float(loss) == pytest.approx(entropy, rel=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def gradient_of(loss, *arrays, **settings):
    return jax.grad(lambda s: jnp.sum(loss(s, *arrays, **settings)))(jnp.asarray(POLICY))


def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_margin():
    weights = by_pair(lambda s, t, q, u, *_: 0.5 * sigmoid(-0.5 * ((s - q) - (t - u))))
    expected = [[-w, w] for w in weights]
    np.testing.assert_allclose(gradient_of(dpo_loss, REFERENCE, beta=0.5), expected, rtol=1e-5)


def test_ipo_gradient_is_twice_the_distance_over_the_lengths():
    far = by_pair(lambda s, t, q, u, n, m: ((s - q) / n - (t - u) / m - 5.0, n, m))
    expected = [[2 * d / n, -2 * d / m] for d, n, m in far]
    found = gradient_of(ipo_loss, REFERENCE, LENGTHS, tau=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_simpo_gradient_is_shared_out_over_the_tokens():
    x = by_pair(lambda s, t, q, u, n, m: (2.0 * (s / n - t / m - 0.25), n, m))
    expected = [[-2.0 * sigmoid(-v) / n, 2.0 * sigmoid(-v) / m] for v, n, m in x]
    np.testing.assert_allclose(gradient_of(simpo_loss, LENGTHS), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "others"),
    [
        (dpo_loss, (REFERENCE,)),
        (ipo_loss, (REFERENCE,)),
        (ipo_loss, (REFERENCE, LENGTHS)),
        (simpo_loss, (LENGTHS,)),
        (lambda s, n: simpo_loss(s, n, label_smoothing=0.3), (LENGTHS,)),
    ],
    ids=["dpo", "ipo summed", "ipo averaged", "simpo", "simpo smoothed"],
)
def test_gradients_are_the_finite_differences_in_float64(loss, others):
    with jax.enable_x64(True):
        others = [jnp.asarray(x, jnp.float64) for x in others]
        policy = jnp.asarray(POLICY, jnp.float64)
        check_grads(lambda s: loss(s, *others), (policy,), order=2, modes=["rev"], rtol=1e-6)


def test_gradients_of_chosen_and_rejected_cancel_where_only_the_margin_counts():
    for gradient in (gradient_of(dpo_loss, REFERENCE), gradient_of(ipo_loss, REFERENCE)):
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_log_ratios_keep_the_digits_that_a_difference_of_sums_cancels():
    # Two long completions, both 1/64 nat above the reference by another 1/128: exact in float32.
    policy = jnp.array([-20000.0 + 1 / 64 + 1 / 128, -3.0 + 1 / 64], jnp.float32)
    reference = jnp.array([-20000.0, -3.0], jnp.float32)
    exact = float(policy[0]) + 20000.0 - 1 / 64
    assert float(margin(log_ratios(policy, reference))) == exact


def test_groups_with_a_missing_candidate_count_nothing():
    where = np.array([[True, True], [True, False], [False, False]])
    for loss in (
        dpo_loss(POLICY, REFERENCE, where=where),
        simpo_loss(POLICY, LENGTHS, where=where),
    ):
        assert loss[0] > 0
        np.testing.assert_array_equal(loss[1:], [0, 0])


def test_empty_completion_has_a_reward_of_0():
    loss = simpo_loss(jnp.array([-3.0, 0.0]), jnp.array([2, 0]), beta=1.0, gamma_beta_ratio=0.0)
    assert float(loss) == pytest.approx(softplus(1.5), rel=1e-6)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, simpo_loss])
def test_arrays_that_do_not_fit_are_refused(loss):
    with pytest.raises(AssertionError):
        loss(jnp.zeros((4, 2)), jnp.zeros((3, 2)))
    with pytest.raises(AssertionError):
        loss(jnp.zeros((4, 3)), jnp.zeros((4, 3)))
