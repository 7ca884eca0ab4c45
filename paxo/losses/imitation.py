r"""DPO beside a likelihood: of the chosen completion, or of the reason why it was chosen.

Without one DPO lowers the likelihood of both completions as long as the rejected one falls faster.
Terms that average over the tokens of the whole batch, as TRL's do, have another denominator:
`weighted_sum` of `dpo` and `nll` with `nll_reduction="token_mean"`.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> iterative_rpo_loss(policy, reference, jnp.array([8, 6]), beta=0.5)
Array(0.8132617, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive
from paxo.losses.pairwise import check_candidates, dpo_loss, margin, pair_log_ratios
from paxo.numerics import Array, at_least_float32, masked, masked_rows, safe_divide


def rpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 0.01,
    eta: NonNegative = 0.005,
    nll_reduction: Literal["sum", "sequence_mean"] = "sum",
    where: Array | None = None,
) -> Array:
    r"""Regularised preference optimisation: DPO plus $-\eta\beta s_w$, or $-\eta\,s_w/n_w$.

    The imitation term is an adversarial regulariser: it keeps the policy where the data is.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        lengths: `[..., 2]` scored tokens of each completion, for the mean.
        beta: strength of the KL regularisation, > 0; the authors use 0.01 and 0.05.
        eta: weight of the imitation term, >= 0; 0 is DPO.
        nll_reduction: "sum" is the main text's form, ηβ times the summed log-prob, which the
            authors find better for chat; "sequence_mean" their appendix's, η times the mean per
            token, better for reasoning.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> policy, reference, lengths = jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.ones(2)
    >>> rpo_loss(policy, reference, lengths, beta=0.5, eta=0.05)
    Array(0.4132617, dtype=float32)

    Liu et al. 2024, arXiv:2405.16436, and the authors' code. TRL's recipe, `sigmoid` with 0.005
    `sft`, has no beta and a mean over the batch's tokens; its old `rpo_alpha` is `iterative_rpo`.
    """
    check_candidates(policy_logps, lengths)
    loss = dpo_loss(policy_logps, reference_logps, beta=beta, where=where)
    nll = _chosen_nll(policy_logps, where)
    if nll_reduction == "sum":
        imitation = eta * beta * nll
    else:
        imitation = eta * safe_divide(nll, masked(lengths, where)[..., 0])
    return loss + masked_rows(imitation, where)


def iterative_rpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Iterative reasoning preference optimisation: DPO plus $-\alpha\,s_w/n_w$.

    Args:
        policy_logps: `[..., 2]` summed log-probs in nats of reasoning and answer, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy, the last round's.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: strength of the KL regularisation, > 0; the default is from memory.
        alpha: weight of the likelihood term, >= 0; 0 is DPO.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> policy, reference = jnp.array([-4., -6.]), jnp.array([-5., -5.])
    >>> iterative_rpo_loss(policy, reference, jnp.array([4, 6]), beta=0.5)
    Array(1.3132617, dtype=float32)

    Pang et al. 2024, arXiv:2404.19733. TRL's `rpo_alpha`, and `sigmoid` with 1.0 `sft`, average
    over the batch's tokens instead of over each sequence's.
    """
    return rpo_loss(
        policy_logps,
        reference_logps,
        lengths,
        beta=beta,
        eta=alpha,
        nll_reduction="sequence_mean",
        where=where,
    )


def rationale_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    gamma: NonNegative = 1.0,
    rationale_link: Literal["linear", "log_sigmoid"] = "linear",
    where: Array | None = None,
) -> Array:
    r"""DPO with rationales: plus $-\gamma\log\pi(\text{rationale} \mid x, y_w \succ y_l)$.

    The third candidate of a group is the rationale. What it is written after, both completions and
    which is better, stands in front of it as tokens that are not scored.

    Args:
        policy_logps: `[..., 3]` summed log-probs in nats: chosen, rejected, rationale.
        reference_logps: `[..., 3]` the same under the reference policy; the rationale's is not
            read.
        beta: strength of the KL regularisation, > 0.
        gamma: weight of the rationale, >= 0; the paper tries 1 to 10, its code has 0.1.
        rationale_link: "linear" is the paper's likelihood; "log_sigmoid" the code's
            -log σ(γ log π), less than log 2 above it, and still a push where the likelihood is 1.
        where: `[..., 3]` bool, False on candidates to ignore. Without the rationale its term is 0.

    Returns:
        `[...]` nats. 0 where chosen or rejected is masked.

    >>> rationale_dpo_loss(jnp.array([-4., -6., -2.]), jnp.array([-5., -5., 0.]), beta=0.5)
    Array(2.3132617, dtype=float32)

    Just et al. 2024, arXiv:2407.14477, the paper's form from memory and reviews, the other from the
    authors' code (`RDPOTrainer`). TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, reference_logps, where, candidates=3)
    pair = None if where is None else where[..., :2]
    ratios = pair_log_ratios(policy_logps[..., :2], reference_logps[..., :2], pair)
    logps = masked(at_least_float32(policy_logps), where)[..., 2]
    if rationale_link == "linear":
        rationale = -gamma * logps
    else:
        rationale = jax.nn.softplus(-gamma * logps)
    if where is not None:
        rationale = jnp.where(where[..., 2], rationale, 0)
    return masked_rows(jax.nn.softplus(-beta * margin(ratios)) + rationale, pair)


def _chosen_nll(policy_logps: Array, where: Array | None) -> Array:
    """`[..., 2] -> [...]` minus the chosen completion's log-prob."""
    return -masked(at_least_float32(policy_logps), where)[..., 0]
