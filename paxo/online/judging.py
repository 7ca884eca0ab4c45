"""Candidates before a judge: each comparison is asked for once, and only where it is read."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paxo.online.groups import Prompt
from paxo.types import Judge

Reward = Callable[[Sequence[Any], Sequence[Sequence[Any]]], Any]
"""`(prompts, completions) -> [B, N]`, or `[B, N, n]` where a name stands for several rewards."""


class Bench:
    """N candidates of each of B prompts, the last M of them opponents.

    Args:
        prompts: B.
        tokens: B lists of N token arrays.
        finished: `[B, N]` bool.
        sources: N, where each candidate was drawn from.
        num_opponents: M, those at the end that are only played against.
        judge: compares; its answers are taken as they are, so hand one whose answers are checked.
        rewards: name -> function.
        decode: token ids -> what judges are shown.
        allow_unfinished: whether a completion that the length limit cut may be trained on.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Sequence[np.ndarray]],
        finished: np.ndarray,
        sources: Sequence[str],
        *,
        num_opponents: int = 0,
        judge: Judge | None = None,
        rewards: Mapping[str, Reward] | None = None,
        decode: Callable[[Sequence[int]], Any] = tuple,
        allow_unfinished: bool = True,
    ):
        self.prompts, self.tokens, self.finished = list(prompts), tokens, np.asarray(finished)
        self.sources, self.num_opponents = tuple(sources), num_opponents
        self.counts: collections.Counter[str] = collections.Counter()
        self._judge, self._rewards = judge, dict(rewards or {})
        self._shown_prompts = [
            decode(p.ids.tolist()) if p.shown is None else p.shown for p in prompts
        ]
        self._shown = [[decode(t.tolist()) for t in row] for row in tokens]
        size = self.finished.shape[1]
        self._asked = np.eye(size, dtype=bool)
        self._known = np.full((len(self.prompts), size, size), np.nan)
        self._known[:, range(size), range(size)] = 0.5
        self._scores: dict[str, np.ndarray] = {}
        self.eligible = np.ones_like(self.finished) if allow_unfinished else self.finished.copy()
        self.eligible &= np.array([[len(t) > 0 for t in row] for row in tokens], bool)

    @property
    def num_prompts(self) -> int:
        """B."""
        return len(self.prompts)

    @property
    def num_candidates(self) -> int:
        """K = N - M, those that may be trained on."""
        return self.finished.shape[1] - self.num_opponents

    @property
    def shown(self) -> tuple[list[Any], list[list[Any]]]:
        """What judges see: prompts, and completions of each."""
        return self._shown_prompts, self._shown

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Names of the reward functions."""
        return tuple(self._rewards)

    def among_candidates(self) -> np.ndarray:
        """`[B, K, K]` P(i beats j) of the candidates; NaN where the judge gave up."""
        own = range(self.num_candidates)
        return self.preferences(own, own)[:, : self.num_candidates, : self.num_candidates]

    def against_opponents(self) -> np.ndarray:
        """`[B, K, M]` P(i beats an opponent)."""
        own, others = range(self.num_candidates), range(self.num_candidates, self._asked.shape[0])
        return self.preferences(own, others)[:, : self.num_candidates, self.num_candidates :]

    def preferences(self, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        """`[B, N, N]` with at least these comparisons; asked once, in whichever order."""
        wanted = np.zeros_like(self._asked)
        wanted[np.ix_(list(rows), list(columns))] = True
        new = wanted & ~self._asked
        if new.any():
            answer = np.asarray(self._judge(*self.shown, wanted=new), np.float64)
            pairs = new | new.T
            self._known = np.where(pairs, answer, self._known)
            self._asked |= pairs
            self.counts["comparisons"] += self.num_prompts * int(np.triu(pairs, 1).sum())
        return self._known

    def beats(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """`[B, M]` P(candidate `first[b, m]` beats `second[b, m]`): other pairs for each prompt."""
        prompts, shown = self.shown
        count = first.shape[1]
        flat = [
            [shown[b][first[b, m]], shown[b][second[b, m]]]
            for b in range(self.num_prompts)
            for m in range(count)
        ]
        asked = [prompt for prompt in prompts for _ in range(count)]
        wanted = np.array([[False, True], [False, False]])
        answer = np.asarray(self._judge(asked, flat, wanted=wanted), np.float64)
        self.counts["comparisons"] += len(flat)
        return answer[:, 0, 1].reshape(first.shape)

    def rewards(self, name: str) -> np.ndarray:
        """`[B, N]` (or `[B, N, n]`) of that reward function, computed once.

        Raises:
            ValueError: for a wrong shape or a NaN; it names the function and the place.
        """
        if name not in self._scores:
            found = np.asarray(self._rewards[name](*self.shown))
            if found.shape[:2] != self.finished.shape or found.ndim > 3:
                raise ValueError(
                    f"reward {name!r}: expected shape {self.finished.shape}, [B, N]; got "
                    f"{found.shape}"
                )
            found = found.astype(np.float64)
            if np.isnan(found).any():
                b, k = np.argwhere(np.isnan(found))[0][:2]
                raise ValueError(
                    f"reward {name!r}, prompt {self.prompts[b].index}, candidate {k}: got nan "
                    f"({int(np.isnan(found).sum())} of {found.size} values are): every candidate "
                    "needs a reward"
                )
            self._scores[name] = found
        return self._scores[name]

    def same(self, b: int, i: int, j: int) -> bool:
        """Whether two candidates of a prompt have the same tokens."""
        return np.array_equal(self.tokens[b][i], self.tokens[b][j])
