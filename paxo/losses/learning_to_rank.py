r"""More losses of learning to rank on implicit rewards $s_i = \beta(\log\pi - \log\pi_{ref})$.

LiPO examined none of these (`lipo` and `lipo_lambda` have what it did); the definitions are rax's
and allRank's. Lists may be ragged and hold ties.
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive, Probability
from paxo.losses.lipo import label_shares
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import (
    better_pairs,
    differences,
    discounts,
    gains,
    ideal_dcg,
    list_inputs,
)
from paxo.numerics import Array, Mean, logsumexp, masked

SINKHORN_STEPS = 50


def unique_softmax_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    where: Array | None = None,
) -> Array:
    r"""Unique softmax: $\sum_i (2^{\psi_i} - 1)\log(1 + \sum_{\psi_j < \psi_i} e^{s_j - s_i})$.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, at least 0.
        beta: scale of the implicit reward, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats.

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> unique_softmax_loss(policy, reference, jnp.array([1.0, 0.0]), beta=0.5)
    Array(0.3132617, dtype=float32)

    rax `unique_softmax_loss`, https://github.com/google/rax.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    others = jnp.broadcast_to(scores[..., None, :], (*scores.shape, scores.shape[-1]))
    below = logsumexp(others, where=better_pairs(labels, where))
    return jnp.sum(masked(gains(labels) * jax.nn.softplus(below - scores), where), axis=-1)


def poly1_softmax_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    epsilon: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Poly-1 softmax: $-\sum_i \psi_i\log p_i + \epsilon(1 - \sum_i \bar\psi_i p_i)$.

    $p = \mathrm{softmax}(s)$; the first term has raw grades, the second their shares.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, at least 0.
        beta: scale of the implicit reward, > 0.
        epsilon: weight of the first-order term.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; 0 for an empty list.

    >>> poly1_softmax_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.0]))  # log 2 + 1/2
    Array(1.193147, dtype=float32)

    rax `poly1_softmax_loss`, https://github.com/google/rax; Leng et al. 2022, arXiv:2204.12511.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    log_p = masked(scores - logsumexp(scores, where=where)[..., None], where)
    share = masked(label_shares(labels, where), where)
    first = 1 - jnp.sum(share * jnp.exp(log_p), axis=-1)
    some = jnp.any(where, axis=-1)
    return masked(epsilon * first - jnp.sum(labels * log_p, axis=-1), some)


def pairwise_mse_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    where: Array | None = None,
) -> Mean:
    r"""Pairwise squared error: $((\psi_i - \psi_j) - (s_i - s_j))^2$ over all ordered pairs.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades.
        beta: scale of the implicit reward, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the ordered pairs of the batch, each candidate with itself included, as rax.

    >>> float(pairwise_mse_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 0.0])).value)
    0.5

    rax `pairwise_mse_loss`, https://github.com/google/rax.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    both = where[..., :, None] & where[..., None, :]
    return Mean.over(jnp.square(differences(labels) - differences(scores)), both)


def pairwise_quantile_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    quantile: Probability = 0.5,
    where: Array | None = None,
) -> Mean:
    r"""Pairwise quantile regression: $\tau\max(0, e) + (1 - \tau)\max(0, -e)$.

    Over pairs $\psi_i > \psi_j$; $e = (\psi_i - \psi_j) - (s_i - s_j)$ is how far the scores' gap
    falls short of the grades'.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades.
        beta: scale of the implicit reward, > 0.
        quantile: tau; above one half a gap too small costs more than one too large.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the pairs of unequal grade of the batch.

    >>> float(pairwise_quantile_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([3.0, 1.0])).value)
    1.0

    rax `pairwise_qr_loss`, https://github.com/google/rax.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    short = differences(labels) - differences(scores)
    loss = quantile * jax.nn.relu(short) + (1 - quantile) * jax.nn.relu(-short)
    return Mean.over(loss, better_pairs(labels, where))


