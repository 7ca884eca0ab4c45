"""Triple preference optimisation: a pair beside the likelihood of a third candidate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.pairwise import simpo_loss
from paxo.losses.reference_free import cpo_loss, cpo_simpo_loss
from paxo.losses.triple import triple_po_l_loss, triple_po_loss

POLICY = np.array([[-4.0, -9.0, -5.0], [-7.5, -2.25, -1.0]], np.float32)
LENGTHS = np.array([[4, 6, 10], [5, 3, 2]], np.float32)
PAIR = (POLICY[:, :2], LENGTHS[:, :2])
GOLD = np.array([0.5, 0.5])  # mean negative log-prob of the third candidate


@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo"])
def test_triple_po_without_likelihood_is_cpos_preference(link):
    found = triple_po_loss(POLICY, LENGTHS, beta=0.3, tpo_alpha=0.0, link=link)
    expected = cpo_loss(*PAIR, beta=0.3, cpo_alpha=0.0, link=link)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_triple_po_l_without_likelihood_is_simpo():
    found = triple_po_l_loss(POLICY, LENGTHS, tpo_alpha=0.0)
    np.testing.assert_allclose(found, simpo_loss(*PAIR), rtol=1e-6)


def test_likelihood_is_of_the_gold_completion():
    for loss in (triple_po_loss, triple_po_l_loss):
        term = loss(POLICY, LENGTHS, tpo_alpha=2.0) - loss(POLICY, LENGTHS, tpo_alpha=0.0)
        np.testing.assert_allclose(term, 2 * GOLD, rtol=1e-5)
        gradient = jax.grad(lambda s, loss=loss: jnp.sum(loss(s, LENGTHS)))(jnp.asarray(POLICY))
        np.testing.assert_allclose(gradient[:, 2], -0.9 / LENGTHS[:, 2], rtol=1e-6)


def test_gold_that_is_the_chosen_makes_it_cpo_and_cpo_simpo():
    policy, lengths = (x[:, [0, 1, 0]] for x in (POLICY, LENGTHS))
    found = triple_po_loss(policy, lengths, beta=0.1, tpo_alpha=0.5, nll_reduction="sum")
    expected = cpo_loss(*PAIR, beta=0.1, cpo_alpha=0.5, nll_reduction="sum")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    settings = {"beta": 10.0, "gamma_beta_ratio": 0.54}
    found = triple_po_l_loss(policy, lengths, tpo_alpha=0.05, **settings)
    expected = cpo_simpo_loss(*PAIR, cpo_alpha=0.05, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_pair_without_gold_is_refused_and_a_masked_gold_counts_nothing():
    with pytest.raises(AssertionError):
        triple_po_loss(*PAIR)
    where = np.array([[True, True, False], [True, True, True]])
    for loss in (triple_po_loss, triple_po_l_loss):
        found = loss(POLICY, LENGTHS, where=where)
        assert found[0] == 0
        assert found[1] > 0
