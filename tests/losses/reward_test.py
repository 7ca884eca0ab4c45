import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.ensembles import ensemble_rewards, preference_strength
from paxo.losses.reward import (
    bradley_terry_loss,
    contrastive_reward_loss,
    general_preference_loss,
    general_preference_scores,
    order_corrected,
    pair_preference_loss,
    plackett_luce_reward_loss,
)
from paxo.losses.steps import aggregate_steps, prm_loss, regret_preference_loss, segment_regret


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def jitted(loss, **options):
    return jax.jit(functools.partial(loss, **options))


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


SCORES = np.array([[1.3, 0.4], [-0.2, 2.0]])
GAPS = np.array([0.9, -2.2])


def test_bradley_terry_forms():
    for options, arrays, expected in [
        ({}, (), [softplus(-d) for d in GAPS]),
        ({}, (np.array([0.5, -1.0]),), [softplus(-d) for d in (0.4, -1.2)]),
        ({"temperature": 0.1}, (np.array([0.5, -1.0]),), [softplus(-d) for d in (4, -12)]),
        ({"label_smoothing": 0.2}, (), [0.8 * softplus(-d) + 0.2 * softplus(d) for d in GAPS]),
        (
            {},
            (None, np.array([0.7, 0.1])),
            [p * softplus(-d) + (1 - p) * softplus(d) for p, d in zip((0.7, 0.1), GAPS)],
        ),
        (  # 0.7 smoothed by 0.2 is 0.7 * 0.8 + 0.3 * 0.2
            {"label_smoothing": 0.2},
            (None, np.array([0.7, 0.1])),
            [p * softplus(-d) + (1 - p) * softplus(d) for p, d in zip((0.62, 0.26), GAPS)],
        ),
        ({"centering": 0.3}, (), [softplus(-d) + 0.3 * t**2 for d, t in zip(GAPS, (1.7, 1.8))]),
        ({"link": "regression", "temperature": 0.1}, (), [(d / 0.1 - 10) ** 2 / 2 for d in GAPS]),
        (
            {"link": "regression"},
            (np.array([0.0, 2.0]),),
            [(0.9 - 2.5) ** 2 / 2, (-2.2 - 5 / (1 + math.exp(-2))) ** 2 / 2],
        ),
    ]:
        found = bradley_terry_loss(SCORES, *arrays, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=str(options))


def test_bradley_terry_swapped_probabilities_sum_to_one():
    swapped = bradley_terry_loss(SCORES[:, ::-1])
    np.testing.assert_allclose(jnp.exp(-bradley_terry_loss(SCORES)) + jnp.exp(-swapped), 1)
    np.testing.assert_allclose(bradley_terry_loss(SCORES + 7), bradley_terry_loss(SCORES))


def test_bradley_terry_gradient_saturates_and_stays_alive_where_far_wrong():
    slope = jax.vmap(jax.grad(bradley_terry_loss))(np.array([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]]))
    # MOSS's log(sigmoid + 1e-5) would give 0 in the second row
    np.testing.assert_allclose(slope, [[0, 0], [-1, 1], [-0.5, 0.5]])


def test_bradley_terry_margins_and_soft_labels_carry_no_gradient():
    slope = jax.grad(lambda m, p: bradley_terry_loss(SCORES[0], m, p), argnums=(0, 1))(0.3, 0.6)
    assert slope == (0, 0)


def test_half_a_soft_label_pulls_to_equality():
    loss = lambda x: bradley_terry_loss(x, None, np.array(0.5))  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(np.zeros(2)), 0)
    assert jax.grad(loss)(np.array([1.0, 0.0]))[0] > 0


def test_plackett_luce_of_two_rewards_is_bradley_terry():
    found = jitted(plackett_luce_reward_loss)(SCORES, np.array([[5.0, 3.0]] * 2))
    np.testing.assert_allclose(found, bradley_terry_loss(SCORES), rtol=1e-12)


def test_plackett_luce_probabilities_of_rewards_sum_to_one():
    orders = np.array(list(itertools.permutations(range(4))), float)
    scores = np.tile([0.3, -1.0, 0.8, 0.1], (24, 1))
    nll = jitted(plackett_luce_reward_loss)(scores, orders)
    np.testing.assert_allclose(jnp.sum(jnp.exp(-nll)), 1, rtol=1e-12)


VECTORS = np.random.default_rng(0).normal(size=(3, 4, 6))


