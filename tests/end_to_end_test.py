"""Whole runs on made pairs with a made model: from the command line to the exported weights."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from paxo import experiment, loading, runs
from paxo.models.pretrained import load_params, read_config
from paxo.models.sharding import make_mesh
from paxo.scoring import FixedScorer, StoredScorer, attach_logps, make_scorer
from paxo.training.checkpoint import read_params
from tests.made_run import (
    SAMPLES,
    compiled_quickly,
    make_model,
    metrics,
    paxo,
    paxo_process,
    results,
    weights,
    write_experiment,
)

DPO = 'paxo.objective("dpo", beta=0.1)'
OTHERS = {
    "ipo": ('paxo.objective("ipo", tau=0.2)', "pairs.jsonl"),
    "simpo": ('paxo.objective("simpo")', "pairs.jsonl"),
    "dpo + nll": (f'paxo.weighted_sum(({DPO}, 1.0), (paxo.objective("nll"), 0.1))', "pairs.jsonl"),
    "nll": ('paxo.objective("nll")', "sft.jsonl"),
}
STEP_NAMES = {
    "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "length/chosen", "length/rejected", "grad_norm",
    "learning_rate", "padding/share", "num_tokens", "num_groups",
}  # fmt: skip


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
    return write_experiment(model.parent / "small.py", model)


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    assert paxo("run", file, "--workdir", workdir) == 0
    return workdir


def test_results_hold_the_heldout_accuracy_before_and_after(finished):
    found = results(finished)
    assert found["num_steps"] == 4
    pairs = found["heldout_pairs"]
    assert 3 <= pairs <= 20
    # Policy and reference are one before the run: every pair ties, and a tie is half a success.
    assert found["heldout_accuracy"]["before"] == 0.5
    assert found["heldout_accuracy_interval"]["before"] == [0.5, 0.5]
    after = found["heldout_accuracy"]["after"]
    low, high = found["heldout_accuracy_interval"]["after"]
    assert low <= after <= high
    assert after > 0.5
    assert (after * pairs * 2).is_integer()


def test_metrics_have_the_names_of_the_field_in_every_step(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line.keys() >= STEP_NAMES
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5
        )
        assert 0 <= line["padding/share"] < 0.5
    # The first step is compilation: it has no speed to tell.
    assert all(line["tokens_per_second"] > 0 for line in steps[1:])
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[0]["rewards/accuracies"] == 0.5
    assert steps[-1]["loss"] < 0.6
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [1.5e-3, 3e-3, 3e-3, 1.5e-3], rel=1e-5
    )
    assert evaluations[-1].keys() == {"step", "eval/rewards/accuracies"}
    assert [line["step"] for line in evaluations] == [2, 4]
    final = results(finished)["heldout_accuracy"]["after"]
    assert evaluations[-1]["eval/rewards/accuracies"] == final


def test_the_run_folder_tells_what_was_run_and_with_what(finished, file):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints", "config.json", "environment.json", "experiment.py", "export", "log.txt",
        "logps", "metrics.jsonl", "model", "overrides.json", "prompts.json", "results.json",
        "tensorboard",
    }  # fmt: skip
    assert (finished / "experiment.py").read_text() == file.read_text()
    config = json.loads((finished / "config.json").read_text())
    assert config["objective"] == "dpo"
    assert config["objective.beta"] == 0.1
    assert config["train.num_steps"] == 4
    assert json.loads((finished / "overrides.json").read_text()) == []
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["2", "4"]
    assert any((finished / "tensorboard").iterdir())


def test_the_log_counts_bad_rows_by_reason_and_what_was_cut(finished):
    log = (finished / "log.txt").read_text()
    for reason, line in (
        ("chosen equals rejected", 6),
        ("empty completion", 12),
        ("missing column rejected", 18),
        ("malformed JSON", 24),
    ):
        assert f"skipped 1 of 40 records: {reason} ({SAMPLES / 'pairs.jsonl'}:{line})" in log
    assert "cut 8 prompts to their last 24 tokens" in log
    assert "cut 3 completions to their first 16 tokens" in log


def test_the_export_holds_the_parameters_of_the_last_checkpoint(finished, model, tmp_path):
    exported = load_params(finished / "export")
    trained = read_params(finished / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, exported, trained)
    start = load_params(model)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), exported, start)
    assert all(change > 0 for change in jax.tree.leaves(moved))
    tokenizer = (finished / "export" / "tokenizer.json").read_bytes()
    assert tokenizer == (model / "tokenizer.json").read_bytes()
    assert paxo("export", finished, "--out", tmp_path / "again") == 0
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == weights(finished)
    assert paxo("export", finished, "--step", "2", "--out", tmp_path / "earlier") == 0
    earlier = load_params(tmp_path / "earlier", read_config(finished / "export"))
    jax.tree.map(np.testing.assert_array_equal, earlier, read_params(finished / "checkpoints", 2))


def test_export_of_a_step_without_checkpoint_names_those_there_are(finished, capsys):
    assert paxo("export", finished, "--step", "3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no checkpoint of step 3; there are [2, 4]" in error


def test_sample_prints_completions_of_a_run_and_of_a_model_folder(finished, capsys, monkeypatch):
    arguments = ["--max-tokens", "5", "--temperature", "0"]
    monkeypatch.chdir(finished.parent)  # as typed: runs/dpo_hh
    assert paxo("sample", finished.name, *arguments) == 0
    own = capsys.readouterr().out
    assert own.count("<s> Human:") == 4  # the prompts that the run has kept
    assert own.count("finished") + own.count("cut at --max-tokens") == 4
    question = ["--prompt", "How do I bake bread ?"]
    assert paxo("sample", finished, *question, *arguments) == 0
    of_run = capsys.readouterr().out
    assert "Human: How do I bake bread ? Assistant:" in of_run
    assert paxo("sample", finished / "export", *question, *arguments) == 0
    assert capsys.readouterr().out == of_run


def test_inspect_prints_records_and_figures_and_trains_nothing(file, capsys):
    assert paxo("inspect", file, "--num", "2") == 0
    out = capsys.readouterr().out
    figures = {" ".join(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line}
    assert out.count("grade 1") == 2
    assert "40, of which 36 are used" in out
    assert figures["skipped: malformed JSON"] == "1"
    assert figures["identical pairs"] == "1"
    assert figures["empty completions"] == "1"
    assert figures["prompts cut"] == "8"
    assert figures["BOS in a sequence"] == "1"
    assert figures["scored EOS if finished"] == "1"
    assert figures["scored EOS if cut"] == "0"


def test_a_second_run_gives_the_same_metrics_results_and_weights_to_the_bit(
    finished, file, tmp_path
):
    assert paxo("run", file, "--workdir", tmp_path) == 0
    assert metrics(tmp_path) == metrics(finished)
    assert results(tmp_path) == results(finished)
    assert weights(tmp_path) == weights(finished)


def test_with_a_filled_store_the_reference_is_not_run(finished, file, tmp_path, monkeypatch):
    references, scored = [], []
    asked, run = StoredScorer.__call__, FixedScorer._run

    def noted(self, batch):
        references.append(self.scorer)
        return asked(self, batch)

    def counted(self, function, batch):
        scored.append(self)
        return run(self, function, batch)

    monkeypatch.setattr(StoredScorer, "__call__", noted)
    monkeypatch.setattr(FixedScorer, "_run", counted)
    # A copy: what the run adds must not change the store of the first one.
    shutil.copytree(finished / "logps", tmp_path / "store")
    store = (tmp_path / "store" / "0.bin").read_bytes()
    flags = ["--set", f"reference.store={tmp_path / 'store'}"]
    assert paxo("run", file, "--workdir", tmp_path / "run", *flags) == 0
    assert references
    assert scored  # the policy on held-out rows
    assert not any(scorer is reference for scorer in scored for reference in references)
    assert (tmp_path / "store" / "0.bin").read_bytes() == store
    assert metrics(tmp_path / "run") == metrics(finished)
    assert weights(tmp_path / "run") == weights(finished)
    # Without a store it runs in each of the four steps, and for each look at held-out rows.
    with_store = len(scored)
    flags = ["--set", "reference.store=off"]
    assert paxo("run", file, "--workdir", tmp_path / "without", *flags) == 0
    assert len(scored) - with_store == 2 * with_store + 4
    # Other rows, other last bits: what is scored anew is equal to rounding only.
    for anew, first in zip(metrics(tmp_path / "without"), metrics(finished)):
        assert anew == pytest.approx(first, rel=1e-4, abs=1e-5)


def test_the_same_folder_with_other_settings_is_refused_and_the_setting_named(
    finished, file, capsys
):
    before = weights(finished)
    assert paxo("run", file, "--workdir", finished, "--set", "objective.beta=0.3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{finished} holds a run with other settings: objective.beta was 0.1, now 0.3" in line
    assert "Choose another --workdir" in line
    assert weights(finished) == before


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_objective_runs_too(name, model, tmp_path):
    objective, data = OTHERS[name]
    data = SAMPLES / data
    file = write_experiment(tmp_path / "other.py", model, objective=objective, data=data)
    workdir = tmp_path / "run"
    assert paxo("run", file, "--workdir", workdir, "--set", "train.num_steps=3") == 0
    lines = [line for line in metrics(workdir) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (workdir / "logps").exists() == ("dpo" in name or name == "ipo")
    found = results(workdir)
    if name == "nll":
        assert "heldout_accuracy" not in found  # a demonstration has nothing to be compared with
        assert found["heldout_nll"]["after"] < found["heldout_nll"]["before"]
        assert "rewards/chosen" in lines[0]
        assert "rewards/rejected" not in lines[0]
    elif name == "simpo":
        assert found["heldout_accuracy"]["before"] != 0.5  # no reference: lengths and words decide
    else:
        assert found["heldout_accuracy"]["before"] == 0.5
    assert load_params(workdir / "export")


def start(file, workdir, *flags):
    """`paxo run` on one device in another process."""
    environment = os.environ | {"XLA_FLAGS": ""}
    return paxo_process("run", file, "--workdir", workdir, *flags, env=environment)


def test_a_run_killed_at_any_moment_and_started_again_ends_in_the_same_bits(file, tmp_path):
    flags = ["--set", "train.num_steps=30", "train.checkpoint_every=3", "train.evaluate_every=7"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(file, whole, *flags)
    assert uninterrupted.wait(120) == 0, uninterrupted.stderr.read()
    process = start(file, killed, *flags)
    moment = random.uniform(0, 0.3)
    while not (killed / "checkpoints" / "3").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"it had finished {moment} s after the checkpoint"
    assert not (killed / "results.json").exists()
    again = start(file, killed, *flags)
    assert again.wait(120) == 0, again.stderr.read()
    assert "restored step" in (killed / "log.txt").read_text()
    assert metrics(killed) == metrics(whole), moment
    assert results(killed) == results(whole)
    assert weights(killed) == weights(whole), moment


def test_a_run_goes_on_from_the_same_state_on_another_mesh(file, tmp_path):
    flags = ["train.checkpoint_every=2", "train.evaluate_every=0", "train.num_steps=4"]
    settings = experiment.settings_of(experiment.load(file), flags)
    one = make_mesh(devices=jax.devices()[:1])
    eight = make_mesh(2, 2, 2)
    first_half = dataclasses.replace(settings.train, num_steps=2)

    def train(mesh, workdir, train_settings):
        model = loading.load_model(settings.model, mesh)
        data = loading.load_data(settings.data, model)
        scorer = make_scorer(model.policy, model.params, mesh=mesh)
        # The schedule is that of the whole run, however far this part of it goes.
        optimizer = dataclasses.replace(settings.optimizer, decay_steps=4)
        return runs.train(
            model.policy,
            model.params,
            settings.objective,
            optimizer,
            loading.batches(data, settings.data, train_settings),
            train_settings,
            mesh,
            workdir,
            attach=lambda batch: attach_logps(batch, "reference", scorer),
        )

    alone = train(one, tmp_path / "one", settings.train)
    train(one, tmp_path / "both", first_half)
    moved = train(eight, tmp_path / "both", settings.train)
    assert len(moved.params["embed"]["embedding"].sharding.device_set) == 8
    assert int(moved.step) == int(alone.step) == 4
    assert [line["step"] for line in metrics(tmp_path / "both")] == [1, 2, 3, 4]
    for theirs, ours in zip(metrics(tmp_path / "one"), metrics(tmp_path / "both")):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(moved.params)):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5 * np.abs(a).max())
