"""The loop of every self-play and online method.

    for each round:
        snapshot = the policy
        groups   = collect(prompts of the round, snapshot, ...)      kept as rounds/<round>.jsonl
        policy   = minimise(objective on groups, its anchors attached)
        anchors move

What the loop needs to go on lies in three places: parameters, moments and anchors in the checkpoint,
with the number of the round and of the step in it; the round's groups in their file, written whole
before the first step on them; everything else follows from the seed. A run that was killed goes on
to the same bits.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from paxo.objectives import Objective
from paxo.online.collect import Collected, Judges, collect
from paxo.online.drawing import Drawer
from paxo.online.groups import Group, Prompt, read_groups, write_groups
from paxo.online.method import Method
from paxo.online.shaping import Tools
from paxo.scoring import attach_logps, make_scorer, place_rows
from paxo.training.checkpoint import Checkpointer
from paxo.training.loop import fit
from paxo.training.state import TrainState, init_state, snapshot, state_shardings
from paxo.training.step import compile_step, make_train_step
from paxo.training.writers import Writer
from paxo.types import Array, Params, Policy, PreferenceBatch

logger = logging.getLogger(__name__)

Pack = Callable[[Sequence[Group]], PreferenceBatch]
Evaluate = Callable[[Params, Params, int], Mapping[str, float]]
ROUNDS = "rounds"


@dataclasses.dataclass(frozen=True)
class RoundSettings:
    """How many rounds, of what.

    Attributes:
        num_rounds: rounds of the run.
        prompts_per_round: prompts that are answered in a round.
        epochs: times that a round's groups are trained on.
        minibatches: steps of an epoch; the round's groups are dealt out to them.
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

    def check(self, method: Method, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for what a method or the prompts do not allow."""
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

    def steps_per_round(self, method: Method) -> int:
        """Optimiser steps of a round."""
        fits = 2 if method.schedule.optimistic else 1
        return fits * self.epochs * self.minibatches


class PlayResult(NamedTuple):
    """What is left after the last round.

    Attributes:
        state: of the training.
        anchors: "snapshot", and what else the method keeps: "reference", "ahead", "anchor",
            "average".
        history: the evaluations, each with its "round".
    """

    state: TrainState
    anchors: dict[str, Params]
    history: list[dict[str, float]]


def play(
    policy: Policy,
    params: Params,
    method: Method,
    optimizer: Any,
    prompts: Sequence[Prompt],
    settings: RoundSettings,
    *,
    draw: Drawer,
    judges: Judges,
    pack: Pack,
    mesh: Mesh,
    param_shardings: Any,
    workdir: pathlib.Path,
    microbatches: int = 1,
    frozen: Mapping[str, Params] | None = None,
    evaluate: Evaluate | None = None,
    checkpointer: Checkpointer | None = None,
    make_writer: Callable[[int], Writer] | None = None,
    log_every: int = 1,
) -> PlayResult:
    """Plays all rounds, or those that are left of a run that was stopped.

    Args:
        policy: the model.
        params: first parameters: the first reference too. They are not used up.
        method: the row, see `METHODS`.
        optimizer: settings such as `adamw(...)`, built for all steps of the run.
        prompts: all of them; each round takes the next ones of a shuffled order.
        settings: how many rounds, of what.
        draw: draws completions.
        judges: who judges.
        pack: groups -> packed rows of host arrays, of few different shapes.
        mesh: devices.
        param_shardings: where each parameter lies on it.
        workdir: its folder `rounds` holds what each round was trained on.
        microbatches: parts of a step.
        frozen: role -> parameters of further frozen policies ("dpo" for RTO).
        evaluate: `(params, snapshot's params, round) -> figures` after a round.
        checkpointer: keeps state and anchors.
        make_writer: `(step that the run goes on from) -> writer` of metrics.
        log_every: steps between lines of metrics.

    Raises:
        RoundError: a round could not be judged or paired; the run goes on from there when started
            again.
        ValueError: method, judges, prompts and settings do not go together.
    """
    judges.check(method)
    settings.check(method, prompts)
    answers = [len(p.completions[0]) for p in prompts if p.completions] if method.reset else []
    draw.check(prompts, extra=max(answers, default=0))
    run = _Run(
        policy, method, optimizer, list(prompts), settings, draw, judges, pack, mesh,
        param_shardings, pathlib.Path(workdir), microbatches, dict(frozen or {}), snapshot(params),
    )  # fmt: skip
    state, anchors, place = run.start(checkpointer)
    writer = None if make_writer is None else make_writer(int(state.step))
    history: list[dict[str, float]] = []
    try:
        while place.round < settings.num_rounds:
            number, began, before = place.round, time.perf_counter(), int(state.step)
            state, anchors, figures = run.round(
                place, state, anchors, checkpointer=checkpointer, writer=writer, log_every=log_every
            )
            place = _Place(number + 1, 0)
            last = place.round == settings.num_rounds
            if evaluate is not None and (last or _falls_on(place.round, settings.evaluate_every)):
                scores = dict(evaluate(state.params, anchors["snapshot"], place.round))
                history.append({"round": place.round, **scores})
                figures |= {f"eval/{name}": value for name, value in scores.items()}
            if writer is not None:
                figures["seconds"] = time.perf_counter() - began
                writer.write(int(state.step), {"round": place.round, **figures})
            every = 0 if checkpointer is None else checkpointer.every
            if checkpointer is not None and (last or int(state.step) // every > before // every):
                checkpointer.save(int(state.step), _saved(state, anchors), place._asdict())
    finally:
        if writer is not None:
            writer.close()
        if checkpointer is not None:
            checkpointer.wait()
    return PlayResult(state, anchors, history)


class _Place(NamedTuple):
    """Where a run stands: the next step is number `step` of round `round`, both from 0."""

    round: int
    step: int


class _Run:
    """What stays the same over all rounds."""

    def __init__(self, policy, method, optimizer, prompts, settings, draw, judges, pack, mesh,
                 placed, workdir, microbatches, frozen, first):  # fmt: skip
        self.policy, self.method, self.settings = policy, method, settings
        self.prompts, self.draw, self.judges, self.pack = prompts, draw, judges, pack
        self.mesh, self.workdir, self.frozen, self.first = mesh, workdir, frozen, first
        self.microbatches, self.placed = microbatches, placed
        steps = settings.num_rounds * settings.steps_per_round(method)
        self.optimizer = optimizer.build(steps) if hasattr(optimizer, "build") else optimizer
        self.key = jax.random.key(settings.seed)
        self._steps: dict[Any, Any] = {}

    # --- the state ---

    def start(self, checkpointer: Checkpointer | None) -> tuple[TrainState, dict, _Place]:
        """The newest checkpoint, or the beginning."""
        begin = functools.partial(
            init_state, objective=self.method.objective, optimizer=self.optimizer
        )
        make = lambda params, key: begin(params, key=key)  # noqa: E731
        key = jax.random.fold_in(self.key, 1)
        abstract = jax.eval_shape(make, self.first, key)
        self.shardings = state_shardings(abstract, self.placed, self.optimizer)
        if checkpointer is not None:
            wanted = _saved(abstract, dict.fromkeys(self._kept, abstract.params))
            lies = _saved(self.shardings, dict.fromkeys(self._kept, self.placed))
            found = checkpointer.restore_latest(
                jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, lies
                )
            )
            if found is not None:
                saved, position, _ = found
                anchors = dict(saved.pop("anchors"))
                return TrainState(**saved), anchors, _Place(position["round"], position["step"])
        state = jax.jit(make, out_shardings=self.shardings)(snapshot(self.first), key)
        anchors = {name: snapshot(self.first) for name in self._kept}
        return state, anchors, _Place(0, 0)

    @property
    def _kept(self) -> list[str]:
        """Names of the anchors that this method has."""
        schedule = self.method.schedule
        names = {
            "reference": schedule.reference_every,
            "ahead": schedule.extrapolation,
            "anchor": schedule.optimistic,
            "average": schedule.average,
        }
        return ["snapshot", *(name for name, used in names.items() if used)]

    # --- a round ---

    def round(
        self, place: _Place, state: TrainState, anchors: dict[str, Params], **kept: Any
    ) -> tuple[TrainState, dict[str, Params], dict[str, float]]:
        """One round from its beginning, or from a step within it."""
        number, schedule = place.round, self.method.schedule
        if place.step == 0:
            anchors = anchors | {"snapshot": snapshot(state.params)}
        objective = self._objective(number)
        if schedule.extragradient:
            state, figures = self._extragradient(place, state, anchors, objective, **kept)
        else:
            collected = self._collected(number, f"{number:04d}", anchors)
            figures = collected.figures
            state, anchors = self._fits(place, state, anchors, objective, collected, **kept)
        state, anchors = self._moved(number, state, anchors)
        return state, anchors, {f"round/{name}": x for name, x in figures.items()}

    def _fits(self, place, state, anchors, objective, collected, **kept):
        """All steps of a round; an optimistic one fits its anchor first, then the policy."""
        per_fit = self.settings.epochs * self.settings.minibatches
        groups = self._with_replay(place.round, collected.groups)
        fits = range(self.settings.steps_per_round(self.method) // per_fit)
        for fit_number in fits:
            begin = max(place.step - fit_number * per_fit, 0)
            if begin >= per_fit:
                continue
            if self.method.schedule.optimistic and begin == 0:
                if fit_number == 0:
                    state = state.replace(params=snapshot(anchors["anchor"]))
                else:
                    anchors = anchors | {"anchor": snapshot(state.params)}
            batches = self._batches(place.round, groups, anchors, objective)
            feed = _Feed(batches, place.round, fit_number * per_fit, begin)
            state = self._fit(state, anchors, objective, feed, **kept)
        return state, anchors

    def _fit(self, state, anchors, objective, feed, *, checkpointer, writer, log_every):
        saver = None if checkpointer is None else _Saver(checkpointer, anchors)
        return fit(
            self._step(objective, donate=True),
            state,
            feed,
            num_steps=int(state.step) + feed.left,
            writer=writer,
            checkpointer=saver,
            log_every=log_every,
            whole=False,
        )

    def _extragradient(self, place, state, anchors, objective, **kept):
        """The same step twice from one state: nothing needs restoring, as the state is a value."""
        number = place.round
        if place.step:  # it was stopped after the step
            return state, self._collected(number, f"{number:04d}", anchors).figures
        collected = self._collected(number, f"{number:04d}-half", anchors)
        batch = self._batches(number, collected.groups, anchors, objective)[0]
        half, _ = self._step(objective, donate=False)(state, batch)
        against = self._policies(anchors) | {"policy": half.params}
        collected = self._collected(number, f"{number:04d}", anchors, opponents=against)
        batches = self._batches(number, collected.groups, anchors, objective)
        state = self._fit(state, anchors, objective, _Feed(batches, number, 0, 0), **kept)
        return state, collected.figures

    def _moved(self, number, state, anchors):
        """State and anchors after a round."""
        schedule, anchors = self.method.schedule, dict(anchors)
        if schedule.extrapolation:
            fitted = snapshot(state.params)
            if number > 0:
                ahead = _extrapolated(fitted, anchors["ahead"], schedule.extrapolation)
                state = state.replace(params=ahead)
            anchors["ahead"] = fitted
        if schedule.average:
            anchors["average"] = _averaged(anchors["average"], state.params, schedule.average)
        if _falls_on(number + 1, schedule.reference_every):
            anchors["reference"] = snapshot(state.params)
        return state, anchors

    # --- data ---

    def _collected(self, number, name, anchors, opponents=None) -> Collected:
        """A round's groups: those in its file if it was written, else sampled and written."""
        file = self.workdir / ROUNDS / f"{name}.jsonl"
        figures = file.with_suffix(".json")
        if file.exists():
            logger.info("round %d: its groups are read from %s", number, file)
            return Collected(read_groups(file), json.loads(figures.read_text(encoding="utf-8")))
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2 + number), "half" in name)
        found = collect(
            self.method,
            self._prompts(number),
            self._policies(anchors),
            self.draw,
            self.judges,
            key,
            name=f"round {name}",
            opponents=opponents,
        )
        decode = None if self.judges.decode is tuple else self.judges.decode
        figures.parent.mkdir(parents=True, exist_ok=True)
        figures.write_text(json.dumps(found.figures, indent=2) + "\n", encoding="utf-8")
        write_groups(file, found.groups, decode)  # last: with this file the round counts as drawn
        return found

    def _policies(self, anchors) -> dict[str, Params]:
        names = {"policy": anchors["snapshot"], "reference": self._reference(anchors)}
        return names | ({"average": anchors["average"]} if "average" in anchors else {})

    def _reference(self, anchors) -> Params:
        if self.method.schedule.reference == "snapshot":
            return anchors["snapshot"]
        return anchors.get("reference", self.first)

    def _prompts(self, number: int) -> list[Prompt]:
        """The round's: the next ones of all epochs' orders, one behind the other."""
        size, total = self.settings.prompts_per_round, len(self.prompts)
        chosen = []
        for place in range(number * size, (number + 1) * size):
            epoch, at = divmod(place, total)
            chosen.append(self.prompts[_order(self.settings.seed, epoch, total)[at]])
        return chosen

    def _with_replay(self, number: int, groups: list[Group]) -> list[Group]:
        """The round's groups and those of earlier rounds, from their files."""
        replay = self.method.schedule.replay
        if not replay:
            return groups
        older = range(number - 1, -1, -1)
        shares = [1.0] * number if replay == "all" else list(replay)
        added = []
        for earlier, share in zip(older, shares):
            known = read_groups(self.workdir / ROUNDS / f"{earlier:04d}.jsonl")
            if replay != "all":
                rng = np.random.default_rng((self.settings.seed, number, earlier))
                count = min(round(share * len(groups)), len(known))
                known = [known[i] for i in sorted(rng.choice(len(known), count, replace=False))]
            added += known
        return groups + added

    def _batches(self, number, groups, anchors, objective) -> list[PreferenceBatch]:
        """Every step's batch of a fit, with all that is fixed attached."""
        settings, parts = self.settings, []
        for epoch in range(settings.epochs):
            rng = np.random.default_rng((settings.seed, number, epoch, 7))
            order = rng.permutation(len(groups))
            if len(groups) < settings.minibatches:
                raise ValueError(
                    f"round {number}: {len(groups)} groups cannot be dealt out to "
                    f"rounds.minibatches={settings.minibatches} steps"
                )
            for part in np.array_split(order, settings.minibatches):
                parts.append([groups[i] for i in part])
        packed = [place_rows(self.pack(part), self.mesh) for part in parts]
        roles = dict.fromkeys([*objective.frozen_roles, *self.method.attach])
        scorers = {role: self._scorer(role, anchors) for role in roles}
        tokens = self.method.by_token
        batches = []
        for batch in packed:
            for role, scorer in scorers.items():
                reads = objective.reads_tokens(role) or tokens
                batch = attach_logps(batch, role, scorer, tokens=reads)
            batches.append(batch)
        if self.method.shape is not None:
            with jax.set_mesh(self.mesh):
                batches = self.method.shape(batches, Tools(self.policy, anchors["snapshot"]))
        return batches

    def _scorer(self, role: str, anchors: Mapping[str, Params]):
        known = {"reference": self._reference(anchors), **self.frozen}
        known["previous"] = anchors.get("anchor", anchors["snapshot"])
        if role not in known:
            raise ValueError(
                f"method {self.method.name!r} needs a frozen policy under the role {role!r}: give "
                f"frozen={{{role!r}: params}}"
            )
        return make_scorer(self.policy, known[role], mesh=self.mesh)

    # --- the step ---

    def _objective(self, number: int) -> Objective:
        """The objective with the hyper-parameters of this round."""
        objective = self.method.objective
        for name, value in self.method.schedule.hyper_parameters.items():
            objective = objective.with_field(name, float(value(number, self.settings.num_rounds)))
        return objective

    def _step(self, objective: Objective, *, donate: bool):
        known = (objective.name, tuple(sorted(objective.hyper_parameters.items())), donate)
        if known not in self._steps:
            body = make_train_step(
                self.policy, objective, self.optimizer, microbatches=self.microbatches
            )
            self._steps[known] = compile_step(body, self.mesh, self.shardings, donate=donate)
        return self._steps[known]


