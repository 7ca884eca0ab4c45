"""Which groups share a row, and how large a row is.

Two things can run out in a row, its L tokens and its S scored slots. Both follow from the lengths
of the set, so that few positions are computed for nothing.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from paxo.data.records import DataError, TokenGroup
from paxo.data.unpaired import Mismatch, Mismatched

logger = logging.getLogger(__name__)

Rows = list[list[int]]  # for each row the numbers of its groups, in their order in the row

SAMPLE_WINDOWS = 4  # windows packed for each shape that is tried
COMFORT, LIMIT = (
    (1.08, 1.42),
    (1.10, 1.50),
)  # overhead in positions, in slots; the sample is not the set
TIE = 1.03  # a cost relative to the least that is as good
WAY_OUT = {
    "length": "raise row_length, or cut or drop long records with TokenLimits",
    "slots": "raise slots, or cut or drop long completions with TokenLimits",
    "candidates": "raise RowShape.candidates, or keep fewer candidates",
    "max_completion": "raise RowShape.max_completion, or cut completions with TokenLimits",
}


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The static sizes of a packed row.

    Attributes:
        length: L, tokens.
        slots: S, scored tokens; never more than the tokens.
        groups: G, groups.
        candidates: K, candidates of a group.
        max_completion: T, tokens of a completion.
    """

    length: int
    slots: int
    groups: int
    candidates: int
    max_completion: int

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"RowShape.{name} must be an int of at least 1, got {size!r}")
        if self.slots > self.length:
            raise ValueError(
                f"RowShape.slots ({self.slots}) exceeds length ({self.length}), but a row cannot "
                "score more tokens than it holds: lower slots"
            )


class Sizes(NamedTuple):
    """`[N]` int64 each: what a group takes in a row, in tokens and in scored tokens."""

    tokens: np.ndarray
    slots: np.ndarray

    def take(self, index: np.ndarray) -> "Sizes":
        """The sizes of the groups of these numbers."""
        return Sizes(self.tokens[index], self.slots[index])

    def plus(self, added: np.ndarray) -> "Sizes":
        """The sizes with `added` `[N]` scored tokens more."""
        return Sizes(self.tokens + added, self.slots + added)


class Overhead(NamedTuple):
    """What a packing costs.

    Attributes:
        rows: number of rows.
        positions: token positions computed, relative to the tokens with each prompt once.
        slots: scored slots, relative to the scored tokens.
    """

    rows: int
    positions: float
    slots: float


def group_sizes(groups: Sequence[TokenGroup]) -> Sizes:
    """The sizes of the groups; raises a DataError that names one that cannot be packed at all."""
    if not groups:
        raise DataError("there is no group to pack: every record was dropped, or none was read")
    slots = np.empty(len(groups), np.int64)
    for i, group in enumerate(groups):
        if len(group.prompt) == 0:
            raise DataError(
                f"{group.source}: the prompt has no token, so nothing predicts the first token of "
                "a completion: give it a BOS"
            )
        lengths = [len(completion) for completion in group.completions]
        if not lengths or min(lengths) == 0:
            raise DataError(
                f"{group.source}: expected candidates of at least one token, got lengths "
                f"{lengths}: drop the record, or end the completion with an EOS"
            )
        if len(group.labels) != len(lengths):
            raise DataError(
                f"{group.source}: {len(group.labels)} labels for {len(lengths)} candidates"
            )
        slots[i] = sum(lengths)
    return Sizes(np.array([group.num_tokens for group in groups], np.int64), slots)


