r"""What an order of candidates says about a gradient: descent for a judge who only ranks.

>>> tried = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
>>> rank_gradient(tried, jnp.array([1, 3]))          # the second was best, then the fourth
Array([1. , 0.6], dtype=float32)
"""

import jax.numpy as jnp

from paxo.numerics import Array


def rank_gradient(perturbations: Array, best: Array) -> Array:
    r"""`[d]` a direction in which what is ranked gets worse: to be stepped against.

    Of M perturbations of one point the k best are named in order, so that every pair with one of
    them in it is ordered; the direction is the mean of (worse - better) over those pairs. One that
    beats w others and loses to l has the weight (l - w) / pairs: weights sum to 0, and what is
    common to all cancels. (The authors' code gives the named ones one win too many.)

    Args:
        perturbations: `[M, d]`, standard normal for an estimate of a gradient's direction.
        best: `[k]` indices of the k best, the best first; k = M is a whole ranking.

    Raises:
        ValueError: for no index, or more than there are perturbations.

    Tang et al. 2023, arXiv:2303.03751, the estimator of ZO-RankSGD.
    """
    total, named = len(perturbations), len(best)
    if not 0 < named <= total:
        raise ValueError(f"best must name 1 to {total} of the perturbations; got {named}")
    pairs = named * (total - named) + named * (named - 1) // 2
    weights = jnp.full(total, named, perturbations.dtype)
    weights = weights.at[best].set(2 * jnp.arange(named, dtype=perturbations.dtype) + 1 - total)
    return weights @ perturbations / pairs
