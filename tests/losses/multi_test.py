"""Losses over more than a pair: blind answers, revisions, images, a second policy, degrees."""

import math

import numpy as np
import pytest

from paxo.losses.multi import bpo_loss, ofs_dpo_loss, opa_dpo_loss, spo_degree_loss, srpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
    MARGINS,
    POLICY,
    RATIOS,
    REFERENCE,
    check_gradient,
    close,
    exact,
    gradient,
    sigmoid,
    softplus,
)

BETA = 0.3
DPO = exact(dpo_loss, POLICY, REFERENCE, beta=BETA)
LOG_2 = math.log(2)


def test_bpo_is_twice_dpo_if_the_blind_answer_is_the_rejected_one():
    twice = [x[:, [0, 1, 1]] for x in (POLICY, REFERENCE)]
    close(exact(bpo_loss, *twice, beta=BETA), 2 * DPO)


def test_bpo_against_an_unchanged_blind_answer_lifts_the_chosen_one_alone():
    policy, reference = (np.concatenate([x, -7 * np.ones((4, 1))], -1) for x in (POLICY, REFERENCE))
    close(exact(bpo_loss, policy, reference, beta=BETA), DPO + softplus(-BETA * RATIOS[:, 0]))
    check_gradient(bpo_loss, policy, reference, beta=BETA)


def exact_srpo_solution(preference, reference, beta):
    """Log-ratios r(y) and r_+(y'|y) [draft, revision] that solve the min-max problem."""
    n = len(reference)
    # The reviser maximises P(y' > y) - beta KL: a tilted reference with log-normaliser value.
    tilt = preference.T / beta  # [draft, revision]
    value = np.log(np.sum(reference * np.exp(tilt), -1))
    reviser = tilt - value[:, None]
    # The policy minimises the reviser's value plus beta KL.
    policy = -value - np.log(np.sum(reference * np.exp(-value)))
    assert policy.shape == (n,)
    return policy, reviser


def test_srpo_is_zero_at_the_solution_of_its_game():
    rng = np.random.default_rng(0)
    preference = 0.5 + 0.5 * np.sign(rng.normal(size=(5, 5)))
    preference = np.triu(preference, 1) + np.tril(1 - preference.T, -1) + 0.5 * np.eye(5)
    policy, reviser = exact_srpo_solution(preference, rng.dirichlet(np.ones(5)), BETA)
    for w, l in zip(*np.nonzero(preference == 1)):  # noqa: E741
        ratios = [policy[w], policy[l], reviser[l, w], reviser[w, l], reviser[w, w], reviser[l, l]]
        for alpha in (0.0, 0.3, 1.0):
            found = exact(srpo_loss, np.array(ratios), np.zeros(6), beta=BETA, alpha=alpha)
            close(found, 0.0, atol=1e-12)


def test_srpo_with_an_unchanged_reviser_is_ipo():
    policy, reference = (
        np.concatenate([x, np.full((4, 4), -3.0)], -1) for x in (POLICY, REFERENCE)
    )
    found = exact(srpo_loss, policy, reference, beta=BETA, alpha=0.0)
    close(found, BETA**2 / 4 * (MARGINS - 1 / BETA) ** 2)
    check_gradient(srpo_loss, policy, reference, beta=BETA, alpha=0.4)


def test_srpo_mixes_in_the_revisers_own_loss():
    found = exact(srpo_loss, np.array([0.0, 0, 1, 2, 3, 4]), np.zeros(6), beta=0.5, alpha=1.0)
    close(found, (0.5 - 0.5 * (1 - 4)) ** 2 + (0.5 + 0.5 * (2 - 3)) ** 2)


RNG = np.random.default_rng(1)
TOKENS, REFERENCE_TOKENS = RNG.normal(-1, 0.5, (5, 4)), RNG.normal(-1, 0.5, (5, 4))
MASK = np.arange(4) < np.array([[4], [3], [2], [4], [3]])
TOKEN_RATIOS = np.where(MASK, TOKENS - REFERENCE_TOKENS, 0)
TRUTH, REVISED, ORIGINAL, TRUTH_MASKED, REVISED_MASKED = range(5)


def opa(**options):
    return exact(opa_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, **options)


def test_opa_dpo_is_dpo_on_whole_sequences_if_only_its_first_pair_counts():
    sums = [np.where(MASK, x, 0).sum(-1)[[TRUTH, ORIGINAL]] for x in (TOKENS, REFERENCE_TOKENS)]
    found = opa(revised_coef=0.0, copo_coef=0.0, anchor_coef=0.0)
    close(found, exact(dpo_loss, *sums, beta=BETA))


