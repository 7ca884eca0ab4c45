r"""Several reward models at once: conservative rewards, and how sure they are of a pair."""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.numerics import Array, at_least_float32


def ensemble_rewards(
    scores: Array,
    how: Literal["mean", "wco", "uwo"] = "uwo",
    *,
    lam: float = 0.5,
    ddof: Literal[0, 1] = 0,
) -> Array:
    r"""`[M, ...] -> [...]` one reward from those of M models, without gradient.

    "mean", "wco" (worst case: the minimum) or "uwo" (uncertainty-weighted: mean minus `lam` times
    the variance). "uwo" is not monotone: a higher reward of one model may lower it.

    Args:
        scores: `[M, ...]` rewards, models first.
        how: which of the three.
        lam: weight of the variance: 0.5 for best-of-n, 0.1 for PPO in the paper.
        ddof: the variance divides by M - ddof. The authors' best-of-n code has 0, their PPO code 1,
            which makes the same `lam` M/(M - 1) times as strong.

    >>> scores = jnp.array([[1.0], [3.0]])
    >>> [float(ensemble_rewards(scores, how)[0]) for how in ("mean", "wco", "uwo")]
    [2.0, 1.0, 1.5]

    Coste et al. 2023, arXiv:2310.02743.
    """
    scores = jax.lax.stop_gradient(at_least_float32(scores))
    if how == "wco":
        return jnp.min(scores, axis=0)
    mean = jnp.mean(scores, axis=0)
    if how == "mean" or scores.shape[0] == 1:
        return mean
    return mean - lam * jnp.var(scores, axis=0, ddof=ddof)


def preference_strength(scores: Array) -> tuple[Array, Array]:
    r"""`[M, ..., 2] -> [...], [...]` mean and standard deviation over models of $r_w - r_l$.

    A pair with a negative mean is probably mislabelled: swap it, smooth its label
    (`bradley_terry_loss(label_smoothing=...)`) or let the mean be the pair's margin.

    Args:
        scores: `[M, ..., 2]` rewards of M models trained on the same pairs in different orders (10
            in the paper), chosen first.

    >>> preference_strength(jnp.array([[2.0, 1.0], [0.0, 1.0]]))
    (Array(0., dtype=float32), Array(1., dtype=float32))

    Wang et al. 2024, arXiv:2401.06080, Section 2.
    """
    scores = jax.lax.stop_gradient(at_least_float32(scores))
    gaps = scores[..., 0] - scores[..., 1]
    return jnp.mean(gaps, axis=0), jnp.std(gaps, axis=0)
