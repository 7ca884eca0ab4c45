"""What every judge's answer must be, and the one place where that is checked.

An answer is `[B, K, K]`: the probability that completion i of a prompt beats completion j, with
P + Pᵀ = 1 to the last bit and 1/2 on the diagonal. `wanted [K, K]` names the comparisons that will
be read; `wanted[i, j]` asks for the pair, in whichever order. A comparison that was not asked for,
or that a judge gave up on, is NaN in both places: an unasked question is no tie, and whoever reads
it by mistake sees so at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from paxo.types import Judge

# What float32 leaves of sigmoid(x) + sigmoid(-x) = 1, with room; the rest is made exact here.
ROUNDING = 1e-5


class JudgeError(ValueError):
    """A judge's answer cannot be used; the text names the judge, the prompt and the pair."""


@dataclasses.dataclass(frozen=True)
class CheckedJudge:
    """A judge whose every answer is checked and made exactly antisymmetric.

    Attributes:
        judge: any judge, such as one that a user wrote.
        name: what errors call it.
        missing: "raise" where a wanted comparison is NaN, or "keep" the NaN for the caller, who
            leaves those prompts out.

    >>> judge = CheckedJudge(lambda prompts, completions, wanted=None: np.full((1, 2, 2), 0.5))
    >>> judge(["p"], [["a", "b"]]).tolist()
    [[[0.5, 0.5], [0.5, 0.5]]]
    """

    judge: Judge
    name: str = "judge"
    missing: Literal["raise", "keep"] = "raise"

    def __post_init__(self):
        if self.missing not in ("raise", "keep"):
            raise ValueError(f"missing must be 'raise' or 'keep'; got {self.missing!r}")
        if not callable(self.judge):
            raise TypeError(f"judge must be callable; got {type(self.judge).__name__}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j.

        Raises:
            JudgeError: for an answer that breaks the contract, or a judge that fails.
        """
        num_prompts, num_candidates = batch_sizes(prompts, completions, self.name)
        wanted = checked_wanted(wanted, num_candidates, self.name)
        try:
            answer = self.judge(prompts, completions, wanted)
        except JudgeError:
            raise
        except Exception as error:
            raise JudgeError(
                f"judge {self.name!r} failed on {num_prompts} prompts with {num_candidates} "
                f"completions each: {type(error).__name__}: {error}"
            ) from error
        return checked_preferences(
            answer, (num_prompts, num_candidates), wanted, name=self.name, missing=self.missing
        )


def checked_preferences(
    preferences: Any,
    sizes: tuple[int, int],
    wanted: np.ndarray | None = None,
    *,
    name: str = "judge",
    missing: Literal["raise", "keep"] = "raise",
) -> np.ndarray:
    """The answer of a judge with P + Pᵀ = 1 exactly, or an error that names what is wrong with it.

    Of a pair with one wanted order, that half decides and the other is not looked at. Of a pair
    with both, the smaller probability decides where they differ by rounding: it has more digits.
    A pair that was not wanted stays if it is right, and is NaN otherwise.

    Args:
        preferences: what the judge returned.
        sizes: B and K.
        wanted: `[K, K]` bool, the comparisons that were asked for; None for all.
        name: what errors call the judge.
        missing: "raise" or "keep" a NaN where an answer was wanted.

    Returns:
        `[B, K, K]` float64, or float32 where the judge computed in that or less.

    Raises:
        JudgeError: for a wrong shape, a NaN where an answer was wanted, a value outside [0, 1],
            halves that do not add up to 1, or a diagonal that is not 1/2.

    >>> found = np.array([[[0.5, 0.25], [np.nan, 0.5]]])
    >>> checked_preferences(found, (1, 2), np.array([[False, True], [False, False]])).tolist()
    [[[0.5, 0.25], [0.75, 0.5]]]
    """
    num_prompts, num = sizes
    p = _array(preferences, name)
    if p.shape != (num_prompts, num, num):
        raise JudgeError(
            f"judge {name!r}: expected shape {(num_prompts, num, num)}, [B, K, K] for "
            f"{num_prompts} prompts with {num} completions each; got {p.shape}"
        )
    if not np.issubdtype(p.dtype, np.number) and p.dtype != bool and p.dtype.name != "bfloat16":
        raise JudgeError(f"judge {name!r}: expected probabilities; got dtype {p.dtype}")
    small = p.dtype.name in ("bfloat16", "float16", "float32")
    p = p.astype(np.float32 if small else np.float64)
    asked = np.ones((num, num), bool) if wanted is None else checked_wanted(wanted, num, name)

    both = asked == asked.T  # of a pair with one wanted order, the other half is not looked at
    _refuse(asked & ((p < 0) | (p > 1)), p, name, "a probability in [0, 1]")
    p = np.where(np.isinf(p), np.nan, p)  # only where nothing was asked
    diagonal, other = np.eye(num, dtype=bool), np.swapaxes(p, 1, 2)
    _refuse(asked & diagonal & (np.abs(p - 0.5) > ROUNDING), p, name, "1/2 on the diagonal")
    inconsistent = both & (np.abs(p + other - 1) > ROUNDING)
    _refuse(asked & inconsistent, p, name, "P(i beats j) + P(j beats i) = 1")
    if missing == "raise":
        unanswered = asked & ~diagonal & np.isnan(p) & ~(both & ~np.isnan(other))
        _refuse(unanswered, p, name, "an answer, as the comparison was wanted")

    exact = (p + other == 1) & (p >= 0) & (p <= 1)
    p = np.where(~(asked | asked.T) & ~exact, np.nan, p)
    other = np.swapaxes(p, 1, 2)
    from_other = ~exact & np.where(both, np.isnan(p) | (other < p), asked.T)
    p = np.where(from_other, 1 - other, p)
    return np.where(diagonal, p.dtype.type(0.5), p)


def checked_wanted(wanted: Any, num_candidates: int, name: str = "judge") -> np.ndarray | None:
    """`wanted` as `[K, K]` bool, or None; raises JudgeError for another shape."""
    if wanted is None:
        return None
    found = np.asarray(wanted)
    if found.shape != (num_candidates, num_candidates):
        raise JudgeError(
            f"judge {name!r}: wanted must have shape {(num_candidates, num_candidates)}, [K, K] "
            f"for {num_candidates} completions of a prompt; got {found.shape}"
        )
    return found.astype(bool)


def wanted_pairs(wanted: np.ndarray | None, num_candidates: int) -> list[tuple[int, int]]:
    """The pairs i < j of which either order is wanted: each question is asked once.

    >>> wanted_pairs(np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]], bool), 3)
    [(0, 1), (0, 2)]
    """
    asked = np.ones((num_candidates,) * 2, bool) if wanted is None else np.asarray(wanted, bool)
    first, second = np.nonzero(np.triu(asked | asked.T, k=1))
    return list(zip(first.tolist(), second.tolist()))


def preferences_of_pairs(
    answers: Any, pairs: Sequence[tuple[int, int]], num_candidates: int
) -> np.ndarray:
    """`[B, N] -> [B, K, K]` from the N answered pairs; NaN where nothing was asked.

    >>> preferences_of_pairs([[0.75]], [(0, 1)], 2).tolist()
    [[[0.5, 0.75], [0.25, 0.5]]]
    """
    answers = np.asarray(answers)
    if not np.issubdtype(answers.dtype, np.floating):
        answers = answers.astype(np.float64)
    p = np.full((len(answers), num_candidates, num_candidates), np.nan, answers.dtype)
    p[:, range(num_candidates), range(num_candidates)] = 0.5
    if pairs:
        first, second = np.array(pairs).T
        p[:, first, second] = answers
        p[:, second, first] = 1 - answers
    return p


def batch_sizes(
    prompts: Sequence[Any], completions: Sequence[Sequence[Any]], name: str = "judge"
) -> tuple[int, int]:
    """B and K; raises JudgeError unless every prompt has the same number of completions."""
    if len(prompts) != len(completions):
        raise JudgeError(
            f"judge {name!r}: {len(prompts)} prompts, but completions of {len(completions)}"
        )
    if len(prompts) == 0:
        raise JudgeError(f"judge {name!r}: there is no prompt to judge completions of")
    num = len(completions[0])
    if num == 0:
        raise JudgeError(f"judge {name!r}, prompt 0: there is no completion to judge")
    for b, row in enumerate(completions):
        if len(row) != num:
            raise JudgeError(
                f"judge {name!r}, prompt {b}: expected {num} completions, as prompt 0 has; got "
                f"{len(row)}"
            )
    return len(prompts), num


def checked_scores(
    scores: Any, sizes: tuple[int, int], *, name: str = "judge", width: bool = False
) -> np.ndarray:
    """`[B, K]` scores, or `[B, K, D]` with `width`, without a NaN; raises JudgeError naming it."""
    found = _array(scores, name)
    if found.dtype.name in ("bfloat16", "float16"):
        found = found.astype(np.float32)
    if not np.issubdtype(found.dtype, np.floating):
        found = found.astype(np.float64)
    if found.ndim != 2 + width or found.shape[:2] != sizes:
        expected = f"({sizes[0]}, {sizes[1]}{', D' if width else ''})"
        raise JudgeError(f"judge {name!r}: expected scores of shape {expected}; got {found.shape}")
    if np.isnan(found).any():
        b, k = np.argwhere(np.isnan(found))[0][:2]
        raise JudgeError(f"judge {name!r}, prompt {b}, completion {k}: expected a score; got nan")
    return found


def _array(found: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(found)
    except ValueError as error:
        raise JudgeError(
            f"judge {name!r}: expected an array; got lists of unequal lengths ({error})"
        ) from error


def _refuse(bad: np.ndarray, p: np.ndarray, name: str, expected: str) -> None:
    """Raises for the first pair that is bad, and counts the others."""
    if not bad.any():
        return
    b, i, j = np.argwhere(bad)[0]
    got = f"{p[b, i, i]}" if i == j else f"P[i, j] = {p[b, i, j]}, P[j, i] = {p[b, j, i]}"
    raise JudgeError(
        f"judge {name!r}, prompt {b}, pair ({i}, {j}): expected {expected}; got {got} "
        f"({np.count_nonzero(bad)} of {bad.size} entries are so)"
    )
