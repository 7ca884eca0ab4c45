"""Groups of tokens -> packed rows, and back.

A row holds several groups; a group is its prompt, once, and then the tokens of each completion.

>>> ids = lambda *tokens: np.array(tokens, np.int32)
>>> candidates = (ids(5, 2), ids(6))
>>> pair = TokenGroup(ids(1, 7), candidates, (True, False), (1.0, 0.0), {}, 0, "pairs.jsonl:1")
>>> shape = RowShape(length=6, slots=4, groups=1, candidates=2, max_completion=2)
>>> batch, index = pack_groups([pair], shape)
>>> batch.tokens.tolist(), batch.branch.tolist(), batch.positions.tolist()
([[1, 7, 5, 2, 6, 0]], [[0, 0, 1, 1, 2, 0]], [[0, 1, 2, 3, 2, 0]])
>>> batch.score_token.tolist(), batch.score_from.tolist(), batch.score_slot.tolist()
([[5, 2, 6, 0]], [[1, 2, 1, 0]], [[0, 0, 1, 2]])
>>> index.tolist()
[[0]]
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paxo.data.records import DataError, Extra, TokenGroup, extra_axes
from paxo.data.row_shape import (
    Overhead,
    Rows,
    RowShape,
    Sizes,
    check_fits,
    choose_shape,
    group_sizes,
    pack_rows,
    packing_overhead,
    split_windows,
)
from paxo.types import PreferenceBatch

__all__ = [
    "Overhead",
    "RowShape",
    "Rows",
    "Sizes",
    "check_fits",
    "choose_shape",
    "fill_rows",
    "group_index",
    "group_sizes",
    "pack_groups",
    "pack_rows",
    "packing_overhead",
    "pad_rows",
    "padding_share",
    "sequence_tokens",
    "split_windows",
]


def pack_groups(
    groups: Sequence[TokenGroup], shape: RowShape, num_rows: int | None = None
) -> tuple[PreferenceBatch, np.ndarray]:
    """Packs groups, read or sampled, into one batch.

    Args:
        groups: at least one; each must fit in a row, or a DataError names it.
        shape: shape of a row.
        num_rows: pad with empty rows to this number, so that batches always have the same shape.

    Returns:
        The batch, and `[R, G]` the number of the group at each place (see `group_index`).
    """
    sizes = group_sizes(groups)
    check_fits(groups, sizes, shape)
    rows = pack_rows(*sizes, shape)
    batch = fill_rows(groups, rows, shape)
    if num_rows is not None:
        batch = pad_rows(batch, num_rows)
    return batch, group_index(rows, shape, len(batch.tokens))


def fill_rows(groups: Sequence[TokenGroup], rows: Rows, shape: RowShape) -> PreferenceBatch:
    """The packed batch, of NumPy arrays.

    Args:
        groups: all with the same extras, see `Record`.
        rows: for each row the numbers of its groups, as `pack_rows` gives them.
        shape: shape of a row; extras are padded with 0 to its candidates and tokens.
    """
    first = groups[0].extras
    batch, names = _empty_rows(len(rows), shape, first), tuple(first)
    for row, members in enumerate(rows):
        at, slot = 0, 0  # the next free token and slot
        for g, index in enumerate(members):
            at, slot = _fill_group(batch, row, g, at, slot, groups[index])
            _fill_extras(batch.extras, names, row, g, groups[index])
    return batch


def group_index(rows: Rows, shape: RowShape, num_rows: int) -> np.ndarray:
    """`[num_rows, G]` int32 number of the group at each place, -1 where none.

    It brings results of a batch back into the order of the groups: with `here = index >= 0`,
    `out[index[here]] = values[here]`.
    """
    index = np.full((num_rows, shape.groups), -1, np.int32)
    for row, members in enumerate(rows):
        index[row, : len(members)] = members
    return index


def pad_rows(batch: PreferenceBatch, num_rows: int) -> PreferenceBatch:
    """The batch with empty rows after its own, `num_rows` in all."""
    missing = num_rows - len(batch.tokens)
    if missing < 0:
        raise ValueError(f"the batch has {len(batch.tokens)} rows, more than num_rows={num_rows}")
    _, num_groups, num_candidates = batch.where.shape

    def pad(array: Any, fill: int = 0) -> np.ndarray:
        array = np.asarray(array)
        return np.concatenate([array, np.full((missing, *array.shape[1:]), fill, array.dtype)])

    no_slot = num_groups * num_candidates
    return jax.tree.map(pad, batch).replace(score_slot=pad(batch.score_slot, no_slot))


def sequence_tokens(
    batch: PreferenceBatch,
) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """Reads the candidates back in order: (row, g, k, prompt ids, completion ids)."""
    tokens, group, branch = map(np.asarray, (batch.tokens, batch.group, batch.branch))
    for row in range(len(tokens)):
        # The branch changes wherever a part begins: groups start with branch 0, end with another.
        edges = [0, *(np.flatnonzero(np.diff(branch[row])) + 1), tokens.shape[1]]
        prompt = tokens[row, :0]
        for start, end in itertools.pairwise(edges):
            g, k = int(group[row, start]) - 1, int(branch[row, start]) - 1
            if g < 0:
                continue
            if k < 0:
                prompt = tokens[row, start:end]
            else:
                yield row, g, k, prompt, tokens[row, start:end]


def padding_share(batch: PreferenceBatch) -> Any:
    """Share of the token positions that hold no token: a scalar, of NumPy or of JAX."""
    return (batch.group == 0).mean()


def _empty_rows(num_rows: int, shape: RowShape, extras: Mapping[str, Extra]) -> PreferenceBatch:
    """Rows of padding, to be filled in place."""

    def ints(size: int, fill: int = 0) -> np.ndarray:
        return np.full((num_rows, size), fill, np.int32)

    length, slots, places = shape.length, shape.slots, (num_rows, shape.groups)
    return PreferenceBatch(
        tokens=ints(length),
        positions=ints(length),
        group=ints(length),
        branch=ints(length),
        score_from=ints(slots),
        score_token=ints(slots),
        score_slot=ints(slots, shape.groups * shape.candidates),
        labels=np.zeros((*places, shape.candidates), np.float32),
        where=np.zeros((*places, shape.candidates), bool),
        extras={
            extra_axes(name, value)[0]: np.zeros((*places, *_extra_shape(name, value, shape)), "f4")
            for name, value in extras.items()
        },
        max_completion=shape.max_completion,
    )


def _fill_group(
    batch: PreferenceBatch, row: int, g: int, at: int, slot: int, group: TokenGroup
) -> tuple[int, int]:
    """Writes the group from token `at` and slot `slot` on, and returns the next free ones."""
    prompt_size, num_candidates = len(group.prompt), batch.where.shape[2]
    prompt_end = at + prompt_size
    batch.tokens[row, at:prompt_end] = group.prompt
    batch.positions[row, at:prompt_end] = np.arange(prompt_size)
    start = prompt_end
    for k, completion in enumerate(group.completions):
        size = len(completion)
        here, scored = slice(start, start + size), slice(slot, slot + size)
        batch.tokens[row, here] = completion
        batch.positions[row, here] = np.arange(prompt_size, prompt_size + size)
        batch.branch[row, here] = k + 1
        batch.score_token[row, scored] = completion
        # The end of the prompt predicts the first token, and each token the one after it.
        batch.score_from[row, scored] = np.arange(start - 1, start + size - 1)
        batch.score_from[row, slot] = prompt_end - 1
        batch.score_slot[row, scored] = g * num_candidates + k
        start, slot = here.stop, scored.stop
    batch.group[row, at:start] = g + 1
    batch.labels[row, g, : len(group.labels)] = group.labels
    batch.where[row, g, : len(group.completions)] = True
    return start, slot


def _extra_shape(name: str, value: Extra, shape: RowShape) -> tuple[int, ...]:
    """Of an extra of one group, padded."""
    sizes = {"K": shape.candidates, "T": shape.max_completion}
    axes = extra_axes(name, value)[1]
    return tuple(sizes[axis] if axis in sizes else np.shape(value)[-1] for axis in axes)


def _fill_extras(
    arrays: Mapping[str, np.ndarray], names: Sequence[str], row: int, g: int, group: TokenGroup
) -> None:
    if group.extras.keys() != set(names):
        raise DataError(
            f"{group.source}: the record has the extras {sorted(group.extras)}, others of the set "
            f"have {sorted(names)}: give them to every record or to none"
        )
    for name in names:
        value = group.extras[name]
        column, axes = extra_axes(name, value)
        array = arrays[column][row, g, ...]
        if axes == "KT":
            _fill_tokens(array, name, group)
            continue
        sizes = {"K": len(group.completions), "D": array.shape[-1] if array.ndim else 0}
        expected = tuple(sizes[axis] for axis in axes)
        if np.shape(value) != expected or array.ndim != len(axes):
            raise DataError(
                f"{group.source}: extra {name!r} has shape {np.shape(value)}, expected "
                f"{expected} for {sizes['K']} candidates, as in the other records"
            )
        array[tuple(slice(size) for size in expected)] = value


def _fill_tokens(array: np.ndarray, name: str, group: TokenGroup) -> None:
    """Writes numbers of scored tokens into `[K, T]`."""
    lengths = [len(completion) for completion in group.completions]
    found = [len(numbers) for numbers in group.extras[name]]
    if found != lengths:
        raise DataError(
            f"{group.source}: extra {name!r} has {found} numbers for candidates of {lengths} "
            "scored tokens: give one for each, the EOS included"
        )
    for k, numbers in enumerate(group.extras[name]):
        array[k, : len(numbers)] = numbers
