"""DPO with a likelihood term: its weight, its average, and the two forms of rationales."""

import math

import numpy as np
import pytest

from paxo.losses.imitation import iterative_rpo_loss, rationale_dpo_loss, rpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
    LENGTHS,
    MARGINS,
    POLICY,
    REFERENCE,
    close,
    exact,
    gradient,
    sigmoid,
)

BETA = 0.3
DPO = exact(dpo_loss, POLICY, REFERENCE, beta=BETA)


def test_rpo_adds_eta_beta_times_the_chosen_sum():
    found = exact(rpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, eta=0.02)
    close(found, DPO - 0.02 * BETA * POLICY[:, 0])


def test_rpos_appendix_adds_eta_times_the_chosen_mean_without_beta():
    options = {"beta": BETA, "eta": 0.02, "nll_reduction": "sequence_mean"}
    found = exact(rpo_loss, POLICY, REFERENCE, LENGTHS, **options)
    close(found, DPO - 0.02 * POLICY[:, 0] / LENGTHS[:, 0])


def test_rpo_lifts_the_chosen_completion_and_leaves_the_rejected_one_to_dpo():
    found = gradient(rpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, eta=0.02)
    weight = sigmoid(-BETA * MARGINS)
    close(found, BETA * np.stack([-(weight + 0.02), weight], -1))


def test_iterative_rpo_adds_the_mean_over_the_sequences_own_tokens():
    found = exact(iterative_rpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, alpha=0.5)
    close(found, DPO - 0.5 * POLICY[:, 0] / LENGTHS[:, 0])


def test_an_empty_chosen_completion_adds_nothing():
    policy, lengths = np.array([0.0, -3.0]), np.array([0.0, 4.0])
    found = exact(iterative_rpo_loss, policy, REFERENCE[0], lengths, beta=BETA)
    close(found, exact(dpo_loss, policy, REFERENCE[0], beta=BETA))


RATIONALES = np.array([-1.0, -20.0, -70.0, 0.0])


def rationale(logps, link="linear", gamma=0.5, where=None):
    policy, reference = (
        np.concatenate([x, np.reshape(logps, (-1, 1))], -1) for x in (POLICY, REFERENCE)
    )
    options = {"beta": BETA, "gamma": gamma, "rationale_link": link, "where": where}
    return exact(rationale_dpo_loss, policy, reference, **options)


def test_rationales_add_their_negative_log_prob_without_reference():
    close(rationale(RATIONALES), DPO - 0.5 * RATIONALES)


def test_the_codes_link_differs_from_the_papers_by_less_than_log_two():
    gap = rationale(RATIONALES, "log_sigmoid") - rationale(RATIONALES)
    close(gap, np.log1p(np.exp(0.5 * RATIONALES)), 1e-9)
    assert (gap[1:3] < 1e-3).all()
    close(gap[3], math.log(2))


@pytest.mark.parametrize(("link", "constant"), [("linear", 0.0), ("log_sigmoid", math.log(2))])
def test_a_weight_of_zero_leaves_dpo_up_to_a_constant(link, constant):
    close(rationale(RATIONALES, link, gamma=0.0), DPO + constant)


def test_the_codes_link_pushes_a_certain_rationale_with_half_the_weight():
    arrays = np.array([-4.0, -6.0, 0.0]), np.zeros(3)
    for link, push in (("linear", -0.5), ("log_sigmoid", -0.25)):
        found = gradient(rationale_dpo_loss, *arrays, gamma=0.5, rationale_link=link)
        close(found[2], push)


@pytest.mark.parametrize("link", ["linear", "log_sigmoid"])
def test_pairs_without_a_rationale_are_dpo(link):
    where = np.ones((4, 3), bool)
    where[1, 2] = False
    found = rationale([-1.0, np.nan, -70.0, 0.0], link, where=where)
    close(found[1], DPO[1])
    close(found[0], rationale(RATIONALES, link)[0])
