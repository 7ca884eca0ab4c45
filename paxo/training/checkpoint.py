"""Checkpoints: the training state and the position in the data, written while training goes on.

A thin layer over Orbax, which copies the arrays to the host before `save` returns (on CPU it holds
them, so that a donating step writes elsewhere), writes them in the background under another name,
and renames the folder when all is there. What a kill leaves half-written is therefore never read,
and removed at the next start.

`TrainState.frozen` is left out, as it follows from the settings of the run: only a fingerprint of
it is kept, so that a run does not go on with another base or reference.
"""

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from paxo.training.state import TrainState

logger = logging.getLogger(__name__)

State = TypeVar("State")
# Name of the fingerprints beside the position in the data.
FROZEN = "frozen"
BUCKET = "bucket.txt"  # in a run folder that is not kept: the address where what is kept lies


class Checkpointer:
    """Keeps the newest checkpoints of a run, and its best ones by a metric, in `<folder>/<step>/`.

    Args:
        folder: made if it is not there; a local path, or a bucket's address ("gs://...").
        every: steps from one checkpoint to the next, see `due`.
        keep: how many of the newest are kept.
        best_metric: name of the metric by which the best are kept as well; checkpoints saved
            without metrics take no part.
        best_mode: whether a larger or a smaller value is better.
        keep_best: how many of the best are kept.
        frozen: name -> fingerprint of the arrays in `TrainState.frozen`, which are not saved: a
            checkpoint made with others is refused.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
        frozen: Mapping[str, str] | None = None,
    ):
        for name, value in (("every", every), ("keep", keep), ("keep_best", keep_best)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', got {best_mode!r}")
        self.folder = _absolute(folder)
        self.every = every
        self.best_metric = best_metric
        self.frozen = dict(frozen or {})
        self._sign = 1.0 if best_mode == "max" else -1.0
        _check_writable(self.folder)
        self._threads = _QuietThreads()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=self._options(keep, keep_best),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def _options(self, keep: int, keep_best: int) -> ocp.CheckpointManagerOptions:
        kept: list[Any] = [policies.LatestN(keep)]
        if self.best_metric is not None:
            best = policies.BestN(
                get_metric_fn=self._quality, n=keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        return ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # Makes Orbax write the metrics; which are kept, the policy above decides.
            best_fn=None if self.best_metric is None else self._quality,
            cleanup_tmp_directories=True,
        )

    def _quality(self, metrics: Mapping[str, float]) -> float:
        """Larger is better; lowest for checkpoints saved without the metric, and for NaN."""
        value = metrics.get(self.best_metric, math.nan)
        return -math.inf if math.isnan(value) else self._sign * value

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy the state and go on writing in the background; the next save waits for this one.

        Args:
            step: number of training steps taken. A step that is already saved is left alone.
            state: a pytree of arrays, typed random keys among them; it may be donated afterwards.
            data: position of the next batch to be trained on, anything JSON can say but "frozen".
            metrics: what this state was found to be worth, for `best_metric`.

        Raises:
            ValueError: the metrics lack `best_metric`.
            OSError: the checkpoint before this one could not be written, or this one not be begun.
        """
        if metrics is not None and self.best_metric and self.best_metric not in metrics:
            raise ValueError(
                f"best_metric {self.best_metric!r} is not among the metrics {sorted(metrics)}"
            )
        if step in self.steps():
            return
        position = dict(data) | ({FROZEN: self.frozen} if self.frozen else {})
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_changing(state)), data=ocp.args.JsonSave(position)
        )
        self.wait()
        with self._one_clear_line(OSError):
            self._manager.save(step, args=args, metrics=metrics and dict(metrics), force=True)

    def restore_latest(self, abstract_state: State) -> tuple[State, dict[str, Any], int] | None:
        """The newest finished checkpoint as (state, data, step); None where there is none.

        See `restore` for the arguments and errors.
        """
        step = self.latest_step()
        if step is None:
            return None
        state, data = self.restore(step, abstract_state)
        logger.info("restored step %d from %s", step, self.folder)
        return state, data, step

    def restore(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """State and data position of one checkpoint.

        Args:
            step: one of `steps()`.
            abstract_state: a pytree of `jax.ShapeDtypeStruct` (or arrays) like the saved one; their
                shardings, on any mesh, are those of the result (without one: the first device).
                What a `TrainState` holds as `frozen` is in the result as it is given.

        Raises:
            ValueError: the checkpoint is of another model, optimiser or frozen parameters, or it is
                damaged.
        """
        self.wait()
        given = abstract_state
        abstract_state = jax.tree.map(_abstract, _changing(given))
        try:
            found = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise ValueError(self._damaged(step, error)) from error
        _check_same_arrays(f"checkpoint {self.folder / str(step)}", found, abstract_state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            raise ValueError(self._damaged(step, error)) from error
        state, position = restored["state"], dict(restored["data"])
        _check_same_frozen(self.folder / str(step), position.pop(FROZEN, {}), self.frozen)
        if isinstance(given, TrainState):
            state = state.replace(frozen=given.frozen)
        return state, position

    def _damaged(self, step: int, error: Exception) -> str:
        return (
            f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}): "
            "remove that folder to go on from the one before"
        )

    def steps(self) -> list[int]:
        """Steps with a checkpoint, the one being written included."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest of `steps()`."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step whose `best_metric` is best; None where no checkpoint has it."""
        return self._manager.best_step()

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        with self._one_clear_line(Exception):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop the background threads."""
        self.wait()
        self._manager.close()
        self._threads.restore()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _one_clear_line(self, errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except errors as error:
            self._threads.failed = True
            _remove_unfinished(self.folder)
            self._manager.reload()
            last = self.latest_step()
            kept = "no checkpoint was finished" if last is None else f"step {last} is kept"
            raise OSError(
                f"cannot write a checkpoint in {self.folder} ({_reason(error)}): make room there "
                f"or choose another folder, and run the same command again; {kept}"
            ) from error


class _QuietThreads(logging.Filter):
    """Drops the tracebacks of Orbax's threads: the error itself is raised too.

    They come after it as well, so where a write has failed this stays until the program ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        for each in self._loggers:
            each.addFilter(self)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable

    def filter(self, record: logging.LogRecord) -> bool:
        # Whose path absl's records show depends on who made its logger first.
        message = record.getMessage()
        of_orbax = "orbax" in record.pathname + message or message.startswith("[process=")
        no_metrics = "did not provide metrics" in message
        return not (of_orbax and (record.levelno >= logging.ERROR or no_metrics))

    def _unraisable(self, what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":  # a write outlived what waited for it
            self._hook(what)

    def restore(self) -> None:
        if not self.failed:
            sys.unraisablehook = self._hook
            for each in self._loggers:
                each.removeFilter(self)


def _check_writable(folder: epath.Path) -> None:
    """Make the folder and write a file in it: better now than after the first hundred steps."""
    if jax.process_index() != 0:
        return
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written to {folder} ({error.strerror or error}): "
            "choose a folder that can be written"
        ) from error