def test_opa_dpo_is_the_weighted_composition():
    weights, image = RNG.uniform(0, 2, (5, 4)), RNG.uniform(0, 2, (5, 4))
    plain, text, seen = (BETA * (w * TOKEN_RATIOS).sum(-1) for w in (1.0, weights, image))

    def pair(rewards, chosen, rejected):
        return softplus(rewards[rejected] - rewards[chosen])

    expected = pair(plain, TRUTH, ORIGINAL) + 0.7 * pair(text, REVISED, ORIGINAL)
    expected += 0.4 * pair(plain, TRUTH, TRUTH_MASKED) + 0.4 * pair(seen, REVISED, REVISED_MASKED)
    chosen = np.array([plain[TRUTH], text[REVISED], plain[TRUTH], seen[REVISED]])
    expected += 0.9 * softplus(0.25 - chosen).sum()
    options = {"revised_coef": 0.7, "copo_coef": 0.4, "anchor": 0.25, "anchor_coef": 0.9}
    with_weights = {"response_weights": weights, "image_weights": image}
    close(opa(**options, **with_weights), expected)


def test_opa_dpos_image_pairs_are_a_constant_if_the_mask_changes_nothing():
    seen = [TRUTH, REVISED, ORIGINAL, TRUTH, REVISED]
    same = [x[seen] for x in (TOKENS, REFERENCE_TOKENS, MASK)]
    options = {"beta": BETA, "anchor_coef": 0.0}
    with_images = exact(opa_dpo_loss, *same, copo_coef=0.5, **options)
    without = exact(opa_dpo_loss, *same, copo_coef=0.0, **options)
    close(with_images - without, 2 * 0.5 * LOG_2)


def test_opa_dpos_anchor_lifts_the_revision():
    # The authors' code has it the other way round.
    coefs = {"revised_coef": 0.0, "copo_coef": 0.0, "anchor_coef": 1.0}
    found = gradient(opa_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, **coefs)
    assert (found[REVISED][MASK[REVISED]] < 0).all()
    assert not found[REVISED][~MASK[REVISED]].any()


PREVIOUS = REFERENCE + np.array([0.5, -0.25])
OTHER = PREVIOUS[:, 0] - PREVIOUS[:, 1]
OWN = POLICY[:, 0] - POLICY[:, 1]


def test_ofs_dpos_fast_policy_leads_and_its_slow_one_chases():
    fast = exact(ofs_dpo_loss, POLICY, REFERENCE, PREVIOUS, beta=BETA, alpha=0.4)
    close(fast, DPO + 0.4 * softplus(-BETA * (OWN - OTHER)))
    slow = exact(ofs_dpo_loss, POLICY, REFERENCE, PREVIOUS, beta=BETA, alpha=0.4, module="slow")
    close(slow, DPO - 0.4 * softplus(-BETA * (OTHER - OWN)))


def test_ofs_dpo_of_equal_policies_has_a_chase_of_log_two_that_pushes_with_half_of_beta():
    arrays = (POLICY, REFERENCE, POLICY)
    for module, sign in (("fast", 1), ("slow", -1)):
        options = {"beta": BETA, "alpha": 1.0, "module": module}
        close(exact(ofs_dpo_loss, *arrays, **options), DPO + sign * LOG_2)
        whole = gradient(ofs_dpo_loss, *arrays, **options)
        chase = whole - gradient(dpo_loss, POLICY, REFERENCE, beta=BETA)
        # Both widen their own margin: to lead, and to catch up.
        close(chase, np.tile([-BETA / 2, BETA / 2], (4, 1)))
    assert not gradient(ofs_dpo_loss, *arrays, argnum=2).any()


LOGITS = np.array([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 1.0, -2.0], [-1.0, 0.0, 1.0]])
DEGREES = np.array([2, 0, 1, 0])


def test_spo_adds_the_cross_entropy_of_the_degree():
    right = LOGITS[np.arange(4), DEGREES]
    cross_entropy = np.log(np.exp(LOGITS).sum(-1)) - right
    arrays = (POLICY, REFERENCE, LOGITS, DEGREES)
    close(exact(spo_degree_loss, *arrays, beta=BETA, weight=0.7), DPO + 0.7 * cross_entropy)
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    found = gradient(spo_degree_loss, *arrays, argnum=2, weight=0.7)
    close(found, 0.7 * (softmax - np.eye(3)[DEGREES]))


@pytest.mark.parametrize(("degrees", "weight"), [(1, 1.0), (3, 0.0)])
def test_spo_of_one_degree_or_no_weight_is_dpo(degrees, weight):
    labels = np.zeros(4, int)
    arrays = (POLICY, REFERENCE, LOGITS[:, :degrees], labels)
    close(exact(spo_degree_loss, *arrays, beta=BETA, weight=weight), DPO)


def test_opa_and_bpo_push_the_ground_truth_up_and_the_rejected_down():
    found = gradient(opa_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, anchor_coef=0.0)
    up, down = [TRUTH, REVISED], [ORIGINAL, TRUTH_MASKED, REVISED_MASKED]
    assert (found[up][MASK[up]] < 0).all()
    assert (found[down][MASK[down]] > 0).all()
    blind = gradient(bpo_loss, np.array([-4.0, -5.0, -6.0]), np.zeros(3), beta=BETA)
    close(
        blind, BETA * np.array([-1 * (sigmoid(-0.3) + sigmoid(-0.6)), sigmoid(-0.3), sigmoid(-0.6)])
    )
