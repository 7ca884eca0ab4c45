import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses import learning_to_rank as ltr

LOSSES = {
    "unique_softmax": ltr.unique_softmax_loss,
    "poly1_softmax": ltr.poly1_softmax_loss,
    "pairwise_mse": ltr.pairwise_mse_loss,
    "pairwise_quantile": ltr.pairwise_quantile_loss,
    "pairwise_soft01": ltr.pairwise_soft01_loss,
    "approx_ndcg": ltr.approx_ndcg_loss,
    "neural_ndcg": ltr.neural_ndcg_loss,
}
S, PSI = [0.3, -0.7, 1.1, 0.2], [1.0, 0.0, 2.0, 1.0]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def made(seed=0, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    where = np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None]
    return (*rng.normal(size=(2, *shape)), rng.integers(0, 4, shape) * 0.5, where)


def value(name, scores, labels, where=None, **options):
    """Of the loss whose implicit rewards are `scores`, averaged as an objective does."""
    run = jax.jit(functools.partial(LOSSES[name], beta=1.0, **options))
    found = run(scores, np.zeros(np.shape(scores)), np.asarray(labels), where=where)
    if hasattr(found, "count"):
        return found.value
    return jnp.sum(found) / (found.size if where is None else where.any(-1).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_formula_written_with_loops(name):
    k, total = 4, sum(map(math.exp, S))
    pairs = [(i, j) for i, j in itertools.product(range(k), repeat=2) if PSI[i] > PSI[j]]
    short = {
        (i, j): PSI[i] - PSI[j] - S[i] + S[j] for i, j in itertools.product(range(k), repeat=2)
    }
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    ideal = 3 + 1 / math.log2(3) + 1 / 2
    place = [1 + sum(sigmoid(S[j] - S[i]) for j in range(k) if j != i) for i in range(k)]
    expected = {
        "unique_softmax": sum(
            (2 ** PSI[i] - 1)
            * math.log1p(sum(math.exp(S[j] - S[i]) for j in range(k) if PSI[j] < PSI[i]))
            for i in range(k)
        ),
        "poly1_softmax": sum(p * (math.log(total) - s) for p, s in zip(PSI, S))
        + 1
        - sum(p / 4 * math.exp(s) / total for p, s in zip(PSI, S)),
        "pairwise_mse": sum(e**2 for e in short.values()) / 16,
        "pairwise_quantile": sum(abs(short[pair]) / 2 for pair in pairs) / len(pairs),
        "pairwise_soft01": sum(sigmoid(S[j] - S[i]) for i, j in pairs) / len(pairs),
        "approx_ndcg": -sum((2**p - 1) / math.log2(1 + r) for p, r in zip(PSI, place)) / ideal,
        "neural_ndcg": _neural_ndcg(ideal),
    }[name]
    np.testing.assert_allclose(value(name, np.array(S), PSI), expected, rtol=1e-9)


def _neural_ndcg(ideal):
    s = np.array(S)
    apart = np.abs(s[:, None] - s).sum(1)
    soft = np.exp((5 - 2 * np.arange(1, 5))[:, None] * s - apart)
    for _ in range(2000):  # until it no longer changes
        soft /= soft.sum(0)
        soft /= soft.sum(1, keepdims=True)
    return -(soft @ (2 ** np.array(PSI) - 1) / np.log2(1 + np.arange(1, 5))).sum() / ideal


@pytest.mark.parametrize("name", ["approx_ndcg", "neural_ndcg"])
def test_cold_ranks_give_minus_ndcg(name):
    order = np.argsort(-np.array([0.3, -0.7, 1.1, 0.2]))
    gains = 2 ** np.array([1.0, 3.0, 0.0, 2.0]) - 1
    factor = 1 / np.log2(2 + np.arange(4))
    expected = -(gains[order] * factor).sum() / (np.sort(gains)[::-1] * factor).sum()
    found = value(name, np.array(S), [1.0, 3.0, 0.0, 2.0], temperature=1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_candidates_are_as_if_they_were_not_there(name):
    hide = lambda x: np.array([[*x[:1], np.nan, *x[1:]]])  # noqa: E731
    where = np.array([[True, False, True, True, True]])
    np.testing.assert_allclose(
        value(name, hide(S), hide(PSI), where), value(name, np.array(S), PSI), rtol=1e-9
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences(name):
    jax.test_util.check_grads(lambda x: value(name, x, PSI), (np.array(S),), order=1, modes=["rev"])


RAX = {
    "unique_softmax": ("unique_softmax_loss", {"gain_fn": lambda psi: 2**psi - 1}),
    "poly1_softmax": ("poly1_softmax_loss", {}),
    "pairwise_mse": ("pairwise_mse_loss", {}),
    "pairwise_quantile": ("pairwise_qr_loss", {"tau": 0.3, "squared": False}),
    "pairwise_soft01": ("pairwise_soft_zero_one_loss", {}),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", RAX)
def test_value_and_gradient_equal_rax(name):
    rax = pytest.importorskip("rax")
    scores, _, labels, where = made(shape=(7, 6))
    theirs, options = RAX[name]
    mine = {"quantile": 0.3} if name == "pairwise_quantile" else {}
    other = lambda s: getattr(rax, theirs)(s, labels, where=where, **options)  # noqa: E731
    ours = lambda s: value(name, s, labels, where, **mine)  # noqa: E731
    for found, expected in zip(*(jax.value_and_grad(f)(scores) for f in (ours, other))):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parity
def test_approx_ndcg_equals_rax():
    rax = pytest.importorskip("rax")
    scores, _, labels, where = made(shape=(7, 6))
    # what approx_t12n(ndcg_metric, 0.5) does; rax 0.4's own wrapper needs a jax.util that is gone
    step = {"step_fn": lambda x: jax.nn.sigmoid(x / 0.5)}
    smooth = {
        "rank_fn": functools.partial(rax.utils.approx_ranks, **step),
        "cutoff_fn": functools.partial(rax.utils.approx_cutoff, **step),
    }
    expected = rax.ndcg_metric(scores, labels, where=where, reduce_fn=None, **smooth)
    some = np.where(where, labels, 0).any(-1)
    found = value("approx_ndcg", scores, labels, where, temperature=0.5)
    np.testing.assert_allclose(found, -np.mean(expected[some]), rtol=1e-6)
