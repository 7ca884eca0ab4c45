r"""Policy-gradient losses whose baseline is the group: GRPO and its relatives, RLOO.

K completions of one prompt, sampled by `previous`; the advantage of each is how far its reward lies
above that of the group. No critic. TRL's names for the choices are in each docstring.

>>> old, mask = jnp.full((2, 3), -1.0), jnp.ones((2, 3), bool)
>>> loss = grpo_loss(old + 0.1, old, jnp.array([1.0, 0.0]), mask, scale_rewards="none")
>>> round(float(loss.value), 4)                   # ratio 1.105: -(0.5 - 0.5) * 1.105
0.0
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import centred, check_lists, given, ratios_to, tokens_there
from paxo.losses.policy_gradient import bounded_exp, clipped_surrogate
from paxo.numerics import Array, Mean, at_least_float32, masked, safe_divide

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
Scale = Literal["group", "none"]


def grpo_loss(
    policy_token_logps: Array,
    previous_token_logps: Array,
    rewards: Array,
    token_mask: Array,
    reference_token_logps: Array | None = None,
    *,
    epsilon_low: Positive = 0.2,
    epsilon_high: Positive = 0.2,
    delta: NonNegative = 0.0,
    beta: NonNegative = 0.0,
    importance: Literal["token", "sequence"] = "token",
    scale_rewards: Scale = "group",
    reduction: Reduction = "token_mean",
    where: Array | None = None,
) -> Mean:
    r"""GRPO: clipped ratios with the group's centred rewards, and a KL to the reference.

    $-\min(\rho A, \mathrm{clip}(\rho, 1-\epsilon_l, 1+\epsilon_h) A) + \beta(e^d - d - 1)$ for each
    token, $d = \log q - \log\pi$; A is the reward minus the group's mean, over its deviation.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        previous_token_logps: `[..., K, T]` the same under the policy that sampled them.
        rewards: `[..., K]` of the completions.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        reference_token_logps: `[..., K, T]` under the reference policy; needed for `beta` > 0.
        epsilon_low: how far a ratio may fall below 1, > 0.
        epsilon_high: how far a ratio may rise above 1, > 0; DAPO has 0.28.
        delta: bound on the unclipped ratio, 0 for none.
        beta: weight of the KL estimate k3, >= 0; 0.04 in the first GRPO, 0 in TRL.
        importance: ratio of each "token", or one of the "sequence", the geometric mean of its
            tokens' (GSPO).
        scale_rewards: "group" divides by the group's standard deviation (K - 1 degrees of freedom)
            plus 1e-4, "none" does not (Dr. GRPO).
        reduction: "token_mean" divides by the batch's tokens (TRL's `dapo`, the default; `bnpo`
            does it by microbatch), "sequence_mean" averages per-token means over completions (the
            paper's, TRL's `grpo`), "sequence_sum" sums over completions (TRL's `luspo`),
            "fixed_length" divides these sums by T (`dr_grpo`, T the longest completion allowed).
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over tokens or completions, in units of the advantage.

    >>> old, mask = jnp.full((2, 1), -1.0), jnp.ones((2, 1), bool)
    >>> now = old + jnp.log(jnp.array([[1.5], [1.0]]))         # advantages ±0.5
    >>> loss = grpo_loss(now, old, jnp.array([1.0, 0.0]), mask, scale_rewards="none")
    >>> round(float(loss.value), 4)                            # (-1.2 * 0.5 + 0.5) / 2
    -0.05

    Shao et al. 2024, arXiv:2402.03300; DAPO Yu et al. 2025, arXiv:2503.14476; Dr. GRPO Liu et al.
    2025, arXiv:2503.20783; GSPO Zheng et al. 2025, arXiv:2507.18071. TRL's GRPOTrainer computes
    the same with `loss_type`, `importance_sampling_level` and `scale_rewards` as above.
    """
    keep = tokens_there(token_mask, where, policy_token_logps, previous_token_logps)
    logs = ratios_to(policy_token_logps, previous_token_logps, keep)
    if importance == "sequence":
        means = safe_divide(jnp.sum(logs, -1), jnp.sum(keep, -1))
        logs = jnp.broadcast_to(means[..., None], logs.shape)
    advantages = group_advantages(rewards, where, scale_rewards)[..., None]
    loss = clipped_surrogate(bounded_exp(logs), advantages, epsilon_low, epsilon_high, delta)
    if beta:
        if reference_token_logps is None:
            raise ValueError("grpo: beta > 0 needs token log-probs of role 'reference'")
        chex.assert_equal_shape([policy_token_logps, reference_token_logps])
        d = -ratios_to(policy_token_logps, reference_token_logps, keep)
        loss = loss + beta * (bounded_exp(d) - d - 1)
    return _reduced(loss, keep, where, reduction)


def cispo_loss(
    policy_token_logps: Array,
    previous_token_logps: Array,
    rewards: Array,
    token_mask: Array,
    *,
    epsilon_high: Positive = 5.0,
    scale_rewards: Scale = "group",
    reduction: Reduction = "token_mean",
    where: Array | None = None,
) -> Mean:
    r"""CISPO: REINFORCE with capped weights, $-\mathrm{sg}[\min(\rho, \epsilon_h)] A\log\pi$.

    Where GRPO's clip silences a token altogether, here every token keeps a gradient.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        previous_token_logps: `[..., K, T]` the same under the policy that sampled them.
        rewards: `[..., K]` of the completions.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        epsilon_high: the cap itself, not its distance from 1, > 0 (the value is from memory).
        scale_rewards: "group" divides by the group's standard deviation, "none" does not.
        reduction: as in `grpo`.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over tokens or completions; its gradient counts, its value does not.

    >>> old, mask = jnp.full((2, 1), -1.0), jnp.ones((2, 1), bool)
    >>> run = lambda s: cispo_loss(s, old, jnp.array([1.0, 0.0]), mask, scale_rewards="none").total
    >>> jax.grad(run)(old)[:, 0].tolist()
    [-0.5, 0.5]

    Chen et al. 2025, arXiv:2506.13585, without its lower bound. TRL's `loss_type="cispo"`.
    """
    keep = tokens_there(token_mask, where, policy_token_logps, previous_token_logps)
    ratios = bounded_exp(ratios_to(policy_token_logps, previous_token_logps, keep))
    weights = jax.lax.stop_gradient(jnp.minimum(ratios, epsilon_high))
    advantages = group_advantages(rewards, where, scale_rewards)[..., None]
    logps = masked(at_least_float32(policy_token_logps), keep)
    return _reduced(-weights * advantages * logps, keep, where, reduction)


def sapo_loss(
    policy_token_logps: Array,
    previous_token_logps: Array,
    rewards: Array,
    token_mask: Array,
    *,
    tau_pos: Positive = 1.0,
    tau_neg: Positive = 1.05,
    scale_rewards: Scale = "group",
    reduction: Reduction = "sequence_mean",
    where: Array | None = None,
) -> Mean:
    r"""SAPO: a soft gate in place of the clip, $-\frac4\tau\sigma(\tau(\rho-1)) A$.

    At ratio 1 the gradient is the policy gradient; it fades smoothly on both sides.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        previous_token_logps: `[..., K, T]` the same under the policy that sampled them.
        rewards: `[..., K]` of the completions.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        tau_pos: steepness of the gate where A > 0, > 0.
        tau_neg: steepness of the gate elsewhere, > 0; steeper, so that these fade sooner.
        scale_rewards: "group" divides by the group's standard deviation, "none" does not.
        reduction: as in `grpo`.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over completions or tokens, in units of the advantage.

    >>> old, mask = jnp.full((2, 1), -1.0), jnp.ones((2, 1), bool)
    >>> run = lambda s: sapo_loss(s, old, jnp.array([1.0, 0.0]), mask, scale_rewards="none").total
    >>> jax.grad(run)(old)[:, 0].tolist()
    [-0.5, 0.5]

    Gao et al. 2025, arXiv:2511.20347. TRL's `loss_type="sapo"`.
    """
    keep = tokens_there(token_mask, where, policy_token_logps, previous_token_logps)
    ratios = bounded_exp(ratios_to(policy_token_logps, previous_token_logps, keep))
    advantages = group_advantages(rewards, where, scale_rewards)[..., None]
    tau = jnp.where(advantages > 0, tau_pos, tau_neg).astype(ratios.dtype)
    gate = 4 / tau * jax.nn.sigmoid(tau * (ratios - 1))
    return _reduced(-gate * advantages, keep, where, reduction)


def rloo_loss(
    policy_logps: Array,
    previous_logps: Array,
    reference_logps: Array,
    rewards: Array,
    *,
    beta: NonNegative = 0.05,
    epsilon: Positive = 0.2,
    where: Array | None = None,
) -> Mean:
    r"""RLOO: each completion against the mean reward of the others, whole sequences as actions.

    $-\min(\rho A, \mathrm{clip}(\rho, 1\pm\epsilon) A)$ with the ratio of whole completions. The KL
    is part of the reward, $r - \beta(\log\pi_{old} - \log q)$, and has no gradient of its own.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        previous_logps: `[..., K]` the same under the policy that sampled them.
        reference_logps: `[..., K]` the same under the reference policy.
        rewards: `[..., K]` of the completions.
        beta: weight of the KL, >= 0.
        epsilon: half-width of the clip interval, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over completions, in units of the reward; one that is alone in its group has
        advantage 0.

    >>> old = jnp.array([-4.0, -6.0])
    >>> jax.grad(lambda s: rloo_loss(s, old, old, jnp.array([3.0, 1.0])).value)(old)
    Array([-1.,  1.], dtype=float32)

    Ahmadian et al. 2024, arXiv:2402.14740. TRL's RLOOTrainer computes the same.
    """
    check_lists(policy_logps, previous_logps, reference_logps, rewards, where)
    drift = given(previous_logps, where) - given(reference_logps, where)
    above, number = centred(given(rewards, where) - beta * drift, where), _number(drift, where)
    advantages = safe_divide(number * above, number - 1)
    ratios = bounded_exp(ratios_to(policy_logps, previous_logps, where))
    return Mean.over(clipped_surrogate(ratios, advantages, epsilon, epsilon), where)


def group_advantages(rewards: Array, where: Array | None, scale: Scale) -> Array:
    """`[..., K]` rewards minus their mean, over their deviation plus 1e-4 if scale is "group".

    >>> group_advantages(jnp.array([1.0, 2.0, 6.0]), None, "none")
    Array([-2., -1.,  3.], dtype=float32)
    """
    above = centred(given(rewards, where), where)
    if scale == "none":
        return above
    others = _number(above, where) - 1
    variance = safe_divide(jnp.sum(jnp.square(above), -1, keepdims=True), others)
    return above / (jnp.sqrt(variance) + 1e-4)


def _number(x: Array, where: Array | None) -> Array:
    """`[..., 1]` candidates that are there."""
    return jnp.sum(jnp.ones(x.shape, bool) if where is None else where, -1, keepdims=True)


def _reduced(loss: Array, keep: Array, where: Array | None, reduction: str) -> Mean:
    """Losses of tokens `[..., K, T]` as a total and a count that follows from the masks."""
    if reduction == "token_mean":
        return Mean.over(loss, keep)
    rows = jnp.sum(masked(loss, keep), -1)
    if reduction == "sequence_mean":
        rows = safe_divide(rows, jnp.sum(keep, -1))
    elif reduction == "fixed_length":
        rows = rows / keep.shape[-1]
    return Mean.over(rows, where)
