"""Every kind of input that a loss can name gets there: by `paxo run`, and by a step alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo import runs
from paxo.losses import (
    group_relative,
    multi,
    pointwise,
    policy_gradient,
    reward,
    selfplay,
    tokenwise,
)
from paxo.objectives import LOSSES, Objective, Term, objective
from paxo.scoring import attach_logps, make_scorer
from paxo.training.checkpoint import read_params
from paxo.training.state import init_state
from paxo.training.step import make_train_step
from tests.made import made_batch, tiny_policy
from tests.made_run import (
    SAMPLES,
    compiled_quickly,
    make_model,
    metrics,
    paxo,
    results,
    weights,
    words,
    write_experiment,
)

NAMED = {
    "kto": pointwise.kto_loss,
    "bco": pointwise.bco_loss,
    "tdpo2": tokenwise.tdpo2_loss,
    "sparse_po": tokenwise.sparse_po_loss,
    "grpo": group_relative.grpo_loss,
    "ppo_value": policy_gradient.ppo_value_loss,
    "general_preference": reward.general_preference_loss,
    "spo_degree": multi.spo_degree_loss,
    "inpo": selfplay.inpo_loss,
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(tmp_path_factory):
    with compiled_quickly(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def _losses(monkeypatch):
    for name, loss in NAMED.items():
        monkeypatch.setitem(LOSSES, name, loss)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def pairs():
    """The good rows of the sample pairs, from their lines."""
    found = []
    for line in (SAMPLES / "pairs.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if all(row.get(name) for name in ("prompt", "chosen", "rejected")):
            found.append(row)
    return found


def write_rows(file, rows):
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def run(tmp_path, model, objective, *settings, data=SAMPLES / "pairs.jsonl"):
    """A run of three steps, and the lines of its steps."""
    file = write_experiment(tmp_path / "run.py", model, objective=objective, data=data)
    flags = [f for s in ("train.num_steps=3", *settings) for f in ("--set", s)]
    workdir = tmp_path / "run"
    assert paxo("run", file, "--workdir", workdir, *flags) == 0
    return workdir, [line for line in metrics(workdir) if "loss" in line]


def test_kto_runs_on_single_completions_that_were_liked_or_not(tmp_path, model, pairs):
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    data = write_rows(tmp_path / "single.jsonl", rows)
    # Rows in which step and scorer round alike, so that every reward is 0 at first.
    rows_of = ("data.row_length=128", "data.slots=128")
    workdir, lines = run(tmp_path, model, 'paxo.objective("kto")', *rows_of, data=data)
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[0]["rewards/accuracies"] == 0.5
    assert lines[-1]["loss"] < 0.5
    assert lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]
    found = results(workdir)["heldout_accuracy"]
    assert found["before"] == 0.5
    assert found["after"] != 0.5


def test_kto_runs_on_pairs_whose_grades_become_signs(tmp_path, model):
    workdir, lines = run(tmp_path, model, 'paxo.objective("kto")')
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]
    assert results(workdir)["heldout_accuracy"]["after"] > 0.5


def test_inspect_counts_the_mismatched_completions_in_the_rows(tmp_path, model, capsys):
    shares = []
    for name in ("dpo", "kto"):
        file = write_experiment(
            tmp_path / f"{name}.py", model, objective=f'paxo.objective("{name}")'
        )
        assert paxo("inspect", file, "--num", "0") == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "padding share" in x]
        shares.append(float(line.split()[-1].rstrip("%")))
    assert 0 < shares[1] < 50
    assert shares[0] != shares[1]


def test_kto_on_lists_of_grades_is_refused_by_record(tmp_path, model, capsys):
    texts = ["bake bread", "draw old books"]
    rows = [
        {"prompt": " ".join(words()[i : i + 3]), "completions": texts, "scores": [i, 2]}
        for i in range(9)
    ]
    data = write_rows(tmp_path / "lists.jsonl", rows)
    file = write_experiment(
        tmp_path / "run.py", model, objective='paxo.objective("kto")', data=data
    )
    assert paxo("run", file, "--workdir", tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lists.jsonl:" in error
    assert "desirable or not" in error


def test_bco_remembers_its_shift_from_step_to_step(tmp_path, model):
    _, lines = run(tmp_path, model, 'paxo.objective("bco", delta_mode="running_mean")')
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_tdpo_gets_divergences_from_the_whole_distributions_of_the_reference(
    tmp_path, model, monkeypatch
):
    objective = 'paxo.objective("tdpo2", beta=0.1, alpha=0.5)'
    workdir, lines = run(tmp_path, model, objective)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert results(workdir)["heldout_accuracy"]["before"] == 0.5
    assert (workdir / "logps").exists()
    # Another reference: divergences are there from the first step on.
    other = tmp_path / "other"
    make_model(other, seed=5)
    (tmp_path / "far").mkdir()
    heads, fit = [], runs.fit

    def noted(step, state, *args, **kwargs):
        heads.append(state.frozen["reference_head"])
        return fit(step, state, *args, **kwargs)

    monkeypatch.setattr(runs, "fit", noted)
    _, far = run(tmp_path / "far", model, objective, f"reference.path={other}", "mesh.fsdp=2")
    assert abs(far[0]["loss"] - np.log(2)) > 1e-3
    # Each device holds half of the head's width, as of the policy's own.
    (head,) = heads
    width, vocabulary = head.shape
    assert {x.data.shape for x in head.addressable_shards} == {(width // 2, vocabulary)}


@pytest.mark.parametrize("name", ["kto", "tdpo2"])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(name, tmp_path, model):
    goal, flags = f'paxo.objective("{name}")', ["train.checkpoint_every=1", "train.keep=3"]
    workdir, _ = run(tmp_path, model, goal, *flags)
    wanted, final = metrics(workdir), weights(workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    shutil.rmtree(workdir / "export")
    run(tmp_path, model, goal, *flags)
    assert "restored step 2" in (workdir / "log.txt").read_text()
    assert metrics(workdir) == wanted
    assert weights(workdir) == final


def test_sparse_po_trains_a_head_for_the_weights_of_tokens(tmp_path, model):
    workdir, lines = run(tmp_path, model, 'paxo.objective("sparse_po")')
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["loss"] != lines[0]["loss"]
    heads = read_params(workdir / "checkpoints")["heads"]
    assert heads.keys() == {"token_weights"}


def test_the_previous_policy_is_the_one_that_training_starts_from(tmp_path, model):
    objective = 'paxo.objective("inpo", eta=0.5, tau=0.1)'
    workdir, lines = run(tmp_path, model, objective)
    # Policy, reference and snapshot are one: the margin is 0 and the target 1 / (2 eta) = 1.
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert (
        "role 'previous' is the policy that training starts from"
        in (workdir / "log.txt").read_text()
    )


def test_another_previous_policy_is_named_by_its_path(tmp_path, model):
    other = tmp_path / "other"
    make_model(other, seed=5)
    objective = 'paxo.objective("inpo", eta=0.5, tau=0.1)'
    workdir, lines = run(tmp_path, model, objective, f"previous.path={other}")
    assert abs(lines[0]["loss"] - 1.0) > 1e-2
    # Each policy's log-probs have a store of their own.
    assert (workdir / "logps" / "0.bin").stat().st_size > 0
    assert (workdir / "logps" / "previous" / "0.bin").stat().st_size > 0
    assert "training starts from" not in (workdir / "log.txt").read_text()


def test_lists_with_a_column_of_rewards_and_a_reference_that_grpo_may_do_without(
    tmp_path, model, pairs, capsys
):
    rows = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"]],
            "scores": [0, 0],
            "rewards": [1.0, 0.25],
        }
        for row in pairs
    ]
    data = write_rows(tmp_path / "lists.jsonl", rows)
    goal = 'paxo.objective("grpo", beta=0.5, reduction="sequence_mean")'
    extras = "data.extras=rewards"
    file = write_experiment(tmp_path / "run.py", model, objective=goal, data=data)
    flags = ["--set", "train.num_steps=2", "--set", extras, "--set", "data.heldout=0"]
    # With beta > 0 the loss cannot do without, and says so before anything is trained.
    assert paxo("run", file, "--workdir", tmp_path / "first", *flags) == 2
    assert "reference.attach=True gives it" in capsys.readouterr().err
    flags = [extras, "data.heldout=0", "reference.attach=True"]
    _, lines = run(tmp_path, model, goal, *flags, data=data)
    # Advantages are centred, ratios 1, and policy and reference one.
    assert lines[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss"] != pytest.approx(0, abs=1e-6)


def test_numbers_of_tokens_come_from_rows_of_token_ids(tmp_path, model):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        sizes = rng.integers(2, 20, 2)
        rows.append(
            {
                "prompt_ids": [1, *rng.integers(3, 20, 4).tolist()],
                "chosen_ids": rng.integers(3, 20, sizes[0]).tolist(),
                "rejected_ids": rng.integers(3, 20, sizes[1]).tolist(),
                "returns": [np.full(n, 2.0).tolist() for n in sizes],
                "previous_values": [rng.normal(size=n).tolist() for n in sizes],
            }
        )
    data = write_rows(tmp_path / "ids.jsonl", rows)
    extras = "data.extras=returns:KT,previous_values:KT"
    # Completions are cut to 16 tokens, and the numbers with them.
    workdir, lines = run(
        tmp_path, model, 'paxo.objective("ppo_value", clip=100.0)', extras, data=data
    )
    assert "completions to their first 16 tokens" in (workdir / "log.txt").read_text()
    assert lines[-1]["loss"] < lines[0]["loss"]
    heads = read_params(workdir / "checkpoints")["heads"]
    assert heads.keys() == {"values"}
    rows[3]["returns"][1].append(0.0)
    write_rows(data, rows)
    file = tmp_path / "run.py"
    flags = ["--set", extras, "--set", "data.on_error=raise"]
    assert paxo("run", file, "--workdir", tmp_path / "wrong", *flags) == 2


def test_embeddings_of_a_general_preference_model_have_the_width_of_the_settings(tmp_path, model):
    goal = 'paxo.objective("general_preference", temperature=1.0)'
    workdir, lines = run(tmp_path, model, goal, "model.heads=embeddings:6")
    heads = read_params(workdir / "checkpoints")["heads"]
    assert heads["embeddings"]["kernel"].shape == (16, 6)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_degrees_are_told_by_a_head_and_a_column(tmp_path, model, pairs):
    data = write_rows(
        tmp_path / "degrees.jsonl",
        [row | {"degree_labels": i % 3} for i, row in enumerate(pairs)],
    )
    goal, flags = 'paxo.objective("spo_degree")', ("data.extras=degree_labels",)
    workdir, lines = run(tmp_path, model, goal, *flags, "model.heads=degree_logits:3", data=data)
    heads = read_params(workdir / "checkpoints")["heads"]
    assert heads["degree_logits"]["kernel"].shape == (16, 3)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_optional_heads_are_there_where_settings_name_them(tmp_path, model):
    workdir, _ = run(tmp_path, model, 'paxo.objective("sparse_po")', "model.heads=kl_token_weights")
    heads = read_params(workdir / "checkpoints")["heads"]
    assert heads.keys() == {"token_weights", "kl_token_weights"}
    moved = np.abs(np.asarray(heads["kl_token_weights"]["bias"]))
    assert moved > 0


# A step alone.


def step_of(goal, policy, params, batch, *, frozen=None, microbatches=1):
    """The state after one step of plain SGD, and its report."""
    optimizer = optax.sgd(0.1)
    state = init_state(params, goal, optimizer, jax.random.key(0), frozen=frozen)
    step = make_train_step(policy, goal, optimizer, microbatches=microbatches)
    return jax.jit(step)(state, batch)


def with_reference(batch, *, hidden=False):
    """A batch with all that a reference can give, and its frozen head."""
    policy, other = tiny_policy(seed=7)
    scorer = make_scorer(policy, other)
    batch = attach_logps(batch, "reference", scorer, tokens=True, hidden=hidden)
    return batch, {"reference_head": policy.unembed(other)}, other


@pytest.mark.parametrize("microbatches", [1, 2])
def test_divergences_are_those_of_the_full_distributions(microbatches):
    policy, params = tiny_policy()
    batch, frozen, other = with_reference(made_batch(8, rows=4), hidden=True)

    def kls(token_kls, *, where=None):
        return jnp.sum(token_kls, (-2, -1))

    goal = Objective((Term("kls", kls, {}),))
    _, report = step_of(goal, policy, params, batch, frozen=frozen, microbatches=microbatches)

    def distributions(weights):
        hidden = policy.trunk(weights, batch.tokens, batch.positions, batch.group, batch.branch)
        scored = np.take_along_axis(np.asarray(hidden), batch.score_from[..., None], 1)
        return jax.nn.log_softmax(policy.head(weights, scored), -1)

    q, p = distributions(other), distributions(params)
    found = np.sum(np.exp(q) * (q - p), -1)
    scored = batch.score_slot < batch.where[0].size
    expected = float(found[scored].sum() / np.any(batch.where, -1).sum())
    assert report["loss"] == pytest.approx(expected, rel=1e-4)


def test_what_an_objective_cannot_do_without_is_asked_for_by_the_call_that_adds_it():
    policy, params = tiny_policy()
    bare = made_batch(4, rows=2)
    goal = objective("tdpo2")
    with pytest.raises(ValueError, match=r"needs token log-probs of role 'reference'.*tokens=True"):
        step_of(goal, policy, params, bare)
    batch, frozen, _ = with_reference(bare)
    wanted = r"needs token_kls.*hidden=True\) and give its head to init_state\(..., frozen="
    with pytest.raises(ValueError, match=wanted):
        step_of(goal, policy, params, batch, frozen=frozen)
    batch, frozen, _ = with_reference(bare, hidden=True)
    with pytest.raises(ValueError, match=wanted):
        step_of(goal, policy, params, batch)
    step_of(goal, policy, params, batch, frozen=frozen)


def test_an_optional_array_is_none_where_nobody_attached_it_and_is_read_where_somebody_did():
    policy, params = tiny_policy()
    bare = made_batch(4, rows=2)

    def optional(policy_logps, reference_token_logps=None, rewards=None, *, where=None):
        bonus = 0.0 if reference_token_logps is None else jnp.sum(reference_token_logps, (-2, -1))
        bonus += 0.0 if rewards is None else jnp.sum(rewards, -1)
        return 0 * jnp.sum(policy_logps, -1) + bonus

    goal = Objective((Term("optional", optional, {}),))
    assert (goal.frozen_roles, goal.optional_roles) == ((), ("reference",))
    assert step_of(goal, policy, params, bare)[1]["loss"] == 0
    batch, _, _ = with_reference(bare)
    groups = np.any(bare.where, -1).sum()
    expected = float(np.sum(batch.fixed_logps["reference"]) / groups)
    assert step_of(goal, policy, params, batch)[1]["loss"] == pytest.approx(expected, rel=1e-5)
    extras = {"rewards": np.float32(bare.where)}
    assert step_of(goal, policy, params, bare.replace(extras=extras))[1]["loss"] == 2
