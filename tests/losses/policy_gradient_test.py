"""Clipped ratios, mirror descent, regressions on rewards: closed forms, exact expectations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.nash import online_ipo_loss
from paxo.losses.policy_gradient import (
    bounded_exp,
    mdpo_loss,
    p3o_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from paxo.losses.regression import copg_loss, rebel_loss
from paxo.losses.selfplay import dno_loss
from tests.losses.tabular import (
    assert_close,
    expected,
    float64,  # noqa: F401  (a fixture)
    gradient,
    kl,
    made_logits,
    minimise,
    pairs,
    product,
    softmax,
    tilted,
)

POLICY, OLD, REFERENCE = made_logits(1), made_logits(2), made_logits(3)
REWARDS = np.random.default_rng(4).standard_normal(5)


def token_loss(ratio, advantage, **settings):
    """PPO's loss of a single token."""
    now, one = jnp.full((1, 1), math.log(ratio)), jnp.ones((1, 1), bool)
    return float(ppo_policy_loss(now, 0 * now, advantage * one, one, **settings).value)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # clipped: no further gain above 1.2
        (0.5, 2.0, -1.0),  # not clipped: still to be raised
        (0.5, -2.0, 1.6),  # clipped: no further gain below 0.8
        (1.5, -2.0, 3.0),  # not clipped: still to be lowered
    ],
)
def test_ppo_is_the_worse_of_free_and_clipped(ratio, advantage, loss):
    assert token_loss(ratio, advantage) == pytest.approx(loss, rel=1e-12)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    # Ye et al.: for A < 0 the objective is max(min(.), c A)
    for ratio in (0.5, 1.0, 1.5, 2.9, 3.1, 50.0):
        for advantage in (-2.0, 2.0):
            plain = -token_loss(ratio, advantage)
            dual = max(plain, 3.0 * advantage) if advantage < 0 else plain
            assert token_loss(ratio, advantage, delta=3.0) == pytest.approx(-dual, rel=1e-12)


def test_ppo_is_reinforce_at_ratio_1_and_a_mean_over_tokens():
    rng = np.random.default_rng(0)
    old, advantages = rng.uniform(-2, -1, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    mask = rng.uniform(size=(2, 3, 4)) < 0.7
    run = lambda s: ppo_policy_loss(s, old, advantages, mask).value  # noqa: E731
    value, grad = jax.value_and_grad(run)(jnp.asarray(old))
    assert float(value) == pytest.approx(-advantages[mask].mean(), rel=1e-12)
    assert_close(grad, np.where(mask, -advantages, 0) / mask.sum())


def test_value_loss_is_half_the_worse_square():
    value = lambda v, old, goal: float(  # noqa: E731
        ppo_value_loss(*(jnp.full((1, 1), x) for x in (v, old, goal)), jnp.ones((1, 1), bool)).value
    )
    assert value(0.1, 0.0, 1.0) == pytest.approx(0.9**2 / 2)
    assert value(0.9, 0.0, 1.0) == pytest.approx(0.8**2 / 2)  # moved too far: held at 0.2
    assert value(1.9, 0.0, 1.0) == pytest.approx(0.9**2 / 2)
    assert value(-0.9, 0.0, 1.0) == pytest.approx(1.9**2 / 2)


def test_value_far_from_the_old_one_on_the_good_side_has_no_gradient():
    old, goal, mask = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1), bool)
    run = lambda v: ppo_value_loss(v, old, goal, mask).value  # noqa: E731
    assert_close(jax.grad(run)(jnp.full((1, 1), 0.5)), [[0]])
    assert_close(jax.grad(run)(jnp.full((1, 1), 0.1)), [[-0.9]])


def best_direction():
    """Gradient of -E[r] with respect to the policy's logits, exactly."""
    return gradient(lambda s: -jnp.exp(s) @ REWARDS, POLICY)


@pytest.mark.parametrize("joint", [False, True])
def test_p3o_without_clip_is_unbiased_on_and_off_the_policy(joint):
    for old in (POLICY, OLD):
        loss = lambda s: expected(  # noqa: E731
            p3o_loss(pairs(s), pairs(old), pairs(REWARDS), epsilon=1e6, joint=joint),  # noqa: B023
            product(softmax(old), softmax(old)),  # noqa: B023
        )
        assert_close(gradient(loss, POLICY), best_direction())


