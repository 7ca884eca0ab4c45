"""Groups of tokens -> a stream of packed batches that can be continued from any row.

An epoch is a shuffle of the groups cut into windows; each window is packed into rows, and the rows
are shuffled. All of it follows from (seed, epoch), on every process alike; a batch is the next rows
of the stream, of which each process fills its part. So the place of the next row is the whole data
state, whatever the number of processes.

>>> from paxo.data.packing import RowShape
>>> one, two = np.array([1]), np.array([2])
>>> def pair(i): return TokenGroup(one, (one, two), (True, True), (1, 0), {}, i, f"pairs.jsonl:{i}")
>>> groups, shape = [pair(i) for i in range(5)], RowShape(6, 4, 2, 2, 1)
>>> stream = Batches(groups, shape, rows_per_batch=2, prefetch=0)
>>> next(stream).tokens.shape, stream.state
((2, 6), DataState(seed=0, epoch=0, window=0, row=2))
>>> stream.identity
'epoch 0 window 0 rows 0-1: pairs.jsonl:..., pairs.jsonl:..., pairs.jsonl:...'
>>> again = Batches(groups, shape, rows_per_batch=2, prefetch=0, state=stream.state)
>>> bool((next(again).tokens == next(stream).tokens).all())
True
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from paxo.data.packing import (
    RowShape,
    group_index,
    pad_rows,
)
from paxo.data.records import TokenGroup
from paxo.data.unpaired import Mismatch
from paxo.data.windows import OwnWindows, Window, Windows
from paxo.types import PreferenceBatch

NAMED_SOURCES = 8  # records that `Batches.identity` names


@dataclasses.dataclass(frozen=True)
class DataState:
    """The place of the next row in the stream; the same for any number of processes.

    Attributes:
        seed: of the shuffles.
        epoch: passes over the set that are complete.
        window: window of the epoch.
        row: row of the window.
    """

    seed: int
    epoch: int = 0
    window: int = 0
    row: int = 0

    def __post_init__(self):
        for name, value in self.to_dict().items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"DataState.{name} must be an int of at least 0, got {value!r}")

    def to_dict(self) -> dict[str, int]:
        """The four numbers by name, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, numbers: Mapping[str, int]) -> "DataState":
        """The state that `to_dict` wrote; integers of NumPy or JAX are taken too."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(numbers) != names:
            raise ValueError(
                f"a data state has the entries {sorted(names)}, got {sorted(numbers)}: "
                "was the checkpoint written by another program?"
            )
        return cls(**{name: int(value) for name, value in numbers.items()})


class Batches:
    """Endless iterator over batches of `rows_per_batch` packed rows, NumPy arrays.

    Every group comes exactly once an epoch: batches run on over the ends of windows and epochs.
    Windows are packed ahead, in a thread of Grain's; `close` ends it.

    Attributes:
        groups: the set.
        shape: shape of a row.
        last_rows: for each row of the last batch, of this process, the numbers of its groups.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        shape: RowShape,
        rows_per_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 256,
        state: DataState | None = None,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
        mismatch: Mismatch | None = None,
    ):
        """Checks everything that can be checked before the first batch.

        Args:
            groups: the set; each must fit in a row, or a DataError names it.
            shape: shape of a row, see `choose_shape`.
            rows_per_batch: R of the global batch, over all processes.
            seed: of the shuffles.
            shuffle: False keeps the order of the set up to the packing of a window.
            window: groups that are packed together.
            state: continue here (`restore`).
            process_index: this process takes rows `[p * R / n, (p + 1) * R / n)` of each batch.
            process_count: n; it divides `rows_per_batch`.
            prefetch: windows packed ahead; 0 packs where `next` is called.
            mismatch: give each group a mismatched completion, another one each epoch.
        """
        self._own = _own_rows(rows_per_batch, process_index, process_count)
        self.groups, self.shape = groups, shape
        self._rows_per_batch, self._prefetch = rows_per_batch, prefetch
        self._windows = Windows(groups, shape, window, seed, shuffle, mismatch)
        self._source: Iterator[Window] | None = None
        self._identity, self.last_rows = "no batch yet", []
        self.restore(state or DataState(seed))

    @property
    def state(self) -> DataState:
        """The place of the row after the last batch."""
        epoch, window = divmod(self._number, self._windows.per_epoch)
        return DataState(self._windows.seed, epoch, window, self._row)

    @property
    def identity(self) -> str:
        """Place and records of the last batch, of this process: for messages."""
        names = [
            os.path.basename(self.groups[index].source) for row in self.last_rows for index in row
        ]
        more = f" and {len(names) - NAMED_SOURCES} more" if len(names) > NAMED_SOURCES else ""
        return f"{self._identity}: {', '.join(names[:NAMED_SOURCES])}{more}"

    def restore(self, state: DataState) -> None:
        """Continues at `state`; at most one window is packed for it."""
        if state.seed != self._windows.seed:
            raise ValueError(
                f"the data state has seed {state.seed}, this stream seed {self._windows.seed}: "
                "set the seed of the run that is continued"
            )
        if state.window >= self._windows.per_epoch:
            raise ValueError(
                f"the data state is in window {state.window}, but this set has "
                f"{self._windows.per_epoch} windows: set, truncation or window have changed since"
            )
        self.close()
        self._number = state.epoch * self._windows.per_epoch + state.window
        self._row = state.row
        self._filled = OwnWindows(
            self._windows, self._number, state.row, self._rows_per_batch, self._own
        )
        if state.row:
            self._window = self._filled(self._number)
            if state.row >= len(self._window.rows):
                raise ValueError(
                    f"the data state is at row {state.row} of a window that has "
                    f"{len(self._window.rows)}: set, truncation, window or row shape have changed"
                )

    def close(self) -> None:
        """Ends the thread that packs ahead; `next` starts another."""
        if hasattr(self._source, "close"):
            self._source.close()
        self._source = self._window = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> PreferenceBatch:
        parts, places, rows = [], [], []
        at = 0  # rows of the global batch so far
        while at < self._rows_per_batch:
            window = self._current()
            size = min(self._rows_per_batch - at, len(window.rows) - self._row)
            # The part of these rows that is this process's.
            low, high = max(self._own.start, at), min(self._own.stop, at + size)
            if low < high:
                here = slice(self._row + low - at, self._row + high - at)
                first = int(np.searchsorted(window.own, here.start))
                parts.append(_rows_of(window.batch, slice(first, first + high - low)))
                rows += window.rows[here]
                places.append(self._place(here))
            at += size
            self._advance(size)
        self._identity, self.last_rows = ", ".join(places), rows
        return parts[0] if len(parts) == 1 else jax.tree.map(_concatenated, *parts)

    def steps_per_epoch(self) -> float:
        """Batches of an epoch, about: it differs between epochs, and some windows stand for all."""
        some = min(4, self._windows.per_epoch)
        rows = sum(len(self._windows.rows(number)) for number in range(some))
        return rows / some * self._windows.per_epoch / self._rows_per_batch

    def _current(self) -> Window:
        if self._window is None:
            if self._source is None:
                self._source = _windows_from(self._filled, self._number, self._prefetch)
            self._window = next(self._source)
        return self._window

    def _advance(self, size: int) -> None:
        self._row += size
        if self._row == len(self._window.rows):
            self._number, self._row, self._window = self._number + 1, 0, None

    def _place(self, rows: slice) -> str:
        epoch, window = divmod(self._number, self._windows.per_epoch)
        return f"epoch {epoch} window {window} rows {rows.start}-{rows.stop - 1}"


