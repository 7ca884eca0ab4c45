r"""DPO whose margin is moved: by scores, other objectives, a penalty, or two betas.

All are $-\log\sigma$ of something other than $\beta(r_w - r_l)$.

>>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
>>> flex_dpo_loss(policy, reference, beta_w=0.5, beta_l=0.5)  # DPO
Array(0.3132617, dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import NonNegative, Positive, Real
from paxo.losses.pairwise import check_candidates, dpo_loss, margin, pair_log_ratios
from paxo.numerics import Array, at_least_float32, masked, masked_rows


def odpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    rewards: Array,
    *,
    beta: Positive = 0.1,
    alpha: Real = 1.0,
    offset: Literal["log", "linear"] = "log",
    min_gap: Positive = 1e-3,
    where: Array | None = None,
) -> Array:
    r"""DPO with an offset: $-\log\sigma(\beta(r_w - r_l) - \delta)$.

    $\delta = \alpha f(R_w - R_l)$: a pair that a judge finds far apart must have the larger margin.
    With the logarithm, as in the authors' code, δ is negative for gaps below 1, and -∞ at a tie:
    gaps are taken as `min_gap` at least.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        rewards: `[..., 2]` a judge's scores of the completions; no gradient flows through them.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the offset; 0 is DPO. Default from memory.
        offset: f, the gap's logarithm or the gap itself.
        min_gap: smallest gap that the logarithm sees, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> rewards = jnp.array([3., 1.])
    >>> odpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), rewards, beta=1., offset="linear")
    Array(0.6931472, dtype=float32)

    Amini et al. 2024, arXiv:2402.10571, and the authors' code, which does not guard the tie. TRL,
    EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, rewards)
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    gap = margin(masked(at_least_float32(rewards), where))
    if offset == "log":
        gap = jnp.log(jnp.maximum(gap, min_gap))
    delta = jax.lax.stop_gradient(alpha * gap)
    return masked_rows(jax.nn.softplus(delta - z), where)


def modpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    margin_rewards: Array,
    *,
    beta: Positive = 0.1,
    w0: Positive = 0.5,
    w1: Real = 0.5,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    where: Array | None = None,
) -> Array:
    r"""Multi-objective DPO: $-\log\sigma([\beta(r_w - r_l) - w_1(R_w - R_l)] / w_0)$.

    Trains the objective that the pairs express, so that *with* the others' rewards R the weighted
    sum of all is optimised: what R already settles is taken off the margin.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        margin_rewards: `[..., 2]` the other objective's rewards (a DPO-trained policy's implicit
            ones, say); of several objectives their weighted sum, with `w1=1`. No gradient.
        beta: strength of the KL regularisation, > 0.
        w0: weight of the pairs' objective, > 0. The authors' scripts use 0.1, 0.5 and 0.9.
        w1: weight of `margin_rewards`; `1 - w0` there.
        link: "sigmoid", or "hinge": max(0, 1 - that argument).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> rewards = jnp.array([0.5, -0.5])
    >>> modpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), rewards, beta=0.5)
    Array(0.3132617, dtype=float32)

    Zhou et al. 2023, arXiv:2310.03708, and the authors' code (`modpo_trainer.py`), which has
    both links. TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, margin_rewards)
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    others = jax.lax.stop_gradient(margin(masked(at_least_float32(margin_rewards), where)))
    x = (z - w1 * others) / w0
    return masked_rows(jax.nn.relu(1 - x) if link == "hinge" else jax.nn.softplus(-x), where)


def dpop_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.3,
    lam: NonNegative = 50.0,
    where: Array | None = None,
) -> Array:
    r"""DPO-Positive: $-\log\sigma(\beta(r_w - r_l - \lambda\max(0, -r_w)))$.

    A chosen completion that has become less likely than under the reference is charged, inside the
    sigmoid, so that a growing margin does not pay for its fall. Where r_w >= 0 it is DPO.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0; the default is from memory.
        lam: weight of the penalty λ, >= 0; losses of hundreds are usual early on with 50, which is
            what users of the method report.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> dpop_loss(jnp.array([-5.25, -7.]), jnp.array([-5., -5.]), beta=0.5, lam=7.)
    Array(0.6931472, dtype=float32)

    Pal et al. 2024, arXiv:2402.13228; the formula is as corrected in issue 2 of abacusai/smaug and
    as SamPO's code has it, the paper's equation is from memory. Some ports put the penalty outside
    the sigmoid. TRL, EasyDeL and HALOs do not have it.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    penalty = jax.nn.relu(-ratios[..., 0])
    return masked_rows(jax.nn.softplus(-beta * (margin(ratios) - lam * penalty)), where)


def flex_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta_w: Positive = 0.1,
    beta_l: NonNegative = 0.08,
    where: Array | None = None,
) -> Array:
    r"""Flex-DPO: $-\log\sigma(\beta_w r_w - \beta_l r_l)$, a beta for each side.

    The rejected completion is pushed down with β_l/β_w of the force that lifts the chosen one:
    against DPO's habit of lowering both.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta_w: of the chosen, > 0; the default is from memory.
        beta_l: of the rejected, >= 0; the paper lowers it from `beta_w`, and finds about 0.08 best,
            say its reviews.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> flex_dpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), beta_w=0.7, beta_l=0.3)
    Array(0.3132617, dtype=float32)

    Yan et al. 2024, arXiv:2406.07327 (experimental: the formula is from memory). The paper's other
    remedy, SFT on the chosen completion, is `rpo`. TRL, EasyDeL and HALOs do not have it.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    u = beta_w * ratios[..., 0] - beta_l * ratios[..., 1]
    return masked_rows(jax.nn.softplus(-u), where)


def dove_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""DOVE: DPO on *joint* log-probs of instruction and response, whose instructions may differ.

    $-\log\sigma(\beta(j_w - j_l))$, $j = \log\pi(x, y) - \log\pi_{ref}(x, y)$. The difference to
    DPO is in the data: a candidate is an instruction with its response, and the instruction's
    tokens are scored too. Give each candidate its own, and no prompt but the first token to the
    group. Where the instructions are the same, their part cancels and the loss is DPO's.

    Args:
        policy_logps: `[..., 2]` log-probs in nats of instruction plus response, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> instructions, responses = jnp.array([-3., -3.]), jnp.array([-4., -6.])
    >>> dove_loss(instructions + responses, jnp.array([-8., -8.]), beta=0.5)
    Array(0.3132617, dtype=float32)

    Bansal et al. 2024, arXiv:2404.00530, and the authors' code: TRL's DPO trainer with prompt
    tokens unmasked when `joint_distribution` is set, which by default it is not.
    """
    return dpo_loss(policy_logps, reference_logps, beta=beta, where=where)
