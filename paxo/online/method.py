r"""What a self-play method is: a row of functions and numbers, not a class.

    method = (objective, sampler, opponent, pairing, target, anchor, schedule)

A round of every method is the same: candidates are drawn, judged, paired and given their targets;
the objective is minimised on them; the anchors move.

>>> from paxo.online.table import method
>>> row = method("egpo", beta=0.1)
>>> row.objective.name, row.schedule.extragradient
('online_ipo_v1', True)
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from paxo.objectives import Objective

ANY_REWARD = "*"  # in `Method.rewards`: at least one function, of whatever name
OWN_ROLES = ("reference", "previous")  # that the loop itself has

Source = Literal["policy", "reference", "mixture", "average", "data"]
SOURCES = typing.get_args(Source)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Where candidates of a prompt come from.

    Attributes:
        source: "policy" (the live one), "reference", "mixture" (geometric, of the two), "average"
            (exponential moving average of the policy), or "data": completions of the data set.
        count: how many.
        temperature: None takes the run's; `top_k` and `top_p` likewise.
        top_k: see `SamplingConfig`.
        top_p: see `SamplingConfig`.
    """

    source: Source = "policy"
    count: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(
                f"Draw.source must be one of {', '.join(SOURCES)}; got {self.source!r}"
            )
        if self.count < 1:
            raise ValueError(f"Draw.count must be at least 1; got {self.count}")

    @property
    def is_plain(self) -> bool:
        """Whether it is the policy's own distribution, as far as the row says."""
        own = self.temperature in (None, 1) and not self.top_k and self.top_p in (None, 1)
        return self.source == "policy" and own


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When what moves.

    Attributes:
        extragradient: each round is one step, taken twice from the same state: first against the
            live policy, then against where that step led.
        reference: "first", the policy that training starts from, or "snapshot", the policy at the
            beginning of the round.
        reference_every: rounds after which the reference becomes the policy; 0 for never.
        extrapolation: alpha of Nesterov's look-ahead on the parameters after a round; 0 for none.
        average: decay of the exponential moving average of the policy; 0 keeps none.
        optimistic: two fits a round on the same pairs: the anchor from itself, then the policy from
            the new anchor.
        replay: shares of a round's number of groups that are added from the last round, the one
            before it and so on; "all" adds all that earlier rounds have trained on.
        hyper_parameters: name -> `(round, num_rounds) -> value` of the objective's, a number that
            its loss calculates with. The round is traced: one step is compiled for all of them.
    """

    extragradient: bool = False
    reference: Literal["first", "snapshot"] = "first"
    reference_every: int = 0
    extrapolation: float = 0.0
    average: float = 0.0
    optimistic: bool = False
    replay: tuple[float, ...] | Literal["all"] = ()
    hyper_parameters: Mapping[str, Callable[[Any, int], Any]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self):
        if self.reference not in ("first", "snapshot"):
            raise ValueError(
                f"schedule.reference must be 'first' or 'snapshot'; got {self.reference!r}"
            )
        if self.reference == "snapshot" and self.reference_every:
            raise ValueError(
                "schedule.reference_every is for a reference that starts as 'first'; a reference "
                "that is the snapshot moves every round"
            )
        if self.reference_every < 0:
            raise ValueError(
                f"schedule.reference_every must not be negative; got {self.reference_every}"
            )
        for name in ("extrapolation", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"schedule.{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.extragradient and (self.optimistic or self.extrapolation):
            raise ValueError("schedule.extragradient goes with no other look-ahead")

    def check(self, loss: Objective, num_rounds: int) -> None:
        """Raises ValueError where a hyper-parameter of some round is out of its range."""
        for name, value in self.hyper_parameters.items():
            for number in range(num_rounds):
                try:
                    loss.with_field(name, float(value(number, num_rounds)))
                except ValueError as error:
                    raise ValueError(
                        f"schedule.hyper_parameters, round {number}: {error}"
                    ) from error

    def objective(self, loss: Objective, number: Any, num_rounds: int) -> Objective:
        """The objective with the hyper-parameters of a round, whose number may be traced."""
        for name, value in self.hyper_parameters.items():
            loss = loss.with_field(name, value(number, num_rounds), check=False)
        return loss


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: its key in `METHODS`.
        objective: the loss, with its hyper-parameters.
        draws: where the candidates come from; their order is that of the draws.
        opponent: against whom they are judged; None for one another.
        pairing: `(bench, rng) -> Chosen`, the groups to train on (`paxo.online.pairing`).
        targets: functions `(bench, chosen) -> {"labels" or an extra's name: [M, n]}` of what the
            loss reads (`paxo.online.targets`).
        shape: `(batches, tools) -> batches` for what must be computed on packed rows from
            log-probs, such as advantages (`paxo.online.shaping`); None for most.
        schedule: when what moves.
        mix: weight of the reference in the mixture.
        reset: probability that a prompt is continued from a random prefix of its data set's first
            completion.
        attach: optional roles of the objective that are attached all the same.
        by_token: whether roles are attached token by token, for `shape`, whatever the objective
            reads.
        rewards: names of the reward functions that the row reads; without them it cannot run.
            `ANY_REWARD` stands for all that a run has.
        judged: whether it needs a judge.
        paper: where it is from.
    """

    name: str
    objective: Objective
    draws: tuple[Draw, ...]
    pairing: Callable[..., Any]
    targets: tuple[Callable[..., Mapping[str, Any]], ...] = ()
    opponent: Draw | None = None
    shape: Callable[..., Any] | None = None
    schedule: Schedule = Schedule()
    mix: float = 0.0
    reset: float = 0.0
    attach: tuple[str, ...] = ()
    by_token: bool = False
    rewards: tuple[str, ...] = ()
    judged: bool = True
    paper: str = ""

    def __post_init__(self):
        if not self.draws:
            raise ValueError(f"method {self.name!r} draws no candidates: give draws=(Draw(...),)")
        for name in ("mix", "reset"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"method {self.name!r}: {name} must lie in [0, 1]; got {getattr(self, name)}"
                )
        if self.uses("average") and not self.schedule.average:
            raise ValueError(
                f"method {self.name!r} draws from the average policy: set schedule.average"
            )

    def uses(self, source: Source) -> bool:
        """Whether candidates or opponents come from there."""
        return any(draw.source == source for draw in (*self.draws, *self.opponents))

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose log-probs are attached.

        Those that the objective cannot do without, those of the row, and where `beta` weighs a KL
        to a role that is optional otherwise (GRPO), that one.
        """
        penalised = self.objective.hyper_parameters.get("beta")
        optional = self.objective.optional_roles if penalised else ()
        return tuple(dict.fromkeys((*self.objective.frozen_roles, *self.attach, *optional)))

    @property
    def num_completions(self) -> int:
        """Completions that each prompt must have in the data set."""
        drawn = sum(draw.count for draw in (*self.draws, *self.opponents) if draw.source == "data")
        return max(drawn, int(self.reset > 0))

    @property
    def needs(self) -> tuple[str, ...]:
        """What a run must bring, in words.

        >>> Method.named("selm").needs
        ('a judge', '2 completions of each prompt')
        """
        found = ["a judge"] if self.judged else []
        found += [
            "any rewards" if name == ANY_REWARD else f"a reward {name!r}" for name in self.rewards
        ]
        if self.num_completions:
            several = "s" * (self.num_completions > 1)
            found.append(f"{self.num_completions} completion{several} of each prompt")
        found += [f"a frozen policy {role!r}" for role in self.roles if role not in OWN_ROLES]
        return tuple(found)

    @property
    def opponents(self) -> tuple[Draw, ...]:
        """The opponent's draw, if there is one."""
        return () if self.opponent is None else (self.opponent,)

    @property
    def num_candidates(self) -> int:
        """K, candidates drawn for each prompt, opponents not counted."""
        return sum(draw.count for draw in self.draws)

    @property
    def group_size(self) -> int:
        """Candidates of a group that is trained on."""
        return getattr(self.pairing, "size", None) or self.num_candidates

    # A `Record` of settings: `method=egpo method.beta=0.1 method.mix=0.2`.

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The objective's, and the row's own numbers."""
        own = {"mix": self.mix, "reset": self.reset, "draws": _counts(self.draws)}
        if self.opponent is not None:
            own["opponents"] = self.opponent.count
        own |= {name: getattr(self.schedule, name) for name in SCHEDULED}
        return own | dict(self.objective.hyper_parameters)

    def field_names(self) -> dict[str, Any]:
        """Name of each setting -> its type, for overrides."""
        own: dict[str, Any] = {"mix": float, "reset": float, "draws": tuple[int, ...]}
        if self.opponent is not None:
            own["opponents"] = int
        own |= SCHEDULED
        return own | self.objective.field_names()

    def with_field(self, name: str, value: Any) -> "Method":
        """This row with one setting changed, checked again."""
        if name in ("mix", "reset"):
            return dataclasses.replace(self, **{name: value})
        if name == "draws":
            return dataclasses.replace(self, draws=self._counted(tuple(value)))
        if name == "opponents" and self.opponent is not None:
            return dataclasses.replace(
                self, opponent=dataclasses.replace(self.opponent, count=value)
            )
        if name in SCHEDULED:
            changed = dataclasses.replace(self.schedule, **{name: value})
            return dataclasses.replace(self, schedule=changed)
        return dataclasses.replace(self, objective=self.objective.with_field(name, value))

    def _counted(self, counts: tuple[int, ...]) -> tuple[Draw, ...]:
        if len(counts) != len(self.draws):
            raise ValueError(
                f"method {self.name!r} draws from {len(self.draws)} sources "
                f"({', '.join(draw.source for draw in self.draws)}); got counts {counts}"
            )
        return tuple(dataclasses.replace(d, count=n) for d, n in zip(self.draws, counts))

    @classmethod
    def named(cls, name: str) -> "Method":
        """The row of the table with this name and the papers' values."""
        from paxo.online.table import method

        return method(name)


SCHEDULED: dict[str, Any] = {"reference_every": int, "extrapolation": float, "average": float}


def _counts(draws: tuple[Draw, ...]) -> tuple[int, ...]:
    return tuple(draw.count for draw in draws)
