"""NLL's three reductions, on numbers small enough to add up by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.likelihood import nll_loss

# Two pairs; the second's better candidate is the second one.
LOGPS = jnp.array([[-6.0, -1.0], [-8.0, -2.0]])
LENGTHS = jnp.array([[3.0, 1.0], [4.0, 8.0]])
LABELS = jnp.array([[1.0, 0.0], [0.0, 1.0]])


def parts(**kwargs):
    arrays = {"policy_logps": LOGPS, "lengths": LENGTHS, "labels": LABELS} | kwargs
    loss = nll_loss(**arrays)
    return float(loss.total), float(loss.count)


def test_token_mean_divides_the_total_by_the_tokens():
    assert parts() == (6 + 2, 3 + 8)


def test_sequence_mean_averages_means_over_tokens():
    assert parts(nll_reduction="sequence_mean") == (6 / 3 + 2 / 8, 2)


def test_sum_averages_sums_over_sequences():
    assert parts(nll_reduction="sum") == (6 + 2, 2)


def test_reductions_of_one_token_sequences_are_the_same():
    ones = jnp.ones((2, 2))
    found = {parts(lengths=ones, nll_reduction=r) for r in ("token_mean", "sequence_mean", "sum")}
    assert found == {(8, 2)}


def test_ties_are_all_counted():
    assert parts(labels=jnp.array([[1.0, 1.0], [0.0, 1.0]])) == (6 + 1 + 2, 3 + 1 + 8)


def test_the_best_is_chosen_among_the_candidates_that_are_there():
    where = jnp.array([[False, True], [False, False]])
    assert parts(where=where) == (1, 1)
    assert parts(where=where, nll_reduction="sum") == (1, 1)


def test_nothing_to_count_is_0_over_0_and_a_mean_of_0():
    loss = nll_loss(LOGPS, LENGTHS, LABELS, where=jnp.zeros((2, 2), bool))
    assert (float(loss.total), float(loss.count), float(loss.value)) == (0, 0, 0)


def test_labels_below_0_have_a_best_too():
    labels = jnp.array([[-1.0, -2.0], [-2.0, -1.0]])
    assert parts(labels=labels) == (8, 11)
    # A missing candidate is not one with the label 0.
    assert parts(labels=labels, where=jnp.array([[True, True], [True, False]])) == (14, 7)


def test_integer_labels_and_lengths_are_taken():
    whole = {"labels": LABELS.astype(jnp.int32), "lengths": LENGTHS.astype(jnp.int32)}
    assert parts(**whole, where=jnp.array([[False, True], [True, True]])) == (1 + 2, 1 + 8)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [[-1, 0], [0, -1]]),
        ("sum", [[-1, 0], [0, -1]]),
        ("sequence_mean", [[-1 / 3, 0], [0, -1 / 8]]),
    ],
)
def test_gradient_of_the_total_is_minus_one_on_the_best(reduction, expected):

    def loss(logps):
        return nll_loss(logps, LENGTHS, LABELS, nll_reduction=reduction)

    np.testing.assert_allclose(jax.grad(lambda s: loss(s).total)(LOGPS), expected, rtol=1e-6)
    with jax.enable_x64(True):
        logps = jnp.asarray(LOGPS, jnp.float64)
        check_grads(lambda s: loss(s).value, (logps,), order=1, modes=["rev"], rtol=1e-6)


def test_empty_completion_has_a_token_mean_of_0():
    loss = nll_loss(
        jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)), nll_reduction="sequence_mean"
    )
    assert (float(loss.total), float(loss.count)) == (0, 1)
