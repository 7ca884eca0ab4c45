"""The loop of every self-play and online method.

    for each round:
        snapshot = the policy
        groups   = collect(prompts of the round, snapshot, ...)      kept as rounds/<round>.jsonl
        policy   = minimise(objective on groups, its anchors attached)
        anchors move

What the loop needs to go on lies in three places: parameters, moments and anchors in the
checkpoint, with the number of the round and of the step in it; the round's groups in their file,
written whole before the first step on them; everything else follows from the seed. A run that was
killed goes on to the same bits.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from paxo.online import anchors as anchoring
from paxo.online.anchors import Anchors
from paxo.online.collect import Collected, Judges, RoundError, collect
from paxo.online.drawing import Drawer
from paxo.online.groups import Group, Prompt
from paxo.online.method import Method
from paxo.online.round_files import RoundFiles
from paxo.online.settings import RoundSettings
from paxo.online.shaping import Tools
from paxo.rows import own_part, place_rows
from paxo.scoring import attach_logps, make_scorer
from paxo.training.checkpoint import Checkpointer
from paxo.training.loop import NonFiniteLossError, fit
from paxo.training.state import TrainState, init_state, snapshot, state_shardings
from paxo.training.step import CompiledStep, compile_step, make_train_step
from paxo.training.writers import Writer
from paxo.types import Params, Policy, PreferenceBatch

Pack = Callable[[Sequence[Group]], PreferenceBatch]
Evaluate = Callable[[Params, Params, int], Mapping[str, float]]


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
    make_writer: Callable[[int, int], Writer] | None = None,
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
        frozen: role -> parameters of further frozen policies ("dpo" for RTO); "reference" is the
            first reference, where it is not the policy that training starts from.
        evaluate: `(params, snapshot's params, round) -> figures` after a round.
        checkpointer: keeps state and anchors.
        make_writer: `(step, round) -> writer` of metrics of a run that goes on from there: so many
            steps and whole rounds have been told before.
        log_every: steps between lines of metrics.

    Raises:
        RoundError: a round could not be judged or paired; a checkpoint of what was before it is
            left, and the run goes on from there when started again.
        ValueError: method, judges, prompts and settings do not go together.
    """
    frozen = dict(frozen or {})
    judges.check(method)
    settings.check(method, prompts, frozen)
    draw.check([_longest(prompt, method) for prompt in prompts])
    steps = settings.num_rounds * settings.steps_per_round(method)
    first, base = policy.split(params)
    run = _Run(
        policy=policy,
        method=method,
        optimizer=optimizer.build(steps) if hasattr(optimizer, "build") else optimizer,
        prompts=list(prompts),
        settings=settings,
        draw=draw,
        judges=judges,
        pack=pack,
        mesh=mesh,
        param_shardings=param_shardings,
        files=RoundFiles(workdir, None if judges.decode is tuple else judges.decode),
        microbatches=microbatches,
        frozen=frozen,
        first=first,
        base=base,
        reference=frozen.get("reference"),
    )
    state, anchors, place = run.start(checkpointer)
    writer = None if make_writer is None else make_writer(int(state.step), place.round)
    history: list[dict[str, float]] = []
    try:
        while place.round < settings.num_rounds:
            began, before = time.perf_counter(), int(state.step)
            try:
                state, anchors, figures = run.round(
                    place, state, anchors,
                    checkpointer=checkpointer, writer=writer, log_every=log_every,
                )  # fmt: skip
            except RoundError:  # before its first step: the policy of the last round is kept
                if checkpointer is not None and before > (checkpointer.latest_step() or 0):
                    checkpointer.save(before, _saved(state, anchors), place._asdict())
                raise
            place = _Place(place.round + 1, 0)
            last = place.round == settings.num_rounds
            if evaluate is not None and (last or _falls_on(place.round, settings.evaluate_every)):
                both = run.whole(state.params), run.whole(anchors["snapshot"])
                scores = dict(evaluate(*both, place.round))
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


def _longest(prompt: Prompt, method: Method) -> Prompt:
    """The prompt as long as it may be drawn for: with all but one token of its answer."""
    if not method.reset:
        return prompt
    ids = np.concatenate([prompt.ids, prompt.completions[0][:-1]])
    return dataclasses.replace(prompt, ids=ids)


class _Place(NamedTuple):
    """Where a run stands: the next step is number `step` of round `round`, both from 0."""

    round: int
    step: int


