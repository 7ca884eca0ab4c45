r"""Losses over every ordered pair of a list: contrastive preference learning, RRHF.

Candidates stand in any order; their grades say who is better. Masked candidates form no pair.
"""

import jax
import jax.numpy as jnp
import numpy as np

from paxo.losses.contract import NonNegative, Positive, Probability
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import best_candidate, list_inputs
from paxo.losses.reference_free import NllReduction
from paxo.numerics import Array, masked, safe_divide


def cpl_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    alpha: Positive = 0.1,
    contrastive_bias: Probability = 0.5,
    bc_coeff: NonNegative = 0.0,
    soft_labels: bool = False,
    where: Array | None = None,
) -> Array:
    r"""Contrastive preference learning: $-\log\sigma(A_w - \lambda A_l)$, $A = \alpha s$.

    The sum $s$ of a segment's log-probs stands for its regret (discount 1). With a bias
    $\lambda < 1$ the loss falls when both segments become likelier, which keeps the policy near
    the data; with 1 it is CPO's preference term. Of more than two candidates all pairs count, and
    the loss is their mean; a tie counts half in each direction.

    Args:
        policy_logps: `[..., K]` summed log-probs of the segments in nats.
        lengths: `[..., K]` steps or tokens of each segment, for the imitation term only.
        labels: `[..., K]` grades, or with `soft_labels` win rates.
        alpha: temperature, > 0.
        contrastive_bias: the paper's lambda, in [0, 1].
        bc_coeff: weight of $-s/n$ averaged over all candidates (`cpl_bc`: 1, with bias 1).
        soft_labels: candidate i beats j with probability `labels[i] / (labels[i] + labels[j])`.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where no two candidates are left and `bc_coeff` is 0.

    >>> cpl_loss(jnp.array([-4., -8.]), jnp.array([2, 2]), jnp.array([1., 0.]))
    Array(0.6931472, dtype=float32)

    Hejna et al. 2023, arXiv:2310.13639 (number from memory); formula and defaults of the authors'
    code (`research/algs/cpl.py`, MetaWorld). Others' CPO with `cpo_alpha=0` is bias 1.
    """
    where, policy_logps, lengths, labels = list_inputs(where, policy_logps, lengths, labels)
    loss = _contrast(alpha * policy_logps, labels, where, contrastive_bias, soft_labels)
    count = jnp.sum(where, axis=-1, dtype=loss.dtype)
    imitation = -jnp.sum(safe_divide(policy_logps, lengths), axis=-1)
    return loss + bc_coeff * safe_divide(imitation, count)


def cpl_kl_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    alpha: Positive = 0.2,
    contrastive_bias: Probability = 0.75,
    soft_labels: bool = False,
    where: Array | None = None,
) -> Array:
    r"""CPL with a KL-regularised regret: $A = \alpha(s - q)$, log-ratios to a reference.

    With bias 1 it is DPO with beta equal to alpha.

    Args:
        policy_logps: `[..., K]` summed log-probs of the segments in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, or with `soft_labels` win rates.
        alpha: temperature, > 0.
        contrastive_bias: the paper's lambda, in [0, 1].
        soft_labels: candidate i beats j with probability `labels[i] / (labels[i] + labels[j])`.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where no two candidates are left.

    >>> cpl_kl_loss(jnp.array([-4., -8.]), jnp.array([-5., -7.]), jnp.array([1., 0.]))
    Array(0.5333822, dtype=float32)

    Hejna et al. 2023, arXiv:2310.13639 (number from memory); `research/algs/cpl_kl.py`.
    TRL, EasyDeL and HALOs do not have it.
    """
    where, policy_logps, labels = list_inputs(where, policy_logps, labels)
    advantages = alpha * log_ratios(policy_logps, reference_logps, where)
    return _contrast(advantages, labels, where, contrastive_bias, soft_labels)


def rrhf_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    rrhf_weight: NonNegative = 1.0,
    length_penalty: NonNegative = 1.0,
    nll_reduction: NllReduction = "sum",
    where: Array | None = None,
) -> Array:
    r"""RRHF: $\sum_{r_i > r_j} \max(0, p_j - p_i) - \log\pi(y_{best})$, $p = s/n$.

    A hinge without margin ranks the completions by their mean log-prob as their grades do, and the
    best is imitated. Only the order of the grades matters; ties form no pair.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` grades; of several best the first is imitated.
        rrhf_weight: weight of the ranking term, >= 0.
        length_penalty: p is $s/n$ to this power of n; 0 compares sums.
        nll_reduction: "sum" of the best's log-probs as in the paper, or "sequence_mean".
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where there is no candidate.

    >>> rrhf_loss(jnp.array([-4., -3.]), jnp.array([2, 2]), jnp.array([5., 1.]))
    Array(4.5, dtype=float32)

    Yuan et al. 2023, arXiv:2304.05302. The authors' code divides by the padded row instead of the
    lengths (its mask is overwritten), and takes the mean over that row of the best's log-probs.
    """
    where, policy_logps, lengths, labels = list_inputs(where, policy_logps, lengths, labels)
    tokens = jnp.maximum(lengths, 1)
    scores = policy_logps / tokens**length_penalty
    (one, other), (grade, than), both = (_pairs(x) for x in (scores, labels, where))
    # Of a tie the sign is 0: no hinge and no gradient.
    hinges = jax.nn.relu(-jnp.sign(grade - than) * (one - other))
    ranking = jnp.sum(masked(hinges, both[0] & both[1]), axis=-1)
    imitated = policy_logps / tokens if nll_reduction == "sequence_mean" else policy_logps
    best = jnp.sum(masked(imitated, best_candidate(labels, where)), axis=-1)
    return rrhf_weight * ranking - best


def _contrast(advantages: Array, labels: Array, where: Array, bias: float, soft: bool) -> Array:
    """Mean over the pairs i, j of P(i beats j) softplus(bias A_j - A_i), both directions."""
    (one, other), (grade, than), both = (_pairs(x) for x in (advantages, labels, where))
    both = both[0] & both[1]
    if soft:
        total = grade + than
        wins = jnp.where(total == 0, 0.5, grade / jnp.where(total == 0, 1, total))
    else:
        wins = 0.5 * (1 + jnp.sign(grade - than))
    lost = wins * jax.nn.softplus(bias * other - one)
    lost = lost + (1 - wins) * jax.nn.softplus(bias * one - other)
    return safe_divide(jnp.sum(masked(lost, both), axis=-1), jnp.sum(both, axis=-1))


def _pairs(x: Array) -> tuple[Array, Array]:
    """`[..., K] -> [..., K (K - 1) / 2]` twice: the two sides of every pair."""
    first, second = np.triu_indices(x.shape[-1], 1)
    return x[..., first], x[..., second]
