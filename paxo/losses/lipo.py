r"""LiPO: the ranking losses of learning to rank on implicit rewards.

Candidates are on the last axis, with any number of grades; scores are $s_i = \beta(\log\pi(y_i) -
\log\pi_{ref}(y_i))$. Lists may be ragged (`where`) and hold ties, of which no pair is formed.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import Count, Positive
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import (
    better_pairs,
    differences,
    discounts,
    gains,
    ideal_dcg,
    list_inputs,
    plackett_luce_nll,
    ranks,
)
from paxo.numerics import LOG_2, Array, Mean, at_least_float32, logsumexp, masked, safe_divide

RankingLoss = Literal[
    "pair_logistic", "pair_hinge", "list_mle", "softmax", "point_sigmoid", "point_mse"
]
Reduction = Literal["list", "batch"]
Weighting = Literal["dcg", "dcg2", "ndcg2pp", "gain", "discount", "label_difference", "none"]


def lipo_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    ranking_loss: RankingLoss = "pair_logistic",
    beta: Positive = 0.05,
    reduction: Reduction = "list",
    where: Array | None = None,
) -> Mean:
    r"""LiPO: one of the ranking losses that the paper compares, on implicit rewards $s$.

    With grades $\psi$ in [0, 1], per list:

    - "point_mse" (Eq. 9): $\sum_i (\psi_i - s_i)^2$;
    - "point_sigmoid" (Eq. 10): $-\sum_i \psi_i\log\sigma(s_i) + (1 - \psi_i)\log\sigma(-s_i)$;
    - "pair_logistic" (Eq. 5): $\sum_{\psi_i > \psi_j} -\log\sigma(s_i - s_j)$; DPO for K = 2;
    - "pair_hinge" (Eq. 6): $\sum_{\psi_i > \psi_j} \max(0, 1 - (s_i - s_j))$;
    - "list_mle" (Eq. 7): the Plackett–Luce model; ties as in `plackett_luce_loss`;
    - "softmax" (Eq. 11): $-\sum_i (\psi_i / \sum_q \psi_q)\log\mathrm{softmax}(s)_i$, uniform
      weights where all grades are 0.

    `lipo_lambda_loss` is Eq. 8, the one that the paper recommends.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades in [0, 1]; without a ranker's probabilities `(K - rank + 0.5)/K`.
        ranking_loss: which of the above.
        beta: scale of the implicit reward, > 0.
        reduction: "list" sums in each list, as the paper writes, and averages over the lists that
            have a term; "batch" averages over all pairs, or items, of the batch, as rax does. The
            two are the same for "list_mle" and "softmax".
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of scalars in nats.

    >>> policy, reference = jnp.array([-4.0, -6.0, -5.0]), jnp.full(3, -5.0)
    >>> loss = lipo_loss(policy, reference, jnp.array([0.9, 0.4, 0.4]), beta=1.0)
    >>> round(float(loss.total), 4), float(loss.count)  # log(1 + e^-2) + log(1 + e^-1)
    (0.4402, 1.0)

    Liu et al. 2024, arXiv:2402.01878, Table 1. rax, which the paper names, computes "softmax" with
    raw grades, and its gradients of "point_sigmoid" and "list_mle" are wrong where all s are 0.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    some = jnp.any(where, axis=-1)
    if ranking_loss == "list_mle":
        return Mean.over(plackett_luce_nll(scores, labels, where), some)
    if ranking_loss == "softmax":
        log_share = scores - logsumexp(scores, where=where)[..., None]
        target = label_shares(labels, where)
        return Mean.over(-jnp.sum(masked(target * log_share, where), axis=-1), some)
    if ranking_loss in ("point_mse", "point_sigmoid"):
        return _mean(_pointwise(scores, labels, ranking_loss), where, 1, reduction)
    gaps = differences(scores)
    loss = jax.nn.softplus(-gaps) if ranking_loss == "pair_logistic" else jax.nn.relu(1 - gaps)
    return _mean(loss, better_pairs(labels, where), 2, reduction)


