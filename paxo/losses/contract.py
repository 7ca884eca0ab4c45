"""How a loss declares what it needs: its signature, the ranges of its numbers, and a few marks.

Positional parameters are arrays, named by who provides them; keyword-only ones are
hyper-parameters, with their range as annotation; `where` comes last. An objective reads all of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of allowed values.

    >>> Range(0, 0.5, low_open=False).holds(0.0)
    True
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = True
    high_open: bool = True

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside; NaN does not."""
        above = value > self.low or (value == self.low and not self.low_open)
        below = value < self.high or (value == self.high and not self.high_open)
        return above and below

    def __str__(self):
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


Real = Annotated[float, Range()]
Positive = Annotated[float, Range(0)]
NonNegative = Annotated[float, Range(0, low_open=False)]
Probability = Annotated[float, Range(0, 1, low_open=False, high_open=False)]
Count = Annotated[int, Range(0, low_open=False)]
FlipRate = Annotated[float, Range(0, 0.5, low_open=False)]


def checked(check: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Marks a loss whose hyper-parameters are checked together: `check` raises ValueError.

    It is called with those that it names, when the objective is built.
    """

    def mark(loss: Callable) -> Callable:
        loss.check_hyper_parameters = check
        return loss

    return mark


def whole_batch(loss: Callable) -> Callable:
    """Marks a loss that couples groups: its leading axes must be the whole global batch."""
    loss.whole_batch = True
    return loss


def unpaired(loss: Callable) -> Callable:
    """Marks a loss on single completions, which reads the sign of `labels`.

    Above 0 is desirable, below 0 undesirable, and 0 is not judged. Data of pairs are then given to
    it as +1 and -1 instead of grades.
    """
    loss.unpaired = True
    return loss


def wants_mismatched(loss: Callable) -> Callable:
    """Marks an unpaired loss that wants one further candidate, with label 0, in each group.

    It is a completion of another prompt; the packer draws it anew every epoch.
    """
    loss.mismatched = True
    return unpaired(loss)


def stateful(init: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Marks a whole-batch loss with memory.

    The loss takes `state` (keyword) and returns `(loss, new_state)`; `init(**hyper_parameters)`
    builds the first state, a pytree of arrays. Hyper-parameters that `init` does not name are not
    passed to it.
    """

    def mark(loss: Callable) -> Callable:
        loss.init_state = init
        return whole_batch(loss)

    return mark
