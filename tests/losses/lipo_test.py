import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.lipo import lambda_weights, lipo_lambda_loss, lipo_loss
from paxo.losses.pairwise import dpo_loss
from paxo.losses.ranking import better_pairs, ideal_dcg, plackett_luce_nll, ranks

FORMS = ["pair_logistic", "pair_hinge", "list_mle", "softmax", "point_sigmoid", "point_mse"]
GRADES = np.array([0.9, 0.2, 0.6, 0.4])
NONE = np.zeros(4)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def made(seed=0, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    where = np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None]
    return tuple(jnp.asarray(x) for x in (*rng.normal(size=(2, *shape)), rng.random(shape), where))


def value(scores, labels, form, where=None, **options):
    """Of the loss whose implicit rewards are `scores`."""
    run = functools.partial(lipo_loss, beta=1.0, ranking_loss=form, **options)
    return jax.jit(run)(scores, jnp.zeros_like(scores), labels, where=where).value


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formula_written_with_loops(form):
    s, psi = [0.3, -0.7, 1.1, 0.2], [0.9, 0.2, 0.6, 0.4]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    pairs = [(i, j) for i in range(4) for j in range(4) if psi[i] > psi[j]]
    by_rank = [s[i] for i in sorted(range(4), key=lambda i: -psi[i])]
    total = math.log(sum(map(math.exp, s)))
    expected = {
        "pair_logistic": sum(softplus(s[j] - s[i]) for i, j in pairs),
        "pair_hinge": sum(max(0, 1 - s[i] + s[j]) for i, j in pairs),
        "list_mle": sum(math.log(sum(map(math.exp, by_rank[r:]))) - by_rank[r] for r in range(4)),
        "softmax": sum(p / sum(psi) * (total - x) for p, x in zip(psi, s)),
        "point_sigmoid": sum(p * softplus(-x) + (1 - p) * softplus(x) for p, x in zip(psi, s)),
        "point_mse": sum((p - x) ** 2 for p, x in zip(psi, s)),
    }[form]
    np.testing.assert_allclose(value(jnp.array(s), jnp.array(psi), form), expected, rtol=1e-12)


def test_two_candidates_are_dpo():
    policy, reference, _, _ = made(shape=(6, 2))
    for form in ("pair_logistic", "list_mle"):
        loss = lipo_loss(policy, reference, jnp.array([[1.0, 0.0]] * 6), ranking_loss=form)
        expected = jnp.mean(dpo_loss(policy, reference, beta=0.05))
        np.testing.assert_allclose(loss.value, expected, rtol=1e-12)


def test_list_mle_is_a_distribution_over_orders():
    scores = jnp.array([0.3, -1.2, 0.8, 0.1])
    orders = jnp.array(list(itertools.permutations(range(4))), float)
    probabilities = jax.vmap(lambda psi: jnp.exp(-value(scores, psi, "list_mle")))(orders)
    np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_only_pointwise_losses_feel_a_shift_of_all_scores(form):
    scores = jnp.array([0.3, -1.2, 0.8, 0.1])
    same = abs(np.subtract(*(value(x, GRADES, form) for x in (scores, scores + 3)))) < 1e-9
    assert same != form.startswith("point")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("point_sigmoid", 0.5 - GRADES),
        ("point_mse", -2 * GRADES),
        # by rank: sum over k <= rank of 1 / (K - k + 1), less 1
        ("list_mle", np.array([1 / 4, 25 / 12, 7 / 12, 13 / 12]) - 1),
        ("softmax", 1 / 4 - GRADES / 2.1),
        ("pair_hinge", np.array([-3.0, 3, -1, 1])),
    ],
)
def test_gradient_where_policy_and_reference_agree(form, expected):
    slope = jax.jit(jax.grad(lambda x: value(x, GRADES, form)))(NONE)
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "pair_hinge"])
def test_gradient_equals_finite_differences(form):
    policy, reference, labels, where = made()
    loss = lambda x: lipo_loss(x, reference, labels, ranking_loss=form, beta=1.0, where=where).value  # noqa: E731
    jax.test_util.check_grads(jax.jit(loss), (policy,), order=1, modes=["rev"])


