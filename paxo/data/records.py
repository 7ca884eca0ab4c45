"""What a preference record is: a prompt, its candidate completions and a grade for each.

Everything that reads or tokenises data sees these types only; `paxo.data.layouts` makes records
out of the columns that data sets come in.
"""

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """A data set cannot be read; the text is one line that names the way out."""

    def __reduce__(self):
        # Pickled as it is, for other processes: subclasses are not made from their text.
        return _made, (type(self), str(self), vars(self))


def _made(kind: type[DataError], text: str, attributes: dict[str, Any]) -> DataError:
    error = kind.__new__(kind, text)
    error.__dict__.update(attributes)
    return error


class RecordError(DataError):
    """One record is bad.

    Attributes:
        source: file and line of the record.
        reason: the same for all records with this fault, so that skipped records can be counted.
    """

    def __init__(
        self, source: str, field: str, *, expected: str, got: str, way_out: str, reason: str
    ):
        super().__init__(f"{source}: field '{field}': expected {expected}, got {got}; {way_out}")
        self.source = source
        self.reason = reason


class TextError(DataError):
    """A text that a tokenizer cannot take; `at` says whose it is."""

    def __init__(self, *, expected: str, got: str, way_out: str, reason: str):
        super().__init__(f"expected {expected}, got {got}; {way_out}")
        self._parts = {"expected": expected, "got": got, "way_out": way_out, "reason": reason}

    def at(self, source: str, field: str) -> RecordError:
        """The same error with the place of the record."""
        return RecordError(source, field, **self._parts)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


EXTRA_AXES = ("K", "KK", "KT", "KD", "D")
"""Axes that the name of an extra may tell, as in "advantages:KT": K candidates, T scored tokens of
each, D any fixed number."""

Text = str | tuple[Message, ...] | tuple[int, ...]
"""A string, the messages of a conversation, or token ids."""


Extra = np.ndarray | tuple[np.ndarray, ...]
"""A value that a loss may name: an array, or one array for each candidate with a number a token."""


def extra_axes(name: str, value: Extra) -> tuple[str, str]:
    """The name without its axes, and the axes.

    >>> extra_axes("advantages:KT", (np.zeros(3), np.zeros(5))), extra_axes("rewards", np.zeros(2))
    (('advantages', 'KT'), ('rewards', 'K'))
    """
    plain, told, axes = name.partition(":")
    if told:
        return plain, axes
    return plain, "KT" if isinstance(value, tuple) else "K" * np.ndim(value)


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt with its candidates, not yet tokenised.

    Attributes:
        prompt: what comes before the completions; the empty string only for plain text.
        completions: K candidates, each of the prompt's kind.
        labels: K grades, larger is better: (1, 0) for a pair, the scores of a list, +1 or -1 for an
            unpaired completion that was liked or not, 1 for a demonstration.
        extras: name -> float32 array, a scalar, `[K]` or `[K, K]`; other axes are told by the name:
            "x:D" `[D]`, "x:KD" `[K, D]`, and "x:KT" K arrays, a number for each scored token.
        source: file and line, such as `"pairs.jsonl:17"`.
        index: number of the row in its source from 0, skipped ones counted; None if made by hand.
        contexts: K texts that stand between the prompt and each completion and are not scored, such
            as a draft that is revised; () for none.
    """

    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[float, ...]
    extras: Mapping[str, Extra] = dataclasses.field(default_factory=dict)
    source: str = "record"
    index: int | None = None
    contexts: tuple[str | tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGroup:
    """A record as token ids: what is packed into rows.

    Attributes:
        prompt: `[P]` int32, at least one token.
        completions: K arrays `[T_k]` int32, the scored tokens: the EOS included where the
            completion is finished, none where it is cut.
        finished: K bools, False where the completion was cut.
        labels: K grades.
        extras: see `Record`.
        index: number of the record in its source.
        source: file and line of the record.
        contexts: K arrays, the tokens between the prompt and each completion that are not scored;
            () for none.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    finished: tuple[bool, ...]
    labels: tuple[float, ...]
    extras: Mapping[str, Extra]
    index: int
    source: str
    contexts: tuple[np.ndarray, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in a row: the prompt once, contexts and completions."""
        return len(self.prompt) + sum(map(len, (*self.completions, *self.contexts)))

    def context(self, k: int) -> np.ndarray:
        """Tokens between the prompt and completion k."""
        return self.contexts[k] if self.contexts else self.prompt[:0]

    @property
    def is_pair(self) -> bool:
        """True for two completions of which one is better."""
        return len(self.labels) == 2 and self.labels[0] != self.labels[1]


def is_ids(text: Any) -> bool:
    """True for a text that is given as token ids."""
    return not isinstance(text, str) and len(text) > 0 and isinstance(text[0], (int, np.integer))


def plain_text(text: Text) -> str:
    r"""The words of a completion as one string; consecutive messages are joined by an empty line.

    >>> plain_text((Message("assistant", "Yes."), Message("assistant", "Why?")))
    'Yes.\n\nWhy?'
    """
    if isinstance(text, str):
        return text
    return "\n\n".join(message.content for message in text)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError naming the nearest right value when `value` is none of the choices."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}{hint}")


class Skipped:
    """Counts bad records by reason, or lets the first one through.

    >>> skipped = Skipped("skip")
    >>> with skipped:
    ...     raise RecordError("a:3", "x", expected="y", got="z", way_out="-", reason="wrong type")
    >>> skipped.counts
    {'wrong type': 1}
    """

    def __init__(self, on_error: str):
        check_choice("on_error", on_error, ("raise", "skip"))
        self._skip = on_error == "skip"
        self.counts: dict[str, int] = {}
        self._first: dict[str, RecordError] = {}

    def __enter__(self) -> "Skipped":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        if not self._skip or not isinstance(error, RecordError):
            return False
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self._first.setdefault(error.reason, error)
        return True

    @classmethod
    def joined(cls, parts: Iterable["Skipped"]) -> "Skipped":
        """The counts of all parts of a set, which follow one another."""
        whole = cls("skip")
        for part in parts:
            for reason, count in part.counts.items():
                whole.counts[reason] = whole.counts.get(reason, 0) + count
            whole._first |= part._first | whole._first
        return whole

    def log(self, logger: logging.Logger, total: int) -> None:
        """One line for each reason, with the place of the first such record."""
        for reason, count in self.counts.items():
            first = self._first[reason]
            logger.warning("skipped %d of %d records: %s (%s)", count, total, reason, first.source)

    def first_error(self) -> RecordError | None:
        """The first bad record, for the message when no good one is left."""
        return next(iter(self._first.values()), None)
