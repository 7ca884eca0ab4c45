"""Optimisers as frozen settings, built into Optax when a run starts."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

Schedule = Literal["constant", "linear", "cosine"]
# Norm scales and biases are not decayed.
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


class Scheduled(NamedTuple):
    """An Optax transformation that also tells its learning rate."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    schedule: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with warm-up, decay of the learning rate, and clipping by the global norm.

    Attributes:
        learning_rate: peak.
        warmup_steps: steps of linear growth from 0; the first update already has a rate above 0.
        schedule: what follows: "constant", or "linear" or "cosine" down to `final_fraction`.
        decay_steps: steps until the end of the decay, warm-up included; None takes the run's.
        final_fraction: learning rate at the end over the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of kernels, embeddings and adapters; norms and biases have
            none.
        max_grad_norm: global norm to which gradients are clipped; None does not clip.
        moments_dtype: dtype of the first moment; None keeps the parameters'.
    """

    learning_rate: float
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    decay_steps: int | None = None
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    moments_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"optimizer.schedule must be constant, linear or cosine; got {self.schedule!r}"
            )
        if self.moments_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(
                "optimizer.moments_dtype must be float32, bfloat16 or none; got "
                f"{self.moments_dtype!r}"
            )
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be above 0; got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "final_fraction"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"optimizer.{name} must not be negative; got {getattr(self, name)}"
                )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"optimizer.max_grad_norm must be above 0, or none; got {self.max_grad_norm}"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer.decay_steps must exceed warmup_steps; got {self.decay_steps} and "
                f"{self.warmup_steps}"
            )

    def build(self, num_steps: int | None = None) -> Scheduled:
        """The Optax transformation of a run of `num_steps` steps.

        Raises:
            ValueError: if the schedule decays and neither `decay_steps` nor `num_steps` is known.
        """
        schedule = self._learning_rate(num_steps)
        steps = (
            [] if self.max_grad_norm is None else [optax.clip_by_global_norm(self.max_grad_norm)]
        )
        steps.append(
            optax.adamw(
                schedule,
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decay_mask,
                mu_dtype=self.moments_dtype,
            )
        )
        chain = optax.chain(*steps)
        return Scheduled(chain.init, chain.update, schedule)

    def _learning_rate(self, num_steps: int | None) -> optax.Schedule:
        end = self.decay_steps if self.decay_steps is not None else num_steps
        if self.schedule != "constant" and end is None:
            raise ValueError(
                f"optimizer.schedule {self.schedule!r} needs decay_steps or the run's num_steps"
            )
        rest = max((end or 0) - self.warmup_steps, 1)
        after = {
            "constant": lambda: optax.constant_schedule(self.learning_rate),
            "linear": lambda: optax.linear_schedule(
                self.learning_rate, self.learning_rate * self.final_fraction, rest
            ),
            "cosine": lambda: optax.cosine_decay_schedule(
                self.learning_rate, rest, self.final_fraction
            ),
        }[self.schedule]()
        if not self.warmup_steps:
            return after
        first = self.learning_rate / self.warmup_steps
        warmup = optax.linear_schedule(first, self.learning_rate, max(self.warmup_steps - 1, 1))
        return optax.join_schedules([warmup, after], [self.warmup_steps])


def adamw(learning_rate: float, **settings: Any) -> AdamW:
    """Settings of an AdamW; see `AdamW` for them.

    >>> schedule = adamw(1e-3, warmup_steps=10, schedule="linear").build(num_steps=100).schedule
    >>> [round(float(schedule(step)), 6) for step in (0, 9, 100)]
    [0.0001, 0.001, 0.0]
    """
    return AdamW(learning_rate, **settings)


def decay_mask(params: Any) -> Any:
    """True on kernels, embeddings and adapters, False on norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in DECAYED, params
    )
