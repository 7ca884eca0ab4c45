r"""Regressions on rewards: differences of log-ratios follow differences of rewards, no ratios.

>>> snapshot, rewards = jnp.array([-4.0, -6.0]), jnp.array([1.0, 0.5])
>>> float(rebel_loss(snapshot + 2.0 * rewards, snapshot, rewards, eta=2.0))
0.0
"""

import jax.numpy as jnp

from paxo.losses.contract import Positive
from paxo.losses.given import centred, check_lists, check_pairs, given, ratios_to
from paxo.losses.pairwise import margin
from paxo.numerics import Array, masked_rows, safe_divide


def copg_loss(
    policy_logps: Array,
    reference_logps: Array,
    rewards: Array,
    *,
    beta: Positive = 0.06,
    where: Array | None = None,
) -> Array:
    r"""CoPG, contrastive policy gradient: $-(R_{\beta/2}(y) - R_{\beta/2}(y'))(h(y) - h(y'))$.

    $R_c(y) = R(y) - c\,h(y)$, with a gradient through all of it: $-(R_\beta(y) - R_\beta(y'))
    \nabla(h(y) - h(y'))$. It is $(\Delta R - \beta\Delta h)^2/(2\beta)$ up to a constant, so that
    the best KL-regularised policy is stationary whatever policy gave the completions; on samples of
    the policy itself it is twice the policy gradient.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats, from any policy.
        reference_logps: `[..., K]` the same under the reference policy.
        rewards: `[..., K]` of the completions.
        beta: strength of the KL regularisation, > 0; 0.06 was best on TL;DR.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` in nats times reward: the sum over the pairs of a group, over K - 1. 0 for fewer
        than two candidates.

    >>> copg_loss(jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([1.0, 0.0]), beta=0.5)
    Array(-1., dtype=float32)

    Flet-Berliac et al. 2024, arXiv:2406.19185 (a slip of sign in the paper: the objective is to be
    maximised). No trainer has it; for K = 2 its gradient on the policy's own samples is twice that
    of `rloo`.
    """
    check_lists(policy_logps, reference_logps, rewards, where)
    h = centred(ratios_to(policy_logps, reference_logps, where), where)
    products = (centred(given(rewards, where), where) - beta / 2 * h) * h
    # The sum over pairs of products of differences is K times the sum of products about the mean.
    number = h.shape[-1] if where is None else jnp.sum(where, axis=-1)
    return -safe_divide(number * jnp.sum(products, axis=-1), number - 1)


def rebel_loss(
    policy_logps: Array,
    previous_logps: Array,
    rewards: Array,
    *,
    eta: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""REBEL: $((g(y) - g(y')) - \eta(r(y) - r(y')))^2$ with log-ratios $g$ to the snapshot.

    The minimiser is a mirror step $\pi_t e^{\eta r}$, normalised, whatever the pairs' distribution.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        previous_logps: `[..., 2]` the same under the snapshot that sampled them.
        rewards: `[..., 2]` of the completions, a KL penalty to the reference included if wanted.
        eta: step, > 0: nats per unit of reward.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> rebel_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([1., 0.]), eta=0.5)
    Array(2.25, dtype=float32)

    Gao et al. 2024, arXiv:2404.16767. The authors' code multiplies by eta (1 on TL;DR, 1e6 on
    UltraFeedback), as here; the paper divides the log-ratios by it. No library has it.
    """
    check_pairs(policy_logps, previous_logps, rewards, where)
    ratios = ratios_to(policy_logps, previous_logps, where)
    return masked_rows(jnp.square(margin(ratios) - eta * margin(given(rewards, where))), where)
