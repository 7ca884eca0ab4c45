"""How often one policy's completions are preferred over another's."""

import numpy as np

from paxo.evaluation.estimates import Estimate, bootstrap_mean


def win_rate(preferences: np.ndarray) -> Estimate:
    """Mean probability that ours beats theirs, with a 95 % bootstrap interval over prompts.

    Args:
        preferences: `[B, ...]` P(ours beats theirs) for each prompt and, in further axes, pair of
            completions; a tie is 0.5. The pairs of a prompt are averaged first.

    >>> win_rate(np.array([[1.0, 0.5], [0.0, 0.5]])).value
    0.5
    """
    preferences = np.asarray(preferences, np.float64)
    return bootstrap_mean(preferences.reshape(len(preferences), -1).mean(1))
