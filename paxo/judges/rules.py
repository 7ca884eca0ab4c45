"""Judges that are programs: the answer is known exactly."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.judges.checks import batch_sizes, checked_scores


@dataclasses.dataclass(frozen=True)
class RuleJudge:
    """Prefers the completion with the higher score, whatever the order of presentation.

    Attributes:
        score: `(prompt, completion) -> float`, higher is better.

    >>> judge = RuleJudge(lambda prompt, completion: len(completion))
    >>> judge(["p"], [["long", "s", "o"]])[0].tolist()
    [[0.5, 1.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]
    """

    score: Callable[[Any, Any], float]

    def scores(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
        """`[B, K]` float64 scores of K completions of each of B prompts.

        Raises:
            JudgeError: for another number of completions, or a score that is NaN; it names them.
        """
        sizes = batch_sizes(prompts, completions, "rules")
        found = [[self.score(p, c) for c in row] for p, row in zip(prompts, completions)]
        return checked_scores(found, sizes, name="rules")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; all are computed, as scoring is cheap."""
        del wanted
        return preferences_from_scores(self.scores(prompts, completions))


def preferences_from_scores(scores: np.ndarray) -> np.ndarray:
    """`[..., K] -> [..., K, K]` 1 where i scores above j, 0 where below, 1/2 where they tie.

    >>> preferences_from_scores(np.array([3.0, 1.0])).tolist()
    [[0.5, 1.0], [0.0, 0.5]]
    """
    ours, theirs = scores[..., :, None], scores[..., None, :]
    return np.where(ours == theirs, 0.5, (ours > theirs).astype(np.float64))
