"""DPO with a term on further samples: closed forms, limits and the identities behind the terms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.exploration import hypo_loss, selm_loss, vpo_loss, xpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.tabular import (
    Tree,
    assert_close,
    float64,  # noqa: F401  (a fixture)
    kl,
    made_logits,
    softmax,
    tilted,
)

S = np.array([[-4.0, -6.5, -2.0, -3.0], [-3.0, -2.0, -5.0, -1.0]])
Q = np.array([[-5.0, -5.5, -3.0, -2.5], [-1.0, -4.0, -2.0, -2.0]])
LOSSES = [xpo_loss, vpo_loss, selm_loss, hypo_loss]


def dpo_of_pair(row, beta):
    z = beta * ((S[row, 0] - Q[row, 0]) - (S[row, 1] - Q[row, 1]))
    return math.log1p(math.exp(-z))


def test_xpo_adds_the_mean_log_prob_of_the_references_samples():
    found = xpo_loss(S, Q, alpha=0.3, beta=0.2)
    wanted = [dpo_of_pair(row, 0.2) + 0.3 * (S[row, 2] + S[row, 3]) / 2 for row in range(2)]
    assert_close(found, wanted)


def test_vpo_and_selm_add_alpha_beta_of_the_mean_log_ratio():
    bonus = 0.3 * 0.2 * (S - Q)[:, 2:].mean(-1)
    dpo = np.array([dpo_of_pair(row, 0.2) for row in range(2)])
    assert_close(vpo_loss(S, Q, alpha=0.3, beta=0.2), dpo + bonus)
    assert_close(vpo_loss(S, Q, alpha=0.3, beta=0.2, mode="offline"), dpo - bonus)
    assert_close(selm_loss(S, Q, alpha=0.3, beta=0.2), dpo + bonus)


def test_hypo_adds_log_probs_weighed_with_what_others_log_ratios_leave():
    h = S - Q
    weights = h[:, 2:] - h[:, 3:1:-1]  # two samples: each against the other
    term = (weights * S[:, 2:]).mean(-1)
    dpo = np.array([dpo_of_pair(row, 0.2) for row in range(2)])
    assert_close(hypo_loss(S, Q, beta=0.2, lam=0.3), dpo + 0.3 * term)
    one = hypo_loss(S[:, :3], Q[:, :3], beta=0.2, lam=0.3)
    assert_close(one, dpo + 0.3 * h[:, 2] * S[:, 2])


@pytest.mark.parametrize("loss", LOSSES)
def test_without_its_weight_each_is_dpo(loss):
    weight = {"lam": 0.0} if loss is hypo_loss else {"alpha": 0.0}
    assert_close(loss(S, Q, beta=0.2, **weight), dpo_loss(S[:, :2], Q[:, :2], beta=0.2))


@pytest.mark.parametrize("loss", LOSSES)
def test_flags_are_the_same_as_places_and_may_name_one_of_the_pair(loss):
    flags = np.array([0.0, 0.0, 1.0, 1.0])
    assert_close(loss(S, Q, np.broadcast_to(flags, S.shape)), loss(S, Q))
    twice = S[:, [0, 1, 1]], Q[:, [0, 1, 1]]  # the rejected one once more, as a sample
    rejected = np.array([[0.0, 1.0]] * 2)
    assert_close(loss(S[:, :2], Q[:, :2], rejected), loss(*twice))
    with pytest.raises(ValueError, match="samples"):
        loss(S[:, :2], Q[:, :2])


@pytest.mark.parametrize("loss", LOSSES)
def test_group_without_samples_is_dpo_and_one_without_its_pair_counts_nothing(loss):
    where = np.array([[True, True, False, False], [False, True, True, True]])
    found = loss(np.where(where, S, np.nan), Q, beta=0.2, where=where)
    assert_close(found, [dpo_of_pair(0, 0.2), 0])


def test_xpo_bonus_gradient_is_the_mean_score_of_the_samples():
    run = lambda alpha: jax.grad(lambda s: xpo_loss(s, Q[0], alpha=alpha))(jnp.asarray(S[0]))  # noqa: E731
    assert_close(run(0.3) - run(0.0), [0, 0, 0.15, 0.15])


def test_xpo_bonus_in_the_mean_is_minus_the_kl_from_the_reference_up_to_a_constant():
    reference = made_logits(0)
    bonus = [softmax(reference) @ made_logits(seed) for seed in (1, 2, 3)]
    divergence = [kl(reference, made_logits(seed)) for seed in (1, 2, 3)]
    assert np.ptp(np.add(bonus, divergence)) < 1e-12


def test_vpo_bonus_is_the_best_value_of_a_reward_with_mean_0_under_the_calibration_policy():
    # J*(r) = max E[r] - beta KL = beta log E_ref[exp(r/beta)], for r with E_cal[r] = 0
    reference, calibration, beta = made_logits(0), softmax(made_logits(1)), 0.7
    rewards = np.random.default_rng(2).standard_normal(5)
    rewards = rewards - calibration @ rewards
    best = tilted(reference, rewards, 1 / beta)
    value = softmax(best) @ rewards - beta * kl(best, reference)
    pair = np.zeros((5, 2))
    columns = [np.concatenate([pair, x[:, None]], -1) for x in (best, reference)]
    bonus = calibration @ (np.asarray(vpo_loss(*columns, alpha=1.0, beta=beta)) - math.log(2))
    assert value == pytest.approx(-bonus, abs=1e-12)


TREE = Tree(vocab=2)


def tree_gradient(loss):
    """Mean over all draws of two completions of `loss(log-probs [draws, 4])`, exactly."""
    policy, reference = TREE.logits(0), np.asarray(TREE.logps(TREE.logits(1)))
    probs = np.exp(TREE.logps(policy))
    first, second = np.divmod(np.arange(16), 4)

    def run(x):
        s = TREE.logps(x)
        pair = jnp.zeros((16, 2))  # a pair on which policy and reference agree for ever
        logps = jnp.concatenate([pair, s[first, None], s[second, None]], -1)
        fixed = np.concatenate([pair, reference[first, None], reference[second, None]], -1)
        return jnp.sum(probs[first] * probs[second] * loss(logps, fixed))

    return np.asarray(jax.grad(run)(jnp.asarray(policy)))


def test_hypo_gradient_on_own_samples_is_that_of_the_kl():
    q = TREE.logps(TREE.logits(1))
    exact = jax.grad(lambda x: jnp.exp(TREE.logps(x)) @ (TREE.logps(x) - q))
    wanted = 0.3 * np.asarray(exact(jnp.asarray(TREE.logits(0))))
    assert_close(tree_gradient(lambda s, q: hypo_loss(s, q, lam=0.3)), wanted)


def test_hypo_holds_in_place_what_no_pair_mentions_and_dpo_does_not():
    # Three actions, the third in no pair: DPO's gradient leaves its log-ratio free.
    reference, probs = made_logits(0, 3), softmax(made_logits(1, 3))

    def run(logits, lam):
        s = jax.nn.log_softmax(logits)
        group = lambda x: jnp.stack([jnp.broadcast_to(x[0], 3), jnp.broadcast_to(x[1], 3), x], -1)  # noqa: E731
        return jnp.sum(probs * hypo_loss(group(s), group(jnp.asarray(reference)), lam=lam))

    grad = jax.grad(run)(jnp.asarray(made_logits(1, 3)), 0.0)
    assert_close(grad[2], 0)
    assert abs(float(jax.grad(run)(jnp.asarray(made_logits(1, 3)), 0.1)[2])) > 1e-3


@pytest.mark.parametrize("loss", [xpo_loss, vpo_loss, selm_loss])
def test_gradients_are_finite_differences(loss):
    check_grads(lambda s: loss(s, Q, alpha=0.3), (jnp.asarray(S),), order=2, modes=["rev"])


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_goes_through_the_reference(loss):
    assert_close(jax.grad(lambda q: jnp.sum(loss(S, q)))(jnp.asarray(Q)), np.zeros_like(Q))