def _remove_unfinished(folder: epath.Path) -> None:
    if jax.process_index() == 0:
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            path.rmtree()


def _changing(state: State) -> State:
    """The state without what is frozen."""
    return state.replace(frozen={}) if isinstance(state, TrainState) else state


def _check_same_frozen(where: epath.Path, before: Mapping[str, str], now: Mapping[str, str]):
    differ = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differ:
        raise ValueError(
            f"checkpoint {where} was made with other frozen parameters ({', '.join(differ)}): give "
            "the model and the reference that the run began with, or choose another folder"
        )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array or of something like it."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same_arrays(where: str, found: Any, wanted: Any) -> None:
    """Raise a ValueError that names the first array which differs in place, shape or dtype."""
    there, here = _described(found), _described(wanted)
    differ = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    if not differ:
        return
    # A parameter says more than the moments of the optimiser that follow from it.
    name = min(differ, key=lambda name: (not name.startswith("params/"), name))
    before, now = (arrays.get(name, "absent") for arrays in (there, here))
    raise ValueError(
        f"{where} is of another model or optimiser: {name} is {before} there and {now} here "
        f"({len(differ)} of {len(there | here)} arrays differ): "
        "go back to the settings it was made with, or choose another folder"
    )


def _described(tree: Any) -> dict[str, str]:
    """`{"params/layers/w": "float32[512, 64]"}` for each array; keys as the data they hold."""

    def describe(leaf: Any) -> str:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf)
        for path, leaf in leaves
    }


def _reason(error: Exception) -> str:
    """What the operating system said, where Orbax passed it on, or the error's first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def kept_folder(workdir: str | os.PathLike[str]) -> epath.Path:
    """Where what a run goes on from lies: its folder, or the bucket that `BUCKET` there names.

    Args:
        workdir: of the run, or a folder in it of one of its trainings ("sft").
    """
    folder = epath.Path(workdir)
    for run, part in ((folder, ()), (folder.parent, (folder.name,))):
        if (run / BUCKET).exists():
            return epath.Path((run / BUCKET).read_text().strip()).joinpath(*part)
    return folder


def checkpoint_folder(workdir: str | os.PathLike[str]) -> epath.Path:
    """Where a run's checkpoints lie, see `kept_folder`."""
    return kept_folder(workdir) / "checkpoints"


def _absolute(folder: str | os.PathLike[str]) -> epath.Path:
    """The folder from the root; a bucket's address is one already."""
    return epath.Path(folder if "://" in str(folder) else os.path.abspath(folder))


def read_params(folder: str | os.PathLike[str], step: int | None = None) -> Any:
    """The trained parameters of one checkpoint, on the first device, and nothing else of it.

    Args:
        folder: of the checkpoints.
        step: which one; the newest where None.

    Raises:
        FileNotFoundError: if there is no such checkpoint; the message names those there are.
    """
    where = _folder_of(folder, step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(where).item_metadata.tree["params"]
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            "params": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), found
            )
        }
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        return reader.restore(where, args=args)["params"]


def read_frozen(folder: str | os.PathLike[str], step: int | None = None) -> dict[str, str]:
    """Name -> fingerprint of the frozen parameters beside which a checkpoint's were trained.

    Arguments and errors are those of `read_params`.
    """
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return dict(reader.restore(_folder_of(folder, step) / "data").get(FROZEN, {}))


def _folder_of(folder: str | os.PathLike[str], step: int | None) -> epath.Path:
    """The folder of one checkpoint, by default the newest."""
    path = _absolute(folder)  # Orbax finds no metadata under a relative path
    names = [p.name for p in path.iterdir()] if path.exists() else []
    steps = sorted(int(name) for name in names if name.isdecimal())
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        which = "" if step is None else f" of step {step}"
        raise FileNotFoundError(f"{folder}: no checkpoint{which}; there are {steps}")
    return path / str(step)
