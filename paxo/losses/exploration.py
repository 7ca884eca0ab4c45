r"""DPO with a term on further samples: optimism (XPO, VPO, SELM) and on-policy KL (HyPO).

The pair stands on the first two places of a group, chosen first. The samples of the further term
are the candidates from the third place on; where one of the pair is itself such a sample (XPO
compares an answer of the policy with one of the reference), `samples` tells which candidates are
meant, 1 or 0, and nothing need be scored twice.

>>> policy, reference = jnp.array([-4.0, -6.0, -7.0]), jnp.array([-5.0, -5.0, -5.0])
>>> by_place = selm_loss(policy, reference, alpha=0.5, beta=0.5)
>>> by_flag = selm_loss(policy, reference, jnp.array([0.0, 0.0, 1.0]), alpha=0.5, beta=0.5)
>>> float(by_place) == float(by_flag)
True
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import check_lists, given, ratios_to
from paxo.losses.pairwise import dpo_loss
from paxo.numerics import Array, at_least_float32, masked, masked_rows


def xpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    samples: Array | None = None,
    *,
    alpha: NonNegative = 1e-5,
    beta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""XPO: DPO plus $\alpha\log\pi(\tilde y)$ on samples $\tilde y$ of the reference.

    Minimising it pushes down what the reference already says: in the mean the added term is
    $-\alpha\,KL(q|\pi)$ up to a constant. In the paper $\tilde y$ is the second answer of each
    labelled pair, and the sum runs over all pairs collected so far.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats: chosen, rejected, samples.
        reference_logps: `[..., K]` the same under the reference policy.
        samples: `[..., K]` 1 for the samples of the reference, which may be of the pair, else 0;
            without it they are the candidates from the third on.
        alpha: weight of the bonus, >= 0.
        beta: strength of the KL regularisation, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where one of the pair is masked; a group without samples has no bonus.

    >>> s, q = jnp.array([-4.0, -4.0]), jnp.array([-5.0, -5.0])
    >>> xpo_loss(s, q, jnp.array([0.0, 1.0]), alpha=0.1)       # log 2 - 0.4
    Array(0.29314718, dtype=float32)

    Xie et al. 2024, arXiv:2405.21046 (algorithm from memory). TRL's XPOTrainer (up to
    1.13) computes the same with the default alpha, on fresh pairs only; oat has alpha = 5e-6.
    """
    loss, bonus_where = _pair_loss(policy_logps, reference_logps, samples, beta, where)
    logps = masked(at_least_float32(policy_logps), where)
    return masked_rows(loss + alpha * _mean(logps, bonus_where), _pair(where))


def vpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    samples: Array | None = None,
    *,
    alpha: NonNegative = 1e-5,
    beta: Positive = 0.1,
    mode: Literal["online", "offline"] = "online",
    where: Array | None = None,
) -> Array:
    r"""VPO: DPO with the optimal value of the implied reward as a bonus (experimental).

    $\pm\alpha\beta\,E_{\pi_{cal}}[h(y)]$: for a reward with mean 0 under the calibration policy,
    $-\beta E_{\pi_{cal}}[\log(\pi_r/q)]$ is the best value that a KL-regularised policy reaches.
    Online it is made large (optimism), offline small (pessimism). The bonus has no lower bound.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats: chosen, rejected, samples.
        reference_logps: `[..., K]` the same under the reference policy.
        samples: `[..., K]` 1 for samples of the calibration policy, else 0; without it they are the
            candidates from the third on.
        alpha: weight of the bonus, >= 0; the paper's is not known here, the default is XPO's.
        beta: strength of the KL regularisation, > 0.
        mode: "online" adds the bonus, "offline" subtracts it.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where one of the pair is masked; a group without samples has no bonus.

    >>> s, q = jnp.array([-4.0, -4.0, -3.0]), jnp.array([-5.0, -5.0, -5.0])
    >>> vpo_loss(s, q, alpha=0.5, beta=0.1, mode="offline")    # log 2 - 0.5 * 0.1 * 2
    Array(0.5931472, dtype=float32)

    Cen et al. 2024, arXiv:2405.19320, from memory: the sign and the identity are derived, the
    normalisation is not verified. No trainer has it.
    """
    loss, bonus_where = _pair_loss(policy_logps, reference_logps, samples, beta, where)
    bonus = _mean(ratios_to(policy_logps, reference_logps, where), bonus_where)
    sign = 1.0 if mode == "online" else -1.0
    return masked_rows(loss + sign * alpha * beta * bonus, _pair(where))


