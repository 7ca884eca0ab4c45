"""Plans of self-play: what a round takes, against what a round of `paxo run` does."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import pytest

from paxo.experiment import load, settings_of
from paxo.models.lora import LoraSettings
from paxo.models.sharding import make_mesh
from paxo.online import METHODS, Draw, RoundSettings, method
from paxo.overrides import SettingsError
from paxo.plan import compiled, page, planning
from paxo.plan.estimate import estimate
from paxo.plan.kinds import first_layout
from paxo.plan.layout import model_config
from paxo.plan.memory import batch_bytes, memory_of
from paxo.plan.search import layouts
from paxo.plan.shapes import make_run, placement, relaid, with_shardings
from paxo.plan.topology import parse_topology
from paxo.rounds import packed
from paxo.training.step import check_batch
from tests.plan.planned import made_topology
from tests.plan.recorded import COMPLETION, PROMPT, SMALL, made_play, record, shapes_of

FILES = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments").glob("*_prompts.py"))
ONE = (1, 1, 1)


def played(settings, devices=None, processes=1):
    """The run of such settings, as plans have it."""
    mesh, config = settings.mesh, model_config(settings, None)
    devices = mesh.data * mesh.fsdp * mesh.tensor if devices is None else devices
    return make_run(settings, config, first_layout(settings, config, devices), processes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_self_play_experiment_has_a_plan(file):
    settings = settings_of(load(file), [])
    made = planning.plan(settings, "v5e:2x4", compiled=0)
    cost, time = made["round"], made["time"]
    assert made["fits"]
    assert cost["number"] == settings.rounds.num_rounds
    assert cost["prompts"] == settings.rounds.prompts_per_round
    assert cost["candidates"] == settings.method.num_candidates
    assert cost["against"] == sum(draw.count for draw in settings.method.opponents)
    parts = ("sampling", "opponents", "scoring", "step")
    assert cost["seconds"] == pytest.approx(sum(cost[part] for part in parts))
    assert all(cost[part] > 0 for part in parts if part != "opponents")
    assert (cost["opponents"] > 0) == bool(cost["against"])
    assert time["run_seconds"] == pytest.approx(cost["number"] * cost["seconds"])
    assert time["chip_hours"] == pytest.approx(time["run_seconds"] / 3600 * 8)
    assert made["layout"]["row_length"] == settings.row_length
    text = page.markdown(made)
    assert f"{settings.rounds.num_rounds} rounds" in text
    assert "| drawing candidates |" in text
    assert ("| drawing opponents |" in text) == bool(cost["against"])
    assert "| anchors |" in text
    assert "Judges, evaluation, " in text
    assert len(made["search"]) == 3
    assert "rows_per_batch" not in made["search"][0]["layout"]["flags"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_batch_that_its_step_can_take(name):
    row = METHODS[name]
    rounds = RoundSettings(1 if row.schedule.replay == "all" else 2, prompts_per_round=8)
    run = played(made_play(row, mesh=ONE, rounds=rounds, row_length=None))
    assert run.batch.where.shape[-1] == row.group_size
    assert {*run.batch.fixed_logps} == {*row.roles}
    check_batch(row.objective, run.batch, run.policy.heads, run.state.frozen)


def test_extras_have_the_axes_that_targets_and_shapes_give_them():
    def extras(name):
        batch = played(made_play(name, mesh=ONE, row_length=None)).batch
        return {n: x.shape[2:] for n, x in batch.extras.items()}

    assert extras("egpo") == {"win_rates": (2,)}
    assert extras("grpo") == {"rewards": (8,)}
    assert extras("constrained") == {"constraint_rewards": (4, 1)}
    by_token = dict.fromkeys(("advantages", "returns", "previous_values"), (1, COMPLETION))
    assert extras("ppo") == by_token | {"rewards": (1,)}


def test_samplers_draw_what_the_row_says_and_not_what_it_trains_on():
    eight = played(made_play("inpo"))
    assert eight.row.candidates == 2
    assert [d.config.num_candidates for d in eight.round.draws] == [8]
    mixture = played(made_play(method("nash_md", opponents=4))).round
    assert [(d.config.num_candidates, d.policies) for d in mixture.draws] == [(2, 1)]
    assert [(d.config.num_candidates, d.policies) for d in mixture.opponents] == [(4, 2)]
    assert [d.config.temperature for d in (*mixture.draws, *mixture.opponents)] == [2.0, 1.0]
    # Answers of the data set are not drawn.
    taught = played(made_play("dno_prct")).round
    assert [d.config.num_candidates for d in taught.draws] == [5]
    # Of several sources the largest is looked at; one program is compiled once.
    assert len(played(made_play("xpo", rounds=RoundSettings(1, 8))).round.draws) == 2
    assert {*played(made_play("vpo", rounds=RoundSettings(1, 8))).round.programs} == {"sampler"}
    assert {*mixture.programs} == {"sampler", "opponents"}


def test_caches_and_logits_are_those_of_the_sampler():
    two, eight = (played(made_play(row, mesh=ONE)) for row in ("inpo_pairs", "inpo"))
    small, large = (memory_of(run, "cpu").sampler for run in (two, eight))
    assert large["logits"] == 4 * small["logits"]
    token = 2 * 4 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_dim
    assert small["cache"] == 8 * (PROMPT + 2 * COMPLETION) * token
    assert large["cache"] == 8 * (PROMPT + 8 * COMPLETION) * token
    # A mixture has two caches, two policies' weights and one more array of logits.
    plain = dataclasses.replace(METHODS["nash_md"], opponent=Draw("policy", 4))
    mixed = dataclasses.replace(plain, opponent=Draw("mixture", 4))
    one, both = (
        memory_of(played(made_play(row, mesh=ONE)), "cpu").sampler for row in (plain, mixed)
    )
    for name, times in (("cache", 2), ("parameters", 2), ("logits", 4 / 3)):
        assert both[name] == pytest.approx(times * one[name])


def test_rows_are_those_that_packing_needs():
    for name, prompts in (("inpo_pairs", 200), ("grpo", 64), ("sppo", 100)):
        settings = made_play(name, mesh=ONE, rounds=RoundSettings(2, prompts, minibatches=2))
        run = played(settings)
        # As many groups, of the assumed mean lengths.
        (group, *_) = run.kind._tried
        one = dataclasses.replace(
            group,
            prompt=np.ones(PROMPT // 2, np.int32),
            completions=(np.ones(COMPLETION // 2, np.int32),) * len(group.completions),
        )
        needed = len(packed([one] * (prompts // 2), run.row).tokens)
        assert needed <= run.layout.rows <= 1.25 * needed + 4
        assert run.kind.step_groups == prompts // 2


def test_pairs_give_several_groups_a_prompt_and_replay_adds_to_them():
    assert played(made_play(method("inpo_pairs", draws=(8,)))).kind.step_groups == 4 * 8
    assert played(made_play("rso")).kind.step_groups == 4 * 8  # eight accepted are four pairs
    replayed = played(made_play("dno_prct", rounds=RoundSettings(2, prompts_per_round=100)))
    assert replayed.kind.step_groups == 145


def test_an_extragradient_round_does_everything_twice():
    once, twice = (played(made_play(name)) for name in ("online_ipo_v1", "egpo"))
    topology = made_topology(8)
    one, two = (estimate(run, topology) for run in (once, twice))
    assert (one.steps, two.steps) == (1, 2)
    assert two.round_seconds == pytest.approx(2 * one.round_seconds)
    # Its half step keeps the state that it starts from, so there are two of them.
    resident = two.memory.resident
    state = resident["parameters"] + resident["moments"]
    assert two.memory.peak() - one.memory.peak() == state == two.memory.second_state()
    assert one.memory.second_state() == 0
    text = page.markdown(planning.plan(made_play("egpo"), "gpu:h200x8"))
    assert "2 rounds, each step taken twice, take at least" in text
    assert f"keeps the state that it starts from: {state / 2**20:.2f} MiB more" in text


@pytest.mark.parametrize(
    ("row", "copies"),
    [
        ("online_dpo", 2),  # the first policy and the snapshot
        (method("comal", reference_every=1), 3),
        ("apo", 3),
        ("nash_ema_pg", 3),
        ("onpo", 4),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_anchors_are_copies_of_what_is_trained(row, copies):
    resident = memory_of(played(made_play(row)), "tpu").resident
    assert resident["anchors"] == copies * resident["parameters"]
    lora = dataclasses.replace(made_play().model, lora=LoraSettings(rank=4))
    adapted = memory_of(played(made_play(row, model=lora)), "tpu").resident
    assert adapted["anchors"] == copies * adapted["parameters"] < resident["parameters"]
    assert adapted["reference"] == 0


def test_log_probs_of_single_tokens_take_a_pass_of_their_own():
    whole, by_token = (
        estimate(played(made_play(name)), made_topology(8)) for name in ("inpo_pairs", "ppo")
    )
    assert (whole.references, by_token.references) == (2, 4)


def test_a_policy_that_the_loop_does_not_have_is_a_copy_of_its_own():
    resident = memory_of(played(made_play("rto")), "tpu").resident
    assert resident["reference"] == resident["parameters"]


def test_each_process_fills_its_own_batch_of_prompts():
    alone, four = (played(made_play(mesh=(8, 1, 1)), processes=n).round for n in (1, 4))
    assert (alone.batch, alone.calls, alone.drawn) == (8, 1, 8)
    assert (four.batch, four.calls, four.drawn) == (32, 1, 32)
    settings = made_play(mesh=(8, 1, 1), sample_batch=64)
    made = planning.plan(settings, "v5e:2x4", compiled=0)
    assert made["round"]["drawn"] == 128
    assert "draws for 128 prompts a round, of which 8 are asked" in page.markdown(made)


def test_layouts_hold_the_same_groups_in_rows_as_the_run_would_pad_them():
    run = played(made_play("inpo_pairs", rounds=RoundSettings(2, prompts_per_round=256)))
    found = list(layouts(run, made_topology(8)))
    assert found[0] == run.layout
    assert len(found) == len({*found}) > 50
    for layout in found[:: len(found) // 20]:
        changes = {"row_length": layout.row_length, "microbatches": layout.microbatches}
        sizes = tuple(layout.mesh_shape.values())
        again = made_play("inpo_pairs", mesh=sizes, rounds=run.settings.rounds, **changes)
        assert played(again).layout == dataclasses.replace(layout, remat="none")
        assert relaid(run, layout).groups * layout.rows == pytest.approx(256)
    # Half a row would not hold the longest pair.
    short = played(made_play(row_length=PROMPT + 2 * COMPLETION))
    assert {x.row_length for x in layouts(short, made_topology(8))} == {32, 64}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (made_play("xpo"), "groups of all earlier rounds.*rounds.num_rounds=1 plans the first"),
        (made_play("egpo", rounds=RoundSettings(2, 8, minibatches=2)), "rounds.minibatches must"),
        (made_play("ppo", row_length=16), "row_length=16 is shorter than a group may be"),
        (made_play(method("inpo_pairs", draws=(1,))), "'inpo_pairs' cannot be planned: tried out"),
        (
            made_play(sampling=dataclasses.replace(made_play().sampling, max_new_tokens=256)),
            "leaves no room for a prompt in the model's 256 positions",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(settings, words):
    with pytest.raises(SettingsError, match=words):
        planning.plan(settings, "gpu:h200x8", compiled=0)


def test_a_kind_alone_finds_its_smallest_slice_for_self_play():
    made = planning.plan(made_play(mesh=(-1, 1, 1)), "v5e", compiled=0)
    assert made["topology"]["name"] == "v5e:1x1"


def test_drawing_alone_may_be_what_does_not_fit():
    run = played(made_play("inpo", mesh=ONE, sample_batch=512))
    found = estimate(run, made_topology(1))
    room = (found.memory.peak() + found.memory.sampling_peak()) / 2
    assert found.memory.peak() < room < found.memory.sampling_peak()
    assert found.spare(made_topology(1, hbm=room)) < 0


@pytest.fixture(scope="module")
def egpo(tmp_path_factory):
    """A run of two extragradient rounds: its plan, and what its programs were given."""
    settings = made_play("egpo")
    with pytest.MonkeyPatch.context() as patch:
        return played(settings), record(settings, tmp_path_factory.mktemp("egpo"), patch)


def test_the_planned_programs_are_those_that_a_round_compiles(egpo):
    assert_planned(*egpo)


def test_what_lies_beside_a_program_is_what_a_round_has_there(egpo):
    assert_beside(*egpo)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        "inpo_pairs",
        "onpo",
        "nash_md",
        "nash_ema_pg",
        method("comal", reference_every=1),
        "apo",
        "ppo",
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_rounds_of_other_methods_compile_and_hold_what_was_planned(row, tmp_path, monkeypatch):
    settings = made_play(row, rounds=RoundSettings(3, prompts_per_round=8))
    run, calls = played(settings), record(settings, tmp_path, monkeypatch)
    assert_planned(run, calls)
    assert_beside(run, calls)


def assert_planned(run, calls):
    """Each program was given arrays of the planned shapes, and no other program was run."""
    step = shapes_of((run.state, run.batch))
    scored = shapes_of((run.params, run.batch))
    names = {"step", "half step"} if run.round.turns > 1 else {"step"}
    drawings = {(d.config, d.policies) for d in (*run.round.draws, *run.round.opponents)}
    assert {*calls} == names | drawings | ({"scorer"} if run.references else set())
    for name in names:
        assert [given for given, _ in calls[name]] == [step] * len(calls[name])
    for given, _ in calls.get("scorer", []):
        rows = {k: x for k, x in given.items() if "fixed" not in k and "extras" not in k}
        assert rows.items() <= scored.items()
    for config, policies in drawings:
        wanted = shapes_of(((run.params,) * policies, run.prompts))
        assert all(given == wanted for given, _ in calls[config, policies])
    rounds = run.round.number
    assert len(calls["step"]) == rounds * run.round.steps
    assert len(calls.get("half step", [])) == (run.round.turns - 1) * rounds
    found = estimate(run, made_topology(8))
    assert len(calls.get("scorer", [])) == rounds * found.steps * found.references


def assert_beside(run, calls):
    """When a program is called, there is what the plan counts beside its own arrays."""
    memory, rows = memory_of(run, "cpu"), batch_bytes(run)
    held = sum(memory.resident.values())
    small = 4 * rows + 2**12  # a batch or two before they are free, keys, counts
    for name, found in calls.items():
        most = max(nbytes for _, nbytes in found)
        draws, trained = not isinstance(name, str), memory.resident["parameters"]
        half = trained if draws and run.round.turns > 1 else 0
        # Fits that begin anew come after the drawing.
        later = trained if draws and "before" in run.round.anchors else 0
        assert held + half - later <= most + 2**12, name
        assert most <= held + half + small, name


def compiled_programs(name):
    """The run of a method on all CPU devices here, and its compiled programs."""
    here = len(jax.local_devices(backend="cpu"))
    run = played(made_play(name, mesh=(here, 1, 1)))
    found = compiled.compile_programs(run, parse_topology("cpu"))
    resident = memory_of(run, "cpu").resident
    held, trained = sum(resident.values()), resident["parameters"]
    half = trained if run.round.turns > 1 else 0
    for program in found:
        lies = found[program].arguments + found[program].beside
        more = half if program in run.round.programs else 0
        assert 0 <= lies - held - more < 2**14, program
    return run, found


def test_programs_of_an_extragradient_round_are_compiled_beside_its_anchors():
    run, found = compiled_programs("egpo")
    # Opponents are drawn from the policy as well, but one and not two, and at another temperature.
    assert [*found] == ["step", compiled.HALF_STEP, "scorer", "sampler", "opponents"]
    resident = memory_of(run, "cpu").resident
    state = resident["parameters"] + resident["moments"]
    assert abs(found["step"].arguments - state - batch_bytes(run)) < 1024
    assert abs(found[compiled.HALF_STEP].outputs - found["step"].outputs - state) < 1024
    prompts = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(run.prompts)) // run.layout.data
    assert abs(found["sampler"].arguments - resident["parameters"] - prompts) < 1024


def test_programs_with_adapters_are_lowered_with_those_of_the_frozen_policies():
    lora = dataclasses.replace(made_play().model, lora=LoraSettings(rank=4))
    run = played(made_play("nash_md", mesh=ONE, model=lora))
    mesh = make_mesh(devices=jax.devices()[:1])
    drawing = run.round.programs["opponents"]
    for lowered in (
        compiled.lower_step(run, mesh, donate=False),
        compiled.lower_scorer(run, mesh),
        compiled.lower_sampler(run, mesh, drawing),
    ):
        # Arguments that a program does not use are left out of it.
        assert f"tensor<{SMALL.num_layers}x{SMALL.hidden_size}x4x" in lowered.as_text()


@pytest.mark.slow
def test_a_mixture_is_compiled_with_both_of_its_policies():
    run, found = compiled_programs("nash_md")
    parameters = memory_of(run, "cpu").resident["parameters"]
    more = found["opponents"].arguments - found["sampler"].arguments
    assert abs(more - parameters) < 1024


def test_a_planned_batch_lies_as_the_run_places_it():
    run = played(made_play("egpo"))
    placed = placement(run, make_mesh(4, 2))
    rows = with_shardings(run.batch, placed.batch)
    assert rows.tokens.sharding.shard_shape(rows.tokens.shape) == (1, 128)
