"""`paxo plan` as a whole: its record, its page, its command."""

import json
import shlex

import pytest

from paxo.overrides import SettingsError
from paxo.plan import page, planning
from tests.made_run import paxo
from tests.plan.planned import made_settings

EXPERIMENT = """
import sys
sys.path.insert(0, {root!r})
from tests.plan.planned import made_settings

def experiment():
    return made_settings(rows=8, mesh=(-1, 1, 1))
"""
# Name -> its fields, of every nested record; a list stands for the fields of its entries.
SCHEMA = {
    "topology": {"name", "platform", "devices", "chips", "hbm_bytes", "peak_flops",
                 "hbm_bytes_per_second", "link_bytes_per_second", "figures"},
    "model": {"name", "parameters", "trained", "shape"},
    "layout": {"data", "fsdp", "tensor", "rows", "row_length", "microbatches", "remat", "flags"},
    "assumptions": {"prompt", "completion", "max_prompt", "max_completion", "candidates",
                    "scored_slots", "groups_per_row"},
    "memory": {"bytes", "peak", "sampling_peak", "anchors", "second_state", "spare"},
    "flops": {"step", "useful", "step_per_device"},
    "collective_bytes": {"step", "scorer"},
    "time": {"step", "scorer", "limited_by", "scored_step", "mfu_bound", "tokens_per_second",
             "steps", "run_seconds", "chip_hours"},
    "round": {"number", "prompts", "candidates", "against", "drawn", "steps", "sampling",
              "opponents", "scoring", "step", "seconds", "chip_hours", "fastest_sampling",
              "left_out"},
}  # fmt: skip
PLAIN = {"objective", "meshes", "compiled", "compiled_because", "fits", "spare", "search"}


@pytest.fixture(scope="module")
def made():
    return planning.plan(made_settings(rows=8, mesh=(-1, 1, 1)), "gpu:h200x8")


def test_the_record_has_its_schema_and_survives_json(made, tmp_path):
    assert {*made} == {*SCHEMA} | PLAIN
    for name, fields in SCHEMA.items():
        assert {*made[name]} == fields, name
    page.write_plan(made, tmp_path / "deep" / "folder")
    assert json.loads((tmp_path / "deep" / "folder" / "plan.json").read_text()) == made
    assert (tmp_path / "deep" / "folder" / "plan.md").read_text() == page.markdown(made)


def test_the_page_of_a_gpu_says_that_its_figures_are_analytic(made):
    assert made["compiled"] == {}
    assert "No program can be compiled for a GPU that is not here" in page.markdown(made)


def test_figures_of_the_run_follow_from_those_of_a_step(made):
    time, cost = made["time"], made["round"]
    assert time["run_seconds"] == 10 * time["scored_step"]
    assert time["chip_hours"] == pytest.approx(time["run_seconds"] / 3600 * 8)
    assert time["scored_step"] == time["step"]["bound"] + time["scorer"]["bound"]
    assert cost["seconds"] == pytest.approx(cost["sampling"] + cost["scoring"] + cost["step"])
    assert made["memory"]["peak"] <= sum(made["memory"]["bytes"].values())
    assert made["fits"]
    assert len(made["search"]) == 3


def test_the_page_shows_every_category_axis_and_layout(made):
    text = page.markdown(made)
    for name, size in made["memory"]["bytes"].items():
        assert (f"| {name} |" in text) == bool(size)
    assert "| data |" in text
    assert "| fsdp |" not in text  # of one device
    for found in made["search"]:
        assert found["layout"]["flags"] in text


def test_bytes_have_a_unit_in_which_they_can_be_read():
    shown = [page._bytes(size) for size in (15.75 * 2**30, 2**28, 3 * 2**20, 2000)]
    assert shown == ["15.75 GiB", "0.25 GiB", "3.00 MiB", "2.0 KiB"]


def test_a_run_that_does_not_fit_is_told_so_and_not_compiled():
    made = planning.plan(made_settings(num_layers=4000), "v5e:1x1", model="llama3-70b")
    assert not made["fits"]
    assert made["compiled"] == {}
    assert made["search"] == []
    text = page.markdown(made)
    assert "llama3-70b does not fit v5e:1x1 (1 chip)" in text
    assert "% too much of 15.75 GiB" in text
    assert "Nothing was compiled: by the estimate the run is far from fitting" in text


def test_a_kind_alone_finds_its_smallest_slice():
    settings = made_settings(rows=8, mesh=(-1, 1, 1))
    made = planning.plan(settings, "v5e", compiled=0)
    assert made["topology"]["name"] == "v5e:1x1"
    assert "It is the smallest slice of v5e that holds the run." in page.markdown(made)


def test_settings_that_are_no_experiment_are_refused():
    with pytest.raises(
        SettingsError, match=r"or a paxo\.rounds\.SelfPlay; this file's settings are"
    ):
        planning.plan(object(), "cpu")


def test_the_command_plans_a_file_with_overrides(tmp_path, capsys, request):
    file = tmp_path / "small.py"
    file.write_text(EXPERIMENT.format(root=str(request.config.rootpath)))
    out = tmp_path / "out"
    flags = ("--topology", "gpu:h200x2", "--model", "llama3-1b", "--out", out)
    assert paxo("plan", file, *flags, "--set", "train.num_steps=7", "mesh.fsdp=2") == 0
    made = json.loads((out / "plan.json").read_text())
    assert made["model"]["parameters"] == 1_235_814_400
    assert made["time"]["steps"] == 7
    assert (made["layout"]["data"], made["layout"]["fsdp"]) == (1, 2)
    assert "7 steps take at least" in capsys.readouterr().out


def test_the_readmes_command_can_be(tmp_path, capsys, request):
    """Its figures are those of `pods_test`, which compiles it: here only that it is no refusal."""
    readme = (request.config.rootpath / "README.md").read_text().replace("\\\n", " ")
    command = next(line for line in readme.splitlines() if line.startswith("paxo plan "))
    _, verb, file, *flags = shlex.split(command)
    flags += ["--compile", 0, "--out", tmp_path]
    assert paxo(verb, request.config.rootpath / file, *flags) == 0
    assert "llama3-8b fits v5e:16x16" in capsys.readouterr().out


def test_the_command_refuses_what_cannot_be(tmp_path, capsys, request):
    file = tmp_path / "small.py"
    file.write_text(EXPERIMENT.format(root=str(request.config.rootpath)))
    for topology, words in (("v9:2x2", "unknown kind 'v9'"), ("v5e:3x3", "no such slice")):
        assert paxo("plan", file, "--topology", topology) == 2
        assert words in capsys.readouterr().err
