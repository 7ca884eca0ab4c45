"""The notebooks run from top to bottom, and hold the outputs of a real run.

They are executed by nbclient with small numbers in their cell of parameters; the slow tests leave
the numbers as they stand.
"""

import base64
import json
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from tests.made_run import compiled_quickly

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "colab"
SMALL = {
    "quickstart": "SFT_STEPS, STEPS = 2, 2\nPROMPTS, EVAL_PROMPTS = 128, 128\n"
    'OTHERS = {"ipo": ["objective=ipo", "objective.tau=0.2"]}',
    "nash_games": "ITERATIONS = 400",
}
KILOBYTE = 1000


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(notebook, folder):
    """The notebook after a run in that folder; an error in a cell is raised."""
    client = NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}, kernel_name="python3"
    )
    return client.execute()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    """All that the cells print, and the text of what they show."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    streams = [output.text for output in outputs if output.output_type == "stream"]
    shown = [output.data.get("text/plain", "") for output in outputs if "data" in output]
    return "\n".join([*streams, *shown])


def pictures(notebook):
    return [
        base64.b64decode(output.data["image/png"])
        for cell in code(notebook)
        for output in cell.outputs
        if "data" in output and "image/png" in output.data
    ]


@pytest.fixture
def small(request, tmp_path, monkeypatch):
    """One notebook executed with small numbers."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: eight that are simulated are no faster
    notebook = read(request.param)
    (parameters,) = [c for c in code(notebook) if "parameters" in c.metadata.get("tags", ())]
    parameters.source = SMALL[request.param]
    with compiled_quickly(tmp_path / "compiled"):
        return executed(notebook, tmp_path)


@pytest.mark.parametrize("small", ["quickstart"], indirect=True)
def test_quickstart_trains_shows_and_compares(small, tmp_path):
    said = text(small)
    assert "win rate against SFT" in said
    assert said.count("  DPO: ") == 6  # three texts of each of two runs
    assert said.count("review of the museum :") >= 1
    for name in ("dpo", "ipo"):
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert f"{name:8}{results['win_rate']['after']:10.3f}" in said
    (picture,) = pictures(small)
    assert picture == (tmp_path / "runs" / "dpo" / "reward_kl.png").read_bytes()
    # The supervised model was trained once.
    logs = [(tmp_path / "runs" / name / "log.txt").read_text() for name in ("dpo", "ipo")]
    assert ["restored step" in log for log in logs] == [False, True]


@pytest.mark.parametrize("small", ["nash_games"], indirect=True)
def test_nash_games_plays_and_plots(small):
    said = text(small)
    gaps = {
        line[:18].strip(): float(line.split("last policy ")[1].split(",")[0])
        for line in said.splitlines()
        if "gap of the last policy" in line
    }
    assert gaps.keys() == {"online IPO", "INPO, eta = 3 tau", "INPO, decaying", "EGPO"}
    assert gaps["EGPO"] < 0.1 < gaps["online IPO"] < gaps["INPO, eta = 3 tau"]
    assert len(pictures(small)) == 1


@pytest.mark.parametrize("name", SMALL)
def test_stored_outputs_are_of_one_run_from_top_to_bottom(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert len(pictures(notebook)) == 1
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 150 * KILOBYTE


@pytest.mark.parametrize("name", SMALL)
def test_one_cell_installs_only_where_paxo_is_not_there(name):
    first = code(read(name))[0]
    lines = first.source.splitlines()
    guard = next(i for i, line in enumerate(lines) if 'find_spec("paxo") is None' in line)
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    assert installs
    assert all(i > guard and lines[i].startswith("    ") for i in installs)
    assert first.outputs == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_full_run_finds_what_the_text_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = executed(read(name), tmp_path)
    if name == "quickstart":
        results = json.loads((tmp_path / "runs" / "dpo" / "results.json").read_text())
        assert results["win_rate"]["after"] > 0.85
    else:
        assert "EGPO               gap of the last policy 1.0e-15" in text(notebook)
