"""ORPO with rationales: what it adds, and its two links."""

import math

import numpy as np

from paxo.losses.rationale import rationale_orpo_loss
from paxo.losses.reference_free import orpo_loss
from tests.losses.pairs import LENGTHS, POLICY, check_gradient, close, exact, gradient, softplus

RATIONALES = np.array([-1.0, -20.0, -70.0, 0.0])
THREE = np.concatenate([POLICY, RATIONALES[:, None]], -1)
THREE_LENGTHS = np.concatenate([LENGTHS, np.full((4, 1), 9.0)], -1)
BASE = exact(orpo_loss, POLICY, LENGTHS, lam=0.3)


def found(link="linear", gamma=0.5, **options):
    return exact(
        rationale_orpo_loss,
        THREE,
        THREE_LENGTHS,
        lam=0.3,
        gamma=gamma,
        rationale_link=link,
        **options,
    )


def test_it_is_orpo_plus_the_rationales_negative_log_likelihood():
    close(found(), BASE - 0.5 * RATIONALES)
    close(found("log_sigmoid"), BASE + softplus(-0.5 * RATIONALES))


def test_without_weight_it_is_orpo_up_to_a_constant():
    close(found(gamma=0.0), BASE)
    close(found("log_sigmoid", gamma=0.0), BASE + math.log(2))


def test_the_links_agree_on_long_rationales():
    apart = found("log_sigmoid", gamma=0.1) - found("linear", gamma=0.1)
    assert (apart > 0).all()
    assert (apart <= math.log(2) + 1e-12).all()
    assert apart[2] < 1e-3  # gamma * log-prob is -7, below -6.91


def test_gradient_of_the_rationale_is_gamma_or_gamma_times_a_sigmoid():
    options = {"lam": 0.3, "gamma": 0.5}
    close(gradient(rationale_orpo_loss, THREE, THREE_LENGTHS, **options)[:, 2], np.full(4, -0.5))
    options["rationale_link"] = "log_sigmoid"
    wanted = -0.5 / (1 + np.exp(0.5 * RATIONALES))
    close(gradient(rationale_orpo_loss, THREE, THREE_LENGTHS, **options)[:, 2], wanted)
    check_gradient(rationale_orpo_loss, THREE, THREE_LENGTHS, **options)


def test_pairs_without_a_rationale_are_orpo():
    where = np.array([[True, True, False]] * 4)
    for link in ("linear", "log_sigmoid"):
        close(found(link, where=where), BASE)
