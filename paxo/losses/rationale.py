r"""ORPO with rationales; `rationale_dpo` of `paxo.losses.imitation` is its relative.

>>> rationale_orpo_loss(jnp.array([-4.0, -4.0, -2.0]), jnp.array([4, 4, 9]), lam=1.0)
Array(3.6931472, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative
from paxo.losses.pairwise import check_candidates
from paxo.losses.reference_free import NllReduction, orpo_loss
from paxo.numerics import Array, at_least_float32, masked, masked_rows


def rationale_orpo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    lam: NonNegative = 0.1,
    gamma: NonNegative = 1.0,
    rationale_link: Literal["linear", "log_sigmoid"] = "linear",
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""ORPO with rationales: plus $-\gamma\log\pi(\text{rationale} \mid x, y_w \succ y_l)$.

    The third candidate of a group is the rationale. What it is written after, both completions and
    which is better, stands in front of it as tokens that are not scored.

    Args:
        policy_logps: `[..., 3]` summed log-probs in nats: chosen, rejected, rationale.
        lengths: `[..., 3]` scored tokens of each; the rationale's is not read.
        lam: weight of ORPO's odds ratio, >= 0.
        gamma: weight of the rationale, >= 0.
        rationale_link: "linear" is the paper's likelihood, and that of the authors' `rorpo-simple`;
            "log_sigmoid" the -log σ(γ log π) of their `rorpo`, less than log 2 above it.
        nll_reduction: of the chosen, as in `orpo_loss`.
        where: `[..., 3]` bool, False on candidates to ignore. Without the rationale its term is 0.

    Returns:
        `[...]` nats. 0 where chosen or rejected is masked.

    >>> logps, lengths = jnp.array([-4.0, -4.0, -2.0]), jnp.array([4, 4, 9])
    >>> rationale_orpo_loss(logps, lengths, lam=1.0, gamma=0.5)
    Array(2.6931472, dtype=float32)

    Just et al. 2024, arXiv:2407.14477, the paper's form from memory and reviews, weights and links
    from the authors' code (`SimpleRORPOTrainer`), which subtracts the rationale's term while it
    makes metrics. TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, lengths, where, candidates=3)
    pair = None if where is None else where[..., :2]
    base = orpo_loss(
        policy_logps[..., :2],
        lengths[..., :2],
        lam=lam,
        nll_reduction=nll_reduction,
        where=pair,
    )
    x = -gamma * masked(at_least_float32(policy_logps), where)[..., 2]
    term = x if rationale_link == "linear" else jax.nn.softplus(x)
    if where is not None:
        term = jnp.where(where[..., 2], term, 0)
    return base + masked_rows(term, pair)