def pairwise_soft01_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    where: Array | None = None,
) -> Mean:
    r"""Soft share of misordered pairs: $\sigma(-(s_i - s_j))$ where $\psi_i > \psi_j$.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades.
        beta: scale of the implicit reward, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the pairs of unequal grade of the batch, in (0, 1).

    >>> float(pairwise_soft01_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([3.0, 1.0])).value)
    0.5

    rax `pairwise_soft_zero_one_loss`, https://github.com/google/rax.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    return Mean.over(jax.nn.sigmoid(-differences(scores)), better_pairs(labels, where))


def approx_ndcg_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    temperature: Positive = 1.0,
    where: Array | None = None,
) -> Mean:
    r"""ApproxNDCG: minus the NDCG at the smooth ranks $1 + \sum_{j \ne i} \sigma((s_j - s_i)/T)$.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, at least 0.
        beta: scale of the implicit reward, > 0.
        temperature: T; towards 0 the loss becomes minus the NDCG.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the lists with a grade above 0, in [-1, 0].

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> loss = approx_ndcg_loss(policy, reference, jnp.array([1.0, 0.0]), temperature=1e-3)
    >>> float(loss.value)
    -1.0

    Qin et al. 2010; rax `approx_t12n(ndcg_metric)`, https://github.com/google/rax.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    others = where[..., None, :] & ~jnp.eye(labels.shape[-1], dtype=bool)
    ahead = masked(jax.nn.sigmoid(-differences(scores) / temperature), others)
    found = gains(labels) * discounts(1 + jnp.sum(ahead, axis=-1))
    return _minus_share(jnp.sum(masked(found, where), axis=-1), labels, where)


def neural_ndcg_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.05,
    temperature: Positive = 1.0,
    where: Array | None = None,
) -> Mean:
    r"""NeuralNDCG: minus the NDCG of the soft permutation of NeuralSort, made doubly stochastic.

    $P_{ri} = \mathrm{softmax}_i(((n + 1 - 2r)s_i - \sum_j |s_i - s_j|)/T)$ for n candidates, then
    50 steps of Sinkhorn's scaling; the gains are sorted by P and discounted.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, at least 0.
        beta: scale of the implicit reward, > 0.
        temperature: T; towards 0 the loss becomes minus the NDCG.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the lists with a grade above 0, in [-1, 0].

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> loss = neural_ndcg_loss(policy, reference, jnp.array([1.0, 0.0]), temperature=1e-3)
    >>> float(loss.value)
    -1.0

    Pobrotyn and Białobrzeski 2021, arXiv:2102.07831; allRank, with `log_scores=False`. The
    transposed form weighs the gains by expected discounts: the same number for the same P.
    TRL, EasyDeL and HALOs do not have it.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    number = jnp.sum(where, axis=-1, dtype=scores.dtype)[..., None]
    place = jnp.arange(1, scores.shape[-1] + 1).astype(scores.dtype)
    pull = number + 1 - 2 * place
    both = where[..., :, None] & where[..., None, :]
    apart = jnp.sum(masked(jnp.abs(differences(scores)), both), axis=-1)
    logits = (pull[..., :, None] * scores[..., None, :] - apart[..., None, :]) / temperature
    inside = (place <= number)[..., :, None] & where[..., None, :]
    log_soft = masked(logits - logsumexp(logits, where=inside)[..., None], inside)
    soft = masked(jnp.exp(log_soft), inside)
    soft = jax.lax.fori_loop(0, SINKHORN_STEPS, _scaled, soft)
    found = jnp.einsum("...ri,...i,r->...", soft, masked(gains(labels), where), discounts(place))
    return _minus_share(found, labels, where)


def _scaled(_: int, soft: Array) -> Array:
    """One step of Sinkhorn's: columns, then rows, to sums of 1; empty ones stay empty."""
    for axis in (-2, -1):
        total = jnp.sum(soft, axis=axis, keepdims=True)
        # An empty row over a small number would grow its gradient at every step.
        soft = soft / jnp.where(total > 1e-10, total, 1)
    return soft


def _minus_share(found: Array, labels: Array, where: Array) -> Mean:
    ideal = ideal_dcg(gains(labels), where)
    some = ideal > 0
    return Mean.over(-found / jnp.where(some, ideal, 1), some)
