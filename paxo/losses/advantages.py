r"""From rewards to advantages, for the policy-gradient losses: data, without gradient.

>>> gae(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.ones(2, bool), lam=1.0)
(Array([0.5, 0.5], dtype=float32), Array([1., 1.], dtype=float32))
"""

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.given import given, tokens_there
from paxo.numerics import Array, masked


def gae(
    rewards: Array, values: Array, token_mask: Array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Array, Array]:
    r"""Generalised advantage estimates: $A_t = \delta_t + \gamma\lambda A_{t+1}$.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$, with rewards and values 0 outside the mask and after
    the last token: a completion that the length limit cut has no value beyond its end.

    Args:
        rewards: `[..., T]` of each token.
        values: `[..., T]` the critic's value of the state before each token.
        token_mask: `[..., T]` bool, True on scored tokens.
        gamma: discount, in [0, 1].
        lam: 0 trusts the critic (one-step differences), 1 the rewards.

    Returns:
        Advantages and returns (advantage + value), both `[..., T]` and 0 where masked.

    >>> gae(jnp.array([0., 0., 1.]), jnp.zeros(3), jnp.ones(3, bool), gamma=0.5, lam=1.0)[0]
    Array([0.25, 0.5 , 1.  ], dtype=float32)

    Schulman et al. 2015, arXiv:1506.02438, Eq. 16.
    """
    chex.assert_equal_shape([rewards, values, token_mask])
    rewards, values = given(rewards, token_mask), given(values, token_mask)
    following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    deltas = rewards + gamma * following - values

    def back(advantage, delta):
        advantage = delta + gamma * lam * advantage
        return advantage, advantage

    start = jnp.zeros_like(deltas[..., 0])
    _, advantages = jax.lax.scan(back, start, jnp.moveaxis(deltas, -1, 0), reverse=True)
    advantages = masked(jnp.moveaxis(advantages, 0, -1), token_mask)
    return advantages, advantages + values


def whiten(x: Array, where: Array, *, unbiased: bool = True) -> Array:
    """`(x - mean) / sqrt(variance + 1e-8)` over all True entries, 0 elsewhere.

    Args:
        x: any shape; the whole batch, since mean and variance are taken over all of it.
        where: bool of that shape.
        unbiased: the variance over n - 1 (TRL) and not n (HALOs).

    >>> whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]), unbiased=False)
    Array([-1.,  1.,  0.], dtype=float32)
    """
    x, number = given(x, where), jnp.sum(where)
    centred = masked(x - jnp.sum(x) / jnp.maximum(number, 1), where)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(number - unbiased, 1)
    return centred / jnp.sqrt(variance + 1e-8)


def rto_rewards(
    policy_token_logps: Array,
    reference_token_logps: Array,
    dpo_token_logps: Array,
    token_mask: Array,
    rewards: Array,
    *,
    b1: float = 0.05,
    b2: float = 0.01,
    clip: float = 0.05,
    reward_clip: float = 10.0,
    where: Array | None = None,
) -> Array:
    r"""RTO's token rewards for PPO, from a policy that DPO trained.

    $r_t = \mathrm{clip}(b_1\log(\pi_{dpo}/q), \pm c) - b_2\log(\pi/q) + 1_{last}\,r_{RM}$. Without
    the clip and with an ideal $\pi_{dpo}$ the first term is the reward model's reward shaped by a
    potential: it scales the terminal reward, by $1 + b_1/\beta_{dpo}$, and moves credit to tokens.

    Args:
        policy_token_logps: `[..., K, T]` under the policy that sampled, in nats.
        reference_token_logps: `[..., K, T]` under the reference policy.
        dpo_token_logps: `[..., K, T]` under the policy that DPO trained.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        rewards: `[..., K]` of the reward model, for whole completions.
        b1: weight of the DPO policy's log-ratio; 0 leaves PPO's reward.
        b2: weight of the KL penalty.
        clip: bound on the first term of each token, 0 for none.
        reward_clip: bound on the reward model's reward.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[..., K, T]` rewards, 0 where masked.

    >>> logps = jnp.array([[-1.0, -2.0]])
    >>> rto_rewards(logps, logps, logps + 2.0, jnp.ones((1, 2), bool), jnp.array([3.0]))
    Array([[0.05, 3.05]], dtype=float32)

    Zhong et al. 2024, arXiv:2404.18922, with the values of the authors' Llama script.
    """
    arrays = (policy_token_logps, reference_token_logps, dpo_token_logps)
    keep = tokens_there(token_mask, where, *arrays)
    chex.assert_shape(rewards, keep.shape[:-1])
    policy, reference, dpo = (given(x, keep) for x in arrays)
    dense = b1 * (dpo - reference)
    dense = jnp.clip(dense, -clip, clip) if clip else dense
    last = keep & (jnp.cumsum(keep[..., ::-1], axis=-1)[..., ::-1] == 1)
    terminal = jnp.clip(given(rewards, where), -reward_clip, reward_clip)[..., None]
    return dense - b2 * (policy - reference) + masked(jnp.where(last, terminal, 0), keep)
