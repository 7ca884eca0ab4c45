r"""Losses over pairs that need no reference model, most of them with a likelihood term beside.

Candidates are chosen, then rejected, then (SLiC) a target of regularisation. Below, $s$ is a summed
log-prob, $n$ its number of tokens, $a = s/n$ the mean log-prob of a token, and $p = e^a$ the
geometric mean of the token probabilities.

The likelihood term is averaged like the rest of the loss, over groups. Most trainers divide it by
the tokens of the batch instead, which is another denominator: set the weight here to 0 and add it
by `weighted_sum((objective("cpo", cpo_alpha=0.0), 1.0), (objective("nll"), 1.0))`.

>>> orpo_loss(jnp.array([-4.0, -6.0]), jnp.array([4, 6]), lam=0.1)
Array(1.0693147, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import FlipRate, NonNegative, Positive, Real
from paxo.losses.pairwise import MAX_EXPONENT, margin, simpo_loss
from paxo.numerics import Array, at_least_float32, log1mexp, masked, masked_rows, safe_divide

Link = Literal["sigmoid", "hinge", "ipo"]
NllReduction = Literal["sequence_mean", "sum"]


def slic_hf_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    delta: Positive = 1.0,
    lam: NonNegative = 0.1,
    nll_reduction: NllReduction = "sum",
    where: Array | None = None,
) -> Array:
    r"""Sequence likelihood calibration: $\max(0, \delta - s_w + s_l) - \lambda s_{reg}$.

    A hinge on the margin of whole sequences, with a likelihood term against drifting off. The
    regularisation target is a third candidate (the paper takes the fine-tuning target or the best
    decode) or, without one, the chosen completion.

    Args:
        policy_logps: `[..., 2]` or `[..., 3]` summed log-probs in nats: chosen, rejected, target.
        lengths: the same shape, scored tokens of each completion.
        delta: margin in nats at which the pair stops counting, > 0.
        lam: weight of the likelihood term, >= 0.
        nll_reduction: "sum" as in the formula, or "sequence_mean" per token of the target.
        where: bool of the same shape, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where a candidate is masked.

    >>> slic_hf_loss(jnp.array([-4.0, -4.5]), jnp.array([4, 6]))
    Array(0.9, dtype=float32)

    Zhao et al. 2023, arXiv:2305.10425; target and defaults from memory and from HALOs `slic`, which
    adds a token-level term to the sequence-level one, so that its likelihood is a mean over padding
    too. TRL's CPO trainer with `loss_type="hinge"` and beta 1/δ is 1/δ of this at lam = 0, beside a
    mean over the batch's tokens; its DPO trainer's `hinge` subtracts the reference (`rso_hinge`).
    """
    logps = checked_logps(policy_logps, lengths, where, candidates=(2, 3))
    hinge = jax.nn.relu(delta - margin(logps))
    target = nll_term(logps, lengths, where, -1 if logps.shape[-1] == 3 else 0, nll_reduction)
    return masked_rows(hinge + lam * target, where)


def cpo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 0.1,
    cpo_alpha: NonNegative = 1.0,
    link: Link = "sigmoid",
    label_smoothing: FlipRate = 0.0,
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""Contrastive preference optimisation: $-\log\sigma(\beta(s_w - s_l)) - \alpha\log\pi(y_w)$.

    DPO with a uniform reference, held in place by the likelihood of the chosen completion. With
    label smoothing $\epsilon$ the first term is $(1-\epsilon) f(z) + \epsilon f(-z)$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: scale of the margin, > 0.
        cpo_alpha: weight of the likelihood term, >= 0.
        link: "sigmoid"; "hinge", $\max(0, 1 - z)$; or "ipo", $(a_w - a_l - 1/(2\beta))^2$ on means.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        nll_reduction: "sequence_mean" per token of the chosen, or "sum" as the paper writes it; the
            authors' code and TRL divide by the batch's tokens (`weighted_sum` with `nll`).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> cpo_loss(jnp.array([-4.0, -4.0]), jnp.array([4, 4]))
    Array(1.6931472, dtype=float32)

    Xu et al. 2024, arXiv:2401.08417; code fe1ixxu/CPO_SIMPO. With the token mean TRL's `CPOTrainer`
    computes the same (its smoothing for "sigmoid" only); ALMA's trainer of today weighs the
    rejected log-prob by its distance and is not CPO.
    """
    logps = checked_logps(policy_logps, lengths, where)
    preference = preference_term(logps, masked(lengths, where), beta, link, label_smoothing)
    nll = nll_term(logps, lengths, where, 0, nll_reduction)
    return masked_rows(preference + cpo_alpha * nll, where)