def test_p3o_knows_rewards_by_their_difference_only_and_pairs_in_either_order():
    s, o, r = np.array([-4.0, -6.0]), np.array([-4.2, -5.9]), np.array([1.0, 0.3])
    for joint in (False, True):
        loss = lambda s, o, r: float(p3o_loss(s, o, r, joint=joint))  # noqa: B023, E731
        assert loss(s, o, r + 5) == pytest.approx(loss(s, o, r), rel=1e-9)
        assert loss(s[::-1], o[::-1], r[::-1]) == pytest.approx(loss(s, o, r), rel=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_p3o_has_no_gradient_beyond_the_clip_on_the_side_of_the_better_reward(joint):
    run = lambda s, r: jax.grad(p3o_loss)(s, jnp.zeros(2), r, joint=joint)  # noqa: E731
    apart = jnp.array([0.5, -0.5])
    assert_close(run(apart, jnp.array([1.0, 0.0])), [0, 0])
    assert np.abs(run(apart, jnp.array([0.0, 1.0]))).min() > 0.1


def test_mdpo_minimiser_is_the_tilted_policy():
    def run(logps):
        columns = [x[:, None] for x in (logps, jnp.asarray(OLD), jnp.asarray(REWARDS))]
        return softmax(OLD) @ mdpo_loss(*columns, t_k=0.4)

    assert_close(minimise(run, OLD, steps=15), tilted(OLD, REWARDS, 0.4), atol=1e-9)
    # In the mean over the old policy's samples it is -E[A] + KL/t, value and gradient.
    exact = lambda s: -jnp.exp(s) @ REWARDS + jnp.sum(jnp.exp(s) * (s - OLD)) / 0.4  # noqa: E731
    assert_close(run(jnp.asarray(POLICY)), exact(jnp.asarray(POLICY)))
    assert_close(gradient(run, POLICY), gradient(exact, POLICY))


def test_mdpo_at_small_steps_is_the_policy_gradient():
    loss = lambda s: mdpo_loss(s, jnp.asarray(OLD), REWARDS, t_k=0.1)  # noqa: E731
    assert_close(jax.grad(loss)(jnp.asarray(OLD)), -REWARDS / 5)


def test_ratio_goes_on_as_its_tangent_where_it_would_overflow():
    assert_close(bounded_exp(jnp.array([-1e4, 0.0, 3.0])), [0, 1, math.exp(3)])
    x = jnp.array([20.0, 30.0, 1e4])
    np.testing.assert_allclose(bounded_exp(x), math.exp(20) * np.array([1, 11, 9981]), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded_exp))(x[1:]), math.exp(20), rtol=1e-12)


# Regressions on rewards.


def copg(beta, weights):
    return lambda s: expected(
        copg_loss(pairs(s), pairs(REFERENCE), pairs(REWARDS), beta=beta), weights
    )


def test_copg_is_the_regression_of_log_ratios_on_rewards_up_to_a_constant():
    dh = 1.3 - (-0.4)
    dr, beta = 0.8 - (-0.5), 0.6
    found = copg_loss(np.array([1.3, -0.4]), np.zeros(2), np.array([0.8, -0.5]), beta=beta)
    assert float(found) == pytest.approx((dr - beta * dh) ** 2 / (2 * beta) - dr**2 / (2 * beta))
    assert float(found) == pytest.approx(-(dr - beta / 2 * dh) * dh)


@pytest.mark.parametrize("seed", [0, 1])
def test_copg_minimiser_is_the_best_regularised_policy_for_any_sampling(seed):
    rng = np.random.default_rng(seed)
    weights = product(rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5)))
    found = minimise(copg(0.6, weights), POLICY, steps=3)
    assert_close(found, tilted(REFERENCE, REWARDS, 1 / 0.6), atol=1e-9)


