"""How many rounds, of what; and what must hold before the first of them."""

import dataclasses
from collections.abc import Collection, Sequence

from paxo.online.groups import Prompt
from paxo.online.method import OWN_ROLES, Method


@dataclasses.dataclass(frozen=True)
class RoundSettings:
    """How many rounds, of what.

    Attributes:
        num_rounds: rounds of the run.
        prompts_per_round: prompts that are answered in a round. Those that are left over at the end
            of an epoch are not used in it; every epoch has another order.
        epochs: times that a round's groups are trained on.
        minibatches: steps of an epoch; the round's groups are dealt out to them once, and each
            epoch takes them in another order.
        evaluate_every: rounds between evaluations; 0 only after the last.
        seed: of the order of prompts, all draws and shuffles.
    """

    num_rounds: int
    prompts_per_round: int = 64
    epochs: int = 1
    minibatches: int = 1
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("num_rounds", "prompts_per_round", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"rounds.{name} must be at least 1; got {getattr(self, name)}")
        if self.evaluate_every < 0:
            raise ValueError(
                f"rounds.evaluate_every must not be negative; got {self.evaluate_every}"
            )

    def check(
        self, method: Method, prompts: Sequence[Prompt], frozen: Collection[str] = ()
    ) -> None:
        """Raises ValueError for what a method or the prompts do not allow.

        Args:
            method: the row.
            prompts: all of the run.
            frozen: roles of further frozen policies.
        """
        if method.schedule.extragradient and self.epochs * self.minibatches != 1:
            raise ValueError(
                f"method {method.name!r} draws new opponents within a round, which is one step: "
                f"rounds.epochs and rounds.minibatches must be 1; got {self.epochs} and "
                f"{self.minibatches}"
            )
        if len(prompts) < self.prompts_per_round:
            raise ValueError(
                f"rounds.prompts_per_round={self.prompts_per_round}, but there are {len(prompts)} "
                "prompts: lower it or give more"
            )
        for role in method.roles:
            if role not in (*OWN_ROLES, *frozen):
                raise ValueError(
                    f"method {method.name!r} needs a frozen policy under the role {role!r}: give "
                    f"frozen={{{role!r}: params}}"
                )
        method.schedule.check(method.objective, self.num_rounds)
        for prompt in prompts:
            if len(prompt.completions) < method.num_completions:
                raise ValueError(
                    f"method {method.name!r} takes {method.num_completions} completions of each "
                    f"prompt from the data set; prompt {prompt.index} comes with "
                    f"{len(prompt.completions)}: give prompts with completions"
                )

    @property
    def steps_per_fit(self) -> int:
        """Optimiser steps in which a round's groups are trained on."""
        return self.epochs * self.minibatches

    def steps_per_round(self, method: Method) -> int:
        """Optimiser steps of a round."""
        return (2 if method.schedule.optimistic else 1) * self.steps_per_fit
