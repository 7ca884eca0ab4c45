import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.contrastive import exo_loss, infonca_loss, nca_loss
from paxo.losses.lipo import lipo_loss
from paxo.losses.listwise import mppo_loss, plackett_luce_loss, pro_loss, swepo_loss
from paxo.losses.pairwise import dpo_loss, simpo_loss

POLICY = np.array([[-4.0, -6.5, -5.0, -3.0], [-9.0, -2.0, -4.0, -7.0]])
REFERENCE = np.array([[-5.0, -5.5, -5.0, -4.0], [-8.0, -3.0, -2.0, -7.5]])
GRADES = np.array([[3.0, 0.0, 1.0, 2.0], [0.2, 0.9, 0.4, 0.6]])
LENGTHS = np.array([[4.0, 6.0, 5.0, 2.0], [7.0, 3.0, 4.0, 9.0]])
ONE = np.array([[True, False, False, False], [False, False, False, True]])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def jitted(loss, **options):
    return jax.jit(functools.partial(loss, **options))


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


@pytest.mark.parametrize("ties", ["skip", "order", "random"])
def test_plackett_luce_without_ties_is_list_mle(ties):
    key = jax.random.key(0)
    found = jitted(plackett_luce_loss, beta=0.3, ties=ties)(POLICY, REFERENCE, GRADES, key=key)
    mle = jitted(lipo_loss, beta=0.3, ranking_loss="list_mle")(POLICY, REFERENCE, GRADES)
    np.testing.assert_allclose(jnp.sum(found), mle.total, rtol=1e-12)


def test_plackett_luce_of_two_is_dpo():
    pair, reference = POLICY[:, :2], REFERENCE[:, :2]
    found = jitted(plackett_luce_loss)(pair, reference, np.array([[1.0, 0.0]] * 2))
    np.testing.assert_allclose(found, dpo_loss(pair, reference), rtol=1e-12)


def test_plackett_luce_gradient_sums_to_zero_and_is_exact_at_equal_scores():
    loss = jitted(plackett_luce_loss, beta=1.0)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(loss(x, REFERENCE, GRADES))))
    np.testing.assert_allclose(jnp.sum(slope(POLICY), -1), 0, atol=1e-12)
    by_rank = np.array([1 / 4, 7 / 12, 13 / 12, 25 / 12]) - 1
    np.testing.assert_allclose(slope(REFERENCE)[0], by_rank[[0, 3, 2, 1]], rtol=1e-12)


def test_plackett_luce_ties():
    scores, zeros, labels = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.array([1.0, 1.0, 0.0])
    # skip: each of the tied is compared with the third alone
    found = jitted(plackett_luce_loss, beta=1.0)(scores, zeros, labels)
    np.testing.assert_allclose(found, softplus(-0.5) + softplus(2.5), rtol=1e-12)
    # order: as if the first came first; random: one of the two orders
    total = math.log(sum(map(math.exp, scores)))
    orders = [total - 1 + softplus(2.5), total + 2 + softplus(-0.5)]
    found = jitted(plackett_luce_loss, beta=1.0, ties="order")(scores, zeros, labels)
    np.testing.assert_allclose(found, orders[0], rtol=1e-12)
    draw = jitted(plackett_luce_loss, beta=1.0, ties="random")
    drawn = {round(float(draw(scores, zeros, labels, key=jax.random.key(i))), 9) for i in range(20)}
    assert drawn == {round(x, 9) for x in orders}
    with pytest.raises(ValueError, match="needs a key"):
        plackett_luce_loss(scores, zeros, labels, ties="random")


def test_plackett_luce_partial_ranking_leaves_the_rest_unordered():
    scores = np.array([0.3, -0.7, 1.1, 0.2])
    found = jitted(plackett_luce_loss, beta=1.0)(scores, np.zeros(4), np.array([2.0, 1.0, 0, 0]))
    total = math.log(sum(map(math.exp, scores)))
    rest = math.log(sum(map(math.exp, scores[1:])))
    np.testing.assert_allclose(found, total - 0.3 + rest + 0.7, rtol=1e-12)


