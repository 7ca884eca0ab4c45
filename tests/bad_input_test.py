"""What a user gets wrong: one line that tells where and the way out, exit code 2, nothing left."""

import errno
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paxo import experiment, loading
from paxo.models.sharding import make_mesh
from tests.made_run import (
    PROJECT,
    SAMPLES,
    compiled_quickly,
    make_model,
    paxo,
    paxo_process,
    words,
    write_experiment,
)

GOOD = {"prompt": "How do I bake bread ?", "chosen": "Take your time .", "rejected": "Go away ."}
USER = [{"role": "user", "content": "How do I bake bread ?"}]
LONG = " ".join(["please"] * 70)
# What stands in line 5 of the data -> what the error line must say.
BAD_ROWS = {
    "malformed JSON": ('{"prompt": "How', ["field 'line'", "one JSON object", "correct the line"]),
    "row is not an object": ("[1, 2]", ["field 'row'", "a JSON object"]),
    "missing column rejected": ({"prompt": "a", "chosen": "b"}, ["field 'rejected'", "rename"]),
    "wrong type": (GOOD | {"chosen": 7}, ["field 'chosen'", "a string", "got 7"]),
    "empty prompt": (GOOD | {"prompt": " "}, ["field 'prompt'", "some text", "correct the row"]),
    "empty completion": (GOOD | {"rejected": ""}, ["field 'rejected'", "some text", "''"]),
    "chosen equals rejected": (
        GOOD | {"rejected": GOOD["chosen"]},
        ["field 'rejected'", "another completion than 'chosen'"],
    ),
    "unknown role": (
        GOOD | {"prompt": [{"role": "usr", "content": "Hi"}]},
        ["field 'prompt[0].role'", "one of system, user", "got 'usr'"],
    ),
    "completion longer than 16 tokens": (
        GOOD | {"chosen": LONG},
        ["field 'completion'", "at most 16 tokens", "raise max_completion", "'cut'"],
    ),
    "prompt longer than 24 tokens": (
        GOOD | {"prompt": LONG},
        ["field 'prompt'", "at most 24 tokens", "raise max_prompt", "'keep_end'"],
    ),
}
STRICT = ["data.limits.long_prompt=error", "data.limits.long_completion=error"]
RAISE = ["data.on_error=raise", *STRICT]


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(tmp_path_factory):
    with compiled_quickly(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model(folder)
    return folder


@pytest.fixture
def file(model, tmp_path):
    return write_experiment(tmp_path / "small.py", model)


def write_rows(path, *rows):
    """Four good rows, then the ones given."""
    good = [GOOD | {"prompt": f"How do I bake bread ? {'please ' * i}"} for i in range(4)]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in (*good, *rows)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def refused(capsys, file, workdir, *settings) -> str:
    """The one line that `paxo run` prints; checks the exit code and what is left behind."""
    flags = ["--set", *settings] if settings else []
    assert paxo("run", file, "--workdir", workdir, *flags) == 2
    line = one_line(capsys.readouterr().err)
    assert_nothing_half_written(pathlib.Path(workdir))
    return line


def one_line(error: str) -> str:
    """The error: the only line that is not one of the log's or of the training's progress."""
    (line,) = (
        line for line in error.splitlines() if not re.match(r"\d{4}-\d\d-\d\d |train \d", line)
    )
    assert line.startswith("paxo: error: ")
    return line


def assert_nothing_half_written(workdir):
    if workdir.is_dir():
        left = [path.name for path in workdir.rglob("*")]
        # Without config.json the folder takes the next run, whatever its settings.
        for name in ("export", "results.json", "config.json"):
            assert not (workdir / name).exists()
        assert not [name for name in left if "tmp" in name or "partial" in name]
        assert not list(workdir.rglob("checkpoints/*"))


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field_with_the_way_out(reason, file, tmp_path, capsys):
    row, parts = BAD_ROWS[reason]
    data = write_rows(tmp_path / "rows.jsonl", row)
    line = refused(capsys, file, tmp_path / "run", f"data.path={data}", *RAISE)
    assert f"{data}:5: " in line
    for part in parts:
        assert part in line
    # The same folder takes the command that is put right.
    write_rows(data, "")
    missing = refused(capsys, file, tmp_path / "run", "data.path=elsewhere.jsonl")
    assert "holds a run with other settings" not in missing


def test_skip_counts_every_bad_row_by_its_reason(file, tmp_path, caplog):
    data = write_rows(tmp_path / "rows.jsonl", *(row for row, _ in BAD_ROWS.values()))
    settings = experiment.settings_of(experiment.load(file), [f"data.path={data}", *STRICT])
    model = loading.load_model(settings.model, make_mesh())
    with caplog.at_level("WARNING", logger="paxo"):
        tokenised = loading.read_data(settings.data, model.tokenizer, model.config)
    assert len(tokenised.groups) == 4
    assert sorted(message.split(": ")[1].split(" (")[0] for message in caplog.messages) == sorted(
        BAD_ROWS
    )
    assert all("skipped 1 of " in message for message in caplog.messages)


def test_rows_without_one_good_record_are_refused_even_when_skipping(file, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("{\n" * 3)
    assert paxo("run", file, "--workdir", tmp_path / "run", "--set", f"data.path={data}") == 2
    line = one_line(capsys.readouterr().err)
    assert f"{data}: no usable record in 3 rows; first error: {data}:1: " in line


def test_tokens_outside_the_vocabulary_are_named_with_the_greatest_id(tmp_path, capsys):
    count = len(words()) + 3
    small = tmp_path / "model"
    make_model(small, vocab_size=count - 30)
    file = write_experiment(tmp_path / "small.py", small, data=SAMPLES / "sft.jsonl")
    line = refused(capsys, file, tmp_path / "run", "data.on_error=raise")
    assert "sft.jsonl:1: field '" in line
    assert f"expected token ids from 0 to {count - 31}" in line
    assert "use the tokenizer that belongs to the model" in line


def test_messages_without_a_chat_template_name_the_setting_that_gives_one(model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", GOOD | {"prompt": USER})
    file = write_experiment(tmp_path / "small.py", model, template=None, data=data)
    line = refused(capsys, file, tmp_path / "run", "data.on_error=raise")
    assert f"{data}:5: field 'prompt': expected a string, got messages" in line
    assert "has no chat template" in line
    assert "model.chat_template" in line


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "data.path is not set: name a data set, --set data.path=..."),
        ("pears.jsonl", "pears.jsonl: no such file or folder; a data path is a file .jsonl"),
        (__file__, "bad_input_test.py: unknown kind of file"),
    ],
)
def test_data_that_is_not_there_is_named(path, message, file, tmp_path, capsys):
    assert message in refused(capsys, file, tmp_path / "run", f"data.path={path}")


