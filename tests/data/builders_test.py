import json

import numpy as np
import pytest

from paxo.data.records import DataError, RecordError
from paxo.data.sources import load_records, open_source

tfds = pytest.importorskip("tensorflow_datasets")
builders = pytest.importorskip("paxo.data.builders")


def conversation(text):
    return [{"role": "user", "content": text}]


PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f"Yes é {i}", "rejected": "No", "margin": i + 0.1}
    for i in range(5)
]
# A string that looks like JSON, messages, a null, and a number that float32 does not hold.
LISTS = [
    {
        "prompt": conversation("[1, 2]"),
        "responses": ["a", '{"b": 1}'],
        "scores": [i / 3, i + 0.1],
        "note": None if i else "first",
    }
    for i in range(5)
]


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "source" / "rows.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("rows", [PAIRS, LISTS], ids=["pairs", "lists"])
def test_array_record_gives_back_the_same_rows_and_records(tmp_path, write, rows):
    path = write(rows)
    folder = builders.write_array_record(path, tmp_path / "out", split="train")
    assert list(folder.glob("*array_record*"))
    assert [row for row, _ in open_source(f"tfds:{folder}:train")] == rows
    before, _ = load_records(path)
    after, _ = load_records(f"tfds:{folder}:train")
    for one, other in zip(before, after, strict=True):
        assert (one.prompt, one.completions, one.labels) == (
            other.prompt,
            other.completions,
            other.labels,
        )
        assert one.index == other.index
        assert one.extras.keys() == other.extras.keys()
        assert all(np.array_equal(one.extras[n], other.extras[n]) for n in one.extras)


def test_as_data_source_reads_at_random(tmp_path, write):
    folder = builders.write_array_record(write(PAIRS), tmp_path / "out")
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert len(source) == 5
    assert source[3]["prompt"] == b"Question 3?"


def test_a_bad_row_is_refused_before_anything_is_written(tmp_path, write):
    path = write([*PAIRS, PAIRS[0] | {"chosen": ""}])
    with pytest.raises(RecordError, match=r"rows\.jsonl:6"):
        builders.write_array_record(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = builders.write_array_record(path, tmp_path / "out", on_error="skip")
    assert len(open_source(f"tfds:{folder}:train")) == 5


def test_a_taken_folder_and_an_unknown_split_are_errors(tmp_path, write):
    path = write(PAIRS)
    folder = builders.write_array_record(path, tmp_path / "out")
    with pytest.raises(DataError, match="already written"):
        builders.write_array_record(path, tmp_path / "out")
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        open_source(f"tfds:{folder}:test")