@pytest.mark.parametrize("form", FORMS)
def test_masked_candidates_are_as_if_they_were_not_there(form):
    policy, reference, labels, _ = made(shape=(2, 3))
    hide = lambda x: jnp.insert(x, 1, jnp.nan, axis=-1)  # noqa: E731
    where = jnp.array([True, False, True, True])
    for reduction in ("list", "batch"):
        run = functools.partial(lipo_loss, ranking_loss=form, reduction=reduction)
        found = jax.jit(run)(
            hide(policy), hide(reference), hide(labels), where=jnp.stack([where, where])
        )
        expected = jax.jit(run)(policy, reference, labels)
        np.testing.assert_allclose(found.total, expected.total, rtol=1e-12)
        assert found.count == expected.count


def test_reductions_count_lists_or_pairs():
    grades = jnp.array([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    for reduction, count in (("list", 2), ("batch", 3 + 0 + 2)):
        loss = lipo_loss(jnp.zeros((3, 3)), jnp.zeros((3, 3)), grades, reduction=reduction)
        assert loss.count == count
        np.testing.assert_allclose(loss.total, 5 * math.log(2), rtol=1e-12)


def test_softmax_of_all_zero_grades_weighs_alike():
    scores = jnp.array([1.0, 2.0, 4.0])
    expected = jax.nn.logsumexp(scores) - jnp.mean(scores)
    np.testing.assert_allclose(value(scores, jnp.zeros(3), "softmax"), expected, rtol=1e-12)


def test_tied_candidates_are_not_compared():
    scores = jnp.array([1.0, -5.0, 2.0])
    found = plackett_luce_nll(scores, jnp.array([1.0, 1.0, 0.0]), jnp.ones(3, bool))
    np.testing.assert_allclose(found, math.log1p(math.e) + math.log1p(math.exp(7)), rtol=1e-12)


def test_lambda_equals_the_formula_written_with_loops():
    s, psi = [0.3, -0.7, 1.1, 0.2], [0.9, 0.2, 0.6, 0.6]
    place = [2, 4, 1, 3]
    expected = sum(
        abs(2 ** psi[i] - 2 ** psi[j])
        * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
        * math.log1p(math.exp(s[j] - s[i]))
        for i, j in itertools.product(range(4), repeat=2)
        if psi[i] > psi[j]
    )
    paper = {"log_base": "e", "scale_by_k": False, "reduction": "list"}
    found = lipo_lambda_loss(jnp.array(s), NONE, jnp.array(psi), beta=1.0, **paper)
    np.testing.assert_allclose(found.value, expected, rtol=1e-12)
    assert found.count == 1
    # base 2 multiplies by ln 2, rax by K, and its mean divides by the 5 pairs
    rax = lipo_lambda_loss(jnp.array(s), NONE, jnp.array(psi), beta=1.0)
    np.testing.assert_allclose(rax.value, expected * math.log(2) * 4 / 5, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "constant"),
    [
        ({"log_base": "e", "scale_by_k": False}, 0.532456),
        ({"scale_by_k": False}, 0.369070),
        ({}, 0.738140),
    ],
)
def test_lambda_of_two_candidates_is_dpo_times_a_constant(options, constant):
    policy, reference, _, _ = made(shape=(1, 2))
    found = lipo_lambda_loss(policy, reference, jnp.array([[0.75, 0.25]]), **options).value
    factor = (2**0.75 - 2**0.25) * constant
    np.testing.assert_allclose(found, factor * dpo_loss(policy, reference, beta=0.05)[0], rtol=1e-5)


def test_lambda_weights_carry_no_gradient_and_follow_the_order_alone():
    scores, where = jnp.array([0.3, -0.7, 1.1, 0.2]), jnp.ones(4, bool)
    weights = lambda_weights(scores, GRADES, where)
    np.testing.assert_array_equal(weights, lambda_weights(jnp.exp(3 * scores), GRADES, where))
    slope = jax.jacobian(lambda x: lambda_weights(x, GRADES, where))(scores)
    assert not slope.any()


def test_swaps_with_the_top_rank_weigh_most():
    weights = lambda_weights(jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.arange(4.0), jnp.ones(4, bool))
    per_gain = weights / jnp.where(jnp.eye(4, dtype=bool), 1, jnp.abs(weights * 0 + _gain_gaps()))
    assert per_gain[0, 1] > per_gain[1, 2] > per_gain[2, 3] > 0


def _gain_gaps():
    worth = 2 ** jnp.arange(4.0)
    return jnp.where(jnp.eye(4, dtype=bool), 1, worth[:, None] - worth)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("gain", lambda gap, a, b: gap),
        ("discount", lambda gap, a, b: abs(1 / math.log2(1 + a) - 1 / math.log2(1 + b))),
        ("none", lambda gap, a, b: 1),
        (
            "dcg2",
            lambda gap, a, b: gap * (1 / math.log2(1 + abs(a - b)) - 1 / math.log2(2 + abs(a - b))),
        ),
        (
            "ndcg2pp",  # the ideal gain is 3 + 1/log2(3)
            lambda gap, a, b: (
                gap
                / (3 + 1 / math.log2(3))
                * (
                    10 * (1 / math.log2(1 + abs(a - b)) - 1 / math.log2(2 + abs(a - b)))
                    + abs(1 / math.log2(1 + a) - 1 / math.log2(1 + b))
                )
            ),
        ),
    ],
)
def test_other_weightings(weighting, expected):
    labels, place = [2.0, 1.0, 0.0], [3, 1, 2]
    weights = lambda_weights(
        -jnp.array(place, float), jnp.array(labels), jnp.ones(3, bool), weighting=weighting
    )
    for i, j in itertools.permutations(range(3), 2):
        gap = abs(2 ** labels[i] - 2 ** labels[j])
        np.testing.assert_allclose(weights[i, j], expected(gap, place[i], place[j]), rtol=1e-12)


