"""The command line: what it passes on, what it says, and the exit code it leaves."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest

import paxo
import paxo.experiment  # with the real paxo.distributed, for which the tests have a stand-in
from paxo import cli

PROJECT = pathlib.Path(__file__).resolve().parent.parent


class Calls:
    """Stands for paxo.experiment: notes how it is called, or raises."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.error: BaseException | None = None

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            self.calls.append((name, arguments, keywords))
            if self.error:
                raise self.error

        return call


@pytest.fixture
def experiment(monkeypatch) -> Calls:
    calls = Calls()
    module = types.ModuleType("paxo.experiment")
    for name in ("run_file", "inspect_file", "export_run", "sample_run"):
        setattr(module, name, getattr(calls, name))
    monkeypatch.setitem(sys.modules, "paxo.experiment", module)
    monkeypatch.setattr(paxo, "experiment", module, raising=False)
    return calls


@pytest.fixture(autouse=True)
def distributed(monkeypatch) -> Calls:
    """Stands for paxo.distributed: what it logs is no concern of the command line's."""
    calls = Calls()
    module = types.ModuleType("paxo.distributed")
    module.start = calls.start
    monkeypatch.setitem(sys.modules, "paxo.distributed", module)
    monkeypatch.setattr(paxo, "distributed", module, raising=False)
    return calls


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = tmp_path / "mine.py"
    path.write_text("")
    return path


@pytest.fixture(autouse=True)
def _logging_as_before():
    root, package = logging.getLogger(), logging.getLogger("paxo")
    before = root.handlers[:], root.level, package.level
    yield
    root.handlers[:], root.level, package.level = before


def test_run_passes_file_overrides_and_workdir_on(experiment, file):
    flags = ["--set", "a.b=1", "c=2", "--set", "d=x=y", "--workdir", "w"]
    assert cli.main(["run", str(file), *flags]) == 0
    assert experiment.calls == [("run_file", (file, ["a.b=1", "c=2", "d=x=y"], "w"), {})]


def test_run_says_how_several_processes_find_one_another(experiment, distributed, file):
    told = ["--coordinator", "host0:1", "--num-processes", "2", "--process-id=1", "-v"]
    assert cli.main(["run", str(file), *told]) == 0
    assert distributed.calls == [("start", ("host0:1", 2, 1), {"verbose": True})]
    assert len(experiment.calls) == 1


def test_only_run_starts_several_processes(experiment, distributed, file):
    assert cli.main(["inspect", str(file)]) == 0
    assert distributed.calls == []


def test_the_default_run_folder_has_the_name_of_the_file(experiment, file):
    assert cli.main(["run", str(file)]) == 0
    assert experiment.calls == [("run_file", (file, [], pathlib.Path("runs/mine")), {})]


