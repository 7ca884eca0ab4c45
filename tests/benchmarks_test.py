"""The benchmark trains on the very same weights and batch as every other trainer."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import dpo_step, losses, method_table
from paxo.objectives import LOSSES
from tests.made_run import PROJECT


def measured(*arguments, module="benchmarks.dpo_step", **variables):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=PROJECT,
        env=os.environ | {"XLA_FLAGS": ""} | variables,
        capture_output=True,
        text=True,
    )


def test_first_losses_of_w2_are_those_of_the_other_trainers():
    if not (dpo_step.bench_folder() / "common.py").is_file():
        pytest.skip(f"no bench folder at {dpo_step.bench_folder()}: set PAXO_BENCH")
    finished = measured("--workload", "W2", "--steps", "3", "--warmup", "0")
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stdout.splitlines()
    found = json.loads(line.removeprefix("JSON "))
    assert found["losses"] == pytest.approx([0.69315, 0.53326, 0.41335], abs=1e-4)
    assert found["row_length"] == 3 * 64
    assert found["temp_bytes"] > 0
    assert found["tokens_per_s"] > 0
    assert found["compile_s"] > 0


def test_without_a_bench_folder_one_line_says_so(tmp_path):
    finished = measured(PAXO_BENCH=str(tmp_path))
    assert finished.returncode == 2
    assert (
        finished.stderr == f"{tmp_path}: no common.py there; set PAXO_BENCH to the bench folder\n"
    )


def test_sampling_is_measured_lap_by_lap():
    if not (dpo_step.bench_folder() / "common.py").is_file():
        pytest.skip(f"no bench folder at {dpo_step.bench_folder()}: set PAXO_BENCH")
    options = "--workload W2 --laps 2 --prompts 3 --candidates 2 --new-tokens 4 --prompt-length 5"
    finished = measured(*options.split(), module="benchmarks.sampling")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["program"] == "paxo"
    assert found["cpu"] > 0
    assert found["tokens_per_s"] == pytest.approx(3 * 2 * 4 / found["wall"], rel=0.05)
    assert found["times_paxo_cpu"] == 1


@pytest.mark.slow
def test_a_loss_on_pairs_costs_at_most_four_times_dpo():
    ratios = {name: losses.times_dpo(name, laps=30) for name in losses.pairwise_names()}
    assert len(ratios) > 40
    assert {name: ratio for name, ratio in ratios.items() if ratio > losses.LIMIT} == {}


@pytest.mark.slow
def test_lists_grow_with_the_square_of_their_length_at_most():
    growth = {
        name: losses.operations(name, 32) / losses.operations(name, 16) for name in losses.LISTS
    }
    steep = {name for name, factor in growth.items() if factor > 4.5}
    assert steep == losses.CUBIC  # a sorting network has K layers
    assert growth["diff_ndcg"] < 9


def test_a_loss_is_timed_in_turns_with_dpo():
    assert 0.3 < losses.times_dpo("dpo", laps=5, calls=3) < 3
    assert losses.times_dpo("semantic", laps=5, calls=3) > 1.2


def test_the_readme_has_the_table_of_all_methods_with_their_figures():
    figures = json.loads(method_table.FIGURES.read_text())
    assert figures.keys() == LOSSES.keys()
    readme = (PROJECT / "README.md").read_text()
    assert method_table.written(readme, figures) == readme, "python -m benchmarks.method_table"
