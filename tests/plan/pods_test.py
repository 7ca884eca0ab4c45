"""Published models on pods of TPUs that are not here, compiled whole: minutes each."""

import dataclasses
import importlib.util
import pathlib
import time

import pytest

from paxo.experiment import load, settings_of
from paxo.plan import compiled, page, planning
from paxo.plan.estimate import SPARE, estimate
from paxo.plan.kinds import first_layout
from paxo.plan.layout import model_config
from paxo.plan.shapes import make_run
from paxo.plan.topology import parse_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
FILE = EXPERIMENTS / "dpo_hh.py"
# Full-parameter DPO: float32 weights and moments, products and the reference in bfloat16.
FULL = (
    *("model.compute_dtype=bfloat16", "reference.dtype=bfloat16", "model.remat=full"),
    *("data.row_length=4096", "train.rows_per_batch=256", "mesh.data=1", "mesh.fsdp=-1"),
)
# Extragradient self-play of as large a model: pairs of answers of up to 1024 tokens.
PLAYED = (
    *("model.compute_dtype=bfloat16", "model.remat=full", "row_length=4096", "sample_batch=4"),
    *("prompts.max_tokens=1024", "sampling.max_new_tokens=1024", "rounds.prompts_per_round=1024"),
    *("mesh.data=1", "mesh.fsdp=-1"),
)
# Of one program: five minutes even on one core, counted as CPU seconds as other work may share it.
CPU_SECONDS = 5 * 60


def settings(*changes):
    return settings_of(load(FILE), [*FULL, *changes])


@pytest.fixture
def planned(monkeypatch):
    """The plan, after a look at the CPU seconds that each of its programs took."""
    compile_one, took = compiled._compiled, []

    def timed(name, *arguments, **named):
        start = time.process_time()
        found = compile_one(name, *arguments, **named)
        took.append((name, time.process_time() - start))
        return found

    monkeypatch.setattr(compiled, "_compiled", timed)

    def made(changes, topology, model, chosen=None):
        chosen = settings(*changes) if chosen is None else chosen
        found = planning.plan(chosen, topology, model=model, compiled=1)
        print(topology, model, *(f"{name} {seconds:.0f} s" for name, seconds in took))
        assert {name for name, _ in took} >= {*found["compiled"]}
        assert max(seconds for _, seconds in took) < CPU_SECONDS
        assert all(program["failure"] is None for program in found["compiled"].values())
        return found

    return made


@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
def test_8b_fits_with_a_tenth_to_spare(planned, topology):
    made = planned((), topology, "llama3-8b")
    assert made["model"]["trained"] == 8_030_261_248
    assert made["layout"]["row_length"] == 4096
    assert {*made["compiled"]} == {"step", "scorer", "sampler"}
    assert made["spare"] >= SPARE
    assert made["fits"]
    # What training and sampling keep between programs is exact, so the arguments are.
    kept = sum(made["memory"]["bytes"][name] for name in ("parameters", "moments"))
    assert made["compiled"]["step"]["arguments"] == pytest.approx(kept, rel=0.05)
    assert made["memory"]["peak"] == pytest.approx(made["compiled"]["step"]["peak"], rel=0.3)


def test_a_round_of_extragradient_self_play_of_8b_fits_256_v5e_chips(planned):
    chosen = settings_of(load(EXPERIMENTS / "egpo_prompts.py"), PLAYED)
    made = planned((), "v5e:16x16", "llama3-8b", chosen)
    programs, memory = made["compiled"], made["memory"]
    assert {*programs} == {"step", "half step", "scorer", "sampler", "opponents"}
    assert made["fits"]
    assert made["spare"] >= SPARE
    # The largest program is a half step, which has two states beside first policy and snapshot.
    assert programs["half step"]["peak"] == max(p["peak"] for p in programs.values())
    kept = sum(memory["bytes"][name] for name in ("parameters", "moments")) / 2
    assert programs["step"]["arguments"] == pytest.approx(kept, rel=0.05)
    assert programs["half step"]["outputs"] == pytest.approx(kept, rel=0.05)
    assert memory["peak"] == pytest.approx(programs["half step"]["peak"], rel=0.3)
    text = page.markdown(made)
    assert "llama3-8b fits v5e:16x16 (256 chips)" in text
    assert "100 rounds, each step taken twice, take at least" in text


def test_the_smallest_v5p_slice_that_holds_70b_is_found_and_named(planned):
    changes = ("train.rows_per_batch=64",)
    made = planned(changes, "v5p", "llama3-70b")
    assert made["fits"]
    assert made["spare"] >= SPARE
    assert made["smallest"]["of"] == "v5p"
    # Half of it: 16 chips hold neither two sums of gradients beside weights, moments and reference,
    # as microbatches need, nor the inputs of all layers for 64 rows at once.
    room = 16 * (1 - SPARE) * made["topology"]["hbm_bytes"]
    parameters, inputs = 70_553_706_496, 80 * 64 * 4096 * 8192 * 2
    assert parameters * (4 + 8 + 8 + 2) > room
    assert parameters * (4 + 8 + 4 + 2) + inputs > room
    assert made["topology"]["name"] == "v5p:2x4x4"


def test_adapters_of_8b_fit_16_v5e_chips(planned):
    changes = ("train.rows_per_batch=16", "model.lora.rank=16", "reference.dtype=none")
    made = planned(changes, "v5e:4x4", "llama3-8b")
    assert made["model"]["trained"] < made["model"]["parameters"] / 100
    assert made["memory"]["bytes"]["reference"] == 0
    assert made["fits"]
    assert made["spare"] >= SPARE


def test_what_does_not_fit_is_said_by_the_compiler():
    run_settings = settings("train.rows_per_batch=64")
    config = model_config(run_settings, "llama3-8b")
    config = dataclasses.replace(config, num_layers=4)
    topology = parse_topology("v5e:2x2")
    run = make_run(run_settings, config, first_layout(run_settings, config, 4))
    assert estimate(run, topology).spare(topology) < 0
    found = compiled.compile_programs(run, topology, ("step",))["step"]
    assert found.failure is not None
    assert "15.75G" in found.failure
    assert found.peak > topology.chip.hbm_bytes