def test_a_data_file_that_is_empty_or_cut_is_named(file, tmp_path, capsys):
    empty, cut = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl.gz"
    empty.write_text("")
    cut.write_bytes(b"\x1f\x8b\x08\x00")
    line = refused(capsys, file, tmp_path / "run", f"data.path={empty}")
    assert f"{empty}: the file is empty; expected one JSON object a line" in line
    line = refused(capsys, file, tmp_path / "run", f"data.path={cut}")
    assert f"{cut}: damaged or cut gzip file" in line
    assert "copy it again" in line


def test_a_model_that_is_not_there_is_named(file, model, tmp_path, capsys):
    line = refused(capsys, file, tmp_path / "run", "model.path=none")
    assert "model.path is not set: name a folder or a hub model, --set model.path=..." in line
    line = refused(capsys, file, tmp_path / "run", f"model.path={tmp_path / 'nowhere'}")
    assert "nowhere" in line
    assert "no such folder" in line
    line = refused(capsys, file, tmp_path / "run", f"model.path={model / 'config.json'}")
    assert "config.json: expected a folder; got a file" in line


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model to be damaged, and a file that starts from it."""
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    return folder, write_experiment(tmp_path / "small.py", folder)


def test_a_missing_weight_file_is_named(broken, tmp_path, capsys):
    folder, file = broken
    (folder / "model.safetensors").unlink()
    line = refused(capsys, file, tmp_path / "run")
    assert f"{folder}: neither model.safetensors nor model.safetensors.index.json is there" in line


def test_a_truncated_weight_file_is_named_with_its_size(broken, tmp_path, capsys):
    folder, file = broken
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(capsys, file, tmp_path / "run")
    assert f"{weights}: truncated or not a safetensors file ({weights.stat().st_size} bytes" in line
    assert "fetch it again" in line


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(broken, tmp_path, capsys):
    folder, file = broken
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
    save_file(tensors, weights, metadata={"format": "pt"})
    line = refused(capsys, file, tmp_path / "run")
    assert f"{weights}: tensor '{name}' has shape [32, 15]; the model's config asks for" in line
    assert "[32, 16]" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_description_of_the_model_is_named(name, broken, tmp_path, capsys):
    folder, file = broken
    (folder / name).write_text((folder / name).read_text()[:50])
    assert str(folder) in refused(capsys, file, tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused_and_names_the_array(tmp_path, capsys):
    folder = tmp_path / "model"
    make_model(folder)
    file = write_experiment(tmp_path / "small.py", folder, objective='paxo.objective("simpo")')
    flags = ["--set", "train.num_steps=1", "data.heldout=0"]
    assert paxo("run", file, "--workdir", tmp_path / "run", *flags) == 0
    shutil.rmtree(folder)
    make_model(folder, intermediate_size=48)
    before = (tmp_path / "run" / "results.json").read_bytes()
    capsys.readouterr()
    assert paxo("run", file, "--workdir", tmp_path / "run", *flags) == 2
    line = one_line(capsys.readouterr().err)
    assert f"checkpoint {tmp_path / 'run' / 'checkpoints' / '1'} is of another model" in line
    assert (
        "params/layers/mlp/down/kernel is float32[2, 32, 16] there and float32[2, 48, 16]" in line
    )
    assert "choose another folder" in line
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize("workdir", ["a_file", "a_file/run"])
def test_a_run_folder_that_cannot_be_made_is_named(workdir, file, tmp_path, capsys):
    (tmp_path / "a_file").write_text("mine")
    line = refused(capsys, file, tmp_path / workdir)
    assert f"{tmp_path / workdir}: cannot write to the run folder: " in line
    assert "choose another --workdir" in line
    assert (tmp_path / "a_file").read_text() == "mine"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.num_step=20", "unknown setting 'train.num_step'; did you mean 'train.num_steps'?"),
        ("objective.betta=1", "did you mean 'objective.beta'?"),
        ("trane.num_steps=20", "did you mean 'train.num_steps'?"),
        ("train.num_steps=few", "setting 'train.num_steps' wants a whole number; got 'few'"),
        ("objective.beta=-1", "objective 'dpo': beta must lie in"),
        ("train.num_steps=0", "train.num_steps must be at least 1; got 0"),
        ("data.limits.long_prompt=keepend", "did you mean 'keep_end'?"),
        ("mesh.tensor=3", "mesh {'data': 2, 'fsdp': 1, 'tensor': 3} needs 6 devices; there are 8"),
        ("train.rows_per_batch=6", "train.rows_per_batch=6 must be a multiple of the 8 ways"),
        ("data.row_length=12", "raise max_group or set long_group to 'drop'"),
        ("data.heldout=0", "objective 'dpo' does not take groups of 1 candidates, as data.path"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(
    setting, message, file, tmp_path, capsys
):
    demonstrations = f"data.path={SAMPLES / 'sft.jsonl'}"
    flags = [demonstrations, "data.on_error=raise", "data.limits.max_prompt=none", setting]
    assert message in refused(capsys, file, tmp_path / "run", *flags)


def test_a_file_without_experiment_or_with_a_mistake_is_named(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    line = refused(capsys, file, tmp_path / "run")
    assert f"{file}: defines no function experiment() that returns paxo.Experiment" in line
    file.write_text("def experiment():\n    return 3\n")
    assert "experiment() must return a paxo.Experiment; got int" in refused(
        capsys, file, tmp_path / "run"
    )


def test_a_full_disk_at_the_store_gives_one_line_and_keeps_what_was_stored(
    file, tmp_path, capsys, monkeypatch
):
    real = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("logps/0.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert paxo("run", file, "--workdir", tmp_path / "run") == 2
    line = one_line(capsys.readouterr().err)
    assert f"{tmp_path / 'run' / 'logps' / '0.bin'} (No space left on device)" in line
    assert "make room and run the same command again" in line
    assert (tmp_path / "run" / "logps" / "0.bin").read_bytes() == b""
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        (1, "run: cannot write to the run folder: File too large"),
        (4, "cannot export to"),
        (16, "cannot write a checkpoint in"),
    ],
)
def test_where_files_cannot_grow_the_run_ends_in_one_line(kilobytes, what, model, tmp_path):
    """A limit on the size of files stands for a full disk: both let a write fail half-way."""
    workdir = tmp_path / "run"
    # Between the settings, in two kilobytes, and the checkpoints stands the tokenizer, in eight.
    large = shutil.copytree(model, tmp_path / "model")
    tokenizer = large / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().ljust(8 * 1024))
    file = write_experiment(tmp_path / "large.py", large)
    command = f"ulimit -f {kilobytes}; exec " + shlex.join(
        [sys.executable, "-m", "paxo.cli", "run", str(file), "--workdir", str(workdir), "--set",
         "reference.store=off", "data.heldout=0", "train.num_steps=2"]
    )  # fmt: skip
    # The cache of compiled programs has no place under the limit.
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    line = one_line(process.stderr)
    assert process.returncode == 2
    assert what in line
    left = [path.name for path in workdir.rglob("*")]
    assert "results.json" not in left
    assert not [name for name in left if "tmp" in name or "partial" in name]


def test_nothing_else_is_printed_where_the_input_is_wrong(file, tmp_path):
    process = paxo_process("run", file, "--workdir", tmp_path / "run", "--set", "data.path=none")
    error = process.communicate()[1]
    assert process.returncode == 2
    assert len(error.splitlines()) == 1
