r"""Triple preference optimisation: a pair is compared while a third, gold completion is imitated.

The symbols and the averaging of the likelihood term are those of `paxo.losses.reference_free`.
"""

from paxo.losses.contract import NonNegative, Positive
from paxo.losses.pairwise import simpo_loss
from paxo.losses.reference_free import (
    Link,
    NllReduction,
    checked_logps,
    nll_term,
    preference_term,
)
from paxo.numerics import Array, masked, masked_rows


def triple_po_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 0.2,
    tpo_alpha: NonNegative = 0.9,
    link: Link = "sigmoid",
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""Triple preference optimisation: $-\log\sigma(\beta(s_w - s_l)) - \alpha\log\pi(y_{gold})$.

    One step in place of fine-tuning and alignment: a gold completion is imitated while the other
    two are compared.

    Args:
        policy_logps: `[..., 3]` summed log-probs in nats: chosen, rejected, gold.
        lengths: `[..., 3]` scored tokens of each completion.
        beta: scale of the margin, > 0.
        tpo_alpha: weight of the gold completion's likelihood, >= 0.
        link: "sigmoid", "hinge" or "ipo", as in `cpo_loss`.
        nll_reduction: "sequence_mean" per token of the gold completion, or "sum".
        where: `[..., 3]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where a candidate is masked.

    >>> import jax.numpy as jnp
    >>> triple_po_loss(jnp.array([-4.0, -4.0, -2.0]), jnp.array([4, 4, 2]))
    Array(1.5931472, dtype=float32)

    Saeidi et al. 2024, arXiv:2405.16681, not the Tree PO of the same initials; defaults of the
    authors' README run (their code's are 0.1 and 1, TRL's 0.01 and 1). The authors' code and TRL
    average the likelihood over the gold tokens of the batch.
    """
    logps = checked_logps(policy_logps, lengths, where, candidates=(3,))
    preference = preference_term(logps, masked(lengths, where), beta, link, 0.0)
    nll = nll_term(logps, lengths, where, 2, nll_reduction)
    return masked_rows(preference + tpo_alpha * nll, where)


def triple_po_l_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.25,
    tpo_alpha: NonNegative = 0.9,
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""Triple preference optimisation with mean log-probs and a target margin.

    $-\log\sigma(\beta(a_w - a_l) - \gamma) - \alpha\log\pi(y_{gold})$.

    Args:
        policy_logps: `[..., 3]` summed log-probs in nats: chosen, rejected, gold.
        lengths: `[..., 3]` scored tokens of each completion.
        beta: scale of the per-token reward, > 0; SimPO's, as TRL's 0.01 leaves the loss flat.
        gamma_beta_ratio: target margin over `beta`, nats per token; TRL's `tpo_l_gamma` is their
            product, 0.5 by default as here.
        tpo_alpha: weight of the gold completion's likelihood, >= 0.
        nll_reduction: "sequence_mean" per token of the gold completion, or "sum".
        where: `[..., 3]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where a candidate is masked.

    >>> import jax.numpy as jnp
    >>> triple_po_l_loss(jnp.array([-4.0, -7.5, -2.0]), jnp.array([4, 6, 2]))
    Array(1.5931472, dtype=float32)

    Saeidi et al. 2024, arXiv:2405.16681, as in TRL's `tpo-l`; not in the authors' first code.
    """
    logps = checked_logps(policy_logps, lengths, where, candidates=(3,))
    pair = simpo_loss(
        logps[..., :2],
        masked(lengths, where)[..., :2],
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
    )
    nll = nll_term(logps, lengths, where, 2, nll_reduction)
    return masked_rows(pair + tpo_alpha * nll, where)
