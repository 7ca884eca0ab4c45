"""Prompts of self-play, the groups that a round trains on, and their file.

A round's groups are kept as JSONL whose rows are token-id lists, a layout that offline training
reads: `paxo run experiments/dpo_hh.py --set data.path=runs/x/rounds/0003.jsonl`.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to be completed.

    Attributes:
        ids: `[P]` int32 tokens, at least one.
        index: its number in its data set: random draws for it are made from it.
        shown: what judges are shown, a text as a rule.
        completions: token ids of completions that the data set has for it (a chosen and a rejected
            answer, a reference answer), the best first, for methods that train on them or start
            from them.
        finished: whether each of these ends, rather than being cut.
    """

    ids: np.ndarray
    index: int
    shown: Any = None
    completions: tuple[np.ndarray, ...] = ()
    finished: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """A prompt with the candidates chosen for training; the fields of a tokenised record.

    Attributes:
        prompt: `[P]` int32.
        completions: K arrays `[T_k]` int32, the stop token included where there is one.
        finished: K bools, False where the length limit cut the completion.
        labels: K grades.
        extras: name -> number, `[K]` array or, where the name tells it, `[K, n]` ("x:KD").
        index: number of the prompt in its data set.
        source: names the group in errors, such as `"round 3, prompt 17"`.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    finished: tuple[bool, ...]
    labels: tuple[float, ...]
    extras: Mapping[str, Any]
    index: int
    source: str


Decode = Callable[[Sequence[int]], Any]


def write_groups(
    path: str | os.PathLike[str], groups: Iterable[Group], decode: Decode | None = None
) -> None:
    """Writes a round's groups as JSONL, whole or not at all.

    Columns `prompt_ids`, `completions_ids`, `scores` (the labels), `finished`, `prompt_index`, one
    for each extra (by its name without axes), and, for people, `texts`.

    Args:
        path: the file, here or in a bucket ("gs://..."); its folder is made.
        groups: of the round.
        decode: token ids -> text, for `texts`; left out where None.

    Raises:
        OSError: where the file cannot be written; nothing is left of it then.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for group in groups:
                file.write(json.dumps(_row(group, decode), ensure_ascii=False) + "\n")
            file.flush()
            with contextlib.suppress(io.UnsupportedOperation):  # a bucket has no disk to wait for
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_groups(path: str | os.PathLike[str]) -> list[Group]:
    """The groups of a round, equal to those written, to the bit.

    Raises:
        ValueError: for a file that is none of these; the text names the line.

    >>> import tempfile
    >>> one = Group(np.array([1]), (np.array([2, 3]),), (True,), (0.5,), {}, 4, "round 0, prompt 4")
    >>> path = epath.Path(tempfile.mkdtemp(), "0000.jsonl")
    >>> write_groups(path, [one])
    >>> read_groups(path)[0].completions[0].tolist()
    [2, 3]
    """
    groups = []
    for number, line in enumerate(epath.Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            groups.append(_group(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a row of a round's groups ({type(error).__name__}: "
                f"{error}); remove the file: the round is then sampled anew"
            ) from error
    return groups


def _row(group: Group, decode: Decode | None) -> dict[str, Any]:
    row = {
        "prompt_ids": group.prompt.tolist(),
        "completions_ids": [completion.tolist() for completion in group.completions],
        "scores": [float(label) for label in group.labels],
        "finished": list(map(bool, group.finished)),
        "prompt_index": int(group.index),
        "source": group.source,
    }
    row |= {name.partition(":")[0]: _plain(value) for name, value in group.extras.items()}
    if decode is not None:
        texts = [str(decode(x)) for x in (group.prompt, *group.completions)]
        row["texts"] = {"prompt": texts[0], "completions": texts[1:]}
    return row


OWN = ("prompt_ids", "completions_ids", "scores", "finished", "prompt_index", "source", "texts")


def _group(row: Mapping[str, Any]) -> Group:
    return Group(
        prompt=np.array(row["prompt_ids"], np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in row["completions_ids"]),
        finished=tuple(row["finished"]),
        labels=tuple(row["scores"]),
        extras=dict(_array(name, value) for name, value in row.items() if name not in OWN),
        index=row["prompt_index"],
        source=row["source"],
    )


def _plain(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def _array(name: str, value: Any) -> tuple[str, np.ndarray]:
    """Name with axes, and array: of more than a number a candidate it is several of each."""
    array = np.array(value, np.float64)
    return (f"{name}:KD" if array.ndim == 2 else name), array
