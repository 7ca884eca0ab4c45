"""Candidates before a judge: each comparison is asked for once, and only where it is read."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paxo.online.groups import Prompt
from paxo.types import Judge

Reward = Callable[[Sequence[Any], Sequence[Sequence[Any]]], Any]
"""`(prompts, completions) -> [B, N]`, or `[B, N, n]` where a name stands for several rewards."""

# Both orders of a pair are wanted, though one is read: that they fit is then checked.
FIRST_AGAINST_SECOND = ~np.eye(2, dtype=bool)


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
        self._asked = np.tile(np.eye(size, dtype=bool), (len(self.prompts), 1, 1))
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

    @property
    def computed_rewards(self) -> tuple[str, ...]:
        """Names of those that have been asked for."""
        return tuple(self._scores)

    def among_candidates(self) -> np.ndarray:
        """`[B, K, K]` P(i beats j) of the candidates; NaN where the judge gave up."""
        own = range(self.num_candidates)
        return self.preferences(own, own)[:, : self.num_candidates, : self.num_candidates]

    def against_opponents(self) -> np.ndarray:
        """`[B, K, M]` P(i beats an opponent)."""
        own, others = range(self.num_candidates), range(self.num_candidates, self._asked.shape[1])
        return self.preferences(own, others)[:, : self.num_candidates, self.num_candidates :]

    def preferences(self, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        """`[B, N, N]` with at least these comparisons; asked once, in whichever order."""
        wanted = np.zeros_like(self._asked[0])
        wanted[np.ix_(list(rows), list(columns))] = True
        pairs = (wanted | wanted.T) & ~self._asked.all(0)
        if pairs.any():
            answer = np.asarray(self._judge(*self.shown, wanted=pairs), np.float64)
            self._known = np.where(pairs, answer, self._known)
            self.counts["comparisons"] += int((np.triu(pairs, 1) & ~self._asked).sum())
            self._asked |= pairs
        return self._known

    def beats(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """`[B, m]` P(candidate `first[b, m]` beats `second[b, m]`): other pairs for each prompt.

        NaN, and not asked, where one of them may not be trained on.
        """
        rows = np.arange(self.num_prompts)[:, None]
        able = self.eligible[rows, first] & self.eligible[rows, second]
        new = able & ~self._asked[rows, first, second]
        if new.any():
            (prompts, shown), (b, _) = self.shown, np.nonzero(new)
            i, j = first[new], second[new]
            asked = [[shown[x][y], shown[x][z]] for x, y, z in zip(b, i, j)]
            answer = self._judge([prompts[x] for x in b], asked, wanted=FIRST_AGAINST_SECOND)
            p = np.asarray(answer, np.float64)[:, 0, 1]
            self._known[b, i, j], self._known[b, j, i] = p, 1 - p
            self._asked[b, i, j] = self._asked[b, j, i] = True
            self.counts["comparisons"] += len(b)
        return np.where(able, self._known[rows, first, second], np.nan)

    def rewards(self, name: str) -> np.ndarray:
        """`[B, N]` (or `[B, N, n]`) of that reward function, computed once.

        Raises:
            ValueError: for a wrong shape, or a NaN of a function that does not say, by an attribute
                `may_fail`, that it may give up; it names the function and the place.
        """
        if name not in self._scores:
            function = self._rewards[name]
            found = np.asarray(function(*self.shown))
            if found.shape[:2] != self.finished.shape or found.ndim > 3:
                raise ValueError(
                    f"reward {name!r}: expected shape {self.finished.shape}, [B, N] for "
                    f"{self.num_prompts} prompts with {self.finished.shape[1]} completions each; "
                    f"got {found.shape}"
                )
            found = found.astype(np.float64)
            missing = int(np.isnan(found).sum())
            if missing and not getattr(function, "may_fail", False):
                b, k = np.argwhere(np.isnan(found))[0][:2]
                raise ValueError(
                    f"reward {name!r}, prompt {self.prompts[b].index}, candidate {k}: got nan "
                    f"({missing} of {found.size} values are): every candidate needs a reward"
                )
            if missing:
                self.counts[f"candidates without {name!r}"] += missing
            self._scores[name] = found
        return self._scores[name]

    def same(self, b: int, i: int, j: int) -> bool:
        """Whether two candidates of a prompt have the same tokens."""
        return np.array_equal(self.tokens[b][i], self.tokens[b][j])