def lipo_lambda_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    item_weights: Array | None = None,
    *,
    beta: Positive = 0.05,
    weighting: Weighting = "dcg",
    log_base: Literal["2", "e"] = "2",
    scale_by_k: bool = True,
    normalize: bool = False,
    topn: Count = 0,
    reduction: Reduction = "batch",
    where: Array | None = None,
) -> Mean:
    r"""LiPO-lambda: $\sum_{\psi_i > \psi_j} \Delta_{ij}\,(-\log\sigma(s_i - s_j))$.

    $\Delta_{ij} = |G_i - G_j|\,|1/D(\tau_i) - 1/D(\tau_j)|$ is what swapping i and j changes in the
    discounted cumulative gain: $G = 2^\psi - 1$, $D(r) = \log(1 + r)$ and $\tau$ the rank by the
    current scores. It carries no gradient.

    The defaults are rax's, with which the paper's figures were obtained; as printed the paper is
    `log_base="e", scale_by_k=False, reduction="list"`. For K = 2 the loss is DPO times a factor
    that depends on the grades alone.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades in [0, 1].
        item_weights: `[..., K]` optional: they multiply the gains, and each pair by the weight of
            its better candidate.
        beta: scale of the implicit reward, > 0.
        weighting: Delta: "dcg" as above; "dcg2", LambdaLoss: |1/D(m) - 1/D(m + 1)| with m the
            distance of the ranks; "ndcg2pp": 10 times "dcg2" plus "dcg" on normalised gains (the 10
            is from memory); and the paper's ablations "gain" (discounts differ by 1), "discount"
            (gains differ by 1) and "none". "label_difference" is |psi_i - psi_j|, unscaled.
        log_base: of the discount's logarithm.
        scale_by_k: multiply Delta by K, the length of the padded list.
        normalize: divide the gains by the ideal cumulative gain.
        topn: ranks beyond it count nothing ("dcg") or more, by 1/(1 - 1/D) ("dcg2"); 0 for all.
        reduction: "batch" averages over all pairs of the batch, "list" sums in each list and
            averages over lists with a pair.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of scalars in nats.

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> loss = lipo_lambda_loss(policy, reference, jnp.array([1.0, 0.0]), beta=0.5)
    >>> float(loss.value)  # 2 (1 - 1/log2(3)) = 0.73814 times the 0.31326 of dpo
    0.231232

    Liu et al. 2024, arXiv:2402.01878, Eq. 8; rax `pairwise_logistic_loss` with
    `lambdaweight_fn=dcg_lambdaweight` computes the same as the defaults.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    if item_weights is not None:
        item_weights = masked(at_least_float32(item_weights), where)
    settings = {"log_base": log_base, "scale_by_k": scale_by_k, "normalize": normalize}
    weights = lambda_weights(
        scores, labels, where, item_weights, weighting=weighting, topn=topn, **settings
    )
    if item_weights is not None:
        weights = weights * item_weights[..., :, None]
    loss = weights * jax.nn.softplus(-differences(scores))
    return _mean(loss, better_pairs(labels, where), 2, reduction)


def label_shares(labels: Array, where: Array) -> Array:
    """`[..., K]` grades over their sum, and equal shares where all are 0."""
    total = jnp.sum(masked(labels, where), axis=-1, keepdims=True)
    number = jnp.sum(where, axis=-1, keepdims=True, dtype=labels.dtype)
    equal = safe_divide(jnp.ones_like(labels), number)
    return jnp.where(total == 0, equal, labels / jnp.where(total == 0, 1, total))


def lambda_weights(
    scores: Array,
    labels: Array,
    where: Array,
    item_weights: Array | None = None,
    *,
    weighting: Weighting = "dcg",
    log_base: Literal["2", "e"] = "2",
    scale_by_k: bool = False,
    normalize: bool = False,
    topn: Count = 0,
) -> Array:
    """`[..., K, K]` the Delta of `lipo_lambda_loss`: of ranks, hence without gradient."""
    size = scores.shape[-1]
    if weighting == "none":
        return jnp.ones((*scores.shape, size), scores.dtype)
    if weighting == "label_difference":
        return jnp.abs(differences(labels))
    worth = gains(labels)
    if item_weights is not None:
        worth = worth * item_weights
    if normalize or weighting == "ndcg2pp":
        ideal = ideal_dcg(worth, where, topn)[..., None]
        worth = worth / jnp.where(ideal == 0, 1, ideal)
    swapped = jnp.abs(differences(worth))
    place = ranks(scores, where)
    scale = size if scale_by_k else 1
    if log_base == "e" and weighting != "gain":
        scale = scale / LOG_2
    first = _discount_change(place, topn) if weighting in ("dcg", "ndcg2pp", "discount") else 0
    second = _distance_discount(place, topn) if weighting in ("dcg2", "ndcg2pp") else 0
    change = {
        "dcg": first,
        "dcg2": second,
        "ndcg2pp": 10 * second + first,
        "discount": first,
        "gain": 1,
    }[weighting]
    return scale * change * (1 if weighting == "discount" else swapped)


def _discount_change(place: Array, topn: int) -> Array:
    found = discounts(place)
    return jnp.abs(differences(jnp.where(place <= topn, found, 0) if topn else found))


def _distance_discount(place: Array, topn: int) -> Array:
    distance = jnp.abs(differences(place))
    apart = jnp.maximum(distance, 1)  # the diagonal is never a pair
    change = jnp.where(distance > 0, discounts(apart) - discounts(apart + 1), 0)
    if not topn:
        return change
    lower = jnp.maximum(place[..., :, None], place[..., None, :])
    beyond = lower > topn
    return jnp.where(beyond, change / (1 - discounts(jnp.where(beyond, lower, 3))), change)


def _pointwise(scores: Array, labels: Array, kind: str) -> Array:
    if kind == "point_mse":
        return jnp.square(labels - scores)
    return jax.nn.softplus(scores) - jnp.clip(labels, 0, 1) * scores


def _mean(values: Array, where: Array, axes: int, reduction: Reduction) -> Mean:
    """Of all terms, or of the sums over the last `axes` in the lists that have one."""
    if reduction == "batch":
        return Mean.over(values, where)
    last = tuple(range(-axes, 0))
    return Mean.over(jnp.sum(masked(values, where), axis=last), jnp.any(where, axis=last))
