r"""Distributions over a list: the implicit rewards' softmax against that of explicit rewards.

InfoNCA and EXO are the two directions of the same divergence; NCA pins each likelihood by itself.
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import list_inputs
from paxo.numerics import Array, logsumexp, masked, safe_divide


def infonca_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.01,
    reward_temperature: Positive = 1e-4,
    where: Array | None = None,
) -> Array:
    r"""InfoNCA: $-\sum_i q_i \log\mathrm{softmax}(s)_i$ with $q = \mathrm{softmax}(r/\alpha)$.

    Cross-entropy from the explicit rewards to the implicit ones $s = \beta(\log\pi -
    \log\pi_{ref})$. For K = 2 and distant rewards it is DPO; as all rewards become equal, its
    minimum is equal scores.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` rewards.
        beta: scale of the implicit reward, > 0.
        reward_temperature: alpha; the authors' 1e-4 leaves the best candidate alone, 1 is ListNet.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log K where policy and reference agree.

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> infonca_loss(policy, reference, jnp.array([1.0, 0.0]), beta=0.5)
    Array(0.3132617, dtype=float32)

    Chen et al. 2024, arXiv:2402.05369. The authors' code, whose configuration the default is,
    says that its temperature is the inverse of the paper's alpha, and adds 0.01 to the first reward
    against ties; here ties share.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    target = jnp.exp(_log_targets(labels, reward_temperature, where))
    return -jnp.sum(masked(target * _log_softmax(scores, where), where), axis=-1)


def nca_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.01,
    reward_temperature: Positive = 1e-4,
    where: Array | None = None,
) -> Array:
    r"""NCA: $-\sum_i q_i \log\sigma(s_i) + \frac{1}{K}\log\sigma(-s_i)$, $q$ as in InfoNCA.

    Unlike InfoNCA it pins the likelihoods themselves, not their differences: a number added to all
    scores changes it.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` rewards.
        beta: scale of the implicit reward, > 0.
        reward_temperature: alpha, as in `infonca_loss`.
        where: `[..., K]` bool, False on candidates to ignore; K is the number that is left.

    Returns:
        `[...]` nats; 2 log 2 where policy and reference agree.

    >>> nca_loss(jnp.zeros(4), jnp.zeros(4), jnp.array([3.0, 2.0, 1.0, 0.0]))
    Array(1.386294, dtype=float32)

    Chen et al. 2024, arXiv:2402.05369, and the authors' code.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    target = jnp.exp(_log_targets(labels, reward_temperature, where))
    share = safe_divide(jnp.ones_like(scores), jnp.sum(where, axis=-1, keepdims=True))
    loss = target * jax.nn.softplus(-scores) + share * jax.nn.softplus(scores)
    return jnp.sum(masked(loss, where), axis=-1)


def exo_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    reward_temperature: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""EXO: $\mathrm{KL}(\mathrm{softmax}(s)\,\|\,\mathrm{softmax}(r/\beta_r))$, policy first.

    The reverse of InfoNCA's divergence: it seeks a mode of the rewards, and its gradient vanishes
    where the policy is far off. $s = \beta(\log\pi - \log\pi_{ref})$.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` rewards; grades (1, 0) with the default are the authors' log-targets
            (0, -10) of a preference pair.
        beta: beta_pi, scale of the implicit reward, > 0 (TRL's value).
        reward_temperature: beta_r, temperature of the rewards.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats, at least 0.

    >>> exo_loss(jnp.array([-5.0, -5.0]), jnp.array([-5.0, -5.0]), jnp.array([1.0, 0.0]))
    Array(4.306898, dtype=float32)

    Ji et al. 2024, arXiv:2402.00856, and the authors' code (`exo-rw`), which for pairs leaves the
    target unnormalised: a constant log(1 + e^-10) less. `exo_pair` has label smoothing instead.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    own = _log_softmax(scores, where)
    gap = own - _log_targets(labels, reward_temperature, where)
    return jnp.sum(masked(jnp.exp(own) * gap, where), axis=-1)


def _log_softmax(x: Array, where: Array) -> Array:
    """`[..., K]` over the candidates that are there, 0 elsewhere."""
    return masked(x - logsumexp(x, where=where)[..., None], where)


def _log_targets(rewards: Array, temperature: float, where: Array) -> Array:
    """log softmax(r / temperature), the best reward taken off before the division enlarges it."""
    best = jnp.max(jnp.where(where, rewards, -jnp.inf), axis=-1, keepdims=True)
    away = masked(rewards, where) - masked(best, jnp.any(where, axis=-1, keepdims=True))
    return _log_softmax(masked(away, where) / temperature, where)