def test_general_preference_scores_are_the_rotation_and_skew():
    scales = np.array([[1.0, 0.5, 2.0]] * 3)
    found = general_preference_scores(VECTORS, scales)
    block = np.zeros((6, 6))
    for n, lam in enumerate((1.0, 0.5, 2.0)):
        block[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = lam * np.array([[0, -1], [1, 0]])
    expected = np.einsum("bid,de,bje->bij", VECTORS, block.T, VECTORS)
    np.testing.assert_allclose(found, expected, atol=1e-12)  # <R v_i, v_j>
    np.testing.assert_allclose(found, -jnp.swapaxes(found, -1, -2), atol=1e-12)
    np.testing.assert_allclose(jnp.diagonal(found, axis1=-2, axis2=-1), 0, atol=1e-12)


def test_general_preferences_can_run_in_a_circle():
    angles = np.arange(3) * 2 * math.pi / 3
    vectors = np.stack([np.cos(angles), np.sin(angles)], -1)
    turn = math.sqrt(3) / 2
    expected = turn * np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    np.testing.assert_allclose(general_preference_scores(vectors), expected, atol=1e-12)


def test_general_preference_with_a_constant_coordinate_is_bradley_terry():
    vectors = np.stack([SCORES, np.full((2, 2), 3.0)], -1)
    found = general_preference_loss(vectors, temperature=0.5)
    expected = bradley_terry_loss(3 * SCORES, temperature=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_general_preference_margin_scale_and_regression():
    pair, scales = VECTORS[:, :2], np.array([[1.0, 0.5, 2.0]] * 3)
    score = general_preference_scores(pair, scales)[:, 0, 1]
    margins = np.array([0.2, 0.0, -1.0])
    found = general_preference_loss(pair, margins, scales)
    np.testing.assert_allclose(found, jax.nn.softplus(-(score - margins) / 0.1), rtol=1e-12)
    found = general_preference_loss(pair, None, scales, link="regression", temperature=2.0)
    np.testing.assert_allclose(found, (score / 2 - 10) ** 2 / 2, rtol=1e-12)


def test_general_preference_masked_pair_may_hold_nan():
    pair, where = VECTORS[:, :2].copy(), np.array([[True, True], [True, False], [True, True]])
    pair[1, 1] = np.nan
    loss = lambda x: jnp.sum(general_preference_loss(x, where=where))  # noqa: E731
    found, slope = jax.value_and_grad(loss)(pair)
    assert np.isfinite(found)
    assert np.isfinite(slope).all()
    assert not slope[1].any()


def test_pair_preference_is_symmetric_in_order_and_treats_ties_as_asked():
    labels = np.array([[2.0, 1.0], [0.0, 3.0]])
    found = pair_preference_loss(SCORES, labels)
    np.testing.assert_allclose(found, [softplus(-0.9), softplus(-2.2)], rtol=1e-12)
    np.testing.assert_allclose(pair_preference_loss(SCORES[:, ::-1], labels[:, ::-1]), found)
    tie = np.ones(2)
    np.testing.assert_allclose(
        pair_preference_loss(SCORES[0], tie), (softplus(0.9) + softplus(-0.9)) / 2
    )
    loss = functools.partial(pair_preference_loss, labels=tie, ties="ignore")
    value, slope = jax.value_and_grad(loss)(SCORES[0])
    np.testing.assert_allclose(value, math.log(2))
    assert not slope.any()


def test_order_corrected_is_consistent():
    ab, ba = np.array([0.9, 0.3]), np.array([0.5, 0.8])
    total = order_corrected(ab, ba) + order_corrected(ba, ab)
    np.testing.assert_allclose(total, 1)


def test_contrastive_term_finds_the_other_view():
    features = np.array([[2.0, 0.0], [0.0, 1.0]])
    found = contrastive_reward_loss(features, 3 * features, temperature=0.5)
    np.testing.assert_allclose(found, math.log1p(math.exp(-2)), rtol=1e-12)


STEPS = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])


def test_prm_counts_the_ends_of_steps_and_takes_soft_labels():
    values, labels = (
        np.arange(10.0).reshape(2, 5) - 4,
        np.array([[9, 0.3, 9, 1, 9], [0, 9, 9, 9, 9]]),
    )
    loss = prm_loss(values, labels, STEPS)
    expected = 0.3 * softplus(3) + 0.7 * softplus(-3) + softplus(1) + softplus(1)
    np.testing.assert_allclose(loss.total, expected, rtol=1e-12)
    assert loss.count == 3
    last = prm_loss(values, labels, STEPS, last_step_only=True)
    np.testing.assert_allclose(last.total, 2 * softplus(1), rtol=1e-12)
    assert last.count == 2


