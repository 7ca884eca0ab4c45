"""How a loss declares what it needs: its signature, the ranges of its numbers, and a few marks.

Positional parameters are arrays, named by who provides them; keyword-only ones are
hyper-parameters, with their range as annotation; `where` comes last. An objective reads all of it.
"""

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a loss takes for the implicit reward of a completion: a factor of its log-ratio.

    Attributes:
        scale: the hyper-parameter that is the factor, "1/name" for its inverse, "" for 1.
        per_token: whether the log-ratio is a mean over tokens, or (hyper-parameter, value) for
            which it is.
    """

    scale: str = "beta"
    per_token: bool | tuple[str, Any] = False

    def scale_of(self, hyper_parameters: Mapping[str, Any]) -> float:
        """The factor with these hyper-parameters."""
        inverse, name = self.scale.startswith("1/"), self.scale.removeprefix("1/")
        factor = float(hyper_parameters[name]) if name else 1.0
        return 1 / factor if inverse else factor

    def is_per_token(self, hyper_parameters: Mapping[str, Any]) -> bool:
        """Whether it is a mean over tokens with these hyper-parameters."""
        if isinstance(self.per_token, bool):
            return self.per_token
        name, value = self.per_token
        return hyper_parameters[name] == value


_NORMALIZED = ("length_normalize", True)

# Name of a loss -> its reward, where that is not beta times a sum of log-ratios (or, for a loss
# without beta, the sum itself).
REWARDS = {
    "alphapo": Reward("beta", per_token=True),
    "asft": Reward("", per_token=True),
    "brain": Reward("scale"),
    "cal_dpo": Reward(""),  # its beta is the target of the squares
    "cpl": Reward("alpha"),
    "cpl_kl": Reward("alpha"),
    "cpo": Reward("beta", per_token=("link", "ipo")),
    "cpo_simpo": Reward("beta", per_token=True),
    "dno": Reward("eta"),
    "dno_prct": Reward("eta"),
    "drpo_rank": Reward("", per_token=True),
    "flex_dpo": Reward("beta_w"),
    "grpo": Reward(""),  # its beta weighs a penalty
    "inpo": Reward("eta"),
    "ipo": Reward("tau", per_token=_NORMALIZED),
    "ipo_md": Reward("tau"),
    "ln_dpo": Reward("beta", per_token=True),
    "mdpo": Reward("1/t_k"),
    "mpo_magnetic": Reward("1/eta"),
    "mppo": Reward("", per_token=True),
    "nash_md": Reward("beta", per_token=_NORMALIZED),
    "nash_md_pg": Reward("tau"),
    "nll": Reward("", per_token=True),
    "online_ipo": Reward("tau"),
    "online_ipo_v1": Reward("beta", per_token=_NORMALIZED),
    "online_ipo_v2": Reward("beta", per_token=_NORMALIZED),
    "onpo": Reward("1/eta"),
    "orpo": Reward("", per_token=True),
    "pro": Reward("", per_token=True),
    "rationale_orpo": Reward("", per_token=True),
    "rebel": Reward("1/eta"),
    "rrhf": Reward("", per_token=True),
    "rso_hinge": Reward("gamma"),
    "semantic": Reward("beta", per_token=_NORMALIZED),
    "semantic_reference": Reward("beta", per_token=_NORMALIZED),
    "simpo": Reward("beta", per_token=True),
    "sppo": Reward("1/eta"),
    "triple_po": Reward("beta", per_token=("link", "ipo")),
    "triple_po_l": Reward("beta", per_token=True),
}


def reward_of(loss: Callable, hyper_parameters: Mapping[str, Any]) -> Reward:
    """The implicit reward of a loss, from `REWARDS` or by the rule for all others."""
    default = Reward("beta" if "beta" in hyper_parameters else "")
    return REWARDS.get(getattr(loss, "__name__", "").removesuffix("_loss"), default)
