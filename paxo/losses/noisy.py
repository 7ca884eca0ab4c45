r"""DPO for pairs that tell less than they seem to: flipped labels, other policies' text.

All are DPO's loss of the scaled margin $z = \beta(r_w - r_l)$, tilted or weighted.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> cdpo_loss(policy, reference, beta=0.5, label_smoothing=0.0)  # DPO
Array(0.3132617, dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import FlipRate, NonNegative, Positive
from paxo.losses.pairwise import MAX_EXPONENT, check_candidates, margin, pair_log_ratios
from paxo.numerics import Array, at_least_float32, masked, masked_rows, safe_divide


def smoothed(z: Array, label_smoothing: float) -> Array:
    r"""$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$ with one softplus."""
    return jax.nn.softplus(-z) + label_smoothing * z


def cdpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.2,
    where: Array | None = None,
) -> Array:
    r"""Conservative DPO: cross-entropy to the label 1 - ε, $-\log\sigma(z) + \epsilon z$.

    Smallest, with the binary entropy of ε as value, at the finite margin $z = \mathrm{logit}(1 -
    \epsilon)$; beyond it the gradient turns round.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        label_smoothing: assumed share of flipped labels ε, in [0, 0.5); 0 is DPO. HALOs' recipe
            sets 0.2, the author's code 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> cdpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5, label_smoothing=0.1)
    Array(0.4132617, dtype=float32)

    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf (no arXiv number). HALOs, Tunix, OpenRLHF,
    EasyLM and torchtune have it as DPO's `label_smoothing`, EasyDeL also as "kto"; TRL from 2026 on
    and Liger ignore that argument for `sigmoid`.
    """
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    return masked_rows(smoothed(z, label_smoothing), where)


def robust_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    eps: FlipRate = 0.1,
    where: Array | None = None,
) -> Array:
    r"""Provably robust DPO: unbiased under flips, $-\log\sigma(z) - \frac{\epsilon}{1-2\epsilon}z$.

    Averaged over labels that are flipped with probability ε it is DPO's loss on the true ones. The
    tilt is opposite to conservative DPO's: the loss falls without bound as z grows, so negative
    values are right, and its gradient never vanishes.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        eps: known share of flipped labels ε, in [0, 0.5); 0 is DPO.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> robust_dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5, eps=0.1)
    Array(0.1882617, dtype=float32)

    Chowdhury et al. 2024, arXiv:2403.00409; the formula is as TRL quotes it. TRL `robust` and
    EasyDeL `robust` compute the same, with ε under the name `label_smoothing`.
    """
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    return masked_rows(smoothed(z, -eps / (1 - 2 * eps)), where)


def wpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    policy_token_logps: Array,
    token_collisions: Array,
    token_mask: Array,
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
    clip_max: NonNegative = 1.0,
    where: Array | None = None,
) -> Array:
    r"""WPO: (conservative) DPO, each pair weighted by how likely the policy is to write it.

    $w = \min(1, e^{a_w + a_l})$, $a$ the mean over the completion's tokens of $\log\pi(y_t) -
    \log\sum_v\pi(v)^2$: tokens that the policy samples have mean weight 1. No gradient flows
    through w.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        policy_token_logps: `[..., 2, T]` log-probs of the completions' tokens.
        token_collisions: `[..., 2, T]` log Σ p² of the policy's next-token distributions.
        token_mask: `[..., 2, T]` bool, True on tokens of the completion.
        beta: strength of the KL regularisation, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        clip_max: largest weight; 0 for no clip.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> coin, mask = jnp.full((2, 3), jnp.log(0.5)), jnp.ones((2, 3), bool)  # a uniform policy
    >>> wpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), coin, coin, mask, beta=0.5)
    Array(0.3132617, dtype=float32)

    Zhou et al. 2024, arXiv:2406.11827, and the authors' code (`run_wpo.py`). TRL's `use_weighting`
    is the same up to early 2026 and without the clip since; open-instruct leaves out the
    denominator and lets the gradient through the weight.
    """
    chex.assert_equal_shape([policy_token_logps, token_collisions, token_mask])
    check_candidates(policy_logps, token_mask[..., 0])
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    kept = token_mask.astype(bool)
    if where is not None:
        kept = kept & where[..., None]
    logps, collisions = at_least_float32(policy_token_logps), at_least_float32(token_collisions)
    alignment = jnp.sum(masked(logps, kept) - masked(collisions, kept), axis=-1)
    alignment = jnp.sum(safe_divide(alignment, jnp.sum(kept, axis=-1)), axis=-1)
    weight = jnp.exp(jnp.minimum(alignment, MAX_EXPONENT))
    if clip_max:
        weight = jnp.minimum(weight, clip_max)
    return masked_rows(jax.lax.stop_gradient(weight) * smoothed(z, label_smoothing), where)