def test_prm_of_one_step_solutions_is_an_outcome_reward_model():
    values, labels = np.array([[0.3, 0.7]]), np.array([[0.0, 1.0]])
    both = [prm_loss(values, labels, np.array([[0, 1]]), last_step_only=x) for x in (True, False)]
    assert both[0].total == both[1].total


def test_aggregated_steps():
    p = np.array([[0.9, 0.5, 0.0, 0.8, 0.1], [0.4, 0.0, 0.0, 0.0, 0.0]])
    for how, expected in [
        ("min", [0.5, 0.4]),
        ("product", [0.4, 0.4]),
        ("last", [0.8, 0.4]),
        ("mean", [0.65, 0.4]),
    ]:
        np.testing.assert_allclose(aggregate_steps(p, STEPS, how), expected)
        assert aggregate_steps(p[0], np.zeros(5), how) == 0


def test_regret_tells_where_equal_returns_lead_and_ignores_potentials():
    potential = np.array([0.0, 3.0, -1.0, 2.0, 0.0])  # 0 at the end, where values are 0
    segments = [(0, 2), (1, 0)]  # forward two states, or one back
    base = lambda s, t: float(t == 4)  # noqa: E731
    shaped = lambda s, t: base(s, t) + potential[t] - potential[s]  # noqa: E731
    found = {}
    for name, reward in (("base", base), ("shaped", shaped)):
        values = np.zeros(5)
        for s in reversed(range(4)):
            values[s] = reward(s, s + 1) + values[s + 1]
        returns = np.array(
            [
                sum(reward(s, s + 1) for s in range(a, b)) if b > a else reward(a, b)
                for a, b in segments
            ]
        )
        starts, ends = values[[a for a, _ in segments]], values[[b for _, b in segments]]
        found[name] = (returns, segment_regret(returns, starts, ends))
        loss = regret_preference_loss(returns, starts, ends)
        gap = found[name][1][1] - found[name][1][0]
        np.testing.assert_allclose(loss, softplus(-gap), rtol=1e-12)
    np.testing.assert_allclose(found["base"][1], found["shaped"][1], atol=1e-12)
    assert not np.allclose(np.diff(found["base"][0]), np.diff(found["shaped"][0]))


def test_regret_with_equal_values_is_the_return_model():
    found = regret_preference_loss(SCORES, np.ones((2, 2)), np.full((2, 2), 3.0), temperature=2.0)
    np.testing.assert_allclose(found, bradley_terry_loss(SCORES, temperature=2.0), rtol=1e-12)
    # two segments of equal return: the one that ends better is preferred
    better = regret_preference_loss(np.zeros(2), np.zeros(2), np.array([1.0, 0.0]))
    assert better < math.log(2)


MEMBERS = np.array([[1.0, -2.0], [4.0, 0.0], [1.0, 8.0]])


def test_ensemble_rewards():
    np.testing.assert_allclose(ensemble_rewards(MEMBERS, "mean"), [2, 2])
    np.testing.assert_allclose(ensemble_rewards(MEMBERS, "wco"), [1, -2])
    np.testing.assert_allclose(ensemble_rewards(MEMBERS, "uwo", lam=0.5), [2 - 1, 2 - 28 / 3])
    # dividing by M - 1 is M / (M - 1) times the penalty
    np.testing.assert_allclose(
        ensemble_rewards(MEMBERS, "uwo", lam=0.5, ddof=1),
        ensemble_rewards(MEMBERS, "uwo", lam=0.75),
    )
    np.testing.assert_allclose(ensemble_rewards(MEMBERS, "uwo", lam=0.0), [2, 2])
    for how in ("mean", "wco", "uwo"):
        for ddof in (0, 1):
            np.testing.assert_array_equal(ensemble_rewards(MEMBERS[:1], how, ddof=ddof), MEMBERS[0])


def test_uncertainty_weighting_is_not_monotone():
    higher = MEMBERS + np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]])
    assert ensemble_rewards(higher, "uwo")[0] < ensemble_rewards(MEMBERS, "uwo")[0]


def test_preference_strength_finds_flipped_pairs():
    rng = np.random.default_rng(1)
    true_gap = np.abs(rng.normal(1, 0.5, 400)) * np.where(np.arange(400) < 80, -1, 1)
    gaps = true_gap + rng.normal(0, 0.5, (10, 400))
    mean, spread = preference_strength(np.stack([gaps, np.zeros_like(gaps)], -1))
    np.testing.assert_allclose(mean, gaps.mean(0))
    np.testing.assert_allclose(spread, gaps.std(0))
    caught = (mean[:80, None] < mean[None, 80:]).mean()  # the area under the curve
    assert caught > 0.9
