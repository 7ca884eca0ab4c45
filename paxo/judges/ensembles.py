"""Several judges at once: conservative where they disagree."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from paxo.judges.checks import batch_sizes, checked_preferences, checked_scores, checked_wanted
from paxo.judges.rewards import Score, bradley_terry
from paxo.losses.ensembles import ensemble_rewards
from paxo.types import Judge

How = Literal["mean", "wco", "uwo"]


@dataclasses.dataclass(frozen=True)
class RewardEnsemble:
    """A Bradley–Terry judge over the rewards of several models, combined before they are compared.

    Attributes:
        members: each scores a batch, `(prompts, completions) -> [B, K]`.
        how: "mean", "wco" (worst case: the least reward) or "uwo" (mean minus `lam` times the
            variance over members).
        lam: weight of the variance in "uwo".
        ddof: the variance divides by M - ddof, see `paxo.losses.ensemble_rewards`.
        temperature: in units of the reward.
        name: what errors call it.

    >>> members = [lambda p, c: [[1.0, 2.0]], lambda p, c: [[1.0, 0.0]]]
    >>> RewardEnsemble(members, "wco").scores(["p"], [["a", "b"]]).tolist()
    [[1.0, 0.0]]

    Coste et al. 2023, arXiv:2310.02743.
    """

    members: Sequence[Score]
    how: How = "uwo"
    lam: float = 0.5
    ddof: Literal[0, 1] = 0
    temperature: float = 1.0
    name: str = "reward ensemble"

    def __post_init__(self):
        _check_members(self.members, self.how)
        if not self.lam >= 0:
            raise ValueError(f"lam must not be negative; got {self.lam}")
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1; got {self.ddof}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")

    def scores(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
        """`[B, K]` combined rewards; a faulty member is named by its number."""
        sizes = batch_sizes(prompts, completions, self.name)
        found = [
            checked_scores(
                member(prompts, completions), sizes, name=f"{self.name}, member {number}"
            )
            for number, member in enumerate(self.members)
        ]
        return np.asarray(ensemble_rewards(np.stack(found), self.how, lam=self.lam, ddof=self.ddof))

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j under the combined reward."""
        del wanted
        return bradley_terry(self.scores(prompts, completions), temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class JudgeEnsemble:
    """The preferences of several judges, whatever they are, combined pair by pair.

    Attributes:
        members: judges.
        how: "mean" of their probabilities; "wco" the one nearest to 1/2, and 1/2 itself where they
            do not agree on the winner; "uwo" the mean drawn towards 1/2 by `lam` times the variance
            over members, and no further than 1/2.
        lam: weight of the variance in "uwo".
        name: what errors call it.

    The last two carry the worst case and the uncertainty weighting of reward ensembles over to
    probabilities, symmetrically in the two completions: both are the least sure answer, as seen
    from the winner.

    >>> def says(p):
    ...     return lambda prompts, completions, wanted=None: np.array([[[0.5, p], [1 - p, 0.5]]])
    >>> [float(JudgeEnsemble([says(0.75), says(1.0)], how)(["p"], [["a", "b"]])[0, 0, 1])
    ...  for how in ("mean", "wco")]
    [0.875, 0.75]

    After Coste et al. 2023, arXiv:2310.02743.
    """

    members: Sequence[Judge]
    how: How = "mean"
    lam: float = 0.5
    name: str = "judge ensemble"

    def __post_init__(self):
        _check_members(self.members, self.how)
        if not self.lam >= 0:
            raise ValueError(f"lam must not be negative; got {self.lam}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; NaN where a member gave no answer."""
        sizes = batch_sizes(prompts, completions, self.name)
        wanted = checked_wanted(wanted, sizes[1], self.name)
        found = np.stack(
            [
                checked_preferences(
                    member(prompts, completions, wanted),
                    sizes,
                    wanted,
                    name=f"{self.name}, member {number}",
                    missing="keep",
                )
                for number, member in enumerate(self.members)
            ]
        )
        p = _COMBINE[self.how](found.astype(np.float64), self.lam)
        # The upper half decides: a mean over members may round differently in the lower.
        upper = np.triu(np.ones(p.shape[1:], bool), k=1)
        p = np.where(upper.T, 1 - np.swapaxes(p, 1, 2), p)
        return np.where(np.eye(sizes[1], dtype=bool), 0.5, p)


def _mean(p: np.ndarray, lam: float) -> np.ndarray:
    del lam
    return p.mean(axis=0)


def _least_sure(p: np.ndarray, lam: float) -> np.ndarray:
    del lam
    least, most = p.min(axis=0), p.max(axis=0)
    agreed = np.where(least > 0.5, least, np.where(most < 0.5, most, 0.5))
    return np.where(np.isnan(least), np.nan, agreed)


def _less_the_variance(p: np.ndarray, lam: float) -> np.ndarray:
    lead = p.mean(axis=0) - 0.5
    return 0.5 + np.sign(lead) * np.maximum(np.abs(lead) - lam * p.var(axis=0), 0)


_COMBINE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "mean": _mean,
    "wco": _least_sure,
    "uwo": _less_the_variance,
}


def _check_members(members: Sequence[Any], how: str) -> None:
    if not members:
        raise ValueError("an ensemble needs at least one member")
    for number, member in enumerate(members):
        if not callable(member):
            raise TypeError(f"member {number} must be callable; got {type(member).__name__}")
    if how not in _COMBINE:
        raise ValueError(f"how must be one of {', '.join(_COMBINE)}; got {how!r}")
