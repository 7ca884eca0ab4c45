"""Conversion of any source to ArrayRecord through TFDS: random access at any size, no TensorFlow.

folder = write_array_record("pairs.jsonl.gz", "/data/hh")
records, _ = load_records(f"tfds:{folder}:train")
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from paxo.data.layouts import parse_record
from paxo.data.records import DataError, Skipped
from paxo.data.sources import JSON_COLUMN, LOG, open_source


class Preferences(tfds.core.GeneratorBasedBuilder):
    """Rows with the columns that they came with, in their order.

    Columns of strings are text. All others (messages, numbers, lists) are JSON, because TFDS
    cannot write nested lists without TensorFlow and rounds numbers to float32.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, rows: Sequence[Mapping[str, Any]], split: str, **kwargs: Any):
        self._rows, self._split = rows, split
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = sorted({name for row in self._rows for name in row})
        self._json = {n for n in names if not all(isinstance(r.get(n), str) for r in self._rows)}
        text, as_json = tfds.features.Text(), tfds.features.Text(doc=JSON_COLUMN)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {name: as_json if name in self._json else text for name in names}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for key, row in enumerate(self._rows):
            yield (
                key,
                {
                    name: json.dumps(row.get(name)) if name in self._json else row[name]
                    for name in self.info.features
                },
            )


def write_array_record(
    path: str | pathlib.Path,
    folder: str | pathlib.Path,
    *,
    split: str = "train",
    on_error: str = "raise",
) -> pathlib.Path:
    """Writes all rows of a source as ArrayRecord files, after checking that they are records.

    Args:
        path: as for `open_source`.
        folder: where to write; must not hold a converted data set yet.
        split: name of the split.
        on_error: "raise" or "skip", as in `load_records`.

    Returns:
        The prepared folder; `tfds:FOLDER:SPLIT` is its name as a source.

    Raises:
        RecordError: a row is bad and `on_error` is "raise"; nothing is written.
        DataError: the source holds no good row, or the folder is taken.
    """
    skipped = Skipped(on_error)
    source = open_source(path)
    rows = []
    for i in range(len(source)):
        with skipped:
            row, place = source[i]
            parse_record(row, place)
            rows.append(row)
    skipped.log(LOG, len(source))
    if not rows:
        raise DataError(f"{source.name}: no usable record; first error: {skipped.first_error()}")
    builder = Preferences(rows=rows, split=split, data_dir=str(folder), file_format="array_record")
    if pathlib.Path(builder.data_dir).exists():
        raise DataError(f"{builder.data_dir}: already written; remove it or name another folder")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)