@dataclasses.dataclass(eq=False)
class _Run:
    """What stays the same over all rounds."""

    policy: Policy
    method: Method
    optimizer: Any
    prompts: list[Prompt]
    settings: RoundSettings
    draw: Drawer
    judges: Judges
    pack: Pack
    mesh: Mesh
    param_shardings: Any
    files: RoundFiles
    microbatches: int
    frozen: dict[str, Params]
    first: Params  # those that are trained
    base: Params  # those that are not: adapters' base
    reference: Params | None  # of the first round, where it is not the first policy

    def __post_init__(self):
        self.schedule = self.method.schedule
        self.key = jax.random.key(self.settings.seed)
        begin = functools.partial(
            init_state, objective=self.method.objective, optimizer=self.optimizer
        )
        self._make = lambda params, key: begin(params, key=key)
        self._state_key = jax.random.fold_in(self.key, 1)
        self._abstract = jax.eval_shape(self._make, self.first, self._state_key)
        self.placed, placed_base = self.policy.split(self.param_shardings)
        abstract = self._abstract.replace(frozen=self.base)
        self.shardings = state_shardings(abstract, self.placed, self.optimizer, placed_base)
        self.base = jax.device_put(self.base, self.shardings.frozen)
        self.first = jax.device_put(self.first, self.placed)  # no copy where they lie so
        self._compiled: dict[bool, CompiledStep] = {}

    # --- the state ---

    def start(self, checkpointer: Checkpointer | None) -> tuple[TrainState, Anchors, _Place]:
        """The newest checkpoint, or the beginning."""
        names = anchoring.names(self.schedule)
        if checkpointer is not None:
            wanted = _saved(self._abstract, dict.fromkeys(names, self._abstract.params))
            lies = _saved(self.shardings, dict.fromkeys(names, self.placed))
            found = checkpointer.restore_latest(
                jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, lies
                )
            )
            if found is not None:
                saved, position, _ = found
                anchors = dict(saved.pop("anchors"))
                state = TrainState(**saved, frozen=self.base)
                return state, anchors, _Place(position["round"], position["step"])
        make = jax.jit(self._make, out_shardings=self.shardings.replace(frozen={}))
        state = make(snapshot(self.first), self._state_key).replace(frozen=self.base)
        own = {}
        if self.reference is not None:
            own["reference"] = jax.device_put(self.policy.split(self.reference)[0], self.placed)
        return state, {n: snapshot(own.get(n, self.first)) for n in names}, _Place(0, 0)

    def whole(self, trained: Params) -> Params:
        """All parameters of the policy, as scorers and samplers take them."""
        return self.policy.join(trained, self.base)

    # --- a round ---

    def round(
        self, place: _Place, state: TrainState, anchors: Anchors, **kept: Any
    ) -> tuple[TrainState, Anchors, dict[str, float]]:
        """One round from its beginning, or from a step within it."""
        if place.step == 0:
            # In place: the caller's dictionary must not hold the last round's beside it.
            anchors["snapshot"] = snapshot(state.params)
        one_round = self._extragradient if self.schedule.extragradient else self._fits
        state, anchors, figures = one_round(place, state, anchors, **kept)
        state, anchors = anchoring.moved(self.schedule, place.round, state, anchors)
        return state, anchors, {f"round/{name}": x for name, x in figures.items()}

    def _fits(self, place, state, anchors, **kept):
        """All steps of a round; an optimistic one fits its anchor first, then the policy."""
        collected = self._collected(place.round, anchors)
        groups = collected.groups + self.files.replayed(
            place.round, len(collected.groups), self.schedule, self.settings.seed
        )
        per_fit = self.settings.steps_per_fit
        for before in range(0, self.settings.steps_per_round(self.method), per_fit):
            begin = max(place.step - before, 0)
            if begin >= per_fit:
                continue
            if self.schedule.optimistic and begin == 0:
                if before == 0:
                    state = state.replace(params=snapshot(anchors["anchor"]))
                else:
                    anchors["anchor"] = snapshot(state.params)
            batches = self._batches(place.round, groups, anchors)
            feed = _Feed(batches, place.round, before, begin)
            state = self._fit(state, anchors, feed, **kept)
        return state, anchors, collected.figures

    def _fit(self, state, anchors, feed, *, checkpointer, writer, log_every):
        saver = None if checkpointer is None else _Saver(checkpointer, anchors)
        return fit(
            self._step(donate=True),
            state,
            feed,
            num_steps=int(state.step) + feed.left,
            writer=writer,
            checkpointer=saver,
            log_every=log_every,
            whole=False,
        )

    def _extragradient(self, place, state, anchors, **kept):
        """The same step twice from one state: nothing needs restoring, as the state is a value."""
        number = place.round
        if place.step:  # it was stopped after the step
            return state, anchors, self._collected(number, anchors).figures
        collected = self._collected(number, anchors, "-half")
        batch = self._batches(number, collected.groups, anchors)[0]
        half, metrics = self._step(donate=False)(state, batch)
        if not all(math.isfinite(float(metrics[name])) for name in ("loss", "grad_norm")):
            raise NonFiniteLossError(
                f"loss or grad_norm of the first half of round {number} is not finite: look at "
                f"{self.files.groups(f'{number:04d}-half')}, lower the learning rate or clip the "
                "gradient"
            )
        against = self._policies(anchors) | {"policy": self.whole(half.params)}
        del half  # its moments would lie beside the state's
        collected = self._collected(number, anchors, opponents=against)
        del against
        batches = self._batches(number, collected.groups, anchors)
        state = self._fit(state, anchors, _Feed(batches, number, 0, 0), **kept)
        return state, anchors, collected.figures

    # --- data ---

    def _collected(self, number: int, anchors: Anchors, half: str = "", opponents=None):
        """A round's groups: those in its file if it was written, else sampled and written."""
        name = f"{number:04d}{half}"

        def draw() -> Collected:
            return collect(
                self.method,
                self._prompts(number),
                self._policies(anchors),
                self.draw,
                self.judges,
                jax.random.fold_in(jax.random.fold_in(self.key, 2 + number), bool(half)),
                name=f"round {name}",
                opponents=opponents,
                least=self.settings.minibatches,
            )

        return self.files.kept(name, draw)

    def _policies(self, anchors: Anchors) -> dict[str, Params]:
        names = {"policy": "snapshot"} | ({"average": "average"} if "average" in anchors else {})
        named = {source: self.whole(anchors[anchor]) for source, anchor in names.items()}
        return named | {"reference": self._reference(anchors)}

    def _reference(self, anchors: Anchors) -> Params:
        moved = anchoring.reference(self.schedule, anchors)
        if moved is None and self.reference is not None:
            return self.reference
        return self.whole(self.first if moved is None else moved)

    def _prompts(self, number: int) -> list[Prompt]:
        """The round's: the next ones of this epoch's order."""
        size = self.settings.prompts_per_round
        epoch, place = divmod(number, len(self.prompts) // size)
        rng = np.random.default_rng((self.settings.seed, epoch, 3))
        order = rng.permutation(len(self.prompts))
        return [self.prompts[i] for i in order[place * size : (place + 1) * size]]

    def _batches(self, number, groups, anchors) -> list[PreferenceBatch]:
        """Every step's batch of a fit, with all that is fixed attached.

        Groups are dealt out, packed and scored once; each epoch takes the batches in its own order.
        """
        count = self.settings.minibatches
        rng = np.random.default_rng((self.settings.seed, number, 0, 7))
        dealt = np.array_split(rng.permutation(len(groups)), count)
        parts = [[groups[i] for i in part] for part in dealt]
        batches = [place_rows(own_part(self.pack(part), self.mesh), self.mesh) for part in parts]
        for role in self.method.roles:
            scorer = make_scorer(self.policy, self._frozen(role, anchors), mesh=self.mesh)
            tokens = self.method.objective.reads_tokens(role) or self.method.by_token
            batches = [attach_logps(b, role, scorer, tokens=tokens) for b in batches]
        if self.method.shape is not None:
            with jax.set_mesh(self.mesh):
                tools = Tools(self.policy, self.whole(anchors["snapshot"]))
                batches = self.method.shape(batches, tools)
        orders = [range(count)]
        for epoch in range(1, self.settings.epochs):
            rng = np.random.default_rng((self.settings.seed, number, epoch, 7))
            orders.append(rng.permutation(count).tolist())
        return [batches[i] for order in orders for i in order]

    def _frozen(self, role: str, anchors: Anchors) -> Params:
        if role == "previous":
            return self.whole(anchors.get("anchor", anchors["snapshot"]))
        if role == "reference":
            return self._reference(anchors)
        return self.frozen[role]

    # --- the step ---

    def _step(self, *, donate: bool):
        """The compiled step."""
        if donate not in self._compiled:
            self._compiled[donate] = compile_step(
                self._body, self.mesh, self.shardings, donate=donate
            )
        return self._compiled[donate]

    def _body(self, state: TrainState, batch: PreferenceBatch):
        """A step with the hyper-parameters of its round: numbers of the program, not in it."""
        number = state.step // self.settings.steps_per_round(self.method)
        objective = self.schedule.objective(self.method.objective, number, self.settings.num_rounds)
        step = make_train_step(
            self.policy, objective, self.optimizer, microbatches=self.microbatches
        )
        try:
            return step(state, batch)
        except jax.errors.ConcretizationTypeError as error:
            if not self.schedule.hyper_parameters:
                raise
            raise ValueError(
                f"schedule.hyper_parameters of {', '.join(self.schedule.hyper_parameters)}: "
                f"{self.method.objective.name!r} takes decisions by one of them, so it must be the "
                "same in all rounds"
            ) from error


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
    """What a checkpoint holds; parameters lie where every run's do, and frozen ones do not."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "frozen"]
    fields = {name: getattr(state, name) for name in names}
    return fields | {"anchors": dict(anchors)}


def _falls_on(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