def selm_loss(
    policy_logps: Array,
    reference_logps: Array,
    samples: Array | None = None,
    *,
    alpha: NonNegative = 0.001,
    beta: Positive = 0.01,
    where: Array | None = None,
) -> Array:
    r"""SELM: DPO plus $\alpha\beta(\log\pi(y) - \log q(y))$ on a sample y of the last policy.

    The reference is the policy of the last round, which also gave y; best and worst of y and the
    two of the data are the pair, so y may be one of them. Bonus as VPO's online.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats: chosen, rejected, samples.
        reference_logps: `[..., K]` the same under the last round's policy.
        samples: `[..., K]` 1 for the generated answer, which may be of the pair, else 0; without it
            they are the candidates from the third on.
        alpha: weight of the bonus, >= 0; 0.001 for Zephyr and Phi-3, 1e-4 for Llama-3.
        beta: strength of the KL regularisation, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where one of the pair is masked; a group without samples has no bonus.

    >>> s, q = jnp.array([-4.0, -4.0, -3.0]), jnp.array([-5.0, -5.0, -5.0])
    >>> selm_loss(s, q, alpha=0.5, beta=0.1)                   # log 2 + 0.5 * 0.1 * 2
    Array(0.7931472, dtype=float32)

    Zhang et al. 2024, arXiv:2405.19332, and the authors' code; the paper's algorithm box prints
    alpha where objective and code have alpha * beta, and has the log-prob instead of the
    log-ratio, a constant apart.
    """
    loss, bonus_where = _pair_loss(policy_logps, reference_logps, samples, beta, where)
    bonus = _mean(ratios_to(policy_logps, reference_logps, where), bonus_where)
    return masked_rows(loss + alpha * beta * bonus, _pair(where))


def hypo_loss(
    policy_logps: Array,
    reference_logps: Array,
    samples: Array | None = None,
    *,
    beta: Positive = 0.1,
    lam: NonNegative = 0.01,
    where: Array | None = None,
) -> Array:
    r"""HyPO: DPO on offline pairs plus the gradient of $\lambda\,KL(\pi|q)$ on online samples.

    The second term is the mean over the samples of $\mathrm{sg}[h(y) - b]\log\pi(y)$ with the mean
    log-ratio b of the group's other samples as baseline: a score-function gradient, as the samples
    come from the policy that is trained. It keeps in place what no pair mentions; DPO does not.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats: chosen, rejected, samples.
        reference_logps: `[..., K]` the same under the reference policy.
        samples: `[..., K]` 1 for samples of the live policy, else 0; without it they are the
            candidates from the third on. A single one has the baseline 0.
        beta: strength of DPO's KL regularisation, > 0.
        lam: weight of the online KL, >= 0; the paper's value is not known here.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; the gradient of the second term counts, its value does not. 0 where one of the
        pair is masked.

    >>> s, q = jnp.array([-4.0, -4.0, -3.0]), jnp.array([-5.0, -5.0, -5.0])
    >>> hypo_loss(s, q, beta=0.1, lam=0.1)                     # log 2 + 0.1 * 2 * -3
    Array(0.0931471, dtype=float32)

    Song et al. 2024, arXiv:2406.01462 (experimental: from secondary sources and memory; lambda and
    the number of samples are not verified). No trainer has it.
    """
    loss, bonus_where = _pair_loss(policy_logps, reference_logps, samples, beta, where)
    logps = masked(at_least_float32(policy_logps), where)
    ratios = jax.lax.stop_gradient(logps) - given(reference_logps, where)
    weights = ratios - _mean_of_others(ratios, bonus_where)
    return masked_rows(loss + lam * _mean(weights * logps, bonus_where), _pair(where))


def _pair_loss(policy_logps, reference_logps, samples, beta, where):
    """DPO of the first two places, and the weights `[..., K]` of the samples of the other term."""
    check_lists(policy_logps, reference_logps, samples, where)
    count = policy_logps.shape[-1]
    if samples is None and count < 3:
        raise ValueError(
            f"this loss wants samples beside the pair: got {count} candidates. Give it further "
            "candidates, or the extra `samples [..., K]`, 1 for those of the pair that are meant."
        )
    chex.assert_axis_dimension_gteq(policy_logps, -1, 2)
    dpo = dpo_loss(
        policy_logps[..., :2],
        jax.lax.stop_gradient(reference_logps[..., :2]),
        beta=beta,
        where=_pair(where),
    )
    if samples is None:
        samples = jnp.broadcast_to(jnp.arange(count) >= 2, policy_logps.shape)
    return dpo, given(samples, where).astype(dpo.dtype)


def _pair(where: Array | None) -> Array | None:
    return None if where is None else where[..., :2]


def _mean(x: Array, weights: Array) -> Array:
    """`[..., K] -> [...]` weighted mean, 0 where all weights are."""
    return _quotient(jnp.sum(weights * x, axis=-1), jnp.sum(weights, axis=-1))


def _mean_of_others(x: Array, weights: Array) -> Array:
    """`[..., K]` weighted mean over the other candidates, 0 without any."""
    totals, counts = (jnp.sum(y, axis=-1, keepdims=True) - y for y in (weights * x, weights))
    return _quotient(totals, counts)


def _quotient(total: Array, count: Array) -> Array:
    return total / jnp.where(count == 0, 1, count)
