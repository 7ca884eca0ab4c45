import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.pairwise import dpo_loss
from paxo.losses.soft_ranking import diff_ndcg_loss, drpo_rank_loss, soft_permutation
from paxo.losses.tree import tpo_tree_loss

SCORES = np.array([0.3, -0.7, 1.1, 0.2, 2.0])
GRADES = np.array([2.0, 0.0, 1.0, 3.0, 0.0])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def ndcg(scores, grades, discount=lambda r: 1 / math.log2(1 + r)):
    dcg = lambda order: sum((2 ** grades[i] - 1) * discount(r + 1) for r, i in enumerate(order))  # noqa: E731
    return dcg(np.argsort(-np.array(scores))) / dcg(np.argsort(-np.array(grades)))


def value(scores, grades, **options):
    run = functools.partial(diff_ndcg_loss, beta=1.0, **options)
    return jax.jit(run)(scores, np.zeros_like(scores), grades).value


@pytest.mark.parametrize(
    ("discount", "factor"),
    [
        ("log", lambda r: 1 / math.log2(1 + r)),
        ("sqrt", lambda r: r**-0.5),
        ("square", lambda r: r**-2),
    ],
)
def test_steep_comparators_give_one_minus_ndcg(discount, factor):
    found = value(SCORES, GRADES, steepness=1e12, discount=discount)
    np.testing.assert_allclose(found, 1 - ndcg(SCORES, GRADES, factor), rtol=1e-9)


def test_every_order_of_five_is_sorted():
    orders = np.array(list(itertools.permutations(range(5))), float)
    there = np.ones_like(orders, bool)
    found = jax.jit(soft_permutation)(orders, there, 1e12)
    np.testing.assert_allclose(found, orders[..., None] == 4 - np.arange(5), atol=1e-9)


def test_soft_permutation_is_doubly_stochastic():
    there = np.array([True, False, True, True, True])
    found = jax.jit(soft_permutation)(SCORES, there, 3.0)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(found[1], [0, 0, 0, 0, 1])  # the masked one goes last


def test_two_candidates_closed_form():
    keep = 0.5 + math.atan(10 * (0.3 + 0.7)) / math.pi
    found = value(SCORES[:2], np.array([1.0, 0.0]))
    np.testing.assert_allclose(found, (1 - keep) * (1 - 1 / math.log2(3)), rtol=1e-12)


def test_lists_without_gain_are_not_counted():
    grades = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]])
    loss = jax.jit(diff_ndcg_loss)(np.zeros((3, 2)), np.zeros((3, 2)), grades)
    assert loss.count == 1
    np.testing.assert_allclose(loss.value, (1 - 1 / math.log2(3)) / 2, rtol=1e-12)


def test_gradient_equals_finite_differences():
    run = jax.jit(lambda x: diff_ndcg_loss(x, np.zeros(5), GRADES, beta=1.0, steepness=2.0).value)
    jax.test_util.check_grads(run, (SCORES,), order=1, modes=["rev"])


LOGPS = np.array([[-4.0, -9.0, -3.0], [-8.0, -2.0, -6.0]])
LENGTHS = np.array([[4.0, 3.0, 6.0], [4.0, 4.0, 3.0]])
RANKED = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
MEANS = np.array([[-1.0, -3.0, -0.5], [-0.5, -2.0, -2.0]])  # by rank


@functools.cache
def stepped(**options):
    return jax.jit(functools.partial(drpo_rank_loss, **options))


def drpo(state=None, logps=LOGPS, **options):
    state = drpo_rank_loss.init_state() if state is None else state
    return stepped(**options)(logps, LENGTHS, RANKED, state=state)


def test_drpo_first_step_is_ndcg_of_means_with_a_head_start_per_rank():
    found = drpo(rank_margin=0.4, steepness=1e12)[0]
    expected = [1 - ndcg(row + 0.4 * np.arange(3), [2, 1, 0]) for row in MEANS]
    np.testing.assert_allclose(found.value, np.mean(expected), rtol=1e-9)


