"""SLiC on lists: the hinge of every pair, and its relatives."""

import itertools

import numpy as np
import pytest

from paxo.losses.calibration import slic_list_loss
from paxo.losses.links import rso_hinge_loss
from paxo.losses.lipo import lipo_loss
from paxo.losses.pairwise import dpo_loss
from paxo.losses.reference_free import slic_hf_loss
from tests.losses.pairs import LENGTHS, POLICY, REFERENCE, close, exact, gradient

LOGPS = np.array([-4.0, -3.5, -9.0, -4.25])
GRADES = np.array([2.0, 5.0, 1.0, 2.0])
TOKENS = np.array([2.0, 5.0, 3.0, 4.0])
PAIRS = [(i, j) for i, j in itertools.product(range(4), repeat=2) if GRADES[i] > GRADES[j]]


@pytest.mark.parametrize("nll_reduction", ["sum", "sequence_mean"])
def test_it_is_the_sum_or_mean_of_the_hinges_beside_the_likelihood_of_the_best(nll_reduction):
    hinges = [max(0, 0.8 - LOGPS[i] + LOGPS[j]) for i, j in PAIRS]
    assert len(PAIRS) == 5  # one of the six is a tie
    best = LOGPS[1] / (5 if nll_reduction == "sequence_mean" else 1)
    options = {"delta": 0.8, "lam": 0.3, "nll_reduction": nll_reduction}
    for reduction, ranking in (("sum", sum(hinges)), ("mean", sum(hinges) / 5)):
        found = exact(slic_list_loss, LOGPS, TOKENS, GRADES, reduction=reduction, **options)
        close(found, ranking - 0.3 * best)


def test_of_two_it_is_slic_hf():
    labels = np.broadcast_to([1.0, 0.0], LENGTHS.shape)
    found = exact(slic_list_loss, POLICY, LENGTHS, labels, delta=2.0, lam=0.3)
    close(found, exact(slic_hf_loss, POLICY, LENGTHS, delta=2.0, lam=0.3))


def test_hinge_and_gradient_are_0_once_the_margin_is_delta():
    far, options = np.array([-1.0, -4.0, -2.5]), {"lam": 0.0, "delta": 1.5, "reduction": "sum"}
    grades = np.array([2.0, 0.0, 1.0])
    close(exact(slic_list_loss, far, np.ones(3), grades, **options), 0.0)
    # Both neighbours are just at delta: a little nearer they count, a little farther no more.
    for nearer, wanted in ((1e-9, [-1, 1, 0]), (-1e-9, [0, 0, 0])):
        logps = far - nearer * grades
        close(gradient(slic_list_loss, logps, np.ones(3), grades, **options), wanted)


def test_with_a_reference_the_list_is_lipos_hinge_and_of_two_slic_norm():
    # RSO: hinge_norm max(0, 1 - gamma d), gamma 0.05; 1 where policy and reference agree.
    labels = np.broadcast_to([1.0, 0.0], LENGTHS.shape)
    norm = exact(rso_hinge_loss, POLICY, REFERENCE, gamma=0.05)
    listed = exact(lipo_loss, POLICY, REFERENCE, labels, ranking_loss="pair_hinge", beta=0.05)
    close(listed.total / listed.count, norm.mean())
    ratios = POLICY - REFERENCE
    free = exact(slic_list_loss, ratios, LENGTHS, labels, delta=20.0, lam=0.0)
    close(0.05 * free, norm)  # delta = 1 / gamma, up to the scale gamma
    close(exact(rso_hinge_loss, REFERENCE, REFERENCE), np.ones(4))
    # With the logistic in place of the hinge, sigmoid_norm, it is DPO with beta = gamma.
    found = exact(lipo_loss, POLICY, REFERENCE, labels, ranking_loss="pair_logistic", beta=0.05)
    close(found.total / found.count, exact(dpo_loss, POLICY, REFERENCE, beta=0.05).mean())
