"""Likelihood: supervised fine-tuning, and the NLL term that many preference objectives add."""

from typing import Literal

import jax.numpy as jnp

from paxo.lazy import chex
from paxo.numerics import Array, Mean, at_least_float32, masked, safe_divide

Reduction = Literal["token_mean", "sequence_mean", "sum"]


def nll_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    nll_reduction: Reduction = "token_mean",
    where: Array | None = None,
) -> Mean:
    r"""Negative log-likelihood of each group's best candidates: $-\sum_t \log\pi(y_t)$.

    The best are those with the group's highest label: the one completion of a supervised example,
    the chosen one of a pair, the top of a list. Three averages are in use, and they weigh long
    completions differently; none can be had from another by scaling.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` grades; ties are all counted.
        nll_reduction: "token_mean" divides the batch's total by its tokens (language modelling,
            TRL's `sft` term), "sequence_mean" averages per-token means over sequences (iterative
            RPO), "sum" averages sums over sequences (RPO's main text).
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` whose total is in nats and whose count is tokens or sequences.

    >>> loss = nll_loss(jnp.array([[-4.0], [-3.0]]), jnp.array([[2], [5]]), jnp.ones((2, 1)))
    >>> float(loss.total), float(loss.count), float(loss.value)
    (7.0, 7.0, 1.0)

    Fine-tuning on demonstrations as in Ouyang et al. 2022, arXiv:2203.02155. As a term beside a
    preference loss: RPO, Liu et al. 2024, arXiv:2405.16436; iterative RPO, Pang
    et al. 2024, arXiv:2404.19733. TRL's `sft` term is the token mean.
    """
    if where is None:
        where = jnp.ones(policy_logps.shape, bool)
    chex.assert_equal_shape([policy_logps, lengths, labels, where])
    logps = masked(at_least_float32(policy_logps), where)
    grades = masked(at_least_float32(labels), where, -jnp.inf)
    best = where & (grades == jnp.max(grades, axis=-1, keepdims=True))
    if nll_reduction == "token_mean":
        return Mean(
            -jnp.sum(masked(logps, best)), jnp.sum(masked(lengths, best)).astype(logps.dtype)
        )
    if nll_reduction == "sequence_mean":
        logps = safe_divide(logps, lengths)
    return Mean(-jnp.sum(masked(logps, best)), jnp.sum(best, dtype=logps.dtype))