def test_equal_grades_give_nothing():
    loss = lipo_lambda_loss(jnp.array([1.0, 2.0, 3.0]), jnp.zeros(3), jnp.full(3, 0.5))
    assert loss.value == loss.count == 0


def test_ranks_put_masked_candidates_last():
    found = ranks(jnp.array([1.0, 9.0, 2.0, 2.0]), jnp.array([True, False, True, True]))
    np.testing.assert_array_equal(found, [3, 4, 1, 2])


RAX = {
    "pair_logistic": "pairwise_logistic_loss",
    "pair_hinge": "pairwise_hinge_loss",
    "list_mle": "listmle_loss",
    "point_sigmoid": "pointwise_sigmoid_loss",
    "point_mse": "pointwise_mse_loss",
    "softmax": "softmax_loss",
}


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_equal_rax(form):
    rax = pytest.importorskip("rax")
    options = {"label_fn": rax.utils.normalize_probabilities} if form == "softmax" else {}
    policy, reference, labels, where = made(shape=(7, 6))

    def ours(policy):
        loss = lipo_loss(
            policy, reference, labels, ranking_loss=form, reduction="batch", where=where
        )
        return loss.value

    def theirs(policy):
        scores = 0.05 * (policy - reference)
        return getattr(rax, RAX[form])(scores, labels, where=where, **options)

    _same(ours, theirs, policy)


@pytest.mark.parity
@pytest.mark.parametrize("weighting", ["dcg", "dcg2", "label_difference"])
@pytest.mark.parametrize(
    ("normalize", "topn", "weighted"), [(False, 0, False), (True, 0, True), (True, 3, False)]
)
def test_lambda_equals_rax(weighting, normalize, topn, weighted):
    rax = pytest.importorskip("rax")
    policy, reference, labels, where = made(shape=(7, 6))
    labels = jnp.round(3 * labels)  # graded, with ties
    weights = made(seed=3, shape=(7, 6))[2] if weighted else None

    def ours(policy):
        options = {"weighting": weighting, "normalize": normalize, "topn": topn, "where": where}
        return lipo_lambda_loss(policy, reference, labels, weights, **options).value

    def lambdas(*args, **kwargs):
        if weighting == "label_difference":
            return rax.labeldiff_lambdaweight(*args, **kwargs)
        made_by = {"dcg": rax.dcg_lambdaweight, "dcg2": rax.dcg2_lambdaweight}[weighting]
        return made_by(*args, **kwargs, normalize=normalize, topn=topn or None)

    def theirs(policy):
        scores = 0.05 * (policy - reference)
        return rax.pairwise_logistic_loss(
            scores, labels, where=where, weights=weights, lambdaweight_fn=lambdas
        )

    _same(ours, theirs, policy)


def _same(ours, theirs, policy):
    for found, expected in zip(*(jax.jit(jax.value_and_grad(f))(policy) for f in (ours, theirs))):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parity
def test_ideal_gain_equals_rax():
    rax = pytest.importorskip("rax")
    _, _, labels, where = made()
    expected = rax.dcg_metric(labels, labels, where=where, reduce_fn=None)
    found = ideal_dcg(jnp.where(where, 2**labels - 1, 0), where)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert better_pairs(labels, where).sum() > 0
