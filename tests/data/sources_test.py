import gzip
import json
import logging
import sys
import types

import pytest

from paxo.data.records import DataError, RecordError
from paxo.data.sources import load_records, open_source

PAIRS = [
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."},
    {"prompt": "Bye", "chosen": "Good bye.", "rejected": "Stay."},
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, text):
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_rows_come_in_any_order_with_their_lines(tmp_path, name):
    path = write(tmp_path / name, lines(PAIRS))
    source = open_source(path)
    assert len(source) == 3
    assert source[2] == (PAIRS[2], f"{path}:3")
    assert source[0] == (PAIRS[0], f"{path}:1")
    assert [row for row, _ in source] == PAIRS


def test_empty_lines_are_no_rows_but_count_as_lines(tmp_path):
    text = lines(PAIRS[:1]) + "\n  \n" + lines(PAIRS[1:2])
    source = open_source(write(tmp_path / "pairs.jsonl", text))
    assert len(source) == 2
    assert source[1][1].endswith("pairs.jsonl:4")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(PAIRS).encode())
    assert open_source(path)[0][0] == PAIRS[0]


def test_parquet_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    conversation = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": conversation, "responses": ["a", "b"], "scores": [1.0, 0.5]}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "lists.parquet")
    source = open_source(tmp_path / "lists.parquet")
    assert [row for row, _ in source] == rows
    assert source[1][1].endswith("lists.parquet:2")
    records, _ = load_records(tmp_path)
    assert records[0].labels == (1.0, 0.5)


def test_a_long_parquet_file_is_read_in_any_order(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": str(i)} for i in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet")
    assert len(source) == 2500
    for i in (0, 2499, 1023, 1024, 5, -1):
        assert source[i][0] == rows[i]
    assert source[-1][1].endswith(":2500")
    with pytest.raises(IndexError):
        source[2500]


def test_a_damaged_parquet_file_is_an_error_of_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "pairs.parquet", "not parquet at all")
    with pytest.raises(DataError, match=r"pairs\.parquet: damaged Parquet file \(.*copy it again"):
        open_source(path)


@pytest.mark.parametrize(
    ("path", "module", "pip"),
    [
        ("{}/pairs.parquet", "pyarrow", "pyarrow"),
        ("hf:owner/name:train", "datasets", "datasets"),
        ("tfds:name:train", "tensorflow_datasets", "tensorflow-datasets"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    tmp_path, monkeypatch, path, module, pip
):
    write(tmp_path / "pairs.parquet", "")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"pip install {pip}"):
        open_source(path.format(tmp_path))


def test_a_folder_gives_its_pairs_before_other_files(tmp_path):
    for name in ("train.jsonl", "lists.jsonl", "original.jsonl.gz", "pairs.jsonl.gz"):
        write(tmp_path / name, lines(PAIRS))
    assert open_source(tmp_path).name.endswith("pairs.jsonl.gz")
    (tmp_path / "pairs.jsonl.gz").unlink()
    assert open_source(tmp_path).name.endswith("lists.jsonl")


def test_a_folder_with_one_data_file_gives_that(tmp_path):
    write(tmp_path / "README.md", "# about")
    write(tmp_path / "docs.jsonl", lines(PAIRS))
    assert open_source(tmp_path).name.endswith("docs.jsonl")


def test_a_folder_in_doubt_names_the_candidates(tmp_path):
    write(tmp_path / "a.jsonl", lines(PAIRS))
    write(tmp_path / "b.jsonl.gz", lines(PAIRS))
    with pytest.raises(DataError, match=r"\(a.jsonl, b.jsonl.gz\); name the one"):
        open_source(tmp_path)
    write(tmp_path / "pairs.jsonl", lines(PAIRS))
    write(tmp_path / "pairs.jsonl.gz", lines(PAIRS))
    with pytest.raises(DataError, match=r"\(pairs.jsonl, pairs.jsonl.gz\)"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing.jsonl", "no such file or folder"),
        ("notes.txt", "unknown kind of file"),
        ("folder", "no data file in this folder"),
    ],
)
def test_a_wrong_path_says_what_a_path_may_be(tmp_path, name, text):
    write(tmp_path / "notes.txt", "notes")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=text) as caught:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "tfds:NAME" in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        open_source(write(tmp_path / "pairs.jsonl", "\n\n"))


@pytest.mark.parametrize("keep", [-8, -100, 5])
def test_a_cut_gzip_file_is_an_error_and_not_the_end_of_the_data(tmp_path, keep):
    rows = [PAIRS[0] | {"id": str(i) * 5} for i in range(500)]
    path = write(tmp_path / "pairs.jsonl.gz", lines(rows))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"pairs\.jsonl\.gz: damaged or cut gzip file"):
        load_records(path, on_error="skip")


