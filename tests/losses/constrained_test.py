"""Constrained RLHF: the mixed advantage, its multipliers, and a reward held at its threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.constrained import (
    constrained_rlhf_loss,
    first_multipliers,
    mixed_advantage,
    multiplier_step,
    multipliers,
)
from paxo.losses.group_relative import rloo_loss
from tests.losses.cases import Case
from tests.losses.conformance import CHECKS

RNG = np.random.default_rng(0)
OLD, REFERENCE = RNG.uniform(-8, -4, (2, 3, 4)).astype(np.float32)
POLICY = OLD + RNG.uniform(-0.3, 0.3, OLD.shape).astype(np.float32)
REWARDS = RNG.standard_normal((3, 4, 2)).astype(np.float32)


def with_nu(*nu):
    state = first_multipliers()
    return state | {"nu": state["nu"].at[: len(nu)].set(jnp.array(nu))}


def test_mixed_advantage_weighs_by_the_multipliers_and_keeps_the_sum_of_weights():
    a_kl, advantages, nu = -1.5, np.array([2.0, -3.0, 5.0]), np.array([0.3, -1.0, 2.0])
    for squash, lam in (("sigmoid", 1 / (1 + np.exp(-nu))), ("tanh", np.tanh(nu))):
        found = mixed_advantage(jnp.array(a_kl), advantages, nu, squash=squash)
        np.testing.assert_allclose(found, (3 - lam.sum()) * a_kl + lam @ advantages, rtol=1e-6)
        same = mixed_advantage(jnp.array(2.0), jnp.full(3, 2.0), nu, squash=squash)
        np.testing.assert_allclose(same, 3 * 2.0, rtol=1e-6)
        np.testing.assert_allclose(multipliers(nu, squash), lam, rtol=1e-6)


def test_multiplier_step_is_sgd_with_momentum_on_the_dual_loss():
    excess, rate, momentum = np.array([0.5, -2.0]), 0.1, 0.4
    state, nu, velocity = first_multipliers(2), np.zeros(2), np.zeros(2)
    for _ in range(3):
        state = multiplier_step(state, excess, dual_rate=rate, momentum=momentum, squash="tanh")
        velocity = momentum * velocity + (1 - np.tanh(nu) ** 2) * excess
        nu = nu - rate * velocity
    np.testing.assert_allclose(state["nu"], nu, rtol=1e-5)
    np.testing.assert_allclose(state["velocity"], velocity, rtol=1e-5)


def test_multipliers_rise_below_the_threshold_and_fall_above_it():
    for squash in ("sigmoid", "tanh"):
        nu = multiplier_step(first_multipliers(3), jnp.array([-1.0, 0.0, 1.0]), squash=squash)["nu"]
        assert nu[0] > nu[1] == 0 > nu[2]


def test_loss_is_rlhf_of_the_mixed_rewards():
    nu = (0.7, -0.4)
    lam = np.asarray(multipliers(jnp.array(nu)))
    loss, _ = constrained_rlhf_loss(POLICY, OLD, REFERENCE, REWARDS, state=with_nu(*nu), beta=0.3)
    # RLOO's advantages are linear in the rewards, and its KL is a reward too.
    free = 2 - lam.sum()
    wanted = rloo_loss(POLICY, OLD, REFERENCE, REWARDS @ lam, beta=0.3 * float(free))
    np.testing.assert_allclose(loss.value, wanted.value, rtol=1e-4)


def test_state_follows_the_mean_rewards_of_the_batch_and_of_what_is_there():
    where = np.ones((3, 4), bool)
    where[1, 2:] = False
    junk = np.where(where[..., None], REWARDS, np.nan)
    _, state = constrained_rlhf_loss(
        POLICY, OLD, REFERENCE, junk, state=first_multipliers(), threshold=0.2, where=where
    )
    excess = REWARDS[where].mean(0) - 0.2
    np.testing.assert_allclose(state["nu"][:2], -0.01 * 0.25 * excess, rtol=1e-4)
    assert not state["nu"][2:].any()


def test_too_many_reward_models_are_refused():
    with pytest.raises(ValueError, match="at most 16 reward models; got 17"):
        constrained_rlhf_loss(
            POLICY, OLD, REFERENCE, np.zeros((3, 4, 17)), state=first_multipliers()
        )


@pytest.mark.parametrize("squash", ["sigmoid", "tanh"])
def test_mean_reward_settles_within_two_percent_of_its_threshold(squash):
    # Six arms, exact expectations: each arm once, weighed by the policy through the old log-probs.
    rewards, threshold = jnp.linspace(0.0, 1.0, 6), 0.7
    reference = jnp.full(6, -jnp.log(6.0))

    @jax.jit
    def step(logits, state):
        p = jax.nn.softmax(logits)
        lam = multipliers(state["nu"][:1], squash)
        drift = jax.nn.log_softmax(logits) - reference
        advantage = mixed_advantage(-drift, rewards[:, None], state["nu"][:1], squash=squash)
        logits = logits + 0.5 * p * (advantage - p @ advantage)
        state = multiplier_step(
            state, p @ rewards[:, None] - threshold, squash=squash, dual_rate=0.1
        )
        return logits, state, lam

    logits, state = reference, first_multipliers(1)
    for _ in range(4000):
        logits, state, lam = step(logits, state)
    assert float(jax.nn.softmax(logits) @ rewards) == pytest.approx(threshold, rel=0.02)
    # The multiplier is the one at which pi ∝ exp(lam / (1 - lam) r) has that mean.
    tilt = jax.nn.softmax(lam / (1 - lam) * rewards)
    np.testing.assert_allclose(tilt @ rewards, threshold, rtol=0.02)


def test_one_reward_model_needs_no_axis_of_its_own():
    one, listed = (
        constrained_rlhf_loss(POLICY, OLD, REFERENCE, x, state=with_nu(0.3))
        for x in (REWARDS[..., 0], REWARDS[..., :1])
    )
    assert float(one[0].total) == float(listed[0].total)
    np.testing.assert_array_equal(one[1]["nu"], listed[1]["nu"])


@pytest.mark.parametrize("check", CHECKS)
def test_conformance_with_several_reward_models(check):  # that with one is in the table
    # Momentum acts from the second step on: test_multiplier_step_is_sgd_with_momentum.
    row = {"axes": {"constraint_rewards": "KT"}, "perturbed": {"momentum": []}}
    CHECKS[check](Case("constrained_rlhf", constrained_rlhf_loss, candidates=3, **row))
