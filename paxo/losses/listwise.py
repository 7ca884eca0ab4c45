r"""Losses over lists that come with methods of their own: K candidates with grades or rewards.

`lipo` has the losses of learning to rank. All take ragged lists (`where`) and ties.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive, draws_with
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import (
    Ties,
    best_candidate,
    better_pairs,
    descending_order,
    differences,
    list_inputs,
    plackett_luce_nll,
)
from paxo.numerics import Array, log1mexp, logsumexp, masked, safe_divide

MppoForm = Literal["mnm", "mns", "pair_single", "mcs", "mcm", "list_mle", "point_ce", "point_mse"]


@draws_with(ties="random")
def plackett_luce_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    ties: Ties = "skip",
    key: Array | None = None,
    where: Array | None = None,
) -> Array:
    r"""DPO for rankings: $\sum_r \log\sum_{q \ge r} e^{s_q} - s_r$ over the list sorted by grade.

    The likelihood of the whole order under the Plackett–Luce model, with $s = \beta(\log\pi -
    \log\pi_{ref})$. For K = 2 it is DPO.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, any scale: only their order counts.
        beta: strength of the KL regularisation, > 0.
        ties: "skip" compares a candidate with itself and those of lower grade, so that a partial
            ranking is one whose unranked rest shares the lowest grade; "random" breaks ties by
            `key`; "order" takes them as they stand.
        key: random key, for `ties="random"` alone.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log K! where policy and reference agree and there are no ties.

    >>> policy, reference = jnp.array([-4.0, -6.0, -6.0]), jnp.full(3, -5.0)
    >>> plackett_luce_loss(policy, reference, jnp.array([2.0, 1.0, 0.0]), beta=0.5)
    Array(1.2446..., dtype=float32)

    Rafailov et al. 2023, arXiv:2305.18290, Appendix A.3 (equation number from memory); LiPO's
    list-MLE. rax `listmle_loss` breaks ties by order, or by a key.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    return plackett_luce_nll(scores, labels, where, ties, key)


def pro_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    sft_index: Array | None = None,
    *,
    sft_weight: NonNegative = 0.05,
    where: Array | None = None,
) -> Array:
    r"""Preference ranking optimisation: a ranking with reward-dependent temperatures, and SFT.

    $p = \log\pi / n$ per token and rewards r, best first, give $\sum_{k<K} \log(e^{p_k m_k} +
    \sum_{i>k} e^{p_i (r_k - r_i)}) - p_k m_k$ with $m_k = \max_{i>k}(r_k - r_i)$, plus
    `sft_weight` $(K-1)^2$ times the summed NLL of one candidate. The temperatures of the paper are
    the inverses of $r_k - r_i$, infinite at ties, and are never formed.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` rewards in any order; a tie stands as it came.
        sft_index: `[...]` candidate of the SFT term; by default the first of the best.
        sft_weight: factor of the SFT term before $(K-1)^2$; 0.05 is from memory, the square is the
            authors' code's.
        where: `[..., K]` bool, False on candidates to ignore; K is then the number that is left.

    Returns:
        `[...]` nats.

    >>> loss = pro_loss(jnp.array([-4.0, -12.0]), jnp.array([4, 6]), jnp.array([2.0, 1.0]))
    >>> round(float(loss), 5)  # log(1 + e^-1) + 0.05 * 4
    0.51326

    Song et al. 2023, arXiv:2306.17492. The authors' code takes the exponentials without a maximum,
    adds 1e-10 inside the logarithm, expects sorted rewards and masks one token early.
    """
    where, labels, lengths, logps = list_inputs(where, labels, lengths, policy_logps)
    order = descending_order(labels, where)
    sort = lambda x: jnp.take_along_axis(x, order, axis=-1)  # noqa: E731
    there, rewards, means = sort(where), sort(labels), sort(safe_divide(logps, lengths))
    size = labels.shape[-1]
    later = there[..., None, :] & (jnp.arange(size)[:, None] < jnp.arange(size))
    inverse = jax.lax.stop_gradient(masked(differences(rewards), later))
    own = means * jnp.max(inverse, axis=-1)
    others = logsumexp(inverse * means[..., None, :], where=later)
    ranked = there & jnp.any(later, axis=-1)
    ranking = jnp.sum(masked(jax.nn.softplus(masked(others - own, ranked)), ranked), axis=-1)
    if sft_index is None:
        chosen = best_candidate(labels, where)
    else:
        chosen = where & (jnp.arange(size) == jnp.asarray(sft_index, jnp.int32)[..., None])
    number = jnp.sum(where, axis=-1, dtype=logps.dtype)
    square = jnp.square(jnp.maximum(number - 1, 0))
    return ranking - sft_weight * square * jnp.sum(masked(logps, chosen), axis=-1)


