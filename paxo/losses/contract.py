"""How a loss declares what it needs: its signature, the ranges of its numbers, and a few marks.

Positional parameters are arrays, named by who provides them; keyword-only ones are
hyper-parameters, with their range as annotation; `where` comes last. An objective reads all of it.
"""

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
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


# Parameters that the training step provides.
FROM_STEP = ("key", "state")

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


def draws_with(**hyper_parameters: Any) -> Callable[[Callable], Callable]:
    """Marks a loss that draws with its `key` only where its hyper-parameters have these values.

    Elsewhere it does not couple groups, and the step need not show it the whole batch.
    """

    def mark(loss: Callable) -> Callable:
        loss.draws_with = hyper_parameters
        return loss

    return mark


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


def bound(name: str, loss: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyper-parameter of the loss with its value, given or default; the given are checked."""
    defaults = {
        p.name: p.default
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("where", *FROM_STEP)
    }
    hints = typing.get_type_hints(loss, include_extras=True)
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(
                f"objective {name!r} has no hyper-parameter {key!r}{nearest(key, defaults)} "
                f"It has: {', '.join(defaults) or 'none'}"
            )
        check_value(f"objective {name!r}: {key}", value, hints[key])
    values = defaults | dict(given)
    missing = [key for key, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"objective {name!r} needs {', '.join(missing)}: it has no default")
    if hasattr(loss, "check_hyper_parameters"):
        _check_together(name, loss.check_hyper_parameters, values)
    return values


def _check_together(name: str, check: Callable[..., Any], values: Mapping[str, Any]) -> None:
    wanted = inspect.signature(check).parameters
    try:
        check(**{key: value for key, value in values.items() if key in wanted})
    except ValueError as error:
        raise ValueError(f"objective {name!r}: {error}") from error


def check_value(what: str, value: Any, hint: Any) -> None:
    """Type and range of one hyper-parameter, from its annotation."""
    metadata = getattr(hint, "__metadata__", ())
    base = typing.get_args(hint)[0] if metadata else hint
    if typing.get_origin(base) is typing.Literal:
        choices = typing.get_args(base)
        if value not in choices:
            raise ValueError(
                f"{what} must be one of {', '.join(map(repr, choices))}; got {value!r}"
            )
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number if base is float else isinstance(value, base)):
        expected = getattr(base, "__name__", base)
        raise TypeError(f"{what} must be a {expected}; got {value!r} ({type(value).__name__})")
    for limits in metadata:
        if isinstance(limits, Range) and not limits.holds(value):
            raise ValueError(f"{what} must lie in {limits}; got {value}")


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest of the known names, or `.`."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
