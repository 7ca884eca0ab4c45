"""Whole runs that train adapters: from a flag on the command line to the merged export."""

import json
import shutil

import jax
import numpy as np
import pytest

from paxo.experiment import ModelSettings
from paxo.loading import load_model
from paxo.models.config import LoraSettings
from paxo.models.lora import merge_lora
from paxo.models.pretrained import load_params, read_config
from paxo.models.sharding import make_mesh
from paxo.overrides import SettingsError
from paxo.training.checkpoint import read_frozen, read_params
from tests.made import TINY
from tests.made_run import (
    compiled_quickly,
    make_model,
    metrics,
    paxo,
    results,
    weights,
    write_experiment,
)

FLAGS = ["--set", "model.lora.rank=2", "model.lora.alpha=16", "optimizer.learning_rate=0.02"]
TDPO = 'paxo.objective("tdpo2")'


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(tmp_path_factory):
    with compiled_quickly(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def file(model):
    # Its reference runs in every step, and the step holds the reference's head.
    return write_experiment(model.parent / "small.py", model, objective=TDPO)


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    assert paxo("run", file, "--workdir", workdir, *FLAGS) == 0
    return workdir


def base_weights(model):
    return load_params(model, read_config(model), dtype="bfloat16")


def test_a_flag_trains_adapters_and_the_reference_is_the_base_without_them(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["model.lora.rank"] == 2
    assert config["model.lora.base_dtype"] == "bfloat16"
    steps = [line for line in metrics(finished) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01
    found = results(finished)["heldout_accuracy"]
    assert found["before"] == 0.5  # every pair ties: B is 0
    assert found["after"] > 0.5


def test_checkpoints_hold_the_adapters_and_no_frozen_weight(finished):
    trained = read_params(finished / "checkpoints")
    assert trained.keys() == {"lora"}
    assert all(np.any(pair["lora_b"] != 0) for pair in trained["lora"].values())
    folder = finished / "checkpoints" / "4" / "state"
    described = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    assert [name for name in described if "frozen" in name] == ["('frozen',)"]  # an empty dict
    assert sum("opt_state" in name and "lora" in name for name in described) == 16
    assert not any("opt_state" in name and "embed" in name for name in described)
    assert read_frozen(finished / "checkpoints").keys() == {
        "embed", "layers", "norm", "reference_head",
    }  # fmt: skip


def test_the_export_is_the_base_with_the_adapters_added(finished, model, tmp_path):
    config = read_config(model)
    trained = read_params(finished / "checkpoints")
    merged = merge_lora(trained | base_weights(model), config, LoraSettings(2, 16.0))
    exported = load_params(finished / "export")
    jax.tree.map(np.testing.assert_array_equal, exported, merged)
    assert json.loads((finished / "lora.json").read_text())["base"] == str(model)
    assert paxo("export", finished, "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights(finished)


def test_sample_draws_from_a_run_as_from_its_export(finished, capsys):
    question = ["--prompt", "How do I bake bread ?", "--max-tokens", "5", "--temperature", "0"]
    assert paxo("sample", finished, *question) == 0
    of_run = capsys.readouterr().out
    assert "Human: How do I bake bread ? Assistant:" in of_run
    assert paxo("sample", finished / "export", *question) == 0
    assert capsys.readouterr().out == of_run


def test_a_run_goes_on_from_its_adapters_to_the_same_bits(finished, file, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "results.json").unlink()
    assert paxo("run", file, "--workdir", again, *FLAGS) == 0
    assert "restored step 2" in (again / "log.txt").read_text()
    assert metrics(again) == metrics(finished)
    assert results(again) == results(finished)
    assert weights(again) == weights(finished)


def test_another_base_under_the_same_name_is_refused(finished, model, file, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "4")
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    try:
        make_model(model, seed=1)
        assert paxo("run", file, "--workdir", again, *FLAGS) != 0
        error = capsys.readouterr().err
        assert "was made with other frozen parameters (embed, layers, reference_head)" in error
        assert paxo("export", finished, "--out", tmp_path / "wrong") != 0
        assert "are not those for which the adapters" in capsys.readouterr().err
    finally:
        shutil.copytree(kept, model, dirs_exist_ok=True)


def test_adapters_of_a_model_from_scratch_are_refused(model):
    settings = ModelSettings(config=TINY, tokenizer=str(model), lora=LoraSettings())
    with pytest.raises(SettingsError, match="of a pretrained model: name it, --set model"):
        load_model(settings, make_mesh(devices=jax.devices()[:1]))