def swepo_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    power: Literal[1, 2] = 1,
    where: Array | None = None,
) -> Array:
    r"""SWEPO, experimental: candidates above the mean reward against all, weighted by deviation.

    $-\log (\sum_{i \in Y^+} e^{s_i + \alpha|d_i|^p} / \sum_i e^{s_i + \alpha|d_i|^p})$ with
    $d_i = r_i - \bar r$ and $Y^+ = \{d_i > 0\}$. The weights and the split are confirmed by
    secondary sources; numerator and denominator are from memory and not verified. For K = 2 and
    any `alpha` the loss is DPO exactly.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` rewards.
        beta: scale of the implicit reward, > 0 (our default).
        alpha: weight of the deviation in the exponent (our default); 0 weighs all alike.
        power: p, of the deviation.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 for a list whose rewards are all equal, which says nothing.

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> swepo_loss(policy, reference, jnp.array([9.0, 1.0]), beta=0.5)
    Array(0.3132617, dtype=float32)

    Gupta et al. 2024, arXiv:2412.04628. TRL, EasyDeL and HALOs do not have it.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    mean = safe_divide(
        jnp.sum(labels, axis=-1, keepdims=True), jnp.sum(where, axis=-1, keepdims=True)
    )
    deviation = masked(labels - mean, where)
    logits = scores + alpha * jnp.abs(deviation) ** power
    above, below = where & (deviation > 0), where & (deviation <= 0)
    both = jnp.any(above, axis=-1) & jnp.any(below, axis=-1)
    gap = logsumexp(logits, where=below) - masked(logsumexp(logits, where=above), both)
    return masked(jax.nn.softplus(masked(gap, both)), both)


@draws_with(form="pair_single")
def mppo_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    form: MppoForm = "mnm",
    key: Array | None = None,
    where: Array | None = None,
) -> Array:
    r"""MPPO: preferences over mean token probabilities $p_i = e^{\log\pi(y_i)/n_i}$, no reference.

    With w the best candidate and l those of a lower grade (ties with w are left out):

    - "mnm" (Eq. 10, the recommended one): $-\log\sigma(\sum_l (p_w - p_l))$;
    - "mns" (Eq. 9): $-\sum_l \log\sigma(p_w - p_l)$;
    - "pair_single" (Eq. 8): one l, drawn with `key`;
    - "mcm", "mcs" (Eqs. 12, 11): the same as mnm and mns over all pairs of unequal grade;
    - "list_mle" (Eq. 13): the Plackett–Luce model on p;
    - "point_ce" (Eq. 6): $-v\log p - (1 - v)\log(1 - p)$, and "point_mse" (Eq. 7): $(v - p)^2$,
      summed over the list, for grades v in [0, 1] (the paper's scores over 10).

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` grades.
        form: which of the above.
        key: random key, for "pair_single" alone.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 where there is no candidate of lower grade.

    >>> logps = jnp.log(jnp.array([0.5, 0.25, 0.125]))
    >>> mppo_loss(logps, jnp.ones(3), jnp.array([2.0, 1.0, 0.0]))  # softplus(-0.625)
    Array(0.4287007, dtype=float32)

    Xie et al. 2024, arXiv:2412.15244; no official code was found. Eq. 7 is printed with a minus
    that would maximise the error: a misprint, dropped here.
    """
    where, labels, lengths, logps = list_inputs(where, labels, lengths, policy_logps)
    means = safe_divide(logps, lengths)
    p = jnp.exp(means)
    if form == "list_mle":
        return plackett_luce_nll(p, labels, where)
    if form == "point_mse":
        return jnp.sum(masked(jnp.square(labels - p), where), axis=-1)
    if form == "point_ce":
        entropy = -labels * means - (1 - labels) * log1mexp(means)
        return jnp.sum(masked(entropy, where), axis=-1)
    pairs = better_pairs(labels, where)
    if form in ("mnm", "mns", "pair_single"):
        pairs = pairs & best_candidate(labels, where)[..., :, None]
    if form == "pair_single":
        pairs = _draw_one(pairs, key)
    gaps = differences(p)
    if form in ("mnm", "mcm"):
        loss = jax.nn.softplus(-jnp.sum(masked(gaps, pairs), axis=(-2, -1)))
        return masked(loss, jnp.any(pairs, axis=(-2, -1)))
    return jnp.sum(masked(jax.nn.softplus(-gaps), pairs), axis=(-2, -1))


def _draw_one(pairs: Array, key: Array | None) -> Array:
    if key is None:
        raise ValueError("mppo with form='pair_single' needs a key; pass key=jax.random.key(...)")
    flat = pairs.reshape(*pairs.shape[:-2], -1)
    drawn = jnp.argmax(jnp.where(flat, jax.random.uniform(key, flat.shape), -1), axis=-1)
    return (flat & (jnp.arange(flat.shape[-1]) == drawn[..., None])).reshape(pairs.shape)
