"""Where rows come from: JSON lines, Parquet, TFDS and the Hugging Face hub, all with random access.

A source is a sequence of `(row, place)`: a dict of plain Python values, and a name with a line (or
row) number from 1 for messages.
"""

import dataclasses
import gzip
import importlib
import json
import logging
import pathlib
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxo.data.layouts import parse_record
from paxo.data.records import DataError, Record, RecordError, Skipped, check_choice

LOG = logging.getLogger(__name__)
STEMS = ("pairs", "lists", "unpaired", "sft", "train")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
JSON_COLUMN = "JSON"  # description of a TFDS text feature that holds JSON
FORMS = (
    "a file .jsonl, .jsonl.gz or .parquet, a folder that holds one, tfds:NAME[/CONFIG]:SPLIT, or "
    "hf:OWNER/NAME[:SPLIT]"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Source(Sequence):
    """Rows with random access; nothing is decoded before it is asked for.

    Attributes:
        name: the file or data set, as it was given.
        rows: what `decode` turns into dicts.
        decode: `(rows[i], place) -> dict`.
        lines: the line of each row, where it is not simply i + 1.
    """

    name: str
    rows: Sequence[Any]
    decode: Callable[[Any, str], dict[str, Any]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[dict[str, Any], str]:
        i = range(len(self))[i]
        place = self.place(i)
        return self.decode(self.rows[i], place), place

    def place(self, i: int) -> str:
        """Name and line of row i, without decoding it."""
        return f"{self.name}:{i + 1 if self.lines is None else self.lines[i]}"


def open_source(path: str | pathlib.Path) -> Source:
    """The rows of a file, a folder or a named data set.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file; a folder, where the file called pairs,
            lists, unpaired, sft or train is taken (in this order), or else its only data file;
            `tfds:NAME[/CONFIG]:SPLIT`, where NAME may be a prepared folder;
            `hf:OWNER/NAME[:SPLIT]`.

    Raises:
        DataError: nothing is there, it cannot be read, or a package for it is missing.
    """
    text = str(path)
    if text.startswith("tfds:"):
        return _tfds(text)
    if text.startswith("hf:"):
        return _hub(text)
    file = pathlib.Path(path)
    if not file.exists():
        raise DataError(f"{text}: no such file or folder; a data path is {FORMS}")
    if file.is_dir():
        file = _file_in(file)
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{file}: unknown kind of file; a data path is {FORMS}")
    return _parquet(file) if file.name.endswith(".parquet") else _json_lines(file)


def load_records(
    path: str | pathlib.Path,
    *,
    on_error: str = "raise",
    extras: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[list[Record], dict[str, int]]:
    """All records of a source, and how many rows were skipped for which reason.

    Args:
        path: as for `open_source`.
        on_error: "raise" stops at the first bad row; "skip" counts them by reason and logs.
        extras: numeric columns to keep, see `parse_record`.
        limit: read only so many rows.

    Raises:
        RecordError: a row is bad and `on_error` is "raise".
        DataError: the source cannot be read, or holds no good row.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    source = open_source(path)
    total = len(source) if limit is None else min(limit, len(source))
    records, skipped = read_range(source, range(total), on_error=on_error, extras=extras)
    check_any(source.name, len(records), total, skipped)
    return records, skipped.counts


def read_range(
    source: Source, rows: range, *, on_error: str = "raise", extras: Sequence[str] = ()
) -> tuple[list[Record], Skipped]:
    """The records of a range of rows, maybe none, as they are among all records of the source.

    Args:
        source: from `open_source`.
        rows: their numbers.
        on_error: as for `load_records`.
        extras: the same.

    Raises:
        RecordError: a row is bad and `on_error` is "raise".
    """
    skipped = Skipped(on_error)
    first = _first_record(source, rows.start, on_error, extras)
    records: list[Record] = []
    for i in rows:
        with skipped:
            row, place = source[i]
            record = parse_record(row, place, extras=extras, index=i)
            first = first or record
            _check_same_extras(record, first)
            records.append(record)
    return records, skipped


def check_any(name: str, records: int, total: int, skipped: Skipped) -> None:
    """Logs what was skipped of `total` rows; a DataError if no record is left."""
    skipped.log(LOG, total)
    if not records:
        first = skipped.first_error()
        raise DataError(f"{name}: no usable record in {total} rows; first error: {first}")


def _first_record(source: Source, end: int, on_error: str, extras: Sequence[str]) -> Record | None:
    """The first good record before row `end`, which says what extras all records have."""
    for i in range(end):
        with Skipped(on_error):
            return parse_record(*source[i], extras=extras, index=i)
    return None


def _check_same_extras(record: Record, first: Record) -> None:
    # A batch has one array for each extra: a record without it would have to be made up.
    if record.extras.keys() != first.extras.keys():
        field = sorted(record.extras.keys() ^ first.extras.keys())[0]
        raise RecordError(
            record.source,
            field,
            expected=f"a value in all records or in none ({first.source})",
            got="a value" if field in record.extras else "none",
            way_out="complete the column or remove it",
            reason=f"extra column {field} not in all records",
        )


def _file_in(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(f for f in folder.iterdir() if f.name.endswith(SUFFIXES) and f.is_file())
    if not files:
        raise DataError(f"{folder}: no data file in this folder; a data path is {FORMS}")
    for stem in STEMS:
        named = [file for file in files if file.name.split(".")[0] == stem]
        if named:
            files = named
            break
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: several data files ({names}); name the one to read")
    return files[0]


def _json_lines(file: pathlib.Path) -> Source:
    opened = gzip.open if file.name.endswith(".gz") else open
    try:
        with opened(file, "rb") as stream:
            numbered = [(n, line) for n, line in enumerate(stream, start=1) if line.strip()]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: damaged or cut gzip file ({error}); copy it again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not numbered:
        raise DataError(f"{file}: the file is empty; expected one JSON object a line")
    lines, rows = zip(*numbered)
    return Source(str(file), rows, _decode_json, lines)


def _decode_json(line: bytes, place: str) -> dict[str, Any]:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            place,
            "line",
            expected="one JSON object in UTF-8",
            got=f"{line[:40]!r} ({error})",
            way_out='correct the line, or leave such lines out with on_error="skip"',
            reason="malformed JSON",
        ) from error


def _parquet(file: pathlib.Path) -> Source:
    pyarrow = _package("pyarrow", str(file))
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file}: damaged Parquet file ({_one_line(error)}); copy it again"
        ) from error
    return Source(str(file), _Table(table), lambda row, place: row)


class _Table(Sequence):
    """Rows of an Arrow table, decoded a block at a time: one by one costs 100 µs each."""

    block = 1024

    def __init__(self, table: Any):
        self._table = table
        self._start = -1
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        start = i - i % self.block
        if start != self._start:
            self._rows = self._table.slice(start, self.block).to_pylist()
            self._start = start
        return self._rows[i - start]


def _tfds(text: str) -> Source:
    name, _, split = text.removeprefix("tfds:").rpartition(":")
    if not name or not split:
        raise DataError(f"{text}: expected tfds:NAME[/CONFIG]:SPLIT, such as tfds:hh_rlhf:train")
    tfds = _package("tensorflow_datasets", text)
    try:
        is_folder = pathlib.Path(name).is_dir()
        builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits) or "none: prepare the data set first"
            raise DataError(f"{text}: no split {split!r}; there are {known}")
        rows = builder.as_data_source(split=split)
    except (tfds.core.DatasetNotFoundError, NotImplementedError, OSError) as error:
        raise DataError(f"{text}: TFDS cannot read it ({_one_line(error)})") from error
    described = {name: feature.doc.desc for name, feature in builder.info.features.items()}
    is_json = {name for name, text in described.items() if text == JSON_COLUMN}
    return Source(text, rows, lambda row, place: _decode_tfds(row, is_json))


def _decode_tfds(row: dict[str, Any], is_json: set[str]) -> dict[str, Any]:
    row = {name: _python(value) for name, value in row.items()}
    return {name: json.loads(v) if name in is_json else v for name, v in row.items()}


def _python(value: Any) -> Any:
    """TFDS gives bytes and arrays, and messages as a dict of two arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.generic):
        return _python(value.item())
    if isinstance(value, (np.ndarray, list, tuple)):
        return [_python(item) for item in value]
    if isinstance(value, dict):
        columns = {name: _python(items) for name, items in value.items()}
        if all(isinstance(items, list) for items in columns.values()):
            return [dict(zip(columns, items)) for items in zip(*columns.values())]
        return columns
    return value


def _hub(text: str) -> Source:
    name, _, split = text.removeprefix("hf:").partition(":")
    datasets = _package("datasets", text)
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{text}: the hub data set cannot be loaded ({_one_line(error)})"
        ) from error
    return Source(text, rows, lambda row, place: row)


def _package(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pip = name.replace("_", "-")
        extra = "" if name == "tensorflow_datasets" else " (in the extra 'hub')"
        raise DataError(f"{path}: this needs a package: pip install {pip}{extra}") from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)
