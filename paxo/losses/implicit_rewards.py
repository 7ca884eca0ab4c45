"""What each loss takes for a completion's implicit reward: for metrics and held-out accuracy."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


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
        factor = hyper_parameters[name] if name else 1.0
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
