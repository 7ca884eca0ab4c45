"""Losses on single completions: KTO's reference point, BCO's shift, NCA split in two."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.anchored import apo_zero_loss, nca_pair_loss
from paxo.losses.pairwise import dpo_loss
from paxo.losses.pointwise import (
    apo_zero_unpaired_loss,
    bco_loss,
    bco_state,
    density_ratios_from,
    kto_loss,
    nca_unpaired_loss,
)

# Groups of one judged completion and one mismatched: label ±1 and 0.
RATIOS = np.array([[1.0, 3.0], [-2.0, -1.0], [0.5, 2.0], [3.0, 1.0]], np.float32)
REFERENCE = np.array([[-9.0, -20.0], [-8.0, -30.0], [-12.0, -25.0], [-7.0, -40.0]], np.float32)
POLICY = REFERENCE + RATIOS
LABELS = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
SIGN, OWN = LABELS[:, 0], RATIOS[:, 0]
BASELINE = 1.25  # mean of the mismatched log-ratios 3, -1, 2, 1

# Pairs, both halves judged.
HALVES = np.broadcast_to(np.array([1.0, -1.0], np.float32), (4, 2))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def test_kto_is_half_its_weights_where_policy_equals_reference():
    found = kto_loss(POLICY, POLICY, LABELS, desirable_weight=1.2, undesirable_weight=0.6)
    assert float(found.value) == pytest.approx((1.2 + 0.6) / 2 / 2, rel=1e-6)
    assert float(found.count) == 4  # mismatched completions are not averaged over


def test_kto_is_its_formula():
    weights = np.where(SIGN > 0, 1.3, 0.7)
    expected = np.mean(weights * (1 - sigmoid(SIGN * 0.5 * (OWN - BASELINE))))
    settings = {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    found = kto_loss(POLICY, REFERENCE, LABELS, **settings)
    assert float(found.value) == pytest.approx(expected, rel=1e-6)


def test_kto_gradient_is_each_completions_own_and_0_on_the_mismatched():
    gradient = jax.grad(lambda s: kto_loss(s, REFERENCE, LABELS, beta=0.5).total)(
        jnp.asarray(POLICY)
    )
    value = sigmoid(0.5 * (OWN - BASELINE))
    np.testing.assert_allclose(gradient[:, 0], -SIGN * 0.5 * value * (1 - value), rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_kto_reference_point_does_not_fall_below_0():
    lower = POLICY - np.array([0.0, 9.0], np.float32)
    found = kto_loss(lower, REFERENCE, LABELS)
    alone = kto_loss(POLICY[:, :1], REFERENCE[:, :1], LABELS[:, :1])
    anchored = apo_zero_unpaired_loss(POLICY, REFERENCE, LABELS)
    assert float(found.value) == float(alone.value) == float(anchored.value)


def test_kto_does_not_depend_on_the_order_of_the_batch_or_on_who_holds_a_mismatch():
    def value(rows, mismatched):
        policy, reference = (
            np.stack([x[rows, 0], x[mismatched, 1]], 1) for x in (POLICY, REFERENCE)
        )
        return float(kto_loss(policy, reference, LABELS[rows]).value)

    same = value([0, 1, 2, 3], [0, 1, 2, 3])
    assert value([2, 0, 3, 1], [2, 0, 3, 1]) == pytest.approx(same, rel=1e-6)
    assert value([0, 1, 2, 3], [3, 2, 0, 1]) == pytest.approx(same, rel=1e-6)


def test_kto_ignores_masked_candidates_in_both_averages():
    where = np.array([[True, True], [True, False], [False, True], [True, True]])
    found = kto_loss(POLICY, REFERENCE, LABELS, beta=0.5, where=where)
    judged = np.array([True, True, False, True])
    baseline = (3.0 + 2.0 + 1.0) / 3
    values = sigmoid(SIGN * 0.5 * (OWN - baseline))[judged]
    assert float(found.count) == 3
    assert float(found.value) == pytest.approx(np.mean(1 - values), rel=1e-6)


def test_halves_of_a_pair_add_up_to_anchored_preference_optimisation():
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    halves = apo_zero_unpaired_loss(POLICY, REFERENCE, HALVES, **weights)
    expected = jnp.sum(apo_zero_loss(POLICY, REFERENCE))
    assert float(halves.total) == pytest.approx(float(expected), rel=1e-6)
    assert float(halves.count) == 8


def test_halves_of_a_pair_add_up_to_pairwise_nca():
    halves = nca_unpaired_loss(POLICY, REFERENCE, HALVES, beta=0.3)
    expected = jnp.sum(nca_pair_loss(POLICY, REFERENCE, beta=0.3))
    assert float(halves.total) == pytest.approx(float(expected), rel=1e-6)


def test_nca_has_its_best_desirable_reward_at_log_two_and_pushes_the_others_down():
    def gradient(ratio, label):
        loss = lambda s: nca_unpaired_loss(s, jnp.zeros(1), jnp.array([label]), beta=1.0).total  # noqa: E731
        return float(jax.grad(loss)(jnp.array([ratio]))[0])

    assert gradient(math.log(2), 1.0) == pytest.approx(0, abs=1e-7)
    assert gradient(0.0, 1.0) == pytest.approx(1.5 * 0.5 - 1)
    for ratio in (-3.0, 0.0, 3.0):
        assert gradient(ratio, -1.0) == pytest.approx(0.5 * sigmoid(ratio), rel=1e-6)


def run_bco(batches, **settings):
    """Losses and the last state over `(ratios [N], labels [N])`."""
    state, losses = bco_state(), []
    for ratios, labels in batches:
        ratios = jnp.asarray(ratios, jnp.float32)[:, None]
        loss, state = bco_loss(
            ratios, jnp.zeros_like(ratios), jnp.asarray(labels)[:, None], state=state, **settings
        )
        losses.append(float(loss.value))
    return losses, state


STREAM = [
    (np.array([4.0, 2.0, 1.0]), np.array([1.0, 1.0, -1.0])),
    (np.array([3.0, -2.0, 6.0]), np.array([1.0, -1.0, 1.0])),
    (np.array([5.0, 7.0, -4.0]), np.array([1.0, 1.0, -1.0])),
]


def test_bco_running_mean_is_the_published_code():
    losses, state = run_bco(STREAM, beta=0.5, delta_mode="running_mean")
    seen = []
    for found, (ratios, labels) in zip(losses, STREAM):
        seen += list(0.5 * ratios)
        delta = np.mean(seen)  # this batch included
        expected = np.mean(softplus(-labels * (0.5 * ratios - delta)))
        assert found == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(state["weight"], [3, 6])


def test_bco_midpoint_is_that_of_the_batch():
    losses, _ = run_bco(STREAM, beta=0.5, delta_mode="midpoint")
    for found, (ratios, labels) in zip(losses, STREAM):
        rewards = 0.5 * ratios
        delta = (rewards[labels > 0].mean() + rewards[labels < 0].mean()) / 2
        assert found == pytest.approx(np.mean(softplus(-labels * (rewards - delta))), rel=1e-6)


def test_bco_ema_starts_at_the_first_batch_and_forgets_by_its_decay():
    losses, _ = run_bco(STREAM, beta=0.5, delta_mode="ema", ema_decay=0.8)
    for step, (ratios, labels) in enumerate(STREAM):
        weights = 0.8 ** np.arange(step, -1, -1.0)
        means = [
            [0.5 * r[np.sign(y) == sign].mean() for r, y in STREAM[: step + 1]] for sign in (-1, 1)
        ]
        delta = np.mean([np.average(m, weights=weights) for m in means])
        expected = np.mean(softplus(-labels * (0.5 * ratios - delta)))
        assert losses[step] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "delta"), [("running_mean", 0.9 * 2.0 + 0.1 * -4.0), ("ema", -1.0), ("midpoint", -1.0)]
)
def test_only_the_published_running_mean_leans_to_the_larger_class(mode, delta):
    labels = np.array([1.0] * 9 + [-1.0])
    ratios = np.where(labels > 0, 2.0, -4.0)
    losses, _ = run_bco([(ratios, labels)] * 5, beta=1.0, delta_mode=mode)
    expected = np.mean(softplus(-labels * (ratios - delta)))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["ema", "midpoint", "running_mean"])
def test_bco_shift_carries_no_gradient(mode):
    def total(ratios):
        loss, state = bco_loss(
            ratios, jnp.zeros(3), labels, beta=0.5, delta_mode=mode, state=bco_state()
        )
        return loss.total, state

    ratios, labels = (jnp.asarray(x, jnp.float32) for x in STREAM[0])
    gradient, state = jax.grad(total, has_aux=True)(ratios)
    means = np.asarray(state["mean"])
    delta = np.mean(0.5 * ratios) if mode == "running_mean" else means.mean()
    expected = -labels * 0.5 * sigmoid(-labels * (0.5 * ratios - delta))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_bco_keeps_the_mean_of_a_class_that_a_batch_lacks():
    for mode in ("ema", "midpoint", "running_mean"):
        _, first = run_bco(STREAM[:1], beta=1.0, delta_mode=mode)
        only_desirable = (np.array([9.0, 11.0]), np.array([1.0, 1.0]))
        _, state = run_bco([STREAM[0], only_desirable], beta=1.0, delta_mode=mode)
        assert state["mean"][0] == first["mean"][0] == 1.0
        assert state["mean"][1] > first["mean"][1]
    # a class never seen is left out: the shift is the other's mean
    losses, _ = run_bco([(np.array([2.0, 2.0]), np.array([1.0, 1.0]))])
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)


def test_bco_exceeds_dpo_by_the_cost_of_its_shift_and_least_half_way():
    # log(1 + e^-x + e^-y + e^-x-y) - log(1 + e^-x-y), x = r_w - delta, y = delta - r_l
    state = {"mean": jnp.zeros(2), "weight": jnp.zeros(2)}
    loss, new = bco_loss(
        POLICY[:1], REFERENCE[:1], HALVES[:1], beta=0.5, delta_mode="midpoint", state=state
    )
    delta = float(jnp.mean(new["mean"]))
    x, y = 0.5 * 1.0 - delta, delta - 0.5 * 3.0
    gap = math.log(1 + math.exp(-x) + math.exp(-y) + math.exp(-x - y)) - math.log(
        1 + math.exp(-x - y)
    )
    dpo = float(dpo_loss(POLICY[0], REFERENCE[0], beta=0.5))
    assert float(loss.total) == pytest.approx(dpo + gap, rel=1e-5)
    cost = lambda d: softplus(-(0.5 - d)) + softplus(1.5 - d)  # noqa: E731
    assert cost(delta) < min(cost(delta - 0.1), cost(delta + 0.1))


def test_density_ratios_weigh_the_undesirable_within_their_bounds():
    judged = HALVES[:, ::-1]  # undesirable first
    ratios = np.array([0.01, 0.8, 3.0, 99.0])
    # A long memory of 0 holds the shift there: half-way, both halves of a pair would cost the same.
    state = {"mean": jnp.zeros(2), "weight": jnp.full(2, 1e7)}
    settings = {"beta": 1.0, "delta_mode": "running_mean", "state": state}

    def per_group(density):
        def of(i):
            loss, _ = bco_loss(
                POLICY[i : i + 1], REFERENCE[i : i + 1], judged[i : i + 1], density, **settings
            )
            return float(loss.total)

        return of

    for i, weight in enumerate((0.5, 0.8, 3.0, 10.0)):
        found = per_group(ratios[i : i + 1])(i)
        undesirable, desirable = RATIOS[i]
        expected = weight * softplus(undesirable) + softplus(-desirable)
        assert found == pytest.approx(expected, rel=1e-5)
        assert per_group(np.ones(1))(i) == per_group(None)(i)


def test_density_ratio_of_prompts_that_tell_nothing_is_one():
    probabilities = jnp.array([0.5, 0.8, 1.0])
    found = density_ratios_from(probabilities)
    np.testing.assert_allclose(found[:2], [1.0, 4.0], rtol=1e-6)
    assert np.isfinite(found[2])


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: kto_loss(s, REFERENCE, LABELS, beta=0.5).total,
        lambda s: nca_unpaired_loss(s, REFERENCE, LABELS, beta=0.5).total,
        lambda s: apo_zero_unpaired_loss(s, REFERENCE, LABELS, beta=0.5).total,
    ],
    ids=["kto", "nca_unpaired", "apo_zero_unpaired"],
)
def test_gradients_are_the_finite_differences_in_float64(loss):
    with jax.enable_x64(True):
        policy = jnp.asarray(POLICY, jnp.float64)
        mismatched = policy[:, 1]  # held fixed: the reference point has no gradient
        check_grads(
            lambda s: loss(jnp.stack([s, mismatched], 1)),
            (policy[:, 0],),
            order=1,
            modes=["rev"],
            rtol=1e-6,
        )