def test_drpo_averages_move_by_rank_and_lower_the_next_scores():
    _, state = drpo(decay=0.75)
    scores = MEANS + 0.2 * np.arange(3)
    first = 0.25 * scores.mean(0)
    np.testing.assert_allclose(state["average"][:3], first, rtol=1e-6)
    np.testing.assert_array_equal(state["count"][:4], [1, 1, 1, 0])
    loss, state = drpo(state, decay=0.75, steepness=1e12)
    expected = [1 - ndcg(row - first, [2, 1, 0]) for row in scores]
    np.testing.assert_allclose(loss.value, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(state["average"][:3], 1.75 * first, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"ada_coef": 0.3}, {"bias_correction": True}, {"spread_limit": 0.001}]
)
def test_drpo_options_act_once_there_are_averages(options):
    state = drpo(decay=0.75)[1]
    base = drpo(state, decay=0.75)[0].value
    assert abs(drpo(state, decay=0.75, **options)[0].value - base) > 1e-6


def test_drpo_corrected_average_of_one_step_is_that_steps_mean():
    state = drpo(decay=0.75)[1]
    found = drpo(state, decay=0.75, bias_correction=True)[0]
    whole = {**state, "average": state["average"] / 0.25}
    np.testing.assert_allclose(found.value, drpo(whole, decay=0.75)[0].value, rtol=1e-6)


def test_drpo_averages_carry_no_gradient():
    state = drpo(decay=0.75)[1]
    slope = jax.grad(lambda x: jnp.sum(drpo(state, x, decay=0.75)[1]["average"]))(LOGPS)
    assert not slope.any()


TOKENS = np.array([[-1.0, -2.0, -0.5, -1.5], [-0.3, -1.0, -2.5, -1.0]])
ANCHOR = np.array([[-1.5, -1.0, -1.0, -1.0], [-0.5, -0.5, -1.0, -3.0]])
MASK = np.array([[True, True, True, True], [True, True, True, False]])
ENDS = np.array([[0.0, 1, 0, 1], [1, 0, 1, 1]])
ALIKE = np.array([[0.5, 0.5, -0.2, -0.2], [0.1, 0.8, 0.8, 9.0]])


def tree(labels=(1.0, 0.0), tokens=TOKENS, ends=ENDS, **options):
    run = functools.partial(
        tpo_tree_loss, **{"beta": 1.0, "ranking_loss": "pair_logistic"} | options
    )
    return jax.jit(run)(tokens, ANCHOR, MASK, np.array(labels), ends, ALIKE)


@pytest.mark.parametrize(
    ("step_weight", "weights"),
    [
        ("1+cos", [[1.5, 0.8], [1.1, 1.8]]),
        ("1-cos", [[0.5, 1.2], [0.9, 0.2]]),
        ("none", [[1, 1], [1, 1]]),
    ],
)
def test_tree_scores_are_weighted_means_of_step_means(step_weight, weights):
    ratios = TOKENS - ANCHOR
    steps = [[ratios[0, :2].mean(), ratios[0, 2:].mean()], [ratios[1, 0], ratios[1, 1:3].mean()]]
    best, worst = np.average(steps, axis=1, weights=weights)
    expected = math.log1p(math.exp(worst - best))
    np.testing.assert_allclose(tree(step_weight=step_weight), expected, rtol=1e-12)


def test_tree_is_cut_to_the_shortest_path():
    ends = np.array([[0.0, 1, 0, 1], [0, 0, 1, 1]])  # the second path has one step, of three tokens
    ratios = TOKENS - ANCHOR
    expected = math.log1p(math.exp(ratios[1, :3].mean() - ratios[0, :2].mean()))
    np.testing.assert_allclose(tree(ends=ends), expected, rtol=1e-12)


def test_tree_of_one_step_is_length_normalised_dpo():
    ends = np.array([[0.0, 0, 0, 1], [0, 0, 1, 0]])
    per_token = [np.where(MASK, x, 0).sum(-1) / MASK.sum(-1) for x in (TOKENS, ANCHOR)]
    np.testing.assert_allclose(tree(ends=ends), dpo_loss(*per_token, beta=1.0), rtol=1e-12)


def test_tree_lambda_weighs_a_pair_by_gain_and_discount():
    factor = (2**0.75 - 2**0.25) * (1 - 1 / math.log2(3))
    found = tree((0.75, 0.25), ranking_loss="lambda")
    np.testing.assert_allclose(found, factor * tree((0.75, 0.25)), rtol=1e-12)


def test_tree_of_equal_grades_is_zero():
    assert tree((0.5, 0.5)) == 0


def test_tree_gradient_equals_finite_differences():
    jax.test_util.check_grads(lambda x: tree(tokens=x), (TOKENS,), order=1, modes=["rev"])
