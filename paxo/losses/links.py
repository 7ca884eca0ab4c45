r"""Pairwise losses that put another function than the logistic on DPO's margin.

All take the scaled margin $z = \beta(r_w - r_l)$ of log-ratios to the reference.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> rso_hinge_loss(policy, reference, gamma=0.25)
Array(0.5, dtype=float32)
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive, Range
from paxo.losses.pairwise import MAX_EXPONENT, margin, pair_log_ratios
from paxo.numerics import Array, masked_rows

OpenFlipRate = Annotated[float, Range(0, 0.5)]


def rso_hinge_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    gamma: Positive = 0.05,
    where: Array | None = None,
) -> Array:
    r"""RSO's hinge-norm loss: $\max(0, 1 - \gamma(r_w - r_l))$.

    Nothing, gradient included, once the margin has reached 1/γ nats. With the logistic in its place
    (RSO's sigmoid-norm) it is DPO with beta = γ; the rest of RSO is a way of drawing the pairs.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        gamma: 1 over the wanted margin in nats, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]`, at least 0; 1 where policy and reference agree, 0 where a candidate is masked.

    >>> rso_hinge_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), gamma=0.5)
    Array(0., dtype=float32)

    Liu et al. 2023, arXiv:2309.06657. TRL `hinge`, EasyDeL `hinge` and torchtune's RSO loss compute
    the same (their gamma is called beta); SLiC-HF, which TRL names too, has no reference in its
    margin.
    """
    z = gamma * margin(pair_log_ratios(policy_logps, reference_logps, where))
    return masked_rows(jax.nn.relu(1 - z), where)


def exo_pair_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    eps: OpenFlipRate = 1e-3,
    where: Array | None = None,
) -> Array:
    r"""EXO on pairs: $\mathrm{KL}(\mathrm{Bern}(\sigma(z)) \,\|\, \mathrm{Bern}(1-\epsilon))$.

    The reverse of conservative DPO's divergence, with the same minimum, $z = \mathrm{logit}(1 -
    \epsilon)$, where it is 0. It seeks a mode: the gradient vanishes for margins that are very
    wrong as well as for very right ones.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        eps: the target's probability of the rejected completion ε, in (0, 0.5); the loss at a fixed
            margin grows without bound as ε goes to 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; $-\log 2 - \frac12\log(\epsilon(1-\epsilon))$ where policy and reference
        agree, 0 where a candidate is masked.

    >>> exo_pair_loss(jnp.array([-5., -5.]), jnp.array([-5., -5.]), eps=1e-3)
    Array(2.761231, dtype=float32)

    Ji et al. 2024, arXiv:2402.00856. TRL `exo_pair` computes the same, with ε under the name
    `label_smoothing`; the authors' code fixes ε = 1/(1 + e^10) and leaves out the constant
    log(1 + e^-10).
    """
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    right = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-eps))
    wrong = jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(eps))
    return masked_rows(right + wrong, where)


def discopop_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.05,
    tau: Positive = 0.05,
    where: Array | None = None,
) -> Array:
    r"""DiscoPOP: logistic and exponential loss, mixed by the margin itself.

    $(1-g)\,(-\log\sigma(z)) + g\,e^{-z}$ with $g = \sigma(z/\tau)$. For τ below (1 - log 2)/3 ≈
    0.102 it is not monotone: at τ = 0.05 the gradient at z = 0 *shrinks* the margin, towards a
    local minimum at z = -0.119.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        tau: width of the transition in units of z, > 0. Above 1 the loss grows like
            exp(|z|(1 - 1/tau)); its exponent is cut at 80, with no gradient beyond.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]`; (log 2 + 1)/2 where policy and reference agree, 0 where a candidate is masked.

    >>> discopop_loss(jnp.array([-5., -5.]), jnp.array([-5., -5.]))
    Array(0.8465736, dtype=float32)

    Lu et al. 2024, arXiv:2406.08414, and the authors' code (`log_ratio_modulated_loss`). TRL
    `discopop` computes the same; EasyDeL's keeps tau at 1.
    """
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    # The product g e^-z as one exponent: bounded by 1 for tau <= 1, where e^-z alone overflows.
    exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(z / tau) - z, MAX_EXPONENT))
    loss = jax.nn.sigmoid(-z / tau) * jax.nn.softplus(-z) + exponential
    return masked_rows(loss, where)