def check_fits(
    groups: Sequence[TokenGroup], sizes: Sizes, shape: RowShape, further: int = 0
) -> None:
    """Raises a DataError that names the largest group if a row of this shape cannot hold it.

    Args:
        groups: the set.
        sizes: of the groups.
        shape: shape of a row.
        further: candidates that each group is given besides its own; `sizes` count them.
    """
    candidates = np.array([len(group.completions) for group in groups]) + further
    longest = np.array([max(map(len, group.completions)) for group in groups])
    for name, needed, unit in (
        ("length", sizes.tokens, "tokens"),
        ("slots", sizes.slots, "scored tokens"),
        ("candidates", candidates, "candidates"),
        ("max_completion", longest, "tokens in its longest completion"),
    ):
        limit = getattr(shape, name)
        too_large = np.count_nonzero(needed > limit)
        if too_large:
            worst = int(np.argmax(needed))
            added = " with a mismatched completion" if further else ""
            raise DataError(
                f"{groups[worst].source}: the group has {needed[worst]} {unit}{added}, but a row "
                f"takes {limit} ({too_large} of {len(groups)} groups do not fit): {WAY_OUT[name]}"
            )


def pack_rows(tokens: np.ndarray, slots: np.ndarray, shape: RowShape) -> Rows:
    """Deals groups into rows by best fit, largest first; the same on every machine.

    Args:
        tokens: `[N]` tokens of each group.
        slots: `[N]` scored tokens of each group.
        shape: its length, slots and groups are the capacities of a row.

    Returns:
        For each row the numbers of its groups. Every group is in exactly one row.

    >>> pack_rows(np.array([3, 6, 5]), np.array([1, 2, 2]), RowShape(8, 4, 2, 1, 2))
    [[1], [2, 0]]
    """
    tokens, slots = np.asarray(tokens, np.int64), np.asarray(slots, np.int64)
    if np.any(tokens > shape.length) or np.any(slots > shape.slots):
        raise ValueError(
            f"a group of {tokens.max()} tokens or {slots.max()} scored tokens is larger than a row "
            f"({shape.length} and {shape.slots}): take the shape from choose_shape"
        )
    # Sizes are compared as shares of both capacities, in integers so that no rounding decides.
    order = np.argsort(-np.maximum(tokens * shape.slots, slots * shape.length), kind="stable")
    rows: Rows = []
    free_tokens = np.full(len(tokens), shape.length)
    free_slots = np.full(len(tokens), shape.slots)
    free_groups = np.full(len(tokens), shape.groups)
    for index in order:
        used = len(rows)
        left_tokens = free_tokens[:used] - tokens[index]
        left_slots = free_slots[:used] - slots[index]
        fits = (left_tokens >= 0) & (left_slots >= 0) & (free_groups[:used] > 0)
        if fits.any():
            left = left_tokens * shape.slots + left_slots * shape.length
            row = int(np.argmin(np.where(fits, left, np.iinfo(np.int64).max)))
        else:
            row = used
            rows.append([])
        rows[row].append(int(index))
        free_tokens[row] -= tokens[index]
        free_slots[row] -= slots[index]
        free_groups[row] -= 1
    return rows


def split_windows(num_groups: int, window: int) -> list[np.ndarray]:
    """0 to `num_groups - 1` in windows of nearly equal size: a small last one would pack badly."""
    if window < 1:
        raise ValueError(f"a window packs at least 1 group, got window={window}")
    return np.array_split(np.arange(num_groups), math.ceil(num_groups / window))


def packing_overhead(sizes: Sizes, shape: RowShape, window: int = 256) -> Overhead:
    """What packing the groups costs, in this order and in windows of at most `window` groups."""
    rows = sum(len(rows) for rows in _packed(sizes, shape, window))
    positions = rows * shape.length / int(sizes.tokens.sum())
    return Overhead(rows, positions, rows * shape.slots / int(sizes.slots.sum()))


