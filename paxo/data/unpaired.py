"""What losses on single completions want: labels that are signs, and mismatched completions.

A mismatched completion is a completion of another prompt, a further candidate of the group with
label 0: Kahneman-Tversky optimisation measures the KL divergence on them. Which one a group gets is
drawn anew for each epoch and follows from (seed, epoch), never from the order of a batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paxo.data.records import DataError, Extra, TokenGroup, extra_axes


def signed(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The groups with labels +1 (desirable) and -1 (undesirable), the grades 1 and 0 of pairs too.

    Raises:
        DataError: a record has other grades; it is named.

    >>> ids = np.array([5], np.int32)
    >>> pair = TokenGroup(ids, (ids, ids), (True, True), (1.0, 0.0), {}, 0, "pairs.jsonl:1")
    >>> signed([pair])[0].labels
    (1.0, -1.0)
    """
    return [dataclasses.replace(group, labels=_signs(group)) for group in groups]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Asks the packer for a mismatched completion in each group.

    Attributes:
        max_sequence: tokens of a prompt with its mismatched completion, which loses its end where
            they are more; None for no limit.
    """

    max_sequence: int | None = None


class Mismatched:
    """The groups of a set with their mismatched completions, epoch by epoch.

    Attributes:
        most: `[N]` upper bound on the tokens that an epoch adds to each group.
    """

    def __init__(self, groups: Sequence[TokenGroup], settings: Mismatch, seed: int):
        self._groups, self._seed = groups, seed
        prompts: dict[bytes, int] = {}
        numbers = [prompts.setdefault(g.prompt.tobytes(), len(prompts)) for g in groups]
        self._prompts = np.array(numbers, np.intp)
        _check_prompts(groups, self._prompts)
        lengths = [[len(completion) for completion in group.completions] for group in groups]
        longest = max(map(max, lengths))
        limit = settings.max_sequence
        rooms = [longest if limit is None else min(longest, limit - len(g.prompt)) for g in groups]
        if min(rooms) < 1:
            raise DataError(
                f"{groups[int(np.argmin(rooms))].source}: the prompt leaves no token of "
                f"max_sequence={limit} to a mismatched completion: raise it or cut the prompts"
            )
        self.most, self._lengths = np.array(rooms, np.int64), lengths

    def epoch(self, number: int) -> "EpochGroups":
        """The groups of an epoch, each with one candidate more."""
        # The shuffles of this seed end in other numbers, see `Windows`.
        rng = np.random.default_rng((self._seed, number, 0, 1))
        donors = derangement(self._prompts, rng)
        counts = np.array([len(self._lengths[i]) for i in donors])
        places = rng.integers(counts)
        added = np.array([self._lengths[i][k] for i, k in zip(donors, places)], np.int64)
        return EpochGroups(self._groups, donors, places, np.minimum(added, self.most))


class EpochGroups(Sequence[TokenGroup]):
    """The groups of one epoch, made when they are asked for.

    Attributes:
        added: `[N]` tokens of the mismatched completion of each group.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        donors: np.ndarray,
        places: np.ndarray,
        added: np.ndarray,
    ):
        self._groups, self._donors, self._places, self.added = groups, donors, places, added

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> TokenGroup:
        group, donor = self._groups[index], self._groups[self._donors[index]]
        place, size = self._places[index], self.added[index]
        ids = donor.completions[place]
        return dataclasses.replace(
            group,
            completions=(*group.completions, ids[:size]),
            finished=(*group.finished, donor.finished[place] and len(ids) == size),
            labels=(*group.labels, 0.0),
            extras=_padded(group.extras),
        )


def derangement(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation that sends every number to one of another class.

    Args:
        classes: `[N]` ints from 0 on; no class holds more than half of the numbers.
        rng: draws the order of the classes and the order within them.

    >>> classes = np.array([0, 0, 1, 2])
    >>> others = derangement(classes, np.random.default_rng(0))
    >>> sorted(others.tolist()), (classes[others] == classes).any()
    ([0, 1, 2, 3], np.False_)
    """
    rank = rng.permutation(classes.max() + 1)[classes]
    order = np.lexsort((rng.permutation(len(classes)), rank))
    # Classes lie side by side: a shift by the size of the largest leaves any of them.
    others = np.empty_like(order)
    others[order] = np.roll(order, -int(np.bincount(classes).max()))
    return others


def _check_prompts(groups: Sequence[TokenGroup], prompts: np.ndarray) -> None:
    counts = np.bincount(prompts)
    if 2 * counts.max() > len(groups):
        common = int(np.argmax(prompts == np.argmax(counts)))
        raise DataError(
            f"{groups[common].source}: {counts.max()} of {len(groups)} records have this prompt, "
            "but mismatched completions are of other prompts: give at most half of the records the "
            "same prompt, or take an objective without them (apo_zero_unpaired, bco)"
        )


def _padded(extras: Mapping[str, Extra]) -> dict[str, Extra]:
    """Extras of one candidate more, for which they hold 0."""
    padded = dict(extras)
    for name, value in extras.items():
        axes = extra_axes(name, value)[1]
        if axes == "KT":
            padded[name] = (*value, np.zeros(0, np.float32))
        elif axes:
            padded[name] = np.pad(value, [(0, int(axis == "K")) for axis in axes])
    return padded


def _signs(group: TokenGroup) -> tuple[float, ...]:
    if set(group.labels) <= {1.0, -1.0}:
        return group.labels
    if len(group.labels) == 2 and set(group.labels) == {1.0, 0.0}:
        return tuple(1.0 if label else -1.0 for label in group.labels)
    raise DataError(
        f"{group.source}: the completions have the grades {list(group.labels)}, but the objective "
        "takes completions that are desirable or not: give pairs (prompt, chosen, rejected), "
        "single completions (prompt, completion, label) or scores of 1 and -1"
    )