def epoch_batches(
    groups: Sequence[TokenGroup],
    shape: RowShape,
    rows_per_batch: int,
    *,
    window: int = 256,
    process_index: int = 0,
    process_count: int = 1,
    mismatch: Mismatch | None = None,
) -> Iterator[tuple[PreferenceBatch, np.ndarray]]:
    """One pass without shuffle, for evaluation and scoring; empty rows fill up the last batch.

    Mismatched completions, if they are asked for, are always those of epoch 0 of seed 0.

    Returns:
        An iterator over (this process's rows of a batch, `[R, G]` the number of the group at each
        place, -1 where none). With `here = index >= 0`, `out[index[here]] = values[here]` brings
        results into the order of the groups.
    """
    own = _own_rows(rows_per_batch, process_index, process_count)
    windows = Windows(groups, shape, window, seed=0, shuffle=False, mismatch=mismatch)
    rows = [row for number in range(windows.per_epoch) for row in windows.rows(number)]

    def batch_at(start: int) -> tuple[PreferenceBatch, np.ndarray]:
        mine = rows[start : start + rows_per_batch][own]
        batch = pad_rows(windows.filled(0, mine), own.stop - own.start)
        return batch, group_index(mine, shape, own.stop - own.start)

    return map(batch_at, range(0, len(rows), rows_per_batch))


def _own_rows(rows_per_batch: int, process_index: int, process_count: int) -> slice:
    if rows_per_batch < 1 or rows_per_batch % process_count:
        raise ValueError(
            f"rows_per_batch ({rows_per_batch}) must be a positive multiple of the number of "
            f"processes ({process_count}): each takes as many rows"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below {process_count} processes")
    size = rows_per_batch // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _windows_from(windows: OwnWindows, first: int, prefetch: int) -> Iterator[Window]:
    """The windows from number `first` on, `prefetch` of them packed ahead by a thread."""
    if prefetch == 0:
        return map(windows, range(first, sys.maxsize))
    # Imported here: Grain takes half a second, and a pass for evaluation does without.
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    numbers = grain.MapDataset.range(first, sys.maxsize)
    return iter(numbers.map(windows).to_iter_dataset(options))


def _rows_of(batch: PreferenceBatch, rows: slice) -> PreferenceBatch:
    return jax.tree.map(lambda array: array[rows], batch)


def _concatenated(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays)