def choose_shape(
    groups: Sequence[TokenGroup],
    *,
    row_length: int | None = None,
    slots: int | None = None,
    window: int = 256,
    slot_weight: float = 0.25,
    width: int | None = None,
    mismatch: Mismatch | None = None,
) -> RowShape:
    """The shortest row that packs these groups at about the least cost, by packing some of them.

    The cost of a row is `L + slot_weight * S`, in token positions: the trunk, and the head at the
    scored slots. Attention within each group alone costs the same in any row; where it is dense it
    adds `L**2 / (6 * width)`. Shapes that compute at most 1.10 times the needed positions and 1.5
    times the needed slots come before all others. Costs up to 3 % above the least are as good:
    short rows hold fewer logits, and a batch of them can be of more sizes.

    Args:
        groups: the set; its longest group fits in a row.
        row_length: L, where it is given; the longest group must fit in it.
        slots: S, where it is given.
        window: groups that are packed together.
        slot_weight: cost of the head at one slot relative to the trunk at one position, D * V by
            the parameters of all layers.
        width: D of the model, where it computes the scores of all pairs of a row's tokens: narrow
            models then want short rows.
        mismatch: leave room for a mismatched completion in each group.
    """
    sizes = typical = group_sizes(groups)
    further = 0 if mismatch is None else 1
    if mismatch is not None:
        mismatched = Mismatched(groups, mismatch, seed=0)
        typical = sizes.plus(mismatched.epoch(0).added)
        sizes = sizes.plus(mismatched.most)
    candidates = max(len(group.completions) for group in groups) + further
    max_completion = max(len(c) for group in groups for c in group.completions)
    sample = _sample(typical, window)

    def shape_of(length: int, slots: int) -> RowShape:
        return RowShape(length, slots, len(sample.tokens), candidates, max_completion)

    def cost(shape: RowShape) -> tuple[int, float]:
        found = packing_overhead(sample, shape, window)
        breaches = sum(
            found.positions > bound[0] or found.slots > bound[1] for bound in (COMFORT, LIMIT)
        )
        row = shape.length + slot_weight * shape.slots
        if width is not None:
            row += shape.length**2 / (6 * width)
        return breaches, found.rows * row

    least = max(int(sizes.tokens.max()), slots or 1)
    lengths = _candidate_lengths(least) if row_length is None else [row_length]
    check_fits(groups, sizes, shape_of(lengths[0], lengths[0] if slots is None else slots), further)
    ratio, most = sample.slots.sum() / sample.tokens.sum(), int(sizes.slots.max())
    shapes = [
        shape_of(length, number)
        for length in lengths
        for number in (_candidate_slots(length, ratio, most) if slots is None else [slots])
    ]
    costs = {shape: cost(shape) for shape in shapes}
    breaches, least_cost = min(costs.values())
    best = min(
        (shape for shape, (n, c) in costs.items() if n == breaches and c <= TIE * least_cost),
        key=lambda shape: (shape.length, costs[shape]),
    )
    # Room for as many groups as any row of the sample held, so that G practically never binds.
    fullest = max(len(row) for rows in _packed(sample, best, window) for row in rows)
    best = dataclasses.replace(best, groups=_round_up(fullest, 4))
    logger.info("%s computes %.2f times the needed positions and %.2f times the scored slots",
                best, *packing_overhead(sample, best, window)[1:])  # fmt: skip
    return best


def _packed(sizes: Sizes, shape: RowShape, window: int) -> Iterator[Rows]:
    for part in split_windows(len(sizes.tokens), window):
        yield pack_rows(*sizes.take(part), shape)


def _sample(sizes: Sizes, window: int) -> Sizes:
    """At most `SAMPLE_WINDOWS` windows of groups, from all over the set in a fixed order."""
    order = np.random.default_rng(0).permutation(len(sizes.tokens))
    windows = split_windows(len(order), window)[:SAMPLE_WINDOWS]
    return sizes.take(order[np.concatenate(windows)])


def _round_up(number: float, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _candidate_lengths(longest: int) -> list[int]:
    """Multiples of 128 from the longest group to four times that, to 1024 if it is short."""
    factors = (1, 1.125, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)
    start = _round_up(longest, 128)
    lengths = {_round_up(start * factor, 128) for factor in factors} | {512, 1024}
    lengths.add(2 ** math.ceil(math.log2(start)))
    return sorted(length for length in lengths if length >= longest)


def _candidate_slots(length: int, ratio: float, longest: int) -> list[int]:
    """Multiples of 64 from the set's mean number of scored tokens in a full row upwards."""
    wanted = (ratio * length * slack for slack in (1.05, 1.15, 1.25, 1.35, 1.45))
    return sorted({min(length, _round_up(max(longest, slots), 64)) for slots in wanted})
