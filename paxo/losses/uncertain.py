r"""UPO: pairs whose label an estimator is unsure of count less, or not at all.

The estimator says with dropout kept on, T times, how likely each response is the better one; what
the passes disagree on is the information that the label would bring.

>>> sure, torn = jnp.array([[0.9, 0.1]] * 2), jnp.array([[1.0, 0.0], [0.0, 1.0]])
>>> gains = information_gain(jnp.stack([sure, torn], axis=1))
>>> flip_rates_from(gains)
Array([0. , 0.5], dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.noisy import smoothed
from paxo.losses.pairwise import check_candidates, margin, pair_log_ratios
from paxo.numerics import LOG_2, Array, at_least_float32, masked, masked_rows, safe_divide


def upo_loss(
    policy_logps: Array,
    reference_logps: Array,
    lengths: Array,
    flip_rates: Array,
    *,
    beta: Positive = 0.1,
    lam: NonNegative = 0.0,
    where: Array | None = None,
) -> Array:
    r"""UPO (experimental): $-(1-\alpha)\log\sigma(z) - \alpha\log\sigma(-z)$, each pair its own.

    Conservative DPO with a flip rate $\alpha$ per pair, and $\lambda$ times the negative mean
    log-prob of the chosen. With 1 minus the probability of a judge as flip rate it is DPO with
    soft labels: among all policies the best KL-regularised one is then the minimum if the judge is
    a Bradley-Terry model.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the last round's policy.
        lengths: `[..., 2]` scored tokens of each completion.
        flip_rates: `[...]` alpha in [0, 1/2] (`flip_rates_from`); no gradient is taken.
        beta: strength of the KL regularisation, > 0.
        lam: weight of the likelihood of the chosen, >= 0; its value in the paper is not known.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats. 0 where either candidate is masked.

    >>> policy, reference = jnp.array([-4., -6.]), jnp.array([-5., -5.])
    >>> upo_loss(policy, reference, jnp.ones(2), jnp.array(0.1), beta=0.5)
    Array(0.4132617, dtype=float32)

    Wang et al. 2024, arXiv:2409.11212, whose printed formulas are not followed: its alpha lies in
    [1/2, 1], which would turn every label round, and its likelihood term has the wrong sign and
    divisor. The released trainer has no such weight. TRL, EasyDeL and HALOs do not have it.
    """
    check_candidates(policy_logps, lengths)
    chex.assert_shape(flip_rates, policy_logps.shape[:-1])
    z = beta * margin(pair_log_ratios(policy_logps, reference_logps, where))
    flips = jax.lax.stop_gradient(masked_rows(at_least_float32(flip_rates), where))
    logps = masked(at_least_float32(policy_logps), where)
    nll = -safe_divide(logps, masked(lengths, where))[..., 0]
    return masked_rows(smoothed(z, flips) + lam * nll, where)


def information_gain(probabilities: Array) -> Array:
    r"""`[T, ..., 2] -> [...]` $H(\bar p) - \overline{H(p)}$ of T passes, in [0, log 2] nats.

    0 where all passes agree; log 2 where each is certain and half say the opposite. (BALD.)

    Args:
        probabilities: `[T, ..., 2]` of the two verdicts, from T passes with dropout.

    >>> information_gain(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    Array(0., dtype=float32)

    Wang et al. 2024, arXiv:2409.11212, and the authors' code, which calls it with T = 10.
    """
    p = jax.lax.stop_gradient(at_least_float32(probabilities))
    return _entropy(jnp.mean(p, axis=0)) - jnp.mean(_entropy(p), axis=0)


def flip_rates_from(gains: Array) -> Array:
    """Flip rates in [0, 1/2] from information gains in [0, log 2]: half their share (ours)."""
    return jnp.clip(gains / LOG_2, 0, 1) / 2


def _entropy(p: Array) -> Array:
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
