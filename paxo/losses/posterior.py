r"""BRAIn: the policy is fitted to the posterior of completions given that they are good.

>>> logps, rewards = jnp.array([-1.0, -2.0]), jnp.array([3.0, 3.0])
>>> jax.grad(brain_loss)(logps, logps, logps, rewards)      # the policy is the posterior already
Array([0., 0.], dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive
from paxo.losses.given import check_lists, given, ratios_to
from paxo.numerics import Array, logsumexp, masked


def brain_loss(
    policy_logps: Array,
    reference_logps: Array,
    previous_logps: Array,
    rewards: Array,
    *,
    scale: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""BRAIn, experimental: $-\sum_i a_i\log b_i$ over the samples of a prompt.

    $a = \mathrm{softmax}(r/\gamma + \log q - \log q')$ are the self-normalised importance weights
    of the posterior $\propto q\,e^{r/\gamma}$ on samples of $q'$, and $b = \mathrm{softmax}(
    \log\pi - \log q')$ those of the policy. The gradient is $-(a - b)\nabla\log\pi$: zero where
    the policy is the posterior on the samples. For K = 2 it is DPO against $q'$ with beta 1 and a
    soft label.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy, the prior $q$.
        previous_logps: `[..., K]` the same under the policy $q'$ that sampled them.
        rewards: `[..., K]` of the completions.
        scale: gamma, reward per nat, > 0. The paper's value is not known; the default is ours.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats, at least the entropy of a; 0 without candidates.

    >>> logps = jnp.array([-4.0, -6.0])
    >>> brain_loss(logps, logps, logps, jnp.array([1.0, 1.0]))
    Array(0.6931472, dtype=float32)

    Pandey et al. 2024, arXiv:2402.02479; the abstract was read, the formula is from memory, its
    gradient checked. No code was published and no trainer has it.
    """
    check_lists(policy_logps, reference_logps, previous_logps, rewards, where)
    there = jnp.ones(policy_logps.shape, bool) if where is None else where
    prior = jax.lax.stop_gradient(ratios_to(reference_logps, previous_logps, there))
    target = _log_softmax(given(rewards, there) / scale + prior, there)
    found = _log_softmax(ratios_to(policy_logps, previous_logps, there), there)
    return -jnp.sum(masked(jnp.exp(target) * found, there), axis=-1)


def _log_softmax(x: Array, where: Array) -> Array:
    """`[..., K]` over the candidates that are there, 0 elsewhere."""
    return masked(x - logsumexp(x, where=where)[..., None], where)
