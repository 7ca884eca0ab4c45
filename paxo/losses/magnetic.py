r"""Magnetic mirror descent on preferences: steps towards the win rate, drawn to a magnet.

>>> import jax.numpy as jnp
>>> s = jnp.array([-1.0, -2.0])
>>> float(mpo_magnetic_loss(s, s, s, jnp.array([0.5, 0.5])))
0.0
"""

from paxo.losses.contract import NonNegative, Positive
from paxo.losses.selfplay import inpo_loss
from paxo.numerics import Array


def mpo_magnetic_loss(
    policy_logps: Array,
    reference_logps: Array,
    previous_logps: Array,
    win_rates: Array,
    *,
    alpha: NonNegative = 0.1,
    eta: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Magnetic preference optimisation (experimental), as a regression on win rates.

    A round's policy is $\arg\max_\pi w\cdot\pi - \alpha KL(\pi|q) - \frac1\eta KL(\pi|\pi_t)$ with
    the magnet $q$, that is $\log\pi = (\log\pi_t + \eta\alpha\log q + \eta w)/(1 + \eta\alpha)$
    up to a constant; this loss has it as its minimiser. With a magnet that stays the rounds
    approach the Nash policy of KL weight alpha; with one that moves to the policy every few rounds,
    that of the game itself. It is `inpo` with eta $\alpha + 1/\eta$ and tau $\alpha$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        reference_logps: `[..., 2]` the same under the magnet.
        previous_logps: `[..., 2]` the same under the snapshot that answered.
        win_rates: `[..., 2]` in [0, 1] against the snapshot.
        alpha: KL weight to the magnet, >= 0 (our default).
        eta: step, > 0 (our default).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> import jax.numpy as jnp
    >>> s, q, u = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([-5.0, -5.0])
    >>> mpo_magnetic_loss(s, q, u, jnp.array([1.0, 0.0]), alpha=0.25, eta=4.0)  # (2 - 2)²
    Array(0., dtype=float32)

    Wang et al. 2024, arXiv:2410.16714; the update is from secondary sources, the regression ours.
    The paper trains language models by REINFORCE with advantages of tokens; its values of alpha,
    eta and of the magnet's period are not known. No library has it.
    """
    return inpo_loss(
        policy_logps,
        reference_logps,
        previous_logps,
        win_rates,
        eta=alpha + 1 / eta,
        tau=alpha,
        target="win_rate",
        where=where,
    )
