"""The training loop, top to bottom, in one function.

The host runs one step ahead of what it reports: it dispatches a step, prepares the next batch while
the devices work, and only then fetches the metrics of the step before.
"""

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax

from paxo.training.writers import Writer

if TYPE_CHECKING:
    from paxo.training.checkpoint import Checkpointer

logger = logging.getLogger(__name__)

State = TypeVar("State")
Metrics = dict[str, float]
WATCHED = ("loss", "grad_norm")


class NonFiniteLossError(ValueError):
    """The loss or the gradient is nan or infinite; says at which step and in which records."""


class Batches(Protocol):
    """An endless iterator of batches that knows where it is; the protocol need not be subclassed.

    Attributes:
        state: position of the next batch; its `to_dict()` goes into the checkpoints.
        identity: names the records of the batch that was handed out last.
    """

    state: Any
    identity: str

    def __next__(self) -> Any:
        """The next batch."""
        ...


def fit(
    step: Callable[[State, Any], tuple[State, Mapping[str, jax.Array]]],
    state: State,
    batches: Batches,
    *,
    num_steps: int,
    place: Callable[[Any], Any] | None = None,
    attach: Callable[[Any], Any] | None = None,
    writer: Writer | None = None,
    checkpointer: "Checkpointer | None" = None,
    evaluate: Callable[[State], Metrics] | None = None,
    evaluate_every: int = 0,
    log_every: int = 1,
    on_step: Callable[[int, Metrics], None] | None = None,
    whole: bool = True,
) -> State:
    """Train from `state.step` to `num_steps` and return the last state.

    A checkpoint holds a state whose loss was seen finite, and the position of the batch that it is
    to be trained on next. It is saved where it is due, after the last step, and, if the best are
    kept, after every evaluation. Ctrl-C and SIGTERM save one after the current step and stop.

    Args:
        step: compiled; returns the new state and a dict of scalars, among them `loss` and, for the
            speed, `num_tokens`. It may donate the state it is given.
        state: has a field `step`: an int32 scalar, the number of steps taken.
        batches: stands at the batch that `state` is to be trained on next.
        num_steps: of the whole run, those already taken included.
        place: puts a batch on the devices.
        attach: adds the log-probs of fixed policies to a batch, before `place`.
        writer: gets the metrics of every `log_every`-th and of the last step, and of evaluations.
        checkpointer: saves state and data position.
        evaluate: measures a state, which it must not keep: the next step may donate it.
        evaluate_every: steps between evaluations; with 0, only after the last step.
        log_every: steps between lines of metrics; 0 is only the last step.
        on_step: called with every step's number and metrics, one step late.
        whole: False where this is a part of a longer run, whose last step is nothing special:
            whoever calls saves, writes and measures what is due after it.

    Raises:
        NonFiniteLossError: naming step and records; no checkpoint of that step is saved.
        ValueError: the batches came to an end, or the best are to be kept and nobody measures.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint saved.
        SystemExit: with code 143 after SIGTERM, with a checkpoint saved.
    """
    if evaluate is None and checkpointer is not None and checkpointer.best_metric is not None:
        raise ValueError(
            f"the checkpointer keeps the best by {checkpointer.best_metric!r}, which nobody "
            "measures: give `evaluate`"
        )
    first = int(state.step) + 1
    if first > num_steps:
        return state
    report = _Report(writer, on_step, log_every, num_steps if whole else None, checkpointer)
    feed = _Feed(batches, attach, place)
    with _StopSignals() as stop:
        batch = feed.take(first)
        for number in range(first, num_steps + 1):
            state, metrics = step(state, batch.arrays)
            last = number == num_steps
            next_position = feed.position()
            next_batch = None if last else feed.take(number + 1)  # while the devices work
            report.fetch()
            report.add(number, metrics, batch.identity)

            scores = None
            if evaluate is not None and ((whole and last) or _falls_on(number, evaluate_every)):
                scores = report.evaluation(number, evaluate, state)
            if last:  # a signal that comes while this step runs must be seen
                report.fetch()
            stopped = stop.requested(number)
            if checkpointer is not None and (
                stopped
                or (whole and last)
                or (checkpointer.due(number) and not last)
                or (scores is not None and checkpointer.best_metric is not None)
            ):
                report.fetch()  # a state is saved only when its loss was seen finite
                checkpointer.save(number, state, next_position, scores)
            if stopped:
                report.fetch()
                stop.leave(number, checkpointer)
            batch = next_batch
        report.fetch()
    if checkpointer is not None and whole:
        checkpointer.wait()
    return state


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the step gets, and the names of the records in it."""

    arrays: Any
    identity: str


class _Feed:
    """Takes batches one by one and makes them ready for the step."""

    def __init__(self, batches: Batches, attach: Callable | None, place: Callable | None):
        self._batches = batches
        self._prepare = [change for change in (attach, place) if change is not None]

    def position(self) -> dict[str, Any]:
        """Where the batch that `take` would return stands in the data."""
        return dict(self._batches.state.to_dict())

    def take(self, number: int) -> _Batch:
        """The next batch, for step `number`."""
        try:
            arrays = next(self._batches)
        except StopIteration:
            raise ValueError(
                f"the batches came to an end before step {number}: give an iterator without end, "
                f"or num_steps={number - 1}"
            ) from None
        identity = self._batches.identity
        for change in self._prepare:
            arrays = change(arrays)
        return _Batch(arrays, identity)


class _Report:
    """Fetches the metrics of a step when asked to, checks them and hands them on."""

    def __init__(
        self,
        writer: Writer | None,
        on_step: Callable[[int, Metrics], None] | None,
        log_every: int,
        num_steps: int | None,
        checkpointer: "Checkpointer | None",
    ):
        self._writer = writer
        self._on_step = on_step
        self._log_every = log_every
        self._num_steps = num_steps
        self._checkpointer = checkpointer
        self._pending: tuple[int, Mapping[str, jax.Array], str] | None = None
        self._tokens = 0.0
        self._since: float | None = None  # None until the first step, and with it compilation, ends

    def add(self, number: int, metrics: Mapping[str, jax.Array], identity: str) -> None:
        """Remember the metrics of a step just dispatched, without waiting for them."""
        self._pending = (number, metrics, identity)

    def fetch(self) -> None:
        """Wait for the metrics added last, if that was not done yet; check and write them."""
        if self._pending is None:
            return
        number, metrics, identity = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._check_finite(number, values, identity)
        if self._on_step is not None:
            self._on_step(number, values)
        written = number == self._num_steps or _falls_on(number, self._log_every)
        speed = self._speed(values.get("num_tokens", 0.0), written)
        if written and self._writer is not None:
            self._writer.write(number, values | speed)

    def _check_finite(self, number: int, values: Metrics, identity: str) -> None:
        for name in WATCHED:
            if math.isfinite(values.get(name, 0.0)):
                continue
            saved = "no checkpoint was saved"
            if self._checkpointer is not None:
                self._checkpointer.wait()
                good = self._checkpointer.latest_step()
                if good is not None:
                    saved = (
                        f"the last good checkpoint is step {good} in {self._checkpointer.folder}"
                    )
            raise NonFiniteLossError(
                f"{name} is {values[name]} at step {number} ({identity}); {saved}: look at these "
                "records, lower the learning rate or clip the gradient"
            )

    def _speed(self, tokens: float, written: bool) -> Metrics:
        """Tokens a second since the last written step; {} where there is nothing to tell."""
        now = time.perf_counter()
        if self._since is None:
            self._since = now
            return {}
        self._tokens += tokens
        if not written or self._tokens == 0:
            return {}
        speed = self._tokens / (now - self._since)
        self._tokens, self._since = 0.0, now
        return {"tokens_per_second": speed}

    def evaluation(self, number: int, evaluate: Callable[[Any], Metrics], state: Any) -> Metrics:
        """What `evaluate` finds after step `number`, written below the metrics of that step."""
        self.fetch()
        start = time.perf_counter()
        scores = {name: float(value) for name, value in evaluate(state).items()}
        if self._writer is not None:
            self._writer.write(number, scores)
        if self._since is not None:
            self._since += time.perf_counter() - start  # the speed is that of training
        return scores


class _StopSignals:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one interrupts at once.

    With several processes, all stop after the same step: JAX agrees on it when one gets SIGTERM.
    Outside the main thread Python does not let a handler be set: signals then do what they did.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = number

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; with several processes, to be asked at every step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self._received = signal.SIGTERM
        return self._received is not None

    def leave(self, step: int, checkpointer: "Checkpointer | None") -> None:
        """Wait for the checkpoint and raise what ends the program."""
        saved = "nothing was saved"
        if checkpointer is not None:
            checkpointer.wait()
            saved = f"a checkpoint is in {checkpointer.folder}: run the same command to go on"
        name = signal.Signals(self._received or signal.SIGTERM).name
        message = f"stopped by {name} after step {step}; {saved}"
        logger.warning(message)
        raise KeyboardInterrupt(message) if name == "SIGINT" else SystemExit(143)
