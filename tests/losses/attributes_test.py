"""Heads per attribute, their gate, and MetaRM's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.attributes import (
    attribute_regression_loss,
    gated_preference_loss,
    gated_scores,
    meta_gradient,
    reward_differences,
)
from paxo.losses.reward import bradley_terry_loss
from tests.losses.cases import Case
from tests.losses.conformance import CHECKS

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((3, 2, 4)).astype(np.float32)
TARGETS = RNG.uniform(0, 100, SCORES.shape).astype(np.float32)
GATE = RNG.standard_normal((3, 4)).astype(np.float32)


def test_regression_counts_what_is_annotated():
    targets = np.where(RNG.uniform(size=TARGETS.shape) < 0.4, np.nan, TARGETS)
    found = attribute_regression_loss(SCORES, targets)
    assert float(found.count) == np.isfinite(targets).sum()
    np.testing.assert_allclose(found.value, np.nanmean((SCORES - targets) ** 2), rtol=1e-5)
    grad = jax.grad(lambda s: attribute_regression_loss(s, targets).total)(jnp.asarray(SCORES))
    np.testing.assert_allclose(grad, np.nan_to_num(2 * (SCORES - targets)), rtol=1e-5)


def test_gate_is_bradley_terry_of_the_mixed_heads():
    gate = np.exp(GATE / 10)
    gate /= gate.sum(-1, keepdims=True)
    mixed = np.einsum("bkm,bm->bk", SCORES, gate)
    np.testing.assert_allclose(gated_scores(SCORES, GATE), mixed, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        gated_preference_loss(SCORES, GATE), bradley_terry_loss(mixed), rtol=1e-5
    )


def test_a_cold_gate_reads_one_head_and_a_shift_of_a_head_changes_no_preference():
    found = gated_preference_loss(SCORES, GATE, temperature=1e-3)
    one = np.take_along_axis(SCORES, GATE.argmax(-1)[:, None, None], -1)[..., 0]
    np.testing.assert_allclose(found, bradley_terry_loss(one), rtol=1e-5)
    moved = SCORES + np.array([1.0, -3.0, 0.5, 2.0], np.float32)
    np.testing.assert_allclose(
        gated_preference_loss(moved, GATE), gated_preference_loss(SCORES, GATE), rtol=1e-4
    )


def test_differences_of_rewards_are_within_their_bounds():
    for k in (2, 5):
        scores = RNG.standard_normal((20, k)) * np.logspace(-3, 3, 20)[:, None]
        found = np.asarray(reward_differences(scores))
        assert (found >= (k - 1) / (2 * k) - 1e-6).all()
        assert (found <= (k - 1) / k + 1e-6).all()
        wanted = [
            2 / k**2 * sum(1 / (1 + np.exp(-abs(r[i] - r[j]))) for i in range(k) for j in range(i))
            for r in scores
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    where = np.array([True, True, False, True])
    filled = np.array([1.0, 2.0, np.nan, -1.0])
    np.testing.assert_allclose(
        reward_differences(filled, where), reward_differences(filled[where]), rtol=1e-6
    )
    assert np.isfinite(jax.grad(reward_differences)(jnp.asarray(filled), where)).all()


def test_meta_step_takes_the_loss_gradient_where_rewards_lie_further_apart():
    features, samples = RNG.standard_normal((2, 6, 2, 3)).astype(np.float32)
    start = {"w": jnp.array([0.3, -0.2, 0.1])}
    loss = lambda p: bradley_terry_loss(features @ p["w"]).mean()  # noqa: E731
    apart = lambda p: reward_differences(samples @ p["w"]).mean()  # noqa: E731
    plain = jax.grad(loss)(start)["w"]
    np.testing.assert_allclose(meta_gradient(loss, apart, start, eta=0.0)["w"], plain)
    moved = {"w": start["w"] + 0.5 * jax.grad(apart)(start)["w"]}
    assert apart(moved) > apart(start)
    found = meta_gradient(loss, apart, start, eta=0.5)["w"]
    np.testing.assert_allclose(found, jax.grad(loss)(moved)["w"], rtol=1e-6)
    assert np.abs(found - plain).max() > 1e-3


def test_a_masked_pair_or_head_has_no_gradient():
    where = np.array([[True, True], [True, False], [True, True]])
    scores = np.where(where[..., None], SCORES, np.nan)
    gate = np.where(where.all(-1)[:, None], GATE, np.inf)
    run = lambda s, g: jnp.sum(gated_preference_loss(s, g, where=where))  # noqa: E731
    found = jax.grad(run, argnums=(0, 1))(jnp.asarray(scores), jnp.asarray(gate))
    for x in found:
        assert np.isfinite(x).all()
        assert not np.asarray(x)[1].any()
        assert np.asarray(x)[[0, 2]].all()


# Neither takes a log-prob: their shifts change nothing. A gate belongs to a group, not a candidate.
CLAIMS = {"log_ratios": True, "group_shift": True}
ROWS = [
    (attribute_regression_loss, {"attribute_scores": "KT", "attribute_targets": "KT"}, set()),
    (gated_preference_loss, {"attribute_scores": "KT", "gate_logits": "T"}, {"masked"}),
]


@pytest.mark.parametrize(
    ("loss", "axes", "check"),
    [
        (loss, axes, check)
        for loss, axes, without in ROWS
        for check in sorted(CHECKS.keys() - without)
    ],
)
def test_conformance(loss, axes, check):
    CHECKS[check](Case(loss.__name__, loss, axes=axes, **CLAIMS))
