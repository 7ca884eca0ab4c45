r"""DPO for other divergences than the reverse KL: the reward is $\beta g(r)$ instead of $\beta r$.

$g(r) = f'(e^r)$ of the divergence that ties the policy to the reference. How strongly a log-ratio
counts near the reference is g's slope at 0; a beta found for one divergence does not suit another.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> f_dpo_loss(policy, reference, beta=0.5, divergence="reverse_kl")  # DPO
Array(0.3132617, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive, Probability
from paxo.losses.pairwise import MAX_EXPONENT, margin, pair_log_ratios
from paxo.numerics import Array, masked_rows

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# chiPO's exponents, as in the link that the paper's experiments use.
CHIPO_EXPONENTS = (-88.0, 20.0)


def f_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    divergence: Divergence = "alpha",
    alpha: Probability = 0.5,
    where: Array | None = None,
) -> Array:
    r"""f-DPO: $-\log\sigma(\beta(g(r_w) - g(r_l)))$ for a divergence with $f'(u) = g(\log u)$.

    | divergence   | g(r)             | slope at 0 |
    |--------------|------------------|------------|
    | "reverse_kl" | r (DPO)          | 1          |
    | "forward_kl" | -e^-r            | 1          |
    | "js"         | log σ(r)         | 1/2        |
    | "alpha"      | (1 - e^-αr) / α  | 1          |

    Alpha leads from the reverse (α → 0) to the forward KL (α = 1). The exponent -αr is cut at 80: a
    completion that the policy has all but given up (r < -80/α) gets no gradient.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the regularisation, > 0.
        divergence: which one.
        alpha: of the alpha divergence, in [0, 1], as the paper defines it; 0 is the limit, the
            reverse KL. The others do not read it. The authors' scripts use 0.3, 0.5 and 0.7.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> f_dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5, divergence="js")
    Array(0.4740770, dtype=float32)

    Wang et al. 2023, arXiv:2309.16240, and the authors' code, which cuts nothing. TRL's
    `f_alpha_divergence_coef` is 1 - alpha since early 2026 (so 0.5 means the same) and was alpha
    before.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    scores = _divergence_scores(ratios, divergence, alpha)
    return masked_rows(jax.nn.softplus(-beta * margin(scores)), where)


def chipo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    alpha: Positive = 1.0,
    gamma: NonNegative = 1.0,
    r_max: NonNegative = 0.0,
    where: Array | None = None,
) -> Array:
    r"""χPO: $-\log\sigma(\mathrm{clip}(\beta(\phi(r_w) - \phi(r_l)), \pm 2R_{max}))$.

    The link $\phi(r) = e^{\alpha r} + \gamma r$ belongs to a mixture of χ² and KL regularisation:
    it charges a completion exponentially for rising above the reference. α = γ = 1 is the paper's
    link. The one of its experiments is tamer: α of 1/4 or 1 and γ of 0.1 or 1, such as `alpha=0.25,
    gamma=0.1`. The exponent αr is clipped to [-88, 20] in both, with no gradient outside.

    Near the reference the slope of φ is α + γ: the paper's link acts like DPO with *twice* beta.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the regularisation, > 0; no published default was found.
        alpha: factor of the log-ratio in the exponential, > 0.
        gamma: weight of the KL part, >= 0.
        r_max: bound of the reward in nats; margins beyond twice that are cut, and have no gradient;
            0 for no bound.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> chipo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta=0.5)
    Array(0.1075848, dtype=float32)

    Huang et al. 2024, arXiv:2407.13399 (experimental: link and clips are from memory and from
    secondary sources); the practical link is Appendix E.2 as a reviewer quotes it. TRL, EasyDeL and
    HALOs do not have it; ports that do leave out the bound.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    h = beta * margin(jnp.exp(jnp.clip(alpha * ratios, *CHIPO_EXPONENTS)) + gamma * ratios)
    if r_max:
        h = jnp.clip(h, -2 * r_max, 2 * r_max)
    return masked_rows(jax.nn.softplus(-h), where)


def _divergence_scores(ratios: Array, divergence: str, alpha: float) -> Array:
    """g(r), up to a constant that cancels in the margin."""
    power = {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha": alpha}.get(divergence)
    if power is None:
        return jax.nn.log_sigmoid(ratios)
    if power == 0:
        return ratios
    return -jnp.expm1(jnp.minimum(-power * ratios, MAX_EXPONENT)) / power