def cpo_simpo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    beta: Positive = 10.0,
    gamma_beta_ratio: NonNegative = 0.54,
    cpo_alpha: NonNegative = 0.05,
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""CPO-SimPO: SimPO's margin with CPO's likelihood term.

    $-\log\sigma(\beta(a_w - a_l) - \gamma) - \alpha\log\pi(y_w)$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        beta: scale of the per-token reward, > 0.
        gamma_beta_ratio: target margin over `beta`, nats per token, >= 0.
        cpo_alpha: weight of the likelihood term, >= 0; 0 is SimPO.
        nll_reduction: as in `cpo_loss`.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> cpo_simpo_loss(jnp.array([-4., -9.]), jnp.array([4, 6]), gamma_beta_ratio=0.5)
    Array(0.7431472, dtype=float32)

    https://github.com/fe1ixxu/CPO_SIMPO, 2024, no paper; the defaults are its Llama-3 recipe. With
    the token mean TRL's CPO trainer with `loss_type="simpo"` and `simpo_gamma = beta *
    gamma_beta_ratio` is the same, but its own defaults (beta 0.1, gamma 0.5, alpha 1) ask for a
    margin of 5 nats per token.
    """
    logps = checked_logps(policy_logps, lengths, where)
    simpo = simpo_loss(
        policy_logps, lengths, beta=beta, gamma_beta_ratio=gamma_beta_ratio, where=where
    )
    nll = nll_term(logps, lengths, where, 0, nll_reduction)
    return masked_rows(simpo + cpo_alpha * nll, where)


def alphapo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    alpha: Real = 0.25,
    beta: Positive = 2.5,
    gamma: NonNegative = 0.1,
    where: Array | None = None,
) -> Array:
    r"""AlphaPO: SimPO with the reward bent to $g(a) = (1 - e^{-\alpha a})/\alpha$.

    $-\log\sigma(\beta(g(a_w) - g(a_l)) - \gamma)$. The slope $g'(a) = e^{-\alpha a}$ is above 1 for
    $\alpha > 0$ and weighs unlikely completions more, $\alpha < 0$ less; 0 is SimPO. The exponent
    is cut at 80, where the gradient ends.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        alpha: bend of the reward, of either sign.
        beta: scale of the reward, > 0.
        gamma: target margin in units of `beta` times nats per token, >= 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> alphapo_loss(jnp.array([-4.0, -6.0]), jnp.array([4, 6]), gamma=0.0)
    Array(0.6931472, dtype=float32)

    Gupta et al. 2025, arXiv:2501.03884; formula and defaults (Mistral-Instruct) as TRL quotes them,
    the paper not read: whether 0.1 is gamma or gamma over beta is not verified. TRL and EasyDeL
    compute the same away from overflow; TRL's `alpha` is 0 unless set.
    """
    means = safe_divide(checked_logps(policy_logps, lengths, where), masked(lengths, where))
    straight = jnp.equal(alpha, 0)
    bend = jnp.where(straight, 1.0, alpha).astype(means.dtype)
    bent = -jnp.expm1(jnp.minimum(-bend * means, MAX_EXPONENT)) / bend
    rewards = jnp.where(straight, means, bent)
    return masked_rows(jax.nn.softplus(gamma - beta * margin(rewards)), where)


def orpo_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    lam: NonNegative = 0.1,
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""Odds-ratio preference optimisation: $-\log\pi(y_w) + \lambda\,OR$.

    $OR = -\log\sigma(\mathrm{logit}\,p_w - \mathrm{logit}\,p_l)$, the odds of the mean token
    probability: fine-tuning that pushes the rejected completion's odds below the chosen's. The
    likelihood is that of completions only (the packed batch scores no prompt tokens).

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        lam: weight of the odds ratio, >= 0; the authors' command line has 1, their recipes 0.1.
        nll_reduction: "sequence_mean" per token of the chosen, or "sum".
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> orpo_loss(jnp.array([-4.0, -4.0]), jnp.array([4, 4]), lam=1.0)
    Array(1.6931472, dtype=float32)

    Hong et al. 2024, arXiv:2403.07691. The odds ratio is TRL's; the authors' code, Liger, EasyDeL
    and LLaMA-Factory use `log1p(-exp(a))`, which loses digits near probability 1. LLaMA-Factory
    averages the likelihood as here; the authors and TRL take the batch's tokens, prompts included.
    """
    logps = checked_logps(policy_logps, lengths, where)
    means = safe_divide(logps, masked(lengths, where))
    # log(1 - p) by one branch of log1mexp: far from 0 its error is absolute, as the means' is.
    against = jnp.log(-jnp.expm1(jnp.minimum(means, -1e-7)))
    odds_ratio = jax.nn.softplus(margin(against) - margin(means))
    nll = nll_term(logps, lengths, where, 0, nll_reduction)
    return masked_rows(nll + lam * odds_ratio, where)


def asft_loss(
    policy_logps: Array,
    lengths: Array,
    *,
    lam: NonNegative = 1.0,
    nll_reduction: NllReduction = "sequence_mean",
    where: Array | None = None,
) -> Array:
    r"""Aligned supervised fine-tuning (experimental): likelihood and unlikelihood, not a margin.

    $-\log\pi(y_w) - \lambda\,[\log\sigma(\mathrm{logit}\,p_w) + \log\sigma(-\mathrm{logit}\,p_l)]$,
    whose bracket is $a_w + \log(1 - p_l)$: the gradients of the two completions are independent.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        lengths: `[..., 2]` scored tokens of each completion.
        lam: weight of the bracket, >= 0; the paper's value is not known.
        nll_reduction: "sequence_mean" per token of the chosen, or "sum".
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> asft_loss(jnp.array([-4.0, -6.0]), jnp.array([4, 6]))
    Array(2.4586751, dtype=float32)

    Wang et al. 2024, arXiv:2409.10571, only its abstract read; the formula is from memory, with the
    probabilities of ORPO (of whole sequences the second term would vanish). No peer has it.
    """
    logps = checked_logps(policy_logps, lengths, where)
    means = safe_divide(logps, masked(lengths, where))
    aligned = -means[..., 0] - log1mexp(means[..., 1])
    nll = nll_term(logps, lengths, where, 0, nll_reduction)
    return masked_rows(nll + lam * aligned, where)


def checked_logps(
    policy_logps: Array, lengths: Array, where: Array | None, candidates: tuple[int, ...] = (2,)
) -> Array:
    """The log-probs in at least float32, 0 where masked, after the checks of their shapes."""
    chex.assert_equal_shape([policy_logps, lengths] + ([] if where is None else [where]))
    chex.assert_axis_dimension_gteq(policy_logps, -1, min(candidates))
    chex.assert_axis_dimension_lteq(policy_logps, -1, max(candidates))
    return masked(at_least_float32(policy_logps), where)


def preference_term(logps: Array, lengths: Array, beta: float, link: Link, eps: float) -> Array:
    """(1 - eps) f(z) + eps f(-z) of the first two candidates."""
    if link == "sigmoid":
        z = beta * margin(logps)
        return jax.nn.softplus(-z) + eps * z
    if link == "hinge":
        z = beta * margin(logps)
        return (1 - eps) * jax.nn.relu(1 - z) + eps * jax.nn.relu(1 + z)
    means, target = margin(safe_divide(logps, lengths)), 1 / (2 * beta)
    return (1 - eps) * jnp.square(means - target) + eps * jnp.square(means + target)


def nll_term(
    logps: Array, lengths: Array, where: Array | None, index: int, reduction: NllReduction
) -> Array:
    """`[...]` negative log-likelihood of one candidate, summed or per token."""
    if reduction == "sequence_mean":
        logps = safe_divide(logps, masked(lengths, where))
    return -logps[..., index]
