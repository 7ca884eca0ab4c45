"""The self-play experiments: a short run through the command line, and the claims they make."""

import json
import os
import pathlib

import numpy as np
import pytest

from paxo import rounds
from paxo.experiment import load, run_file, settings_of
from paxo.judges import JudgeError
from paxo.online import RoundError
from tests.made_run import compiled_quickly

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent / "experiments"
FILES = sorted(EXPERIMENTS.glob("*_prompts.py"))
DATA = pathlib.Path(os.environ.get("PAXO_DATA", EXPERIMENTS.parent.parent / "shared" / "data"))
SHORT = [
    *("sft_steps=2", "num_reviews=32", "num_prompts=24", "evaluation.num_prompts=8"),
    *("rounds.num_rounds=2", "rounds.prompts_per_round=8", "rounds.evaluate_every=1"),
    *("sampling.max_new_tokens=6", "sample_batch=8", "row_length=64", "checkpoint_every=1"),
]


def test_every_file_names_its_own_method():
    methods = {file.stem: settings_of(load(file), []).method.name for file in FILES}
    assert methods == {
        "cyclic_prompts": "egpo",
        "dno_prompts": "dno",
        "egpo_prompts": "egpo",
        "inpo_prompts": "inpo_pairs",
        "nash_md_prompts": "nash_md",
        "online_dpo_prompts": "online_dpo",
        "sppo_prompts": "sppo",
    }


def test_a_flag_changes_a_methods_numbers_and_names_another():
    changed = settings_of(load(FILES[0]), ["method=inpo", "method.eta=0.5", "method.draws=4"])
    assert changed.method.name == "inpo"
    assert changed.method.objective.hyper_parameters["eta"] == 0.5
    assert changed.method.num_candidates == 4


def run_short(folder):
    with compiled_quickly(folder / "programs"):
        run_file(EXPERIMENTS / "egpo_prompts.py", SHORT, folder)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("egpo")
    run_short(folder)
    return folder


def test_a_run_leaves_figures_plots_data_and_an_export(short_run):
    results = json.loads((short_run / "results.json").read_text())
    assert [row["round"] for row in results["history"]] == [1, 2]
    assert {"win_rate_first", "duality_gap", "kl_nats", "entropy_nats", "exact_gap"} <= set(
        results["last"]
    )
    styles = json.loads((short_run / "styles.json").read_text())
    assert sum(styles["nash"].values()) == pytest.approx(1, abs=1e-5)
    assert (short_run / "rounds.png").stat().st_size > 5000
    names = sorted(path.name for path in (short_run / "rounds").iterdir())
    assert names == [
        f"{round:04d}{half}.{kind}"
        for round in range(2)
        for half in ("-half", "")
        for kind in ("json", "jsonl")
    ]
    assert (short_run / "export" / "model.safetensors").exists()


def test_a_finished_run_that_is_started_again_changes_nothing(short_run):
    before = (short_run / "metrics.jsonl").read_text()
    run_short(short_run)
    assert (short_run / "metrics.jsonl").read_text() == before


def test_a_run_whose_judge_dies_tells_what_was_and_goes_on_to_the_same_figures(
    short_run, tmp_path, monkeypatch
):
    figures, calls = rounds.Evaluator._figures, []

    def dies(self, *given):
        calls.append(given)
        if len(calls) == 2:
            raise JudgeError("judge 'styles' failed: no route to host")
        return figures(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(rounds.Evaluator, "_figures", dies)
        told = "the evaluation after round 2: judge 'styles' failed: .* run the same command again"
        with pytest.raises(RoundError, match=told):
            run_short(tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())["history"]
    assert row["round"] == 1
    assert (tmp_path / "rounds.png").stat().st_size > 5000
    assert not (tmp_path / "export").exists()
    run_short(tmp_path)
    assert _figures(tmp_path) == _figures(short_run)
    first, again = (
        (folder / "export" / "model.safetensors").read_bytes() for folder in (short_run, tmp_path)
    )
    assert first == again


def _figures(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["egpo", "inpo", "nash_md"])
def test_nash_methods_approach_the_mixed_policy(name, tmp_path):
    run_file(EXPERIMENTS / f"{name}_prompts.py", ["export=false"], tmp_path)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    last = history[-10:]
    # 256 texts an evaluation: shares are uncertain by 0.03 each.
    assert np.mean([row["exact_gap"] for row in last]) < 0.05
    assert np.mean([row["distance"] for row in last]) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dno", "sppo"])
def test_without_a_kl_term_the_last_policy_goes_round_and_the_average_does_not(name, tmp_path):
    run_file(EXPERIMENTS / f"{name}_prompts.py", ["export=false"], tmp_path)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    styles = json.loads((tmp_path / "styles.json").read_text())
    late = [row["unregularised_gap"] for row in history[len(history) // 2 :]]
    assert np.mean(late) > 0.4
    assert styles["average_policy"]["unregularised_gap"] < 0.6 * np.mean(late)


@pytest.mark.slow
def test_online_dpo_goes_round(tmp_path):
    run_file(EXPERIMENTS / "online_dpo_prompts.py", ["export=false"], tmp_path)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    late = history[len(history) // 3 :]
    assert max(row["exact_gap"] for row in late) > 0.3
    leaders = [max(("plain", "warm", "grand"), key=lambda s: row[f"share_{s}"]) for row in late]
    assert len(set(leaders)) >= 2


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not found at {DATA}")
def test_a_real_model_learns_to_repeat_itself_less(tmp_path):
    given = [
        f"model.path={DATA / 'model_stories260k'}",
        f"prompts.path={DATA / 'prompts' / 'alpaca_eval.jsonl'}",
        *("rounds.num_rounds=10", "sampling.max_new_tokens=48", "prompts.max_tokens=128"),
        *("row_length=512", "optimizer.learning_rate=3e-4", "export=false"),
    ]
    run_file(EXPERIMENTS / "online_dpo_prompts.py", given, tmp_path)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    assert history[-1]["win_rate_first_low"] > 0.5
    assert history[-1]["reward/reward"] > history[0]["reward/reward"]
