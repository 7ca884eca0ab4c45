"""The benchmark trains on the very same weights and batch as every other trainer."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import dpo_step, losses, method_table, real_lengths, table, w3
from benchmarks import lists as list_layouts
from paxo.data.records import TokenGroup
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


def group(labels, lengths=(3, 2, 4)):
    completions = tuple(np.arange(1, n + 1, dtype=np.int32) for n in lengths)
    prompt = np.array([1, 40_000], np.int32)
    return TokenGroup(prompt, completions, (True,) * 3, labels, {}, 0, "made:1")


def test_methods_of_the_large_vocabulary_agree_in_loss_and_gradients():
    import jax

    found = {}
    for method in w3.METHODS:
        sizes = "--batch 2 --length 6 --width 8 --vocabulary 70"
        options = w3.parse(["--method", method, *sizes.split()])
        found[method] = jax.tree.leaves(jax.jit(w3.function(options))(*w3.made_arrays(options)))
    for method in w3.METHODS[1:]:
        for x, y in zip(found[method], found["dense"], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_pairs_of_a_list_are_those_of_unequal_grade_better_first():
    pairs = list_layouts.all_pairs([group((1.0, 0.0, 1.0))])
    assert [[len(c) for c in pair.completions] for pair in pairs] == [[3, 2], [4, 2]]
    assert {pair.labels for pair in pairs} == {(1.0, 0.0)}


def test_peers_get_the_same_tokens_without_the_eos_that_they_add(tmp_path):
    folded = real_lengths.folded(group((1.0, 0.0, 0.0)), 32_000)
    assert folded.prompt.max() < 32_000
    assert [len(c) for c in folded.completions] == [3, 2, 4]
    real_lengths.write_pairs([folded], tmp_path / "pairs.json")
    ((prompt, *completions),) = json.loads((tmp_path / "pairs.json").read_text())
    assert prompt == folded.prompt.tolist()
    assert completions == [c[:-1].tolist() for c in folded.completions]


def test_ratios_are_taken_round_by_round_and_without_what_failed():
    rounds = [
        {"paxo": {"step": {"cpu": 2.0}}, "TRL": {"step": {"cpu": 8.0}}},
        {"paxo": {"step": {"cpu": 1.0}}},
        {"paxo": {"step": {"cpu": 1.0}}, "TRL": {"step": {"cpu": 5.0}}},
    ]
    speed = table.Figure("speed", table.seconds, "paxo", "TRL", 4.5)
    assert table.ratios(speed, rounds, wall=False) == [4.0, 5.0]
    found = table.summary(speed, [4.0, 5.0, 3.0])
    assert (found["median"], found["least"], found["rounds"]) == (4.0, 3.0, 3)
    assert not found["reached"]
    share = table.Figure("share", table.seconds, "paxo", "TRL", 0.25, most=True)
    assert table.summary(share, table.ratios(share, rounds, wall=False))["reached"]
    assert table.summary(speed, []) == {"text": "speed", "rounds": 0}


def test_the_table_names_what_it_could_not_run_and_goes_on(tmp_path):
    if not (dpo_step.bench_folder() / "common.py").is_file():
        pytest.skip(f"no bench folder at {dpo_step.bench_folder()}: set PAXO_BENCH")
    options = f"--rows w2 --rounds 1 --pin 0 --out {tmp_path} --timeout 1 --tunix-python /none"
    finished = measured(*options.split(), module="benchmarks")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert any(line.startswith("w2: Tunix: ") for line in lines)
    assert any(line.startswith("w2: paxo: ") and "timed out" in line for line in lines)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"]["w2"]["figures"][0]["rounds"] == 0


@pytest.mark.slow
def test_a_round_of_egpo_costs_at_most_2_2_times_one_of_online_ipo():
    finished = measured("--rounds", "8", "--turns", "3", module="benchmarks.self_play")
    assert finished.returncode == 0, finished.stderr
    line = json.loads(finished.stdout.splitlines()[-1])
    assert line["egpo_over_online_ipo"] <= 2.2, line


def test_the_chart_has_a_bar_for_each_ratio(tmp_path):
    from benchmarks.__main__ import draw

    speed = table.Figure("speed", table.seconds, "paxo", "TRL", 4.5)
    figures = [table.summary(speed, [4.0, 5.0]), table.summary(speed, [])]
    draw({"rows": {"w1": {"figures": figures}}}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


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
