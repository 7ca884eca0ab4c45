"""How far a policy is from being unbeatable, estimated from samples."""

import numpy as np

from paxo.evaluation.estimates import Estimate, bootstrap_mean


def duality_gap_estimate(preferences: np.ndarray, own: np.ndarray | None = None) -> Estimate:
    r"""A lower bound on $2 (\max_{\pi'} P(\pi' \succ \pi) - 1/2)$, with a 95 % interval.

    For each prompt the challenger is the best of C completions against one half of the policy's
    samples, or the policy itself, which wins 1/2, where none wins more; what it wins is counted on
    the other half, so that luck in the choice does not count. The maximum runs over these
    completions only: a better answer that nobody drew is not seen. 0 means that none of them beats
    the policy; a little below 0 is noise.

    Args:
        preferences: `[B, C, E]` P(challenger beats the policy's sample), E at least 2; NaN is left
            out.
        own: `[C]` which sample of the policy a challenger is, -1 for another: a comparison with
            itself is not counted.

    Raises:
        ValueError: for fewer than two samples: there is nothing to count on.

    >>> table = np.array([[[1.0, 1.0], [0.5, 0.5]]])          # a challenger that always wins
    >>> duality_gap_estimate(table).value
    1.0
    """
    table = np.array(preferences, np.float64)
    if table.ndim != 3 or table.shape[2] < 2:
        raise ValueError(
            f"preferences must be [B, C, E] with at least 2 samples of the policy; got "
            f"{table.shape}: raise the number of completions of an evaluation"
        )
    if own is not None:
        for challenger, sample in enumerate(np.asarray(own)):
            if sample >= 0:
                table[:, challenger, sample] = np.nan
    half = table.shape[2] // 2
    gains = [
        _gain(table[:, :, :half], table[:, :, half:]),
        _gain(table[:, :, half:], table[:, :, :half]),
    ]
    return bootstrap_mean(2 * (np.mean(gains, axis=0) - 0.5))


def _gain(chosen_on: np.ndarray, counted_on: np.ndarray) -> np.ndarray:
    """`[B]` what the best challenger of one half wins on the other; 1/2 where none wins more."""
    score, value = _mean(chosen_on), _mean(counted_on)
    usable = (score > 0.5) & ~np.isnan(value)
    best = np.argmax(np.where(usable, score, -1.0), axis=1)
    found = np.take_along_axis(value, best[:, None], 1)[:, 0]
    return np.where(usable.any(1), found, 0.5)


def _mean(table: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    there = ~np.isnan(table)
    total, count = np.where(there, table, 0).sum(-1), there.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
