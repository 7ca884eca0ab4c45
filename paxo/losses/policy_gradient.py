r"""Policy-gradient losses with importance ratios to the policy that sampled, `previous`.

A ratio is $\rho = \pi/\pi_{old}$. Beyond $e^{20}$ it goes on linearly in the log-ratio instead of
overflowing; losses and gradients of practical ratios do not see it.

>>> old = jnp.array([[-1.0, -1.0]])
>>> loss = ppo_policy_loss(old, old, jnp.array([[0.5, 1.5]]), jnp.ones((1, 2), bool))
>>> float(loss.value)
-1.0
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import (
    candidate_mean,
    check_lists,
    check_pairs,
    given,
    ratios_to,
    tokens_there,
)
from paxo.losses.pairwise import margin
from paxo.numerics import Array, Mean, at_least_float32, masked, masked_rows

LARGEST_LOG_RATIO = 20.0


def ppo_policy_loss(
    policy_token_logps: Array,
    previous_token_logps: Array,
    advantages: Array,
    token_mask: Array,
    *,
    epsilon: Positive = 0.2,
    delta: NonNegative = 0.0,
    where: Array | None = None,
) -> Mean:
    r"""PPO's actor: mean over tokens of $-\min(\rho A, \mathrm{clip}(\rho, 1\pm\epsilon) A)$.

    A token whose ratio has left the interval on the side that its advantage favours has no gradient
    any more; one on the other side is still pulled back.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        previous_token_logps: `[..., K, T]` the same under the policy that sampled them.
        advantages: `[..., K, T]` of each token, from `gae`, often whitened.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        epsilon: half-width of the clip interval, > 0.
        delta: bound on the unclipped ratio, 0 for none; above 1 + epsilon it is the dual clip.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over tokens, in units of the advantage.

    >>> old, mask = jnp.log(jnp.array([[0.5, 0.5]])), jnp.ones((1, 2), bool)
    >>> now = jnp.log(jnp.array([[0.75, 0.75]]))               # ratio 1.5, clipped where A > 0
    >>> loss = ppo_policy_loss(now, old, jnp.array([[1.0, -1.0]]), mask)
    >>> round(float(loss.value), 4)                            # (-1.2 + 1.5) / 2
    0.15

    Schulman et al. 2017, arXiv:1707.06347, Eq. 7; dual clip Ye et al. 2020, arXiv:1912.09729.
    TRL's PPOTrainer, OpenRLHF and MOSS-RLHF compute the same token mean (local to a microbatch).
    """
    keep = tokens_there(token_mask, where, policy_token_logps, previous_token_logps, advantages)
    ratios = bounded_exp(ratios_to(policy_token_logps, previous_token_logps, keep))
    loss = clipped_surrogate(ratios, given(advantages, keep), epsilon, epsilon, delta)
    return Mean.over(loss, keep)


def ppo_value_loss(
    values: Array,
    previous_values: Array,
    returns: Array,
    token_mask: Array,
    *,
    clip: Positive = 0.2,
    where: Array | None = None,
) -> Mean:
    r"""PPO's critic: token mean of $\frac12\max((V-R)^2, (V_c-R)^2)$, $V_c$ near the old value.

    $V_c = V_{old} + \mathrm{clip}(V - V_{old}, \pm c)$ holds a value back that moves too far.

    Args:
        values: `[..., K, T]` the critic's value of the state before each token (a head).
        previous_values: `[..., K, T]` the same when the completions were sampled.
        returns: `[..., K, T]` advantage plus value, from `gae`.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        clip: how far a value may move from the old one before its gradient ends, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over tokens, in squared units of the reward.

    >>> old, goal, mask = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1), bool)
    >>> loss = ppo_value_loss(jnp.full((1, 1), 0.5), old, goal, mask)
    >>> round(float(loss.value), 4)                            # max(0.5, 0.8)² / 2
    0.32

    Value clipping is of the original code; formula as in "Secrets of RLHF", Zheng et al. 2023,
    arXiv:2307.04964, and TRL's PPOTrainer.
    """
    keep = tokens_there(token_mask, where, values, previous_values, returns)
    values = masked(at_least_float32(values), keep)
    old, goal = given(previous_values, keep), given(returns, keep)
    clipped = old + jnp.clip(values - old, -clip, clip)
    return Mean.over(jnp.maximum(jnp.square(values - goal), jnp.square(clipped - goal)) / 2, keep)


def p3o_loss(
    policy_logps: Array,
    previous_logps: Array,
    rewards: Array,
    *,
    epsilon: Positive = 0.2,
    joint: bool = False,
    where: Array | None = None,
) -> Array:
    r"""P3O, pairwise PPO: the gradient is that of $\frac12(r_1-r_2)\log(\pi(y_1)/\pi(y_2))$.

    Rewards count by their difference only: adding anything that depends on the prompt alone changes
    nothing. Off the sampling policy either each completion has its own ratio, $A(\rho_1 - \rho_2)$,
    or both have the product $\rho_1\rho_2$; unclipped, both are unbiased.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        previous_logps: `[..., 2]` the same under the policy that sampled them.
        rewards: `[..., 2]` with the KL penalty already subtracted.
        epsilon: half-width of the clip interval, > 0.
        joint: False (V1) clips each ratio, True (V2) weighs with the product of the ratios and
            clips their quotient to [1/(1 + epsilon), 1 + epsilon].
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` in units of the reward; the gradient counts. 0 where either candidate is masked.

    >>> old, rewards = jnp.array([-4.0, -6.0]), jnp.array([3.0, 1.0])
    >>> jax.grad(p3o_loss)(old, old, rewards)
    Array([-1.,  1.], dtype=float32)

    Wu et al. 2023, arXiv:2310.00212 (experimental: the estimators are derived, the paper's exact
    clipped forms and its epsilon are from memory). No trainer has it; on the sampling policy its
    gradient is that of `rloo` of two without its KL.
    """
    check_pairs(policy_logps, previous_logps, rewards, where)
    ratios = ratios_to(policy_logps, previous_logps, where)
    advantages = margin(given(rewards, where)) / 2
    if joint:
        weights = bounded_exp(jax.lax.stop_gradient(jnp.sum(ratios, axis=-1)))
        quotient = margin(ratios)
        # As far up as down in the logarithm: which of the two comes first must not matter.
        clipped = jnp.clip(quotient, -jnp.log1p(epsilon), jnp.log1p(epsilon))
        loss = -weights * jnp.minimum(quotient * advantages, clipped * advantages)
    else:
        signed = jnp.stack([advantages, -advantages], axis=-1)
        loss = clipped_surrogate(bounded_exp(ratios), signed, epsilon, epsilon).sum(-1)
    return masked_rows(loss, where)


def mdpo_loss(
    policy_logps: Array,
    previous_logps: Array,
    advantages: Array,
    *,
    t_k: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""MDPO, mirror descent: $-\rho A + \frac1{t_k} KL(\pi|\pi_k)$ on samples of $\pi_k$.

    Instead of a clip, a KL to the policy of the last round, several gradient steps long. A tabular
    round's minimiser is $\pi_k e^{t_k A}$, normalised. The KL is estimated without bias, in value
    and gradient, by $\rho\log\rho - \rho + 1 \ge 0$ on the samples.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        previous_logps: `[..., K]` the same under the policy that sampled them.
        advantages: `[..., K]` of each completion.
        t_k: step, > 0; the authors let it fall from 1 to 0 over the rounds.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` in units of the advantage, mean over the candidates; 0 without any.

    >>> old = jnp.array([-4.0, -6.0])
    >>> mdpo_loss(old, old, jnp.array([1.0, -0.5]))
    Array(-0.25, dtype=float32)

    Tomar et al. 2020, arXiv:2005.09814, on-policy form; the authors' code has the KL of Gaussians
    in closed form, and two terms more off-policy. No language-model trainer has it.
    """
    check_lists(policy_logps, previous_logps, advantages, where)
    log_ratios = ratios_to(policy_logps, previous_logps, where)
    ratios = bounded_exp(log_ratios)
    kl = ratios * log_ratios - ratios + 1
    return candidate_mean(kl / t_k - ratios * given(advantages, where), where)


def clipped_surrogate(
    ratios: Array, advantages: Array, low: float, high: float, delta: float = 0.0
) -> Array:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A); `delta` > 0 bounds the unclipped ratio."""
    free = jnp.minimum(ratios, delta) if delta else ratios
    return -jnp.minimum(free * advantages, jnp.clip(ratios, 1 - low, 1 + high) * advantages)


def bounded_exp(x: Array) -> Array:
    """e^x, and beyond e^20 its tangent: increasing and finite wherever log-probs lead."""
    excess = jnp.maximum(x - LARGEST_LOG_RATIO, 0)
    return jnp.exp(jnp.minimum(x, LARGEST_LOG_RATIO)) * (1 + excess)
