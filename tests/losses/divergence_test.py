"""DPO for other divergences: their links, the limits between them, and where they are cut."""

import math

import numpy as np
import pytest

from paxo.losses.divergence import chipo_loss, f_dpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import POLICY, RATIOS, REFERENCE, close, exact, gradient, softplus

BETA = 0.3


def f_dpo(divergence, alpha=0.5):
    return exact(f_dpo_loss, POLICY, REFERENCE, beta=BETA, divergence=divergence, alpha=alpha)


def of_link(link, beta=BETA):
    """-log sigma of beta times the link's margin."""
    scores = link(RATIOS)
    return softplus(-beta * (scores[:, 0] - scores[:, 1]))


# f'(u) of the papers' table, at u = e^r.
@pytest.mark.parametrize(
    ("divergence", "derivative"),
    [
        ("reverse_kl", lambda u: np.log(u) + 1),
        ("forward_kl", lambda u: -1 / u),
        ("js", lambda u: np.log(2 * u / (1 + u))),
        ("alpha", lambda u: (1 - u**-0.3) / 0.3),
    ],
)
def test_f_dpo_takes_the_derivative_of_its_divergence(divergence, derivative):
    close(f_dpo(divergence, 0.3), of_link(lambda r: derivative(np.exp(r))), 1e-11)


def test_alpha_leads_from_the_reverse_to_the_forward_kl():
    close(f_dpo("alpha", 1.0), f_dpo("forward_kl"))
    np.testing.assert_allclose(f_dpo("alpha", 1e-7), f_dpo("reverse_kl"), rtol=1e-6)


def test_alpha_is_one_minus_trls_coefficient():
    coefficient = 0.7
    theirs = of_link(lambda r: np.exp((coefficient - 1) * r) / (coefficient - 1))
    close(f_dpo("alpha", 1 - coefficient), theirs)


@pytest.mark.parametrize(
    ("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js", 0.5), ("alpha", 1)]
)
def test_a_divergence_acts_near_the_reference_like_dpo_with_beta_times_its_slope(divergence, slope):
    arrays = (REFERENCE, REFERENCE)
    found = gradient(f_dpo_loss, *arrays, beta=BETA, divergence=divergence)
    close(found, slope * gradient(dpo_loss, *arrays, beta=BETA))


def test_a_completion_given_up_has_no_gradient_from_the_alpha_divergence():
    policy, reference = np.array([-161.0, -5.0]), np.array([0.0, -5.0])
    assert not gradient(f_dpo_loss, policy, reference, beta=BETA, alpha=0.5)[0]
    assert gradient(f_dpo_loss, policy + 2.0, reference, beta=BETA, alpha=0.5)[0] < 0


def test_chipo_puts_both_links_into_the_logistic_loss():
    paper = of_link(lambda r: np.exp(r) + r)
    close(exact(chipo_loss, POLICY, REFERENCE, beta=BETA), paper)
    practical = of_link(lambda r: np.exp(0.25 * r) + 0.1 * r)
    close(exact(chipo_loss, POLICY, REFERENCE, beta=BETA, alpha=0.25, gamma=0.1), practical)


@pytest.mark.parametrize(("options", "slope"), [({}, 2), ({"alpha": 0.25, "gamma": 0.1}, 0.35)])
def test_chipo_acts_near_the_reference_like_dpo_with_more_or_less_than_beta(options, slope):
    found = gradient(chipo_loss, REFERENCE, REFERENCE, beta=BETA, **options)
    close(found, slope * gradient(dpo_loss, REFERENCE, REFERENCE, beta=BETA))


def test_chipo_bounds_the_margin_at_twice_the_largest_reward_and_the_gradient_ends_there():
    policy, reference = np.array([[5.0, 0.0], [0.0, 5.0], [0.1, 0.0]]), np.zeros((3, 2))
    bounded = exact(chipo_loss, policy, reference, beta=BETA, r_max=0.75)
    close(bounded[:2], [softplus(-1.5), softplus(1.5)])
    found = gradient(chipo_loss, policy, reference, beta=BETA, r_max=0.75)
    assert not found[:2].any()
    assert found[2].all()


def test_chipos_exponent_stops_at_twenty():
    reference = np.zeros(2)
    low, high = (
        exact(chipo_loss, np.array([-r, 0.0]), reference, beta=1e-9) for r in (-20.0, -30.0)
    )
    close(low - high, 1e-9 * 10 * 1 / (1 + math.exp(1e-9 * math.exp(20))), 1e-3)
