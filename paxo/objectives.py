"""Objectives: a loss with its hyper-parameters bound, and what it needs, read from its signature.

>>> dpo = objective("dpo", beta=0.2)
>>> dpo.roles, dpo.hyper_parameters["beta"]
(('reference',), 0.2)
>>> weighted_sum((dpo, 1.0), (objective("nll"), 0.5)).name
'dpo + 0.5 nll'
"""

import dataclasses
import inspect
import logging
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paxo.losses.contract import FROM_STEP, Real, bound, check_value, nearest
from paxo.losses.implicit_rewards import reward_of
from paxo.losses.table import ALIASES, LOSSES
from paxo.numerics import Array, Mean

logger = logging.getLogger(__name__)

# "Authors et al. year, arXiv:number" in a docstring, with the equation where it is named.
PAPER = re.compile(
    r"[\w’'-]+(?: et al\.| and [\w’'-]+)? \d{4}, arXiv:\d{4}\.\d{4,5}(?:, Eqs?\. [\d–-]+)?"
)

URL = re.compile(r"https?://[^\s,;()]*[^\s,;().]")  # where there is no paper

# Who provides an array, by its name. Anything else is looked up in the batch's `extras`.
SUMMED = ("policy_logps", "lengths")
TOKENWISE = ("policy_token_logps", "token_mask", "token_entropies", "token_collisions", "token_kls")
FROM_BATCH = ("labels", "where")
HIDDEN_ROLE = "reference"  # whose next-token distributions `token_kls` are measured from


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of an objective with its weight.

    Attributes:
        name: its name in `LOSSES`.
        loss: the function.
        hyper_parameters: the values bound to its keyword-only parameters.
        weight: factor in the objective's sum.
    """

    name: str
    loss: Callable[..., Any]
    hyper_parameters: Mapping[str, Any]
    weight: float = 1.0

    @property
    def arrays(self) -> dict[str, bool]:
        """Name of each array the loss takes -> whether it must be there."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {
            p.name: p.default is p.empty
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD or p.name in ("where", *FROM_STEP)
        }

    @property
    def stateful(self) -> bool:
        """Whether the loss carries memory from step to step."""
        return hasattr(self.loss, "init_state")

    @property
    def draws(self) -> bool:
        """Whether the loss, with these hyper-parameters, draws random numbers."""
        only_with = getattr(self.loss, "draws_with", {})
        return "key" in self.arrays and all(
            self.hyper_parameters[name] == value for name, value in only_with.items()
        )

    def __call__(self, inputs: Mapping[str, Array], state: Any = None) -> tuple[Mean, Any]:
        """The loss's total and count over the groups of `inputs`, and its new state."""
        known = {**inputs, "state": state} if self.stateful else inputs
        arrays = {name: known[name] for name in self.arrays if name in known}
        result = self.loss(**arrays, **self.hyper_parameters)
        result, state = result if self.stateful else (result, None)
        if isinstance(result, Mean):  # perhaps one of each group
            return Mean(jnp.sum(result.total), jnp.sum(result.count)), state
        return _mean_over_groups(result, inputs["where"]), state


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: one loss, or a weighted sum of several, each divided by its own count.

    Attributes:
        terms: the losses; build them with `objective` and `weighted_sum`.
    """

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        """Names of the losses with their weights."""
        return " + ".join(t.name if t.weight == 1 else f"{t.weight:g} {t.name}" for t in self.terms)

    @property
    def arrays(self) -> dict[str, bool]:
        """Name of each array that a loss takes -> whether one of them cannot do without it."""
        needed: dict[str, bool] = {}
        for term in self.terms:
            for name, required in term.arrays.items():
                needed[name] = needed.get(name, False) or required
        return needed

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the frozen policies whose summed log-probs must be attached to the batch."""
        return self._roles(required=True, suffixes=("_logps",))

    @property
    def token_roles(self) -> tuple[str, ...]:
        """Roles whose log-probs must be attached token by token."""
        return self._roles(required=True, suffixes=("_token_logps",))

    @property
    def frozen_roles(self) -> tuple[str, ...]:
        """Roles of all the frozen policies that the objective cannot do without."""
        hidden = {role for role in (HIDDEN_ROLE,) if self.reads_hidden(role)}
        return tuple(sorted({*self.roles, *self.token_roles, *hidden}))

    @property
    def optional_roles(self) -> tuple[str, ...]:
        """Roles that it can do without, but reads where they are attached."""
        named = self._roles(required=False, suffixes=("_logps", "_token_logps"))
        return tuple(role for role in named if role not in self.frozen_roles)

    def reads_tokens(self, role: str) -> bool:
        """Whether it reads log-probs of this role token by token."""
        return f"{role}_token_logps" in self.arrays

    def reads_hidden(self, role: str) -> bool:
        """Whether it reads divergences from this role's next-token distributions."""
        return role == HIDDEN_ROLE and "token_kls" in self.arrays

    @property
    def whole_batch(self) -> bool:
        """Whether a loss must see the whole global batch at once.

        Those that couple groups must, and those that draw random numbers: their draws would
        otherwise depend on how the batch is split.
        """
        return any(getattr(term.loss, "whole_batch", False) or term.draws for term in self.terms)

    @property
    def unpaired(self) -> bool:
        """Whether a loss reads the sign of the labels: +1 desirable, -1 undesirable."""
        return any(getattr(term.loss, "unpaired", False) for term in self.terms)

    @property
    def mismatched(self) -> bool:
        """Whether a loss wants in each group a completion of another prompt, with label 0."""
        return any(getattr(term.loss, "mismatched", False) for term in self.terms)

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Of a single loss its own; of a sum `{loss.name: value}`, weights included."""
        if self._plain:
            return dict(self.terms[0].hyper_parameters)
        named = {f"{t.name}.{k}": v for t in self.terms for k, v in t.hyper_parameters.items()}
        return named | {f"{t.name}.weight": t.weight for t in self.terms}

    @property
    def reward_scale(self) -> float:
        """Factor of the first loss's implicit reward, such as DPO's beta (`contract.REWARDS`)."""
        first = self.terms[0]
        return reward_of(first.loss, first.hyper_parameters).scale_of(first.hyper_parameters)

    @property
    def reward_per_token(self) -> bool:
        """Whether the first loss's implicit reward is a mean over tokens, as SimPO's."""
        first = self.terms[0]
        return reward_of(first.loss, first.hyper_parameters).is_per_token(first.hyper_parameters)

    def init_state(self) -> tuple[Any, ...]:
        """The first memory of each term: `()` for the many that have none."""
        return tuple(_init_state(term) for term in self.terms)

    def field_names(self) -> dict[str, Any]:
        """Name of each setting -> its type, for overrides such as `objective.beta=0.2`."""
        if self._plain:
            return _annotations(self.terms[0])
        named = {f"{t.name}.{k}": kind for t in self.terms for k, kind in _annotations(t).items()}
        return named | {f"{t.name}.weight": float for t in self.terms}

    def with_field(self, name: str, value: Any, *, check: bool = True) -> "Objective":
        """This objective with one hyper-parameter or weight changed, checked again.

        Args:
            name: of the setting, see `field_names`.
            value: the new one.
            check: False within a compiled step, where a value is traced and cannot be checked.
        """
        which, _, field = name.partition(".")
        if self._plain:
            which, field = self.terms[0].name, name
        names = [term.name for term in self.terms]
        if which not in names:
            raise ValueError(
                f"objective {self.name!r} has no loss {which!r}; it holds {', '.join(names)}"
            )
        terms = list(self.terms)
        term = terms[names.index(which)]
        if field == "weight" and not self._plain:
            if check:
                check_value(f"weight of {which!r}", value, Real)
            changed = dataclasses.replace(term, weight=value)
        else:
            hyper = {**term.hyper_parameters, field: value}
            hyper = bound(which, term.loss, hyper) if check else hyper
            changed = dataclasses.replace(term, hyper_parameters=hyper)
        terms[names.index(which)] = changed
        return Objective(tuple(terms))

    @classmethod
    def named(cls, name: str) -> "Objective":
        """The objective with this `name` and the papers' values: `dpo`, or `dpo + 0.5 nll`.

        >>> Objective.named("ipo + 0.5 nll").hyper_parameters["nll.weight"]
        0.5
        """
        parts = [part.strip().rpartition(" ") for part in name.split(" + ")]
        if len(parts) == 1 and not parts[0][0]:
            return objective(parts[0][2])
        try:
            weights = [float(weight or 1) for weight, _, _ in parts]
        except ValueError:
            raise ValueError(
                f"objective {name!r} is read as losses with weights, such as 'dpo + 0.5 nll'"
            ) from None
        return weighted_sum(*((objective(loss), w) for w, (_, _, loss) in zip(weights, parts)))

    def _roles(self, *, required: bool, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        """Roles of the log-probs that are named, or of those without which it cannot do."""
        found = {
            name.removesuffix(suffix)
            for name, needed in self.arrays.items()
            for suffix in suffixes
            if _is_fixed(name, suffix) and needed >= required
        }
        return tuple(sorted(found))

    @property
    def _plain(self) -> bool:
        """Whether it is one loss without a weight, whose settings need no prefix."""
        return len(self.terms) == 1 and self.terms[0].weight == 1


def objective(name: str, **hyper_parameters: Any) -> Objective:
    """The loss of that name with its hyper-parameters bound; the rest keep the paper's values.

    Args:
        name: a key of `LOSSES`, or another trainer's name for one (the log says which it is).
        **hyper_parameters: keyword-only parameters of the loss.

    Raises:
        ValueError: for an unknown name (the nearest is named), an unknown hyper-parameter, or a
            value out of its range.
        TypeError: for a value of the wrong type.

    >>> objective("dpo", betta=0.1)
    Traceback (most recent call last):
    ValueError: objective 'dpo' has no hyper-parameter 'betta'; did you mean 'beta'? It has: beta
    """
    if name in ALIASES:
        logger.info("objective %r is paxo's %r", name, ALIASES[name])
        name = ALIASES[name]
    if name not in LOSSES:
        raise ValueError(
            f"unknown objective {name!r}{nearest(name, LOSSES)} `paxo methods` lists all."
        )
    return Objective((Term(name, LOSSES[name], bound(name, LOSSES[name], hyper_parameters)),))


def weighted_sum(*weighted: tuple[Objective, float]) -> Objective:
    """Σ weight * objective; each loss is divided by its own count.

    Args:
        *weighted: pairs of an objective and its weight.

    Raises:
        ValueError: without terms, or if a loss stands in it twice.

    >>> rpo = weighted_sum((objective("dpo", beta=0.01), 1.0), (objective("nll"), 0.005))
    >>> [term.weight for term in rpo.terms]
    [1.0, 0.005]
    """
    if not weighted:
        raise ValueError("weighted_sum needs at least one (objective, weight)")
    terms = []
    for summand, weight in weighted:
        if not isinstance(summand, Objective):
            raise TypeError(
                f"weighted_sum takes (objective, weight) pairs; got {type(summand).__name__}"
            )
        check_value(f"weight of {summand.name!r}", weight, Real)
        terms += [dataclasses.replace(term, weight=term.weight * weight) for term in summand.terms]
    names = [term.name for term in terms]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"weighted_sum holds {sorted(twice)} twice; add up their weights instead")
    return Objective(tuple(terms))


def method_table() -> list[dict[str, Any]]:
    """A row for each loss: name, first docstring line, paper, arrays and hyper-parameters."""
    rows = []
    for name in sorted(LOSSES):
        term = objective(name).terms[0]
        text = inspect.getdoc(term.loss) or ""
        paper = PAPER.search(" ".join(text.split()))
        rows.append(
            {
                "name": name,
                "summary": text.partition("\n")[0],
                "paper": paper[0] if paper else URL.search(text)[0],
                "inputs": [array for array in term.arrays if array != "where"],
                "hyper_parameters": dict(term.hyper_parameters),
            }
        )
    return rows


def _annotations(term: Term) -> dict[str, Any]:
    hints = typing.get_type_hints(term.loss)  # without the ranges: those are checked when built
    return {name: hints[name] for name in term.hyper_parameters}


def _is_fixed(name: str, suffix: str) -> bool:
    own = name.startswith("policy_") or (suffix == "_logps" and name.endswith("_token_logps"))
    return name.endswith(suffix) and not own


def _mean_over_groups(loss: Array, where: Array) -> Mean:
    """An unreduced `[...]` loss is averaged over the groups that have a valid candidate."""
    return Mean(jnp.sum(loss), jnp.sum(jnp.any(where, -1), dtype=loss.dtype))


def _init_state(term: Term) -> Any:
    if not term.stateful:
        return ()
    wanted = inspect.signature(term.loss.init_state).parameters
    return jax.tree.map(
        jnp.asarray,
        term.loss.init_state(**{k: v for k, v in term.hyper_parameters.items() if k in wanted}),
    )
