r"""Pairwise losses that hold each reward to a value of its own, not only the two to one another.

They take the implicit rewards $u = \beta r_w$ and $v = \beta r_l$ apart: raising or lowering both
log-probs of a pair changes the loss, so the chosen completion cannot sink along with the rejected.

>>> same = jnp.array([-5.0, -5.0])
>>> apo_zero_loss(same, same), apo_down_loss(same, same)
(Array(1., dtype=float32), Array(1., dtype=float32))
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive
from paxo.losses.pairwise import margin, pair_log_ratios
from paxo.numerics import Array, masked_rows


def nca_pair_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.01,
    where: Array | None = None,
) -> Array:
    r"""Noise contrastive alignment of a pair, one optimum for each reward.

    $-\log\sigma(u) - \frac12\log\sigma(-u) - \frac12\log\sigma(-v)$. The chosen reward
    is drawn to u = log 2, the rejected one pushed down for ever.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 2 log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> nca_pair_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(1.198154, dtype=float32)

    Chen et al. 2024, arXiv:2402.05369, and the authors' code, whose beta it is. TRL `nca_pair` and
    EasyDeL `nca_pair` compute the same, by default with beta 0.1. InfoNCA with two completions is
    DPO.
    """
    u, v = _rewards(policy_logps, reference_logps, beta, where)
    chosen = 1.5 * jax.nn.softplus(-u) + 0.5 * u  # softplus(u) = softplus(-u) + u
    return masked_rows(chosen + 0.5 * jax.nn.softplus(v), where)


def apo_zero_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""APO-zero: $\sigma(-u) + \sigma(v)$, the chosen up and the rejected down from the reference.

    For data whose chosen completions are better than what the policy writes.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` in [0, 2]; 1 where policy and reference agree, 0 where a candidate is masked.

    >>> apo_zero_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(0.7550813, dtype=float32)

    D'Oosterlinck et al. 2024, arXiv:2408.06266; the authors name TRL's `apo_zero` as the
    implementation, which EasyDeL has too.
    """
    u, v = _rewards(policy_logps, reference_logps, beta, where)
    return masked_rows(jax.nn.sigmoid(-u) + jax.nn.sigmoid(v), where)


def apo_down_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""APO-down: $\sigma(u) + \sigma(v - u)$, the chosen down and the rejected down further.

    For data whose chosen completions are worse than what the policy writes.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` in [0, 2]; 1 where policy and reference agree, 0 where a candidate is masked.

    >>> apo_down_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(0.8914007, dtype=float32)

    D'Oosterlinck et al. 2024, arXiv:2408.06266; the authors name TRL's `apo_down` as the
    implementation, which EasyDeL has too.
    """
    u, v = _rewards(policy_logps, reference_logps, beta, where)
    return masked_rows(jax.nn.sigmoid(u) + jax.nn.sigmoid(v - u), where)


def cal_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.002,
    where: Array | None = None,
) -> Array:
    r"""Calibrated DPO: a logistic margin, and log-ratios held to a scale.

    $-\log\sigma(r_w - r_l) + \frac12(r_w - \frac1{2\beta})^2 + \frac12(r_l + \frac1{2\beta})^2$.
    The squares hold the log-ratios themselves to ±1/(2β) nats, so that rewards are on the scale of
    the preferences. There is no β in the logistic term.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0; the log-ratios' target is `1 / (2 * beta)`.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]`; log 2 + 1/(4β²) where policy and reference agree, 0 where a candidate is masked.

    >>> cal_dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(0.126928, dtype=float32)

    Xiao et al. 2024, arXiv:2412.14516, in the form of the authors' code, which averages the squares
    over the batch first: the same mean, other values per pair. TRL, EasyDeL and HALOs do not have
    it.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    target = jnp.array([1, -1], ratios.dtype) / (2 * beta)
    calibration = 0.5 * jnp.sum(jnp.square(ratios - target), axis=-1)
    return masked_rows(jax.nn.softplus(-margin(ratios)) + calibration, where)


def _rewards(policy_logps: Array, reference_logps: Array, beta: float, where: Array | None):
    """Implicit rewards of chosen and rejected."""
    rewards = beta * pair_log_ratios(policy_logps, reference_logps, where)
    return rewards[..., 0], rewards[..., 1]
