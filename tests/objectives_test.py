"""Objectives: what is read from a signature, refused by name, and summed."""

import logging
import math
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.contract import NonNegative, stateful
from paxo.losses.pairwise import dpo_loss
from paxo.numerics import Mean
from paxo.objectives import ALIASES, LOSSES, Objective, Term, method_table, objective, weighted_sum


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dppo", r"unknown objective 'dppo'; did you mean 'dpo'\? `paxo methods` lists all\."),
        ("zzzz", r"unknown objective 'zzzz'\. `paxo methods` lists all\."),
    ],
)
def test_unknown_objective_names_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        objective(name)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("dpo", {"betta": 1.0}, ValueError, "has no hyper-parameter 'betta'; did you mean 'beta'"),
        ("dpo", {"where": None}, ValueError, "has no hyper-parameter 'where'"),
        ("dpo", {"beta": 0.0}, ValueError, r"'dpo': beta must lie in \(0, inf\); got 0.0"),
        ("dpo", {"beta": math.inf}, ValueError, r"must lie in \(0, inf\); got inf"),
        ("dpo", {"beta": math.nan}, ValueError, r"must lie in \(0, inf\); got nan"),
        ("simpo", {"label_smoothing": 0.5}, ValueError, r"must lie in \[0, 0.5\); got 0.5"),
        ("dpo", {"beta": "0.1"}, TypeError, r"beta must be a float; got '0.1' \(str\)"),
        ("dpo", {"beta": True}, TypeError, r"beta must be a float; got True \(bool\)"),
        ("ipo", {"length_normalize": 1}, TypeError, r"must be a bool; got 1 \(int\)"),
        ("nll", {"nll_reduction": "mean"}, ValueError, "must be one of 'token_mean', 'sequence_me"),
        ("semantic", {"core": "w &"}, ValueError, "objective 'semantic': .*'w &'"),
        ("semantic", {"core": "rw -> w"}, ValueError, "use semantic_reference"),
        ("semantic", {"core": "w | ~w"}, ValueError, "leaves no adverse world"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(name, settings, error, message):
    with pytest.raises(error, match=message):
        objective(name, **settings)


def test_whole_numbers_are_taken_where_a_float_is_wanted():
    assert objective("simpo", beta=10, label_smoothing=0).hyper_parameters["beta"] == 10


@pytest.mark.parametrize(
    "name", ["dpo", "0.5 dpo", "dpo + 0.5 nll", "ipo + -0.1 nll + 2e-07 simpo"]
)
def test_a_name_gives_the_objective_that_has_it(name):
    assert Objective.named(name).name == name


@pytest.mark.parametrize("name", ["dpo +nll", "half dpo", "dpo + x nll"])
def test_a_name_that_cannot_be_read_is_refused(name):
    with pytest.raises(ValueError, match="objective"):
        Objective.named(name)


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_is_logged_with_its_name_here(alias, caplog):
    with caplog.at_level(logging.INFO, "paxo.objectives"):
        assert objective(alias).terms[0].loss is LOSSES[ALIASES[alias]]
    assert f"objective {alias!r} is paxo's {ALIASES[alias]!r}" in caplog.text


def test_needs_are_read_from_the_signature():
    simpo, dpo = objective("simpo"), objective("dpo")
    assert (dpo.roles, simpo.roles, simpo.reward_per_token) == (("reference",), (), True)
    assert dpo.arrays == {"policy_logps": True, "reference_logps": True, "where": False}
    assert objective("ipo").arrays["lengths"] is False

    def tokens(policy_token_logps, previous_token_logps, previous_logps, offsets, *, where=None):
        return policy_token_logps

    goal = Objective((Term("tokens", tokens, {}),))
    assert (goal.roles, goal.token_roles) == (("previous",), ("previous",))


INPUTS = {
    "policy_logps": jnp.array([[-4.0, -6.0], [-3.0, -9.0], [-1.0, -2.0]]),
    "reference_logps": jnp.array([[-5.0, -5.0], [-3.0, -4.0], [0.0, 0.0]]),
    "lengths": jnp.array([[2.0, 3.0], [4.0, 5.0], [1.0, 1.0]]),
    "labels": jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
    "where": jnp.array([[True, True], [True, True], [False, False]]),
}


def test_losses_of_groups_are_averaged_over_groups_with_a_candidate():
    mean, state = objective("dpo", beta=1.0).terms[0](INPUTS)
    expected = dpo_loss(INPUTS["policy_logps"][:2], INPUTS["reference_logps"][:2], beta=1.0)
    assert (float(mean.count), state) == (2, None)
    assert float(mean.total) == pytest.approx(float(expected.sum()), rel=1e-6)


def test_terms_of_a_sum_keep_their_own_counts():
    goal = weighted_sum((objective("dpo"), 1.0), (objective("nll"), 0.5))
    counts = [float(term(INPUTS)[0].count) for term in goal.terms]
    assert counts == [2.0, 2.0 + 4.0]  # groups, and tokens of the chosen ones


def test_weights_multiply_through_nested_sums():
    inner = weighted_sum((objective("dpo"), 2.0), (objective("nll"), 0.5))
    outer = weighted_sum((inner, 3.0), (objective("simpo"), -1.0))
    assert [(t.name, t.weight) for t in outer.terms] == [("dpo", 6), ("nll", 1.5), ("simpo", -1)]
    assert outer.name == "6 dpo + 1.5 nll + -1 simpo"


@pytest.mark.parametrize(
    ("summands", "error", "message"),
    [
        ((), ValueError, "needs at least one"),
        (((dpo_loss, 1.0),), TypeError, r"takes \(objective, weight\) pairs; got function"),
        (((objective("dpo"), math.nan),), ValueError, "weight of 'dpo' must lie in"),
        (((objective("dpo"), "1"),), TypeError, "weight of 'dpo' must be a float"),
        (
            ((objective("dpo"), 1), (objective("dpo", beta=1), 1)),
            ValueError,
            r"holds \['dpo'\] twi",
        ),
    ],
)
def test_wrong_sums_are_refused(summands, error, message):
    with pytest.raises(error, match=message):
        weighted_sum(*summands)


def test_one_field_changes_and_is_checked_again():
    goal = objective("dpo")
    assert goal.field_names() == {"beta": float}
    assert goal.with_field("beta", 0.5).hyper_parameters == {"beta": 0.5}
    assert goal.hyper_parameters == {"beta": 0.1}
    with pytest.raises(ValueError, match="beta must lie in"):
        goal.with_field("beta", -1.0)
    with pytest.raises(ValueError, match="no hyper-parameter 'tau'"):
        goal.with_field("tau", 1.0)


def test_fields_of_a_sum_are_named_by_loss():
    goal = weighted_sum((objective("dpo"), 1.0), (objective("nll"), 0.2))
    assert set(goal.field_names()) == set(goal.hyper_parameters)
    assert goal.field_names()["dpo.weight"] is float
    assert typing.get_origin(goal.field_names()["nll.nll_reduction"]) is typing.Literal
    changed = goal.with_field("dpo.beta", 0.7).with_field("nll.weight", 3.0)
    assert changed.hyper_parameters == {
        "dpo.beta": 0.7, "dpo.weight": 1.0, "nll.nll_reduction": "token_mean", "nll.weight": 3.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="has no loss 'simpo'; it holds dpo, nll"):
        goal.with_field("simpo.beta", 1.0)


def test_weight_of_a_sum_of_one_outlives_a_changed_field():
    goal = weighted_sum((objective("dpo"), 0.25))
    assert (
        goal.with_field("dpo.beta", 0.7).terms
        == weighted_sum((objective("dpo", beta=0.7), 0.25)).terms
    )
    assert goal.hyper_parameters == {"dpo.beta": 0.1, "dpo.weight": 0.25}


def _start(*, decay):
    return {"mean": np.full((), decay), "steps": 0}


@stateful(_start)
def remembering_loss(
    policy_logps, *, decay: NonNegative = 0.5, scale: NonNegative = 2.0, where=None, state
):
    loss = scale * policy_logps[..., 0] + state["mean"]
    return loss, {"mean": state["mean"] * decay, "steps": state["steps"] + 1}


def test_stateful_loss_gets_its_memory_from_the_hyper_parameters_it_names():
    term = Term("remembering", remembering_loss, {"decay": 0.25, "scale": 2.0})
    goal = Objective((objective("nll").terms[0], term))
    assert goal.whole_batch
    nothing, memory = goal.init_state()
    assert (nothing, float(memory["mean"]), memory["steps"].shape) == ((), 0.25, ())
    mean, after = term(INPUTS, memory)
    assert isinstance(mean, Mean)
    assert (float(after["mean"]), int(after["steps"])) == (0.0625, 1)


def test_a_loss_that_draws_only_with_some_settings_sees_the_whole_batch_only_with_them():
    assert not objective("plackett_luce").whole_batch
    assert objective("plackett_luce", ties="random").whole_batch
    assert not objective("mppo").whole_batch
    assert objective("mppo", form="pair_single").whole_batch


def test_own_loss_outside_the_table_takes_changed_fields():
    goal = Objective((Term("remembering", remembering_loss, {"decay": 0.25, "scale": 2.0}),))
    assert goal.with_field("scale", 3.0).hyper_parameters == {"decay": 0.25, "scale": 3.0}


# Those whose source is code: rax's ranking losses, a note, a repository.
WITHOUT_PAPER = {
    *("unique_softmax", "pairwise_mse", "pairwise_quantile", "pairwise_soft01", "approx_ndcg"),
    *("cdpo", "cpo_simpo", "gumbel"),
}


def test_method_table_has_a_row_with_paper_and_inputs_for_every_loss():
    rows = {row["name"]: row for row in method_table()}
    assert list(rows) == sorted(LOSSES)
    assert all(row["summary"] for row in rows.values())
    assert {name for name, row in rows.items() if "arXiv:" not in row["paper"]} == WITHOUT_PAPER
    assert rows["cdpo"]["paper"] == "https://ericmitchell.ai/cdpo.pdf"
    assert rows["dpo"]["inputs"] == ["policy_logps", "reference_logps"]
    assert rows["simpo"]["hyper_parameters"]["beta"] == 2.0


def test_totals_and_counts_of_groups_are_added_up():
    def by_group(policy_logps, *, where=None):
        return Mean(jnp.sum(policy_logps * where, -1), jnp.sum(where, -1, dtype=jnp.float32))

    mean, _ = Term("by_group", by_group, {})(INPUTS)
    assert (mean.total.shape, mean.count.shape) == ((), ())
    assert (float(mean.total), float(mean.count)) == (-22.0, 4.0)
