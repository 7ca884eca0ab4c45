"""The experiment files: what each writes, at a size that is quick."""

import json
import math
import pathlib

import pytest

from paxo import experiment

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "games"
SHORT = {
    "comal": ["num_steps=8"],
    "copg_bandit": ["num_epochs=2", "num_seeds=1"],
    "didactic_bandit": ["num_steps=20"],
    "egpo_neural": ["num_steps=20", "num_actions=8", "seeds=[1]"],
    "egpo_sampled": ["num_steps=20"],
    "egpo_tabular": ["betas=[0.1]"],
    "inpo_schedules": ["num_steps=20", "taus=[0.1]"],
    "unregularised": ["num_steps=40", "every=10"],
}


def test_every_experiment_is_named_in_the_page_on_which_method_when():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SHORT)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SHORT:
        assert f"| `{name}.py` |" in page


@pytest.mark.parametrize(
    "name",
    [x if x == "unregularised" else pytest.param(x, marks=pytest.mark.slow) for x in SHORT],
)
def test_results_are_method_to_iteration_to_figure(name, tmp_path):
    experiment.run_file(FOLDER / f"{name}.py", SHORT[name], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) >= 4
    for figures in results.values():
        for iteration, figure in figures.items():
            assert int(iteration) >= 0
            assert math.isfinite(figure)
    (picture, *_) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000