class _Feed:
    """A fit's batches, as `fit` takes them."""

    def __init__(self, batches: list[PreferenceBatch], number: int, before: int, begin: int):
        self._batches, self._round, self._before, self._next = batches, number, before, begin
        self.identity = ""

    @property
    def left(self) -> int:
        """Steps that are still to be made."""
        return len(self._batches) - self._next

    @property
    def state(self) -> "_Feed":
        """Itself: `fit` asks it for `to_dict`."""
        return self

    def to_dict(self) -> dict[str, int]:
        """The place of the next batch."""
        return {"round": self._round, "step": self._before + self._next}

    def __next__(self) -> PreferenceBatch:
        batch = self._batches[self._next]
        self.identity = f"round {self._round}, step {self._before + self._next} of it"
        self._next += 1
        return batch


class _Saver:
    """A checkpointer that adds a round's anchors to what is saved within it."""

    best_metric = None

    def __init__(self, checkpointer: Checkpointer, anchors: Mapping[str, Params]):
        self._inner, self._anchors = checkpointer, anchors
        self.folder, self.due = checkpointer.folder, checkpointer.due
        self.wait, self.latest_step = checkpointer.wait, checkpointer.latest_step

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], _: Any = None) -> None:
        """Saves both."""
        self._inner.save(step, _saved(state, self._anchors), data)


def _saved(state: Any, anchors: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds; parameters lie where every run's do."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields | {"anchors": dict(anchors)}


def _falls_on(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 3)).permutation(total)


@jax.jit
def _extrapolated(now: Params, before: Params, alpha: Array) -> Params:
    """Nesterov's look-ahead, arXiv:2410.06293: now + alpha (now - before)."""
    return jax.tree.map(lambda x, y: x + (alpha * (x - y)).astype(x.dtype), now, before)


@jax.jit
def _averaged(average: Params, params: Params, decay: Array) -> Params:
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), average, params)
