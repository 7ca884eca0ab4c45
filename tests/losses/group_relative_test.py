"""GRPO and its relatives against TRL's formulas, RLOO against its identities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.group_relative import (
    cispo_loss,
    group_advantages,
    grpo_loss,
    rloo_loss,
    sapo_loss,
)
from paxo.losses.regression import copg_loss
from tests.losses.tabular import (
    Tree,
    assert_close,
    float64,  # noqa: F401  (a fixture)
)

RNG = np.random.default_rng(0)
MASK = np.arange(5) < np.array([[3, 5, 1], [2, 4, 5]])[..., None]
OLD = RNG.uniform(-2, -1, MASK.shape)
NOW = OLD + 0.4 * RNG.standard_normal(MASK.shape)
REFERENCE = OLD + 0.3 * RNG.standard_normal(MASK.shape)
REWARDS = RNG.standard_normal((2, 3))


def trl_advantages(scale):
    centred = REWARDS - REWARDS.mean(-1, keepdims=True)
    return centred / (REWARDS.std(-1, ddof=1, keepdims=True) + 1e-4) if scale else centred


def trl_tokens(low=0.2, high=0.2, beta=0.0, sequence=False, scale=True, delta=None):
    """Losses `[2, 3, 5]` of the tokens as TRL computes them."""
    logs = NOW - OLD
    if sequence:
        means = (logs * MASK).sum(-1) / MASK.sum(-1)
        logs = np.repeat(means[..., None], 5, -1)
    ratio, advantage = np.exp(logs), trl_advantages(scale)[..., None]
    free = np.minimum(ratio, delta) if delta else ratio
    loss = -np.minimum(free * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    gap = REFERENCE - NOW
    return loss + beta * (np.exp(gap) - gap - 1)


def trl_mean(tokens, reduction):
    sums = (tokens * MASK).sum(-1)
    return {
        "token_mean": sums.sum() / MASK.sum(),
        "sequence_mean": (sums / MASK.sum(-1)).mean(),
        "sequence_sum": sums.mean(),
        "fixed_length": sums.sum() / (6 * 5),
    }[reduction]


@pytest.mark.parametrize(
    "reduction", ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_grpo_is_trls_formula(reduction, importance):
    found = grpo_loss(NOW, OLD, REWARDS, MASK, importance=importance, reduction=reduction)
    wanted = trl_mean(trl_tokens(sequence=importance == "sequence"), reduction)
    assert float(found.value) == pytest.approx(wanted, rel=1e-12)


def test_grpo_options_are_trls():
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.3, "beta": 0.04, "delta": 1.35}
    found = grpo_loss(NOW, OLD, REWARDS, MASK, REFERENCE, scale_rewards="none", **settings)
    tokens = trl_tokens(0.1, 0.3, 0.04, scale=False, delta=1.35)
    assert float(found.value) == pytest.approx(trl_mean(tokens, "token_mean"), rel=1e-12)
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(NOW, OLD, REWARDS, MASK, beta=0.1)


def test_token_and_sequence_means_agree_exactly_for_equal_lengths():
    every = np.ones_like(MASK)
    both = [
        float(grpo_loss(NOW, OLD, REWARDS, every, reduction=r).value)
        for r in ("token_mean", "sequence_mean")
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-12)
    uneven = [
        float(grpo_loss(NOW, OLD, REWARDS, MASK, reduction=r).value)
        for r in ("token_mean", "sequence_mean")
    ]
    assert abs(uneven[0] - uneven[1]) > 1e-3


LOSSES = [grpo_loss, cispo_loss, sapo_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_1_all_have_the_policy_gradient(loss):
    run = lambda s: loss(s, OLD, REWARDS, MASK, reduction="token_mean").value  # noqa: E731
    wanted = -trl_advantages(True)[..., None] * MASK / MASK.sum()
    assert_close(jax.grad(run)(jnp.asarray(OLD)), wanted)


def test_grpo_value_at_ratio_1_is_minus_the_mean_advantage_of_the_tokens():
    found = grpo_loss(OLD, OLD, REWARDS, MASK).value
    wanted = -(trl_advantages(True)[..., None] * MASK).sum() / MASK.sum()
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_cispo_is_trls_formula_and_gives_every_token_a_gradient():
    weights = np.minimum(np.exp(NOW - OLD), 1.1)
    advantages = trl_advantages(True)[..., None]
    wanted = trl_mean(-weights * advantages * NOW, "token_mean")
    run = lambda s: cispo_loss(s, OLD, REWARDS, MASK, epsilon_high=1.1).value  # noqa: E731
    assert float(run(NOW)) == pytest.approx(wanted, rel=1e-12)
    assert_close(jax.grad(run)(jnp.asarray(NOW)), -weights * advantages * MASK / MASK.sum())


def test_sapo_is_trls_formula():
    advantages = np.broadcast_to(trl_advantages(True)[..., None], MASK.shape)
    tau = np.where(advantages > 0, 1.0, 1.05)
    gate = 4 / tau / (1 + np.exp(-tau * (np.exp(NOW - OLD) - 1)))
    found = sapo_loss(NOW, OLD, REWARDS, MASK)
    wanted = trl_mean(-gate * advantages, "sequence_mean")
    assert float(found.value) == pytest.approx(wanted, rel=1e-12)


def test_rloo_is_trls_formula_with_the_kl_in_the_reward():
    old, now, reference = ((x * MASK).sum(-1) for x in (OLD, NOW, REFERENCE))
    rewards = REWARDS - 0.05 * (old - reference)
    advantages = rewards - (rewards.sum(-1, keepdims=True) - rewards) / 2
    ratio = np.exp(now - old)
    wanted = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()
    found = rloo_loss(now, old, reference, REWARDS)
    assert float(found.value) == pytest.approx(wanted, rel=1e-12)
    assert float(found.count) == 6


def test_rloo_advantages_are_the_centred_rewards_times_k_over_k_minus_1_and_sum_to_0():
    old = np.full((2, 3), -4.0)
    run = lambda s: rloo_loss(s, old, old, REWARDS).total  # noqa: E731
    advantages = -np.asarray(jax.grad(run)(jnp.asarray(old)))
    assert_close(advantages, 1.5 * (REWARDS - REWARDS.mean(-1, keepdims=True)))
    assert_close(advantages.sum(-1), [0, 0])


def test_rloo_of_two_on_own_samples_is_half_of_copg():
    s, q, r = np.array([-4.0, -6.5]), np.array([-5.0, -5.5]), np.array([0.7, 0.2])
    rloo = jax.grad(lambda x: rloo_loss(x, s, q, r, beta=0.3).value)(jnp.asarray(s))
    copg = jax.grad(lambda x: copg_loss(x, q, r, beta=0.3))(jnp.asarray(s))
    assert_close(2 * rloo, copg)


def test_rloo_gradient_is_unbiased_on_token_sequences():
    # Every draw of two completions out of four, weighed with its probability.
    tree = Tree(vocab=2)
    policy, q = tree.logits(0), np.asarray(tree.logps(tree.logits(1)))
    rewards = np.random.default_rng(3).standard_normal(4)
    draws = np.stack(np.divmod(np.arange(16), 4), -1)
    old = np.asarray(tree.logps(policy))

    def run(x):
        each = jax.vmap(lambda *a: rloo_loss(*a, beta=0.2).value)
        losses = each(tree.logps(x)[draws], old[draws], q[draws], rewards[draws])
        return jnp.sum(np.exp(old[draws].sum(-1)) * losses)

    def exact(x):
        s = tree.logps(x)
        return -jnp.exp(s) @ rewards + 0.2 * jnp.sum(jnp.exp(s) * (s - q))

    policy = jnp.asarray(policy)
    assert_close(jax.grad(run)(policy), jax.grad(exact)(policy))


def test_advantages_pass_over_candidates_that_are_not_there():
    where = np.array([True, False, True, True])
    rewards = np.array([1.0, np.nan, 2.0, 6.0])
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-4
    found = group_advantages(rewards, where, "group")
    assert_close(found, np.array([-2, 0, -1, 3]) / deviation)
    assert_close(group_advantages(np.array([3.0, 3.0]), None, "group"), [0, 0])


@pytest.mark.parametrize("loss", LOSSES)
def test_completion_that_is_alone_or_empty_has_no_gradient(loss):
    where = np.array([[True, False, False], [True, True, True]])
    mask = MASK.copy()
    mask[1, 2] = False
    run = lambda s: loss(s, OLD, REWARDS, mask, where=where).value  # noqa: E731
    grad = np.asarray(jax.grad(run)(jnp.asarray(NOW)))
    assert not grad[0].any()
    assert not grad[1, 2].any()
    assert np.isfinite(grad).all()


def test_rloo_completion_that_is_alone_has_no_gradient():
    where = np.array([True, False])
    s = jnp.array([-4.0, -5.0])
    run = lambda x: rloo_loss(x, s, s, jnp.array([2.0, jnp.nan]), where=where).value  # noqa: E731
    assert_close(jax.grad(run)(s), [0, 0])