def test_inspect_export_and_sample_pass_their_arguments_on(experiment, file):
    assert cli.main(["inspect", str(file), "--num", "5", "--set", "a=1"]) == 0
    assert cli.main(["export", str(file.parent), "--step", "20", "--out", "o"]) == 0
    assert cli.main(["sample", "m", "--prompt", "a b", "c", "--temperature", "0", "--num=4"]) == 0
    keywords = {"prompts": ["a b", "c"], "num": 4, "max_tokens": 128, "temperature": 0.0, "seed": 0}
    assert experiment.calls == [
        ("inspect_file", (file, ["a=1"], 5), {}),
        ("export_run", (file.parent, 20, "o"), {}),
        ("sample_run", ("m",), keywords),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum", "x"], "unknown command 'rum'; did you mean 'run'?"),
        (
            ["run", "x.py", "--wrkdir", "w"],
            "unknown argument '--wrkdir'; did you mean '--workdir'?",
        ),
        (["run", "x.py", "--sed=1"], "unknown argument '--sed=1'; did you mean '--set'?"),
        (["run", "--set", "a=1", "x.py"], "given as name=value after FILE; got 'x.py'"),
        (["run", "x.py", "--work", "w"], "unknown argument '--work'; did you mean '--workdir'?"),
        (["run"], "required: FILE"),
        ([], "required: COMMAND"),
        (["sample", "m", "--temperature", "-1"], "a number of at least 0 is wanted; got '-1'"),
        (["inspect", "x.py", "--num", "few"], "a whole number is wanted; got 'few'"),
    ],
)
def test_wrong_use_gives_one_line_and_two(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("paxo: error: ")
    assert error.count("\n") == 1


def test_a_missing_file_is_told_the_nearest_before_anything_is_imported(experiment, file, capsys):
    assert cli.main(["run", str(file.with_name("mime.py"))]) == 2
    assert f"no such file; did you mean '{file}'?" in capsys.readouterr().err
    assert experiment.calls == []


class LossError(ValueError):
    """Stands for paxo.training.loop.NonFiniteLossError."""


class RoundError(RuntimeError):
    """Stands for paxo.online.collect.RoundError."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("train.jsonl:3: no\n  column"), 2, "train.jsonl:3: no column"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left", "/x"), 2, "/x: No space left"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system"),
        (LossError("step 7: loss is nan"), 3, "step 7: loss is nan"),
        (RoundError("round 0002: no judge"), 5, "round 0002: no judge"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_the_users_gives_one_line_and_its_code(
    error, code, line, experiment, file, capsys, monkeypatch
):
    for module, raised in (
        ("paxo.training.loop", {"NonFiniteLossError": LossError}),
        ("paxo.online.collect", {"RoundError": RoundError}),
    ):
        made = types.ModuleType(module)
        vars(made).update(raised)
        monkeypatch.setitem(sys.modules, module, made)
    experiment.error = error
    assert cli.main(["run", str(file)]) == code
    assert capsys.readouterr().err == f"paxo: error: {line}\n"
    assert cli.main(["run", str(file), "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EIO, "I/O error"), TypeError("x")])
def test_any_other_error_is_a_crash_with_its_traceback(error, experiment, file, capsys):
    experiment.error = error
    assert cli.main(["run", str(file)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_verbose_and_debug_stand_before_or_after_the_command():
    for arguments in (["-v", "--debug", "run", "f"], ["run", "f", "--debug", "-v"]):
        options = cli.parse(arguments)
        assert (options.verbose, options.debug) == (True, True)


def test_the_package_logs_facts_and_other_libraries_only_warnings(capsys):
    cli.set_up_logging(verbose=False)
    logging.getLogger("paxo.training").info("restored step 3")
    logging.getLogger("paxo.training").debug("too much")
    logging.getLogger("absl").info("noise")
    logging.getLogger("some.library").info("noise")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO restored step 3")


def test_self_play_methods_say_what_they_need(capsys):
    assert cli.main(["methods", "--online", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["egpo"]["needs"] == ["a judge"]
    assert rows["rso"]["needs"] == ["a judge", "a reward 'reward'"]
    assert rows["rto"]["needs"] == ["a reward 'reward'", "a frozen policy 'dpo'"]
    assert rows["maxmin"]["needs"] == ["any rewards"]
    assert rows["selm"]["settings"]["draws"] == [2, 1]
    assert cli.main(["methods", "--online"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(rows)
    assert "dr_po" in lines[2 * list(rows).index("dr_po")]
    assert "| needs a reward 'reward', 1 completion of each prompt" in "\n".join(lines)


def test_methods_are_compared_with_those_of_other_libraries(capsys):
    assert cli.main(["methods", "--compare"]) == 0
    every = capsys.readouterr().out
    assert "rso_hinge" in every
    assert "HALOs" in every
    assert cli.main(["methods", "--compare", "trl", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["peer"] for row in rows} == {"TRL"}
    assert {"name": "rso_hinge", "equal": True}.items() <= rows[
        [row["name"] for row in rows].index("rso_hinge")
    ].items()
    assert cli.main(["methods", "--compare", "torchtune"]) == 2
    assert "expected one of EasyDeL, HALOs, TRL" in capsys.readouterr().err


def test_methods_lists_every_objective_with_its_hyper_parameters(capsys):
    from paxo.objectives import LOSSES

    assert cli.main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == LOSSES.keys()
    assert rows["dpo"]["hyper_parameters"] == {"beta": 0.1}
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in LOSSES)
    assert "beta=0.1" in text


def paxo_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "paxo.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_takes_less_than_a_second_and_imports_no_jax(verb):
    start = time.perf_counter()
    finished = paxo_process(*verb.split(), "--help")
    seconds = time.perf_counter() - start
    assert finished.returncode == 0
    assert "usage: paxo" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"jax", "numpy", "flax", "transformers", "rich"} & imported
    assert seconds < 1


def test_help_tells_the_exit_codes():
    text = paxo_process("--help").stdout
    for code in ("0", "1", "2", "3", "130"):
        assert f"\n  {code} " in text


def test_a_reader_that_stops_reading_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        finished = subprocess.run(
            [sys.executable, "-m", "paxo.cli", "methods"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
    assert "BrokenPipe" not in finished.stderr


def test_a_bucket_keeps_the_checkpoints_and_a_folder_here_the_rest(tmp_path, monkeypatch):
    from paxo import experiment
    from paxo.training.checkpoint import checkpoint_folder

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "made.py"
    file.write_text(
        "import dataclasses\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Settings:\n    steps: int = 1\n\n"
        "def experiment():\n    return Settings()\n\n"
        "def run(settings, workdir):\n    (workdir / 'seen').write_text(str(settings.steps))\n"
    )
    experiment.run_file(file, ["steps=3"], "gs://a-bucket/some/dpo/")
    folder = pathlib.Path("runs", "dpo")
    assert (folder / "seen").read_text() == "3"
    assert (folder / "config.json").exists()
    assert str(checkpoint_folder(folder)) == "gs://a-bucket/some/dpo/checkpoints"
    # Of a file with several trainings each has its own place there.
    assert str(checkpoint_folder(folder / "sft")) == "gs://a-bucket/some/dpo/sft/checkpoints"
    assert checkpoint_folder(tmp_path) == tmp_path / "checkpoints"
