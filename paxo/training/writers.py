"""Where the metrics of a run go: `metrics.jsonl`, TensorBoard, the terminal and `log.txt`.

Metrics are functions of the run alone, so that two runs can be compared bit for bit; the few that
tell the time have the names in `TIMING_KEYS`.
"""

import contextlib
import datetime
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

from etils import epath

TIMING_KEYS = ("tokens_per_second", "seconds")
METRICS = "metrics.jsonl"


class Writer(Protocol):
    """Takes the metrics of a step; the protocol need not be subclassed."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics found after `step` training steps; steps never go back."""
        ...

    def close(self) -> None:
        """Finish what is open."""
        ...


def make_writer(
    workdir: str | os.PathLike[str],
    total_steps: int,
    resume_step: int = 0,
    name: str = "train",
    *,
    resume_round: int | None = None,
) -> Writer:
    """The writers of a run folder together; on processes other than 0, one that does nothing.

    Args:
        workdir: folder for `metrics.jsonl`, `log.txt` and `tensorboard/`, made if it is not there.
        total_steps: steps of the whole run, for the progress bar.
        resume_step: step from which the run goes on: what an earlier attempt wrote after it is
            removed. 0 is a new run and removes everything.
        name: what the progress bar says.
        resume_round: rounds that the run has behind it, if it is one of rounds: the line of a later
            one is removed even where its last step was `resume_step`.

    Raises:
        OSError: the folder cannot be written.
    """
    import jax

    if jax.process_index() != 0:
        return MultiWriter([])
    from paxo.training.checkpoint import kept_folder

    folder, kept = pathlib.Path(workdir), kept_folder(workdir)
    copy = EvaluationCopy(kept / METRICS) if str(kept) != str(folder) else None
    if copy is not None and not (folder / METRICS).exists():
        copy.bring(folder / METRICS)
    lines = JsonlWriter(folder / METRICS)
    lines.truncate_after(resume_step or -1, math.inf if resume_round is None else resume_round)
    writers = [
        lines,
        TensorBoardWriter(folder / "tensorboard", purge_step=resume_step + 1),
        LogWriter(folder / "log.txt", total_steps, name),
        TerminalWriter(total_steps, name, first_step=resume_step),
    ]
    if copy is not None:
        copy.begin(folder / METRICS)
        writers.append(copy)
    return MultiWriter(writers)


class MultiWriter:
    """Hands everything to several writers; with none of them, does nothing."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = list(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write to each."""
        for writer in self.writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Close each, the others too when one cannot be."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self.writers):
                stack.callback(writer.close)


class JsonlWriter:
    """One JSON object a line: `{"step": 17, "loss": 0.69, ...}`; null stands for nan and infinity.

    A line is written whole or not at all, and the numbers read back are those written, to the bit.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        with _one_clear_line(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)

    def truncate_after(self, step: int, rounds: float = math.inf) -> None:
        """Remove the lines of later steps or rounds, and what a kill left half-written, at once."""
        kept = b"".join(
            line
            for line in self.path.open("rb")
            if _number(line, "step") <= step and _number(line, "round", 0) <= rounds
        )
        spare = self.path.with_name(self.path.name + ".tmp")
        with _one_clear_line(self.path):
            try:
                with spare.open("wb") as file:
                    file.write(kept)
                    os.fsync(file.fileno())
                spare.replace(self.path)
            finally:
                spare.unlink(missing_ok=True)
            self._file.close()
            self._file = self.path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        line = memoryview(_line(step, metrics))
        start = self._file.seek(0, os.SEEK_END)
        try:
            with _one_clear_line(self.path):
                while line:
                    line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(start)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EvaluationCopy:
    """The lines of evaluations and rounds in a run's bucket, for a machine that has no others.

    The file is written anew with each of them, as nothing can be added to one in a bucket; lines of
    single steps are too many for that.

    Args:
        there: the file in the bucket.
    """

    def __init__(self, there: epath.Path):
        self._there, self._lines = there, b""

    def bring(self, here: pathlib.Path) -> None:
        """Begin a file of metrics with what an earlier machine has left."""
        if self._there.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_bytes(self._there.read_bytes())

    def begin(self, here: pathlib.Path) -> None:
        """Go on from the lines of a file of metrics."""
        lines = here.read_bytes().splitlines(keepends=True)
        self._lines = b"".join(line for line in lines if not _is_of_step(json.loads(line)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the file with one more line, if that is of an evaluation or a round."""
        if not _is_of_step(metrics):
            self._lines += _line(step, metrics)
            self._there.parent.mkdir(parents=True, exist_ok=True)
            self._there.write_bytes(self._lines)

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardWriter:
    """Scalars for TensorBoard.

    Args:
        folder: made if it is not there.
        purge_step: TensorBoard hides what earlier runs in this folder wrote from this step on.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int = 0):
        import tensorboardX

        with _one_clear_line(pathlib.Path(folder)):
            # By themselves file names differ by the second: a quick resume would overwrite a file.
            self._summary = tensorboardX.SummaryWriter(
                str(folder), purge_step=purge_step, filename_suffix=f".{time.time_ns()}"
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the scalars; they reach the disk within two minutes and at `close`."""
        for name, value in metrics.items():
            self._summary.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._summary.close()