def test_copg_solves_the_papers_bandit_where_ipo_does_not():
    # Three arms, R = (2.5, 2, 1), beta 0.5, uniform reference: pi* = (.70538, .25950, .03512)
    rewards, beta = np.array([2.5, 2.0, 1.0]), 0.5
    reference = np.full(3, -math.log(3))
    best = tilted(reference, rewards, 1 / beta)
    assert_close(softmax(best), [0.70538, 0.25950, 0.03512], atol=5e-6)
    value = lambda s: softmax(s) @ rewards - beta * kl(s, reference)  # noqa: E731
    assert value(best) == pytest.approx(2.1252, abs=5e-5)
    weights = product([0.1, 0.2, 0.7], [0.05, 0.05, 0.9])
    loss = lambda s: expected(  # noqa: E731
        copg_loss(pairs(s), pairs(reference), pairs(rewards), beta=beta), weights
    )
    assert value(best) - value(minimise(loss, reference, steps=3)) < 1e-10
    wins = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None]))
    labels = jnp.stack([wins, wins.T], -1)
    ipo = lambda s: expected(  # noqa: E731
        online_ipo_loss(pairs(s), pairs(reference), labels, tau=beta), weights
    )
    assert value(best) - value(minimise(ipo, reference, steps=3)) == pytest.approx(0.1525, abs=1e-4)


def test_copg_on_own_samples_is_twice_the_policy_gradient():
    own = product(softmax(POLICY), softmax(POLICY))
    exact = lambda s: -jnp.exp(s) @ REWARDS + 0.6 * jnp.sum(jnp.exp(s) * (s - REFERENCE))  # noqa: E731
    assert_close(gradient(copg(0.6, own), POLICY), 2 * gradient(exact, POLICY))


def test_copg_of_a_list_is_the_sum_over_its_pairs_over_the_others():
    s, q, r = POLICY, REFERENCE, REWARDS
    total = sum(
        float(copg_loss(s[[i, j]], q[[i, j]], r[[i, j]], beta=0.6))
        for i in range(5)
        for j in range(i)
    )
    assert float(copg_loss(s, q, r, beta=0.6)) == pytest.approx(total / 4, rel=1e-10)
    where = np.array([True, False, True, True, False])
    kept = copg_loss(s[where], q[where], r[where], beta=0.6)
    found = copg_loss(np.where(where, s, np.nan), q, r, beta=0.6, where=where)
    assert float(found) == pytest.approx(float(kept), rel=1e-12)
    assert float(copg_loss(s, q, r, where=np.arange(5) == 0)) == 0


def test_rebel_minimiser_is_a_mirror_step_and_dnos_with_win_rates():
    weights = np.random.default_rng(5).dirichlet(np.ones(25)).reshape(5, 5)
    rebel = lambda s: expected(  # noqa: E731
        rebel_loss(pairs(s), pairs(OLD), pairs(REWARDS), eta=1.25), weights
    )
    dno = lambda s: expected(  # noqa: E731
        dno_loss(pairs(s), pairs(OLD), pairs(REWARDS), eta=0.8), weights
    )
    step = tilted(OLD, REWARDS, 1.25)
    assert_close(minimise(rebel, OLD, steps=3), step, atol=1e-9)
    assert_close(gradient(dno, step), np.zeros(5))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: mdpo_loss(s, OLD[:2], REWARDS[:2]),
        lambda s: copg_loss(s, OLD[:2], REWARDS[:2]),
        lambda s: rebel_loss(s, OLD[:2], REWARDS[:2]),
        lambda s: p3o_loss(s, OLD[:2], REWARDS[:2], epsilon=1e3),
    ],
    ids=["mdpo", "copg", "rebel", "p3o"],
)
def test_gradients_are_finite_differences(loss):
    check_grads(loss, (jnp.asarray(OLD[:2] + np.array([0.05, -0.1])),), order=1, modes=["rev"])


def test_masked_tokens_and_candidates_do_not_count():
    s, where = np.full((2, 3), -1.0), np.array([True, False])
    s[1], s[0, 2] = np.nan, np.inf
    mask = np.array([[True, True, False], [True, True, True]])
    found = ppo_policy_loss(s, s, np.ones((2, 3)), mask, where=where)
    assert (float(found.total), float(found.count)) == (-2.0, 2.0)
    found = ppo_value_loss(s, s, np.zeros((2, 3)), mask, where=where)
    assert (float(found.total), float(found.count)) == (1.0, 2.0)
