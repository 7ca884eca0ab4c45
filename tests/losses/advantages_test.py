"""Generalised advantages, whitening and RTO's token rewards."""

import numpy as np
import pytest

from paxo.losses.advantages import gae, rto_rewards, whiten
from tests.losses.tabular import (
    Tree,
    assert_close,
    float64,  # noqa: F401  (a fixture)
)

RNG = np.random.default_rng(0)
MASK = np.arange(5) < np.array([3, 5])[:, None]
REWARDS, VALUES = RNG.standard_normal((2, 2, 5))


def test_gae_is_the_discounted_sum_of_the_differences():
    gamma, lam = 0.9, 0.7
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate([3, 5]):
        r, v = REWARDS[row, :length], np.append(VALUES[row, :length], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        wanted = [
            sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, length))
            for t in range(length)
        ]
        assert_close(advantages[row, :length], wanted)
        assert_close(returns[row, :length], np.add(wanted, v[:-1]))
        assert not np.asarray(advantages)[row, length:].any()


def test_gae_trusts_the_rewards_at_lambda_1_and_the_critic_at_0():
    _, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=1.0)
    to_go = np.cumsum((REWARDS * MASK)[:, ::-1], -1)[:, ::-1]
    assert_close(returns, to_go * MASK)
    advantages, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.0)
    following = np.append(VALUES[1, 1:], 0)
    assert_close(advantages[1], REWARDS[1] + following - VALUES[1])


def test_gae_and_whiten_do_not_see_what_is_masked():
    junk = np.where(MASK, REWARDS, np.nan), np.where(MASK, VALUES, np.inf)
    assert_close(gae(*junk, MASK)[0], gae(REWARDS, VALUES, MASK)[0])
    assert_close(whiten(junk[0], MASK), whiten(REWARDS, MASK))


@pytest.mark.parametrize(("unbiased", "ddof"), [(True, 1), (False, 0)])
def test_whitened_values_have_mean_0_and_deviation_1(unbiased, ddof):
    found = np.asarray(whiten(3 * REWARDS + 5, MASK, unbiased=unbiased))[MASK]
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std(ddof=ddof) == pytest.approx(1, rel=1e-6)


def test_rto_clips_the_dense_term_and_pays_the_reward_at_the_last_token():
    policy, reference, dpo = RNG.uniform(-3, -1, (3, 2, 5))
    found = rto_rewards(policy, reference, dpo, MASK, np.array([3.0, -25.0]))
    dense = np.clip(0.05 * (dpo - reference), -0.05, 0.05) - 0.01 * (policy - reference)
    dense[0, 2] += 3.0
    dense[1, 4] += -10.0
    assert_close(found, dense * MASK)
    junk = [np.where(MASK, x, np.nan) for x in (policy, reference, dpo)]
    where = np.array([True, False])
    alone = rto_rewards(*junk, MASK, np.array([3.0, np.nan]), where=where)
    assert_close(alone, (dense * MASK) * where[:, None])


def test_rto_without_clip_only_rescales_the_reward_if_the_dpo_policy_is_ideal():
    # The dense term sums to b1 log(pi_dpo/ref)(y) = b1/beta (r(y) - V), V the prompt's soft value.
    tree, beta, b1 = Tree(vocab=3), 0.5, 0.2
    reference = np.asarray(tree.token_logps(tree.logits(1)))
    rewards = np.random.default_rng(2).standard_normal(9)
    logits = tilted_tree(tree, reference, rewards / beta)
    ideal = np.asarray(tree.token_logps(logits))
    value = beta * np.log(np.sum(np.exp(reference.sum(-1) + rewards / beta)))
    found = rto_rewards(
        reference, reference, ideal, np.ones((9, 2), bool), rewards, b1=b1, clip=0.0
    )
    assert_close(found.sum(-1), (1 + b1 / beta) * rewards - b1 / beta * value)


def tilted_tree(tree, reference, exponents):
    """Logits of the policy proportional to the reference times e^exponents, completion by one."""
    joint = (reference.sum(-1) + exponents).reshape(tree.vocab, tree.vocab)
    return np.concatenate([np.log(np.exp(joint).sum(-1))[None], joint])
