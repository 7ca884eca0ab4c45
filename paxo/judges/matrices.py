"""Judges that follow a fixed matrix over classes of completions: preferences may run in circles."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.judges.checks import JudgeError, batch_sizes, checked_preferences


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixJudge:
    """Compares completions by their classes, such as styles, in a general preference matrix.

    Attributes:
        matrix: `[C, C]` probability that a completion of class c beats one of class d; P + Pᵀ = 1.
        classify: `(prompt, completion) -> class`, an int from 0 to C - 1.
        name: what errors call it.

    >>> judge = MatrixJudge(cyclic_matrix(), lambda prompt, completion: "RPS".index(completion))
    >>> judge(["p"], [["R", "S", "R"]])[0].tolist()
    [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]
    """

    matrix: Any
    classify: Callable[[Any, Any], int]
    name: str = "matrix"

    def __post_init__(self):
        matrix = np.asarray(self.matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"judge {self.name!r}: matrix must be [C, C]; got {matrix.shape}")
        whole = checked_preferences(matrix[None], (1, len(matrix)), name=self.name)[0]
        object.__setattr__(self, "matrix", whole)

    def classes(self, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
        """`[B, K]` class of each completion.

        Raises:
            JudgeError: for a class that the matrix has not.
        """
        found = np.empty(batch_sizes(prompts, completions, self.name), np.int64)
        for b, (prompt, row) in enumerate(zip(prompts, completions)):
            for k, completion in enumerate(row):
                value = self.classify(prompt, completion)
                if value != int(value) or not 0 <= value < len(self.matrix):
                    raise JudgeError(
                        f"judge {self.name!r}, prompt {b}, completion {k}: expected a class from 0 "
                        f"to {len(self.matrix) - 1}; got {value!r}"
                    )
                found[b, k] = value
        return found

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        """`[B, K, K]` probability that i beats j; all are looked up."""
        del wanted
        classes = self.classes(prompts, completions)
        return self.matrix[classes[:, :, None], classes[:, None, :]]


def cyclic_matrix(num_classes: int = 3, *, win: float = 1.0) -> np.ndarray:
    """`[C, C]` float64: each class loses to the next (C-1)/2 and beats the (C-1)/2 before it.

    No reward agrees with it, and its only Nash policy is uniform. Classes 0, 1, 2 are rock, paper
    and scissors.

    Args:
        num_classes: C, odd.
        win: probability that the winner of a pair of classes is preferred.

    >>> cyclic_matrix(win=0.75).tolist()
    [[0.5, 0.25, 0.75], [0.75, 0.5, 0.25], [0.25, 0.75, 0.5]]
    """
    if num_classes < 3 or num_classes % 2 == 0:
        raise ValueError(f"a circle needs an odd number of classes from 3 on; got {num_classes}")
    if not 0.5 < win <= 1:
        raise ValueError(f"win must lie in (0.5, 1]; got {win}")
    steps = (np.arange(num_classes)[:, None] - np.arange(num_classes)) % num_classes
    ahead = (steps > 0) & (steps <= num_classes // 2)
    return np.where(steps == 0, 0.5, np.where(ahead, win, 1 - win))
