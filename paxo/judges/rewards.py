"""Judges from rewards: Bradley–Terry, over any function that scores completions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.judges.checks import batch_sizes, checked_scores

Score = Callable[[Sequence[Any], Sequence[Sequence[Any]]], Any]
"""`(prompts, completions) -> [B, K]`, all completions of a batch at once."""


@dataclasses.dataclass(frozen=True)
class RewardJudge:
    """Prefers by the difference of rewards: P(i beats j) = σ((r_i - r_j) / temperature).

    Attributes:
        score: rewards of a batch: a reward model (`paxo.reward_scoring`), an ensemble, a function.
        temperature: in units of the reward; 1 is the Bradley–Terry model of a reward model's loss.
        name: what errors call it.

    >>> judge = RewardJudge(lambda prompts, completions: [[0.0, np.log(3)]])
    >>> judge(["p"], [["a", "b"]])[0].round(6).tolist()
    [[0.5, 0.25], [0.75, 0.5]]
    """

    score: Score
    temperature: float = 1.0
    name: str = "rewards"

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")

    def scores(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
        """`[B, K]` rewards; float64, or float32 where the function computed in that or less.

        Raises:
            JudgeError: for a wrong shape or a NaN, naming prompt and completion.
        """
        sizes = batch_sizes(prompts, completions, self.name)
        return checked_scores(self.score(prompts, completions), sizes, name=self.name)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; K rewards answer all comparisons."""
        del wanted
        return bradley_terry(self.scores(prompts, completions), temperature=self.temperature)


def bradley_terry(scores: Any, *, temperature: float = 1.0) -> np.ndarray:
    """`[..., K] -> [..., K, K]` σ((r_i - r_j) / temperature); 1/2 where they are equal.

    The smaller probability of a pair is computed and the larger is 1 minus it, so that both add up
    to 1 exactly and neither loses its digits in the tail.

    Args:
        scores: rewards, infinite ones too.
        temperature: in units of the reward.

    >>> bool(bradley_terry(np.array([0.0, 50.0]))[0, 1] == np.exp(-50))
    True
    """
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    ours, theirs = scores[..., :, None], scores[..., None, :]
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        distance = np.where(ours == theirs, 0, np.abs(ours - theirs)) / scores.dtype.type(
            temperature
        )
        small = np.exp(-distance)
        small = small / (1 + small)
    return np.where(ours > theirs, 1 - small, small)
