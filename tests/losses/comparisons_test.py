"""Contrastive preference learning and RRHF: pairs of a list."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.comparisons import cpl_kl_loss, cpl_loss, rrhf_loss
from paxo.losses.pairwise import dpo_loss
from paxo.losses.reference_free import cpo_loss

POLICY = np.array([[-4.0, -9.0, -6.5], [-7.5, -2.25, -3.0]], np.float32)
REFERENCE = np.array([[-5.0, -8.0, -6.0], [-6.0, -3.0, -3.5]], np.float32)
LENGTHS = np.array([[4, 6, 5], [5, 3, 2]], np.float32)
LABELS = np.array([[2.0, 0.0, 1.0], [0.0, 5.0, 5.0]], np.float32)
PAIR = np.array([1.0, 0.0], np.float32) * np.ones((2, 1), np.float32)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def test_cpl_without_bias_is_cpos_preference_and_with_a_reference_dpo():
    policy, reference, lengths = (x[:, :2] for x in (POLICY, REFERENCE, LENGTHS))
    found = cpl_loss(policy, lengths, PAIR, alpha=0.3, contrastive_bias=1.0)
    expected = cpo_loss(policy, lengths, beta=0.3, cpo_alpha=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = cpl_kl_loss(policy, reference, PAIR, alpha=0.3, contrastive_bias=1.0)
    np.testing.assert_allclose(found, dpo_loss(policy, reference, beta=0.3), rtol=1e-6)


def test_cpl_is_the_mean_over_the_pairs_of_a_list_and_ties_count_half_each_way():
    def of(policy, labels):
        terms = []
        for i, j in itertools.combinations(range(3), 2):
            i, j = (i, j) if labels[i] >= labels[j] else (j, i)
            lost, won = (softplus(0.1 * (0.5 * policy[b] - policy[a])) for a, b in ((i, j), (j, i)))
            terms.append((lost + won) / 2 if labels[i] == labels[j] else lost)
        return sum(terms) / 3

    found = cpl_loss(POLICY, LENGTHS, LABELS)
    np.testing.assert_allclose(found, [of(*x) for x in zip(POLICY, LABELS)], rtol=1e-6)


def test_cpl_soft_labels_weigh_the_two_directions():
    labels = np.array([[0.7, 0.3], [0.0, 0.0]], np.float32)
    policy, lengths = POLICY[:, :2], LENGTHS[:, :2]
    found = cpl_loss(policy, lengths, labels, soft_labels=True)
    for loss, (won, lost), p in zip(found, policy, (0.7, 0.5)):
        expected = p * softplus(0.1 * (0.5 * lost - won))
        expected += (1 - p) * softplus(0.1 * (0.5 * won - lost))
        assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_bias_below_one_rewards_likelihood_of_both_segments():
    policy, lengths = POLICY[:, :2], LENGTHS[:, :2]
    for bias, falls in ((0.5, True), (1.0, False)):
        moved = cpl_loss(policy + 1, lengths, PAIR, contrastive_bias=bias)
        change = moved - cpl_loss(policy, lengths, PAIR, contrastive_bias=bias)
        assert (change < -1e-3).all() == falls
        assert falls or np.abs(change).max() < 1e-6


def test_cpl_imitation_is_the_mean_log_prob_of_all_segments():
    where = np.array([[True, True, False], [True, True, True]])
    settings = {"contrastive_bias": 1.0, "where": where}
    term = cpl_loss(POLICY, LENGTHS, LABELS, bc_coeff=1.0, **settings) - cpl_loss(
        POLICY, LENGTHS, LABELS, **settings
    )
    expected = [(4 / 4 + 9 / 6) / 2, (7.5 / 5 + 2.25 / 3 + 3 / 2) / 3]
    np.testing.assert_allclose(term, expected, rtol=1e-5)


def test_a_list_of_one_has_no_pairs():
    where = np.array([[True, False, False], [False, False, False]])
    np.testing.assert_array_equal(cpl_loss(POLICY, LENGTHS, LABELS, where=where), [0, 0])
    np.testing.assert_array_equal(cpl_kl_loss(POLICY, REFERENCE, LABELS, where=where), [0, 0])
    # RRHF still imitates the one that is there
    np.testing.assert_array_equal(rrhf_loss(POLICY, LENGTHS, LABELS, where=where), [4, 0])


def test_rrhf_is_its_formula():
    def of(policy, lengths, labels):
        p = policy / lengths
        pairs = [(i, j) for i in range(3) for j in range(3) if labels[i] < labels[j]]
        return sum(max(0.0, p[i] - p[j]) for i, j in pairs) - policy[labels.argmax()]

    found = rrhf_loss(POLICY, LENGTHS, LABELS)
    np.testing.assert_allclose(found, [of(*x) for x in zip(POLICY, LENGTHS, LABELS)], rtol=1e-6)


def test_rrhf_hinge_has_no_margin_and_reads_only_the_order_of_the_grades():
    ones = np.ones((1, 2), np.float32)
    ahead = np.array([[-1.0, -1.0 - 1e-6]], np.float32)
    bare = {"rrhf_weight": 1e6, "nll_reduction": "sequence_mean"}
    for labels, expected in (((1.0, 0.0), 1.0), ((7.0, 7.0), 1.0), ((9.0, -300.0), 1.0)):
        assert rrhf_loss(ahead, ones, np.array([labels]), **bare)[0] == expected
    behind = rrhf_loss(ahead, ones, np.array([[0.0, 1.0]]), **bare)[0]
    assert float(behind) == pytest.approx(1.0 + 1e6 * float(ahead[0, 0] - ahead[0, 1]), rel=1e-4)


def test_rrhf_length_penalty_of_0_compares_sums():
    policy, lengths = np.array([[-2.0, -3.0]]), np.array([[1.0, 6.0]])
    labels = np.array([[1.0, 0.0]])
    assert rrhf_loss(policy, lengths, labels, length_penalty=0.0)[0] == 2.0
    assert rrhf_loss(policy, lengths, labels)[0] == 2.0 + 1.5


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: cpl_loss(s, jnp.asarray(LENGTHS, s.dtype), LABELS, bc_coeff=0.5),
        lambda s: cpl_kl_loss(s, jnp.asarray(REFERENCE, s.dtype), LABELS),
        lambda s: rrhf_loss(s, jnp.asarray(LENGTHS, s.dtype), LABELS),
    ],
    ids=["cpl", "cpl_kl", "rrhf"],
)
def test_gradients_are_the_finite_differences_in_float64(loss):
    with jax.enable_x64(True):
        policy = jnp.asarray(POLICY + np.array([0, 0.1, 0.3]), jnp.float64)  # away from the hinges
        check_grads(loss, (policy,), order=1, modes=["rev"], rtol=1e-6)
