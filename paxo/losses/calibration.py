r"""SLiC over lists: a hinge of whole sequences for every pair, beside a likelihood.

Its relatives are elsewhere: of a pair, with a separate target of the likelihood, `slic_hf`; with a
reference in the margin (`slic_norm`, RSO's hinge-norm) `rso_hinge` for a pair and `lipo` with
`ranking_loss="pair_hinge"` for lists; with the logistic in place of the hinge (RSO's sigmoid-norm)
`dpo`.

>>> slic_list_loss(jnp.array([-4.0, -4.5]), jnp.array([4, 6]), jnp.array([1.0, 0.0]))
Array(0.9, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive
from paxo.losses.ranking import best_candidate, better_pairs, differences, list_inputs
from paxo.losses.reference_free import NllReduction
from paxo.numerics import Array, masked, safe_divide


def slic_list_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    delta: Positive = 1.0,
    lam: NonNegative = 0.1,
    reduction: Literal["mean", "sum"] = "mean",
    nll_reduction: NllReduction = "sum",
    where: Array | None = None,
) -> Array:
    r"""SLiC on a list: $\max(0, \delta - s_i + s_j)$ over pairs $\psi_i > \psi_j$, plus likelihood.

    The likelihood is $-\lambda s$ of the best candidate. For K = 2 it is `slic_hf`.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` grades; only their order counts, ties form no pair.
        delta: margin in nats at which a pair stops counting, > 0; 1/gamma in RSO's notation.
        lam: weight of the likelihood term, >= 0.
        reduction: "mean" or "sum" over the pairs of a list.
        nll_reduction: "sum" over the tokens of the best, or "sequence_mean" per token.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; delta plus the likelihood term where all log-probs are equal.

    >>> logps, grades = jnp.array([-4.0, -4.5, -9.0]), jnp.array([2.0, 1.0, 0.0])
    >>> slic_list_loss(logps, jnp.ones(3), grades, lam=0.0, reduction="sum")
    Array(0.5, dtype=float32)

    Zhao et al. 2023, arXiv:2305.10425, on all pairs of a list (experimental: the form of the list,
    the regulariser and the defaults are from memory and from HALOs). No trainer has the list.
    """
    where, logps, lengths, labels = list_inputs(where, policy_logps, lengths, labels)
    pairs = better_pairs(labels, where)
    hinges = masked(jax.nn.relu(delta - differences(logps)), pairs)
    ranking = jnp.sum(hinges, axis=(-2, -1))
    if reduction == "mean":
        ranking = safe_divide(ranking, jnp.sum(pairs, axis=(-2, -1)))
    imitated = safe_divide(logps, lengths) if nll_reduction == "sequence_mean" else logps
    best = jnp.sum(masked(imitated, best_candidate(labels, where)), axis=-1)
    return ranking - lam * best
