"""The windows of a set, packed: an epoch is a shuffle of the groups, cut into like parts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paxo.data.packing import (
    Rows,
    RowShape,
    Sizes,
    check_fits,
    fill_rows,
    group_sizes,
    pack_rows,
    split_windows,
)
from paxo.data.records import TokenGroup
from paxo.data.unpaired import Mismatch, Mismatched
from paxo.types import PreferenceBatch


class Window(NamedTuple):
    """Packed groups.

    Attributes:
        rows: for each row the numbers of its groups in the set.
        own: `[R]` which of the rows are this process's, in their order.
        batch: these, `[R, ...]`.
    """

    rows: Rows
    own: np.ndarray
    batch: PreferenceBatch


class Windows:
    """The windows of all epochs, numbered through: a pure function of the number."""

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        shape: RowShape,
        window: int,
        seed: int,
        shuffle: bool,
        mismatch: Mismatch | None = None,
    ):
        self.shape, self.seed, self.shuffle = shape, seed, shuffle
        self._sizes = sizes = group_sizes(groups)
        self._mismatched = None if mismatch is None else Mismatched(groups, mismatch, seed)
        if self._mismatched is None:
            check_fits(groups, sizes, shape)
        else:
            check_fits(groups, sizes.plus(self._mismatched.most), shape, further=1)
        self._latest = (-1, groups, sizes)  # an epoch, its groups and their sizes
        self._parts = split_windows(len(groups), window)
        self._order = (-1, np.arange(len(groups)))  # an epoch and the order of its groups

    @property
    def per_epoch(self) -> int:
        """Number of windows of an epoch."""
        return len(self._parts)

    def rows(self, number: int) -> Rows:
        """The rows of a window, not yet filled."""
        epoch, window = divmod(number, self.per_epoch)
        members = self._shuffled(epoch)[self._parts[window]]
        rows = pack_rows(*self._groups(epoch)[1].take(members), self.shape)
        if self.shuffle:
            # Packing opens rows for the largest groups first: batches would go from large to small.
            order = np.random.default_rng((self.seed, epoch, window + 1)).permutation(len(rows))
            rows = [rows[i] for i in order]
        return [members[row].tolist() for row in rows]

    def filled(self, epoch: int, rows: Rows) -> PreferenceBatch:
        """Rows of an epoch, filled."""
        return fill_rows(self._groups(epoch)[0], rows, self.shape)

    def _groups(self, epoch: int) -> tuple[Sequence[TokenGroup], Sizes]:
        """The groups of an epoch, with their mismatched completions if there are to be any."""
        known, groups, sizes = self._latest  # read once: another thread may be in another epoch
        if self._mismatched is not None and known != epoch:
            groups = self._mismatched.epoch(epoch)
            sizes = self._sizes.plus(groups.added)
            self._latest = (epoch, groups, sizes)
        return groups, sizes

    def _shuffled(self, epoch: int) -> np.ndarray:
        known, order = self._order  # read once: another thread may be in another epoch
        if self.shuffle and known != epoch:
            # NumPy takes (seed, epoch, 0) for the same seed: those of the rows end in 1 or more.
            order = np.random.default_rng((self.seed, epoch)).permutation(len(order))
            self._order = (epoch, order)
        return order


class OwnWindows:
    """The windows from a row of the stream on, of each the rows that are a process's own filled.

    Args:
        windows: of the stream.
        number: of the window in which the first batch begins.
        row: of that window, its first one.
        batch: rows of a global batch.
        own: which of them are this process's.
    """

    def __init__(self, windows: Windows, number: int, row: int, batch: int, own: slice):
        self._windows, self._batch, self._own = windows, batch, own
        # Window -> place in its batch of the window's first row; threads write the same into it.
        self._places = {number: -row % batch}

    def __call__(self, number: int) -> Window:
        """A window of those from the first one on."""
        rows = self._windows.rows(number)
        place = self._place(number)
        self._places[number + 1] = (place + len(rows)) % self._batch
        places = (place + np.arange(len(rows))) % self._batch
        own = np.flatnonzero((places >= self._own.start) & (places < self._own.stop))
        mine = [rows[i] for i in own]
        return Window(rows, own, self._windows.filled(number // self._windows.per_epoch, mine))

    def _place(self, number: int) -> int:
        if number not in self._places:
            before = self._place(number - 1) + len(self._windows.rows(number - 1))
            self._places[number] = before % self._batch
        return self._places[number]