def test_a_malformed_line_names_file_and_line(tmp_path):
    path = write(tmp_path / "pairs.jsonl", lines(PAIRS[:1]) + '{"prompt": "Hi", \n')
    with pytest.raises(RecordError, match=r"pairs\.jsonl:2: field 'line': expected one JSON"):
        load_records(path)


def test_bad_rows_are_skipped_counted_and_logged_by_reason(tmp_path, caplog):
    bad = [PAIRS[0] | {"chosen": ""}, PAIRS[1] | {"chosen": "Stay."}, PAIRS[2] | {"rejected": ""}]
    path = write(tmp_path / "pairs.jsonl", lines([PAIRS[0], *bad]) + "{\n" + lines(PAIRS[1:]))
    with caplog.at_level(logging.WARNING):
        records, counts = load_records(path, on_error="skip")
    assert counts == {
        "empty completion": 2,
        "chosen equals rejected": 1,
        "malformed JSON": 1,
    }
    assert [record.prompt for record in records] == ["Hi", "Bye", "Why?"]
    # Numbers are those of the rows, so that they do not change with what is skipped.
    assert [record.index for record in records] == [0, 5, 6]
    assert f"skipped 2 of 7 records: empty completion ({path}:2)" in caplog.messages
    assert len(caplog.messages) == 3


def test_the_first_bad_row_stops_by_default(tmp_path):
    path = write(tmp_path / "pairs.jsonl", lines([*PAIRS, PAIRS[0] | {"chosen": ""}]))
    with pytest.raises(RecordError, match=r"pairs\.jsonl:4"):
        load_records(path)
    assert len(load_records(path, limit=3)[0]) == 3


def test_when_every_row_is_bad_the_first_one_is_told(tmp_path):
    path = write(tmp_path / "pairs.jsonl", lines([{"question": "Hi"}] * 3))
    with pytest.raises(DataError, match=r"no usable record in 3 rows.*pairs\.jsonl:1: field"):
        load_records(path, on_error="skip")


def test_an_extra_must_be_in_all_records_or_in_none(tmp_path):
    path = write(tmp_path / "pairs.jsonl", lines([PAIRS[0] | {"margin": 1.5}, PAIRS[1]]))
    with pytest.raises(RecordError, match=r"pairs\.jsonl:2: field 'margin'.*in all records"):
        load_records(path)


def test_a_wrong_policy_names_the_right_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'skip'"):
        load_records(tmp_path, on_error="skp")


@pytest.mark.parametrize("path", ["tfds:name", "tfds::train"])
def test_a_tfds_path_without_name_or_split_says_what_is_expected(path):
    with pytest.raises(DataError, match="expected tfds:NAME"):
        open_source(path)


def test_an_unknown_tfds_data_set_is_an_error_of_one_short_line():
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DataError) as caught:
        open_source("tfds:no_such_data_set:train")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("folder", "records", "skipped"),
    [
        ("pairs_hh_harmless", 1845, {"empty completion": 4}),
        ("pairs_llmbar", 719, {"chosen equals rejected": 1}),
        ("pairs_pandalm_human", 689, {"empty completion": 29}),
        ("pairs_llamafactory_dpo_en", 242, {}),
        ("pairs_hhh_alignment", 199, {}),
        ("lists_alpaca_eval", 805, {}),
        ("lists_oasst_en100", 169, {}),
        ("lists_qa_feedback", 400, {}),
        ("lists_gsm8k_solutions", 1055, {}),
        ("unpaired_llamafactory_kto_en", 241, {}),
        ("sft_alpaca_en_demo", 801, {}),
        ("text_tinystories", 1852, {}),
    ],
)
def test_real_sets_are_read_whole(shared_data, folder, records, skipped):
    found, counts = load_records(shared_data / folder, on_error="skip")
    assert (len(found), counts) == (records, skipped)


def test_oasst_ranks_and_scores_agree(shared_data):
    source = open_source(shared_data / "lists_oasst_en100")
    by_scores, _ = load_records(shared_data / "lists_oasst_en100")
    for (row, place), record in zip(source, by_scores):
        ranks = row["ranks"]
        assert record.labels == tuple(max(ranks) - rank for rank in ranks), place


def test_kto_labels_are_balanced_as_published(shared_data):
    records, _ = load_records(shared_data / "unpaired_llamafactory_kto_en")
    assert sum(record.labels == (1.0,) for record in records) == 126
    assert sum(record.labels == (-1.0,) for record in records) == 115


def test_a_hub_data_set_is_asked_for_by_name_and_split(monkeypatch):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return PAIRS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records, _ = load_records("hf:owner/name")
    assert records[1].source == "hf:owner/name:2"
    assert len(open_source("hf:owner/name:test")) == 3
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


def test_a_hub_data_set_that_cannot_be_loaded_is_an_error_of_one_line(monkeypatch):
    def load_dataset(name, *, split):
        raise FileNotFoundError(f"no {name}\non the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"hf:owner/name: .*no owner/name on the hub"):
        open_source("hf:owner/name")
