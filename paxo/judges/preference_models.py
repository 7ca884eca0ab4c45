"""Judges that are trained models of preference: general ones, and ones that read both texts.

The models come as functions, built in `paxo.reward_scoring`. A reward model is a `RewardJudge`.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.judges.checks import (
    JudgeError,
    batch_sizes,
    checked_scores,
    checked_wanted,
    preferences_of_pairs,
    wanted_pairs,
)
from paxo.judges.rewards import Score, bradley_terry
from paxo.losses.reward import general_preference_scores, order_corrected


@dataclasses.dataclass(frozen=True)
class EmbeddingJudge:
    """A general preference model: P(i beats j) = σ(⟨R v_i, v_j⟩ / temperature), R a rotation.

    K embeddings answer all K² comparisons, which may run in circles.

    Attributes:
        embed: `(prompts, completions) -> [B, K, 2n]`.
        temperature: as in the training loss `general_preference`, whose default is 0.1.
        name: what errors call it.

    >>> judge = EmbeddingJudge(lambda prompts, completions: [[[1.0, 0.0], [0.0, 1.0]]], 1.0)
    >>> judge(["p"], [["a", "b"]])[0].round(6).tolist()
    [[0.5, 0.731059], [0.268941, 0.5]]

    Zhang et al. 2024, arXiv:2410.02197.
    """

    embed: Score
    temperature: float = 0.1
    name: str = "general preference model"

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; all are computed.

        Raises:
            JudgeError: for embeddings of a wrong shape, of odd width or with a NaN.
        """
        del wanted
        sizes = batch_sizes(prompts, completions, self.name)
        found = checked_scores(self.embed(prompts, completions), sizes, name=self.name, width=True)
        if found.shape[-1] % 2 or not found.shape[-1]:
            raise JudgeError(
                f"judge {self.name!r}: expected embeddings of even width; got {found.shape[-1]}"
            )
        scores = np.asarray(general_preference_scores(found), found.dtype)
        # The score of a pair is the lead of one reward over another, 0; the upper half decides.
        first, second = np.triu_indices(sizes[1], k=1)
        leads = scores[:, first, second]
        both = bradley_terry(
            np.stack([leads, np.zeros_like(leads)], -1), temperature=self.temperature
        )
        p = np.full(scores.shape, 0.5, found.dtype)
        p[:, first, second], p[:, second, first] = both[..., 0, 1], both[..., 1, 0]
        return p


@dataclasses.dataclass(frozen=True)
class PairModelJudge:
    """A model that reads both completions at once; asked in both orders, whose mean counts.

    Attributes:
        verdicts: `(prompts, firsts, seconds) -> [N, 2]` logits of "the first is better" and "the
            second is better".
        name: what errors call it.
        counts: so far: "compared" and, summed over those, "inconsistency" |P_ab + P_ba - 1|, 0 for
            a model that does not mind the order.

    >>> def by_length(prompts, firsts, seconds):
    ...     return [[len(first), len(second)] for first, second in zip(firsts, seconds)]
    >>> PairModelJudge(by_length)(["p"], [["aa", "b"]])[0].round(6).tolist()
    [[0.5, 0.731059], [0.268941, 0.5]]
    """

    verdicts: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]
    name: str = "pairwise preference model"
    counts: collections.Counter = dataclasses.field(
        default_factory=collections.Counter, compare=False
    )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; NaN where it was not asked.

        Raises:
            JudgeError: for verdicts of a wrong shape, or a NaN.
        """
        num_prompts, num = batch_sizes(prompts, completions, self.name)
        pairs = wanted_pairs(checked_wanted(wanted, num, self.name), num)
        asked = [
            (prompt, texts[first], texts[second])
            for order in (1, -1)
            for prompt, texts in zip(prompts, completions)
            for first, second in (pair[::order] for pair in pairs)
        ]
        if not asked:
            return preferences_of_pairs(np.zeros((num_prompts, 0)), pairs, num)
        logits = checked_scores(
            np.asarray(self.verdicts(*map(list, zip(*asked))))[None],
            (1, len(asked)),
            name=self.name,
            width=True,
        )[0]
        if logits.shape[-1] != 2:
            raise JudgeError(
                f"judge {self.name!r}: expected two verdicts for each of {len(asked)} questions; "
                f"got shape {logits.shape}"
            )
        first_better = bradley_terry(logits)[:, 0, 1].reshape(2, num_prompts, len(pairs))
        self.counts["compared"] += first_better[0].size
        self.counts["inconsistency"] += float(np.abs(first_better.sum(0) - 1).sum())
        return preferences_of_pairs(order_corrected(*first_better), pairs, num)