def test_pro_of_equal_rewards_is_constant():
    loss = jitted(pro_loss, sft_weight=0.0)
    found, slope = jax.value_and_grad(lambda x: jnp.sum(loss(x, LENGTHS[0], np.ones(4))))(POLICY[0])
    np.testing.assert_allclose(found, math.log(4) + math.log(3) + math.log(2), rtol=1e-12)
    assert not slope.any()


def test_pro_of_two_is_simpo_with_the_reward_gap_as_beta():
    pair, lengths = POLICY[:, :2], LENGTHS[:, :2]
    found = jitted(pro_loss, sft_weight=0.0)(pair, lengths, np.array([[1.7, 1.0]] * 2))
    expected = simpo_loss(pair, lengths, beta=0.7, gamma_beta_ratio=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_pro_equals_the_formula_with_temperatures_in_any_order():
    rewards, logps, lengths = [3.0, 2.0, 0.5], [-4.0, -9.0, -5.0], [4.0, 6.0, 2.0]
    p = [s / n for s, n in zip(logps, lengths)]
    expected = 0.0
    for r in range(2):
        temperatures = {i: 1 / (rewards[r] - rewards[i]) for i in range(r + 1, 3)}
        own = p[r] / min(temperatures.values())
        others = sum(math.exp(p[i] / t) for i, t in temperatures.items())
        expected += math.log(math.exp(own) + others) - own
    expected += 0.05 * (3 - 1) ** 2 * 4.0
    order = [2, 0, 1]
    columns = [np.array([x[i] for i in order]) for x in (logps, lengths, rewards)]
    np.testing.assert_allclose(jitted(pro_loss)(*columns), expected, rtol=1e-12)
    # another candidate of the SFT term: the second, now in the last place
    found = jitted(pro_loss)(*columns, np.array(2))
    np.testing.assert_allclose(found, expected + 0.05 * 4 * (9 - 4), rtol=1e-12)


def test_pro_gradient_equals_finite_differences():
    loss = jitted(pro_loss)
    jax.test_util.check_grads(
        lambda x: jnp.sum(loss(x, LENGTHS, GRADES)), (POLICY,), order=1, modes=["rev"]
    )


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("power", [1, 2])
def test_swepo_of_two_is_dpo_for_any_alpha(alpha, power):
    pair, reference = POLICY[:, :2], REFERENCE[:, :2]
    found = jitted(swepo_loss, alpha=alpha, power=power)(
        pair, reference, np.array([[7.0, 2.5]] * 2)
    )
    np.testing.assert_allclose(found, dpo_loss(pair, reference), rtol=1e-12)


def test_swepo_equals_the_formula():
    s, rewards = [0.3, -0.7, 1.1], [3.0, 2.0, 0.4]
    deviation = [r - sum(rewards) / 3 for r in rewards]  # 1.2, 0.2, -1.4
    for power in (1, 2):
        mass = [math.exp(x + 0.5 * abs(d) ** power) for x, d in zip(s, deviation)]
        found = jitted(swepo_loss, beta=1.0, alpha=0.5, power=power)(
            np.array(s), np.zeros(3), np.array(rewards)
        )
        np.testing.assert_allclose(found, -math.log((mass[0] + mass[1]) / sum(mass)), rtol=1e-12)


def test_swepo_of_equal_rewards_says_nothing():
    loss = lambda x: swepo_loss(x, np.zeros(3), np.full(3, 0.1))  # noqa: E731
    found, slope = jax.value_and_grad(loss)(np.array([3.0, 1.0, 2.0]))
    assert found == 0
    assert not slope.any()


P = np.array([0.5, 0.25, 0.8])  # of the grades 2, 1, 3
MPPO = {
    "mnm": softplus(-(0.3 + 0.55)),
    "mns": softplus(-0.3) + softplus(-0.55),
    "mcm": softplus(-(0.3 + 0.55 + 0.25)),
    "mcs": softplus(-0.3) + softplus(-0.55) + softplus(-0.25),
    "list_mle": math.log(sum(map(math.exp, P))) - 0.8 + softplus(-0.25),
}


@pytest.mark.parametrize("form", MPPO)
def test_mppo_equals_the_formula(form):
    lengths = np.array([1.0, 2.0, 7.0])
    found = jitted(mppo_loss, form=form)(lengths * np.log(P), lengths, np.array([2.0, 1.0, 3.0]))
    np.testing.assert_allclose(found, MPPO[form], rtol=1e-12)


def test_mppo_point_forms_take_probabilities_up_to_one():
    v, logs = np.array([0.2, 0.7, 1.0]), np.log(np.array([0.5, 0.25, 1.0]))
    found = jitted(mppo_loss, form="point_mse")(logs, np.ones(3), v)
    np.testing.assert_allclose(found, 0.3**2 + 0.45**2, rtol=1e-12)
    expected = math.log(2) - 0.7 * math.log(0.25) - 0.3 * math.log(0.75)
    found = jitted(mppo_loss, form="point_ce")(logs, np.ones(3), v)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_mppo_of_two_is_the_same_in_four_forms_and_confined():
    key, pair, lengths = jax.random.key(0), POLICY[:, :2], LENGTHS[:, :2]
    found = [
        jitted(mppo_loss, form=form)(pair, lengths, GRADES[:, :2], key=key)
        for form in ("mnm", "mns", "mcm", "mcs", "pair_single")
    ]
    np.testing.assert_allclose(np.ptp(found, axis=0), 0, atol=1e-15)
    assert (softplus(-1) < found[0]).all()
    assert (found[0] < softplus(1)).all()


def test_mppo_pair_single_draws_every_worse_candidate():
    draw = jitted(mppo_loss, form="pair_single")
    logs, labels = np.log(P), np.array([2.0, 1.0, 3.0])
    drawn = {
        round(float(draw(logs, np.ones(3), labels, key=jax.random.key(i))), 9) for i in range(20)
    }
    assert drawn == {round(softplus(-0.3), 9), round(softplus(-0.55), 9)}
    with pytest.raises(ValueError, match="needs a key"):
        mppo_loss(logs, np.ones(3), labels, form="pair_single")


def test_mppo_hardly_pushes_an_unlikely_answer():
    loss = lambda x: mppo_loss(x, np.ones(2), np.array([1.0, 0.0]))  # noqa: E731
    slope = jax.grad(loss)(np.array([-1.0, -9.0]))
    gap = math.exp(-1) - math.exp(-9)
    weight = 1 / (1 + math.exp(gap))
    np.testing.assert_allclose(slope, [-weight * math.exp(-1), weight * math.exp(-9)], rtol=1e-9)


def test_infonca_with_distant_rewards_is_dpo_and_with_one_grade_listnet():
    pair, reference = POLICY[:, :2], REFERENCE[:, :2]
    found = jitted(infonca_loss, beta=0.1)(pair, reference, np.array([[1.0, 0.0]] * 2))
    np.testing.assert_allclose(found, dpo_loss(pair, reference), rtol=1e-12)
    q = np.exp(GRADES) / np.exp(GRADES).sum(-1, keepdims=True)
    s = 0.1 * (POLICY - REFERENCE)
    expected = -(q * (s - np.log(np.exp(s).sum(-1, keepdims=True)))).sum(-1)
    found = jitted(infonca_loss, beta=0.1, reward_temperature=1.0)(POLICY, REFERENCE, GRADES)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_infonca_is_the_softmax_loss_with_shares_for_grades():
    q = jax.nn.softmax(GRADES / 0.5)
    found = jitted(infonca_loss, beta=0.05, reward_temperature=0.5)(POLICY, REFERENCE, GRADES)
    expected = jitted(lipo_loss, ranking_loss="softmax")(POLICY, REFERENCE, q).total
    np.testing.assert_allclose(jnp.sum(found), expected, rtol=1e-12)


def test_nca_of_a_pair_and_its_gradient():
    pair, reference = POLICY[:, :2], REFERENCE[:, :2]
    u, v = (0.3 * (pair - reference)).T
    expected = [softplus(-a) + softplus(a) / 2 + softplus(b) / 2 for a, b in zip(u, v)]
    labels = np.array([[1.0, 0.0]] * 2)
    np.testing.assert_allclose(jitted(nca_loss, beta=0.3)(pair, reference, labels), expected)
    loss = jitted(nca_loss, beta=1.0, reward_temperature=1.0)
    slope = jax.grad(lambda x: jnp.sum(loss(x, np.zeros(4), GRADES[0])))(np.array([0.5, -1, 2, 0]))
    q, sigma = jax.nn.softmax(GRADES[0]), 1 / (1 + np.exp(-np.array([0.5, -1, 2, 0])))
    np.testing.assert_allclose(slope, -(q - (q + 1 / 4) * sigma), rtol=1e-12)


def test_exo_of_a_pair_is_the_reverse_divergence_of_two_bernoullis():
    pair, reference = POLICY[:, :2], REFERENCE[:, :2]
    z = 0.3 * ((pair - reference)[:, 0] - (pair - reference)[:, 1])
    p, eps = 1 / (1 + np.exp(-z)), 1 / (1 + math.exp(10))
    expected = p * np.log(p / (1 - eps)) + (1 - p) * np.log((1 - p) / eps)
    found = jitted(exo_loss, beta=0.3)(pair, reference, np.array([[1.0, 0.0]] * 2))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_exo_is_zero_where_the_scores_are_the_rewards():
    rewards = np.array([0.3, 0.1, 0.7])
    loss = jitted(exo_loss, beta=1.0, reward_temperature=0.5)
    np.testing.assert_allclose(loss(rewards / 0.5 + 3, np.zeros(3), rewards), 0, atol=1e-14)
    slope = jax.grad(lambda x: loss(x, np.zeros(3), rewards))(rewards / 0.5)
    np.testing.assert_allclose(slope, 0, atol=1e-14)


LOSSES = {
    "plackett_luce": (plackett_luce_loss, REFERENCE, 0.0),
    "pro": (pro_loss, LENGTHS, 0.0),
    "swepo": (swepo_loss, REFERENCE, 0.0),
    "mppo": (mppo_loss, LENGTHS, 0.0),
    "infonca": (infonca_loss, REFERENCE, 0.0),
    "exo": (exo_loss, REFERENCE, 0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_candidate_gives_nothing_and_masked_ones_are_as_if_not_there(name):
    loss, other, alone = LOSSES[name]
    run = jax.jit(lambda x, y, z, where: loss(x, y, z, where=where))
    hide = lambda x, where: np.where(where, x, np.nan)  # noqa: E731
    arrays = (POLICY, other, GRADES)
    found = run(*(hide(x, ONE) for x in arrays), ONE)
    np.testing.assert_allclose(found, alone, atol=1e-14)
    three = np.array([[True, True, False, True]] * 2)
    expected = jitted(loss)(*(x[:, [0, 1, 3]] for x in arrays))
    np.testing.assert_allclose(run(*(hide(x, three) for x in arrays), three), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_the_candidates_does_not_matter(name):
    loss, other, _ = LOSSES[name]
    run, order = jitted(loss), [2, 0, 3, 1]
    arrays = (POLICY, other, GRADES)
    np.testing.assert_allclose(run(*(x[:, order] for x in arrays)), run(*arrays), rtol=1e-12)
