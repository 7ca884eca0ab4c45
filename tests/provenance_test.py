"""The run folder: whole or not at all, resumed by equal settings, refused by others."""

import dataclasses
import errno
import json
import logging
import pathlib
import subprocess

import pytest

import paxo
from paxo import provenance
from paxo.overrides import SettingsError, flatten
from paxo.provenance import forget_unless_begun, write_run_folder
from paxo.training.writers import LogWriter

ENVIRONMENT = {"packages": {"jax": "1"}}


@dataclasses.dataclass(frozen=True)
class Train:
    num_steps: int = 100
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    train: Train = Train()
    name: str = "first"


@pytest.fixture
def experiment_file(tmp_path) -> pathlib.Path:
    file = tmp_path / "mine.py"
    file.write_text("# an experiment\n")
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(provenance, "environment", lambda file: ENVIRONMENT)
    return tmp_path / "runs" / "mine"


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILES = ["config.json", "environment.json", "experiment.py", "overrides.json"]


def test_the_folder_holds_the_file_the_settings_the_flags_and_the_machine(folder, experiment_file):
    assert write_run_folder(folder, experiment_file, Settings(), ["train.seed=0"]) is False
    assert names(folder) == FILES
    assert (folder / "experiment.py").read_text() == "# an experiment\n"
    assert json.loads((folder / "config.json").read_text()) == flatten(Settings())
    assert json.loads((folder / "overrides.json").read_text()) == ["train.seed=0"]
    assert json.loads((folder / "environment.json").read_text()) == ENVIRONMENT


def test_the_same_settings_resume_and_change_nothing(folder, experiment_file):
    write_run_folder(folder, experiment_file, Settings(), [])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_run_folder(folder, experiment_file, Settings(), []) is True
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_are_refused_with_old_and_new_values_and_the_way_out(
    folder, experiment_file
):
    write_run_folder(folder, experiment_file, Settings(), [])
    before = {path: path.read_text() for path in folder.iterdir()}
    other = Settings(Train(num_steps=200), "second")
    with pytest.raises(SettingsError) as caught:
        write_run_folder(folder, experiment_file, other, ["train.num_steps=200"])
    message = str(caught.value)
    assert str(folder) in message
    assert 'train.num_steps was 100, now 200; name was "first", now "second"' in message
    assert "train.seed" not in message
    assert "Choose another --workdir" in message
    assert {path: path.read_text() for path in folder.iterdir()} == before


def test_true_is_not_taken_for_one_and_a_missing_setting_is_named():
    old, new = {"a": 1, "b": 2}, {"a": True, "c": None}
    assert provenance._differences(old, new) == [
        "a was 1, now true",
        "b was 2, now not there",
        "c was not there, now null",
    ]


def test_of_many_differences_the_first_are_shown_and_the_rest_counted(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({f"x{i}": 0 for i in range(8)}))
    with pytest.raises(SettingsError, match=r"x4 was 0, now 1; and 3 more\. Choose"):
        provenance._holds_run(folder, {f"x{i}": 1 for i in range(8)})


def test_an_edited_experiment_file_is_kept_beside_the_first_and_logged(
    folder, experiment_file, caplog
):
    write_run_folder(folder, experiment_file, Settings(), [])
    for text in ("# edited\n", "# edited\n", "# edited again\n"):
        experiment_file.write_text(text)
        with caplog.at_level(logging.WARNING, logger="paxo"):
            assert write_run_folder(folder, experiment_file, Settings(), [])
    assert names(folder) == sorted([*FILES, "experiment-2.py", "experiment-3.py"])
    assert (folder / "experiment.py").read_text() == "# an experiment\n"
    assert (folder / "experiment-2.py").read_text() == "# edited\n"
    assert (folder / "experiment-3.py").read_text() == "# edited again\n"
    assert len(caplog.messages) == 2
    assert "experiment-2.py" in caplog.messages[0]


def test_a_kill_before_the_last_file_leaves_a_folder_that_starts_afresh(
    folder, experiment_file, monkeypatch
):
    original = provenance.write_text

    def killed(path, text):
        if path.name == "config.json":
            raise KeyboardInterrupt
        original(path, text)

    monkeypatch.setattr(provenance, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_run_folder(folder, experiment_file, Settings(), [])
    monkeypatch.setattr(provenance, "write_text", original)
    experiment_file.write_text("# edited\n")
    assert write_run_folder(folder, experiment_file, Settings(), []) is False
    assert names(folder) == FILES
    assert (folder / "experiment.py").read_text() == "# edited\n"


def test_a_full_disk_leaves_nothing_half_written(folder, experiment_file, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="No space left on device; free some space") as caught:
        write_run_folder(folder, experiment_file, Settings(), [])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(folder)
    assert names(folder) == []


def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path, folder, experiment_file):
    with pytest.raises(NotADirectoryError, match="choose another --workdir"):
        write_run_folder(experiment_file / "run", experiment_file, Settings(), [])
    with pytest.raises(FileExistsError, match="choose another --workdir"):
        write_run_folder(experiment_file, experiment_file, Settings(), [])


def test_checkpoints_without_settings_and_settings_that_cannot_be_read_are_refused(
    folder, experiment_file
):
    (folder / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"holds checkpoints but no config\.json"):
        write_run_folder(folder, experiment_file, Settings(), [])
    (folder / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json is not readable JSON"):
        write_run_folder(folder, experiment_file, Settings(), [])


def test_the_environment_tells_versions_and_devices_but_no_secrets(experiment_file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    found = provenance.environment(experiment_file)
    assert found["packages"]["paxo"] == paxo.__version__
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= found["packages"].keys()
    assert found["num_devices"] >= 1
    assert found["variables"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert "secret" not in json.dumps(found)


def test_the_commit_is_that_of_the_repository_around_the_experiment_file(tmp_path):
    def git(*command: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", str(tmp_path), *who, *command)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance.git_state(tmp_path) is None
    git("init")
    assert provenance.git_state(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_the_packages_log_is_copied_to_the_run_folder_inside_the_block_only(tmp_path):
    logger = logging.getLogger("paxo.somewhere")
    with provenance.log_to(tmp_path):
        logger.info("restored step 3")
    logger.warning("afterwards")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("INFO paxo.somewhere: restored step 3")


def test_what_is_logged_during_training_stands_in_the_log_once(tmp_path):
    with provenance.log_to(tmp_path):
        writer = LogWriter(tmp_path / "log.txt", total_steps=2)
        logging.getLogger("paxo.somewhere").warning("stopped by SIGTERM")
        writer.close()
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("stopped by SIGTERM")


def test_a_run_that_failed_before_its_first_step_leaves_the_folder_to_other_settings(
    folder, experiment_file
):
    write_run_folder(folder, experiment_file, Settings(), [])
    (folder / "sft").mkdir()
    (folder / "sft" / "metrics.jsonl").touch()
    forget_unless_begun(folder)
    assert write_run_folder(folder, experiment_file, Settings(name="second"), []) is False
    (folder / "sft" / "metrics.jsonl").write_text('{"step": 1}')
    forget_unless_begun(folder)
    with pytest.raises(SettingsError, match='name was "second", now "third"'):
        write_run_folder(folder, experiment_file, Settings(name="third"), [])


def test_a_checkpoint_without_metrics_is_a_run_that_has_begun(folder, experiment_file):
    write_run_folder(folder, experiment_file, Settings(), [])
    (folder / "dpo" / "checkpoints" / "100").mkdir(parents=True)
    forget_unless_begun(folder)
    assert (folder / "config.json").exists()
