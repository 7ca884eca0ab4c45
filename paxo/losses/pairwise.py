r"""Losses over pairs: two candidates on the last axis, chosen first.

All take summed completion log-probs in nats, `[..., 2] -> [...]`, in at least float32, without a
mean. With a reference they start from the log-ratios $r = s - q$ of policy and reference: forming
$r$ first and the margin second keeps the digits that $s_w - s_l$ would cancel.

>>> policy = jnp.array([[-4.0, -6.0], [-3.0, -3.0]])
>>> reference = jnp.array([[-5.0, -5.0], [-3.0, -3.0]])
>>> dpo_loss(policy, reference, beta=0.1)
Array([0.5981389, 0.6931472], dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import FlipRate, NonNegative, Positive
from paxo.numerics import Array, at_least_float32, masked, masked_rows, safe_divide

# Exponents are cut here: exp of 89 is infinite in float32, and products with it must stay finite.
MAX_EXPONENT = 80.0


def margin(x: Array) -> Array:
    """`[..., 2] -> [...]` chosen minus rejected."""
    return x[..., 0] - x[..., 1]


def log_ratios(policy_logps: Array, reference_logps: Array, where: Array | None = None) -> Array:
    """`[..., K]` policy minus reference in at least float32, 0 where masked."""
    policy_logps, reference_logps = (
        at_least_float32(policy_logps),
        at_least_float32(reference_logps),
    )
    # Masked before the difference: inf - inf is NaN, and NaN reaches the gradient.
    return masked(policy_logps, where) - masked(reference_logps, where)


def pair_log_ratios(
    policy_logps: Array, reference_logps: Array, where: Array | None = None, *, candidates: int = 2
) -> Array:
    """`log_ratios` of groups that are checked to have that many candidates."""
    check_candidates(policy_logps, reference_logps, where, candidates=candidates)
    return log_ratios(policy_logps, reference_logps, where)


def token_log_ratios(
    policy_token_logps: Array,
    reference_token_logps: Array,
    token_mask: Array,
    where: Array | None = None,
    *,
    candidates: int = 2,
) -> tuple[Array, Array]:
    """`[..., K, T]` log-ratios token by token, 0 where masked, and the tokens that count."""
    chex.assert_equal_shape([policy_token_logps, reference_token_logps, token_mask])
    kept = token_mask.astype(bool)
    check_candidates(kept[..., 0], where, candidates=candidates)
    if where is not None:
        kept = kept & where[..., None]
    return log_ratios(policy_token_logps, reference_token_logps, kept), kept


def check_candidates(*arrays: Array | None, candidates: int = 2) -> None:
    """Raises unless all arrays that are not None are `[..., candidates]`, of one shape."""
    chex.assert_equal_shape([x for x in arrays if x is not None])
    chex.assert_axis_dimension(arrays[0], -1, candidates)


def dpo_loss(
    policy_logps: Array, reference_logps: Array, *, beta: Positive = 0.1, where: Array | None = None
) -> Array:
    r"""Direct preference optimisation: $-\log\sigma(\beta(r_w - r_l))$.

    The gradient is $-\beta\,\sigma(-z)$ on the chosen and its negative on the rejected log-prob,
    $z = \beta(r_w - r_l)$: a pair weighs as much as the implicit reward gets it wrong.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0; the implicit reward is `beta * r` nats.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(0.3132617, dtype=float32)

    Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. TRL `sigmoid`, HALOs `dpo`, EasyDeL `sigmoid`
    and Tunix `dpo` compute the same.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    return masked_rows(jax.nn.softplus(-beta * margin(ratios)), where)


def ipo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array | None = None,
    *,
    tau: Positive = 0.1,
    length_normalize: bool = True,
    where: Array | None = None,
) -> Array:
    r"""Identity preference optimisation: $(r_w - r_l - 1/(2\tau))^2$.

    Unlike DPO's, the target is finite, so a pair that is always preferred does not push the policy
    arbitrarily far from the reference.

    Two forms are in use. With `lengths` and `length_normalize` each log-ratio is divided by its
    number of tokens, as the paper's authors say their figures were obtained; without, the margin is
    that of Eq. 17 on whole sequences.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        lengths: `[..., 2]` scored tokens of each completion; None for the form of Eq. 17.
        tau: strength of the regularisation, > 0; the target margin is `1 / (2 * tau)` nats.
        length_normalize: False for Eq. 17 even where `lengths` are given.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> ipo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), tau=0.25)
    Array(0., dtype=float32)

    Azar et al. 2023, arXiv:2310.12036, Eq. 17. Averaged: TRL, HALOs (which divides by the tokens
    whose log-probs differ), EasyDeL, LLaMA-Factory. Summed: the DPO authors' code, OpenRLHF,
    EasyLM.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    if length_normalize and lengths is not None:
        ratios = safe_divide(ratios, masked(lengths, where))
    return masked_rows(jnp.square(margin(ratios) - 1 / (2 * tau)), where)


def simpo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    label_smoothing: FlipRate = 0.0,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    where: Array | None = None,
) -> Array:
    r"""SimPO: $-\log\sigma(x)$ of a length-normalised margin without a reference.

    $x = \beta(s_w/n_w - s_l/n_l) - \gamma$: the reward is the mean log-prob per token, as decoding
    ranks by it, and must be ahead by the target margin $\gamma$. Label smoothing $\epsilon$ adds
    $\epsilon x$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: scale of the per-token reward, > 0; the paper's recipes use 2 to 10.
        gamma_beta_ratio: target margin over `beta`, nats per token; the paper's recipes use
            0.1-0.8.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); "sigmoid" only.
        link: "sigmoid", or "hinge" as in the authors' code: max(0, 1 - x).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> simpo_loss(jnp.array([-4., -9.]), jnp.array([4, 6]), beta=2.0, gamma_beta_ratio=0.5)
    Array(0.6931472, dtype=float32)

    Meng et al. 2024, arXiv:2405.14734, Eq. 6, and the authors' code, whose default ratio is used.
    HALOs and Levanter name the ratio alike; TRL's CPO trainer wants `loss_type="simpo"` with
    `simpo_gamma = beta * gamma_beta_ratio` and `cpo_alpha=0`.
    """
    check_candidates(policy_logps, lengths, where)
    logps = masked(at_least_float32(policy_logps), where)
    rewards = safe_divide(logps, masked(lengths, where))
    x = beta * (margin(rewards) - gamma_beta_ratio)
    if link == "hinge":
        return masked_rows(jax.nn.relu(1 - x), where)
    return masked_rows(jax.nn.softplus(-x) + label_smoothing * x, where)