class TerminalWriter:
    """A progress bar on a terminal; elsewhere a plain line now and then, and for each evaluation.

    Args:
        total_steps: steps of the whole run.
        name: stands before the bar.
        first_step: step from which this run goes on.
        stream: standard error by default.
        seconds_between_lines: where there is no bar.
    """

    def __init__(
        self,
        total_steps: int,
        name: str = "train",
        *,
        first_step: int = 0,
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ):
        self._stream = stream or sys.stderr
        self._lines = _Lines(total_steps, name, seconds_between_lines)
        self._bar = _make_bar(self._stream) if self._stream.isatty() else None
        if self._bar is not None:
            # The bar starts where the run does, or the time left would count steps of another run.
            self._task = self._bar.add_task(
                name, total=total_steps, completed=first_step, figures=""
            )
            self._bar.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar, or print a line if it is time."""
        if self._bar is None:
            if line := self._lines.due(step, metrics):
                print(line, file=self._stream, flush=True)
        elif _is_evaluation(metrics):
            self._bar.console.print(self._lines.due(step, metrics), markup=False, highlight=False)
        else:
            self._bar.update(self._task, completed=step, figures="  ".join(_figures(metrics)))

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


class LogWriter:
    """`log.txt`: a progress line now and then, and all that the loggers of paxo say meanwhile."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        total_steps: int,
        name: str = "train",
        *,
        seconds_between_lines: float = 10.0,
    ):
        with _one_clear_line(pathlib.Path(path)):
            self._handler = logging.FileHandler(path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.getLogger("paxo")
        self._level_before = self._logger.level
        files = [getattr(handler, "baseFilename", None) for handler in self._logger.handlers]
        if self._handler.baseFilename not in files:  # `paxo run` logs to this file already
            self._logger.addHandler(self._handler)
        if self._logger.getEffectiveLevel() > logging.INFO:
            self._logger.setLevel(logging.INFO)
        self._lines = _Lines(total_steps, name, seconds_between_lines)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a line if it is time."""
        if line := self._lines.due(step, metrics):
            # Straight to the file: through the logger it would reach the terminal as well.
            record = self._logger.makeRecord("paxo", logging.INFO, __file__, 0, line, (), None)
            self._handler.handle(record)

    def close(self) -> None:
        """Let go of the loggers."""
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level_before)
        self._handler.close()


class _Lines:
    """Decides when a plain line is due, and what it says."""

    def __init__(self, total_steps: int, name: str, seconds_between: float):
        self._total = total_steps
        self._name = name
        self._seconds_between = seconds_between
        self._start: tuple[int, float] | None = None
        self._last = -math.inf

    def due(self, step: int, metrics: Mapping[str, float]) -> str:
        """The line for these metrics, or "" where the last one was written a moment ago."""
        now = time.monotonic()
        self._start = self._start or (step, now)
        if not _is_evaluation(metrics):
            if now - self._last < self._seconds_between and step < self._total:
                return ""
            self._last = now
        parts = [f"{self._name} {step}/{self._total}", *_figures(metrics)]
        first, since = self._start
        if first < step < self._total:
            left = (now - since) / (step - first) * (self._total - step)
            parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        return "  ".join(parts)


def _line(step: int, metrics: Mapping[str, float]) -> bytes:
    values = {name: _finite_or_none(value) for name, value in metrics.items()}
    return json.dumps({"step": step, **values}).encode() + b"\n"


def _is_of_step(metrics: Mapping[str, float]) -> bool:
    """Of a single training step."""
    return "loss" in metrics


def _is_evaluation(metrics: Mapping[str, float]) -> bool:
    """Neither of a training step nor of a round of self-play that nobody evaluated."""
    of_training = _is_of_step(metrics) or "round" in metrics
    return not of_training or any(name.startswith("eval/") for name in metrics)


def _figures(metrics: Mapping[str, float]) -> list[str]:
    """The loss and the speed of a step, the length of a round's texts, or what was evaluated."""
    figures = [f"round {metrics['round']:.0f}"] if "round" in metrics else []
    if _is_evaluation(metrics):
        shown = {k: v for k, v in metrics.items() if not k.endswith(("_low", "_high"))}
        if figures:  # of a round: what was drawn stands in metrics.jsonl
            shown = {k.removeprefix("eval/"): v for k, v in shown.items() if k.startswith("eval/")}
        return [*figures, *(f"{name} {value:.4g}" for name, value in shown.items())]
    figures += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if "round/tokens" in metrics:
        figures.append(f"{metrics['round/tokens']:.1f} tokens a completion")
    if "tokens_per_second" in metrics:
        figures.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return figures


def _make_bar(stream: TextIO) -> Any:
    """A rich progress bar: step of steps, loss, tokens a second, time left."""
    from rich import console, progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console.Console(file=stream),
    )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(line: bytes, name: str, missing: float = math.inf) -> float:
    """The step or round of a line of metrics; infinity for what is not a whole line."""
    try:
        return json.loads(line).get(name, missing) if line.endswith(b"\n") else math.inf
    except (ValueError, AttributeError):
        return math.inf


@contextlib.contextmanager
def _one_clear_line(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror or error}): make room there or choose another "
            "folder, and run the same command again"
        ) from error
