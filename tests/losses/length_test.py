"""Length-aware DPO: averages, charges, draws and discounts of tokens."""

import jax
import numpy as np
import pytest

from paxo.losses.length import ld_dpo_loss, ln_dpo_loss, r_dpo_loss, sampo_loss
from paxo.losses.pairwise import dpo_loss, simpo_loss
from tests.losses.pairs import (
    LENGTHS,
    MARGINS,
    POLICY,
    RATIOS,
    REFERENCE,
    check_gradient,
    close,
    exact,
    gradient,
    softplus,
)

BETA = 0.3
KEY = jax.random.key(0)


def test_ln_dpo_is_dpo_of_log_ratios_per_token():
    per_token = RATIOS / LENGTHS
    expected = softplus(-2.0 * (per_token[:, 0] - per_token[:, 1]))
    close(exact(ln_dpo_loss, POLICY, REFERENCE, LENGTHS, beta=2.0), expected)


def test_ln_dpo_does_not_see_every_token_doubled():
    once = exact(ln_dpo_loss, POLICY, REFERENCE, LENGTHS)
    close(exact(ln_dpo_loss, 2 * POLICY, 2 * REFERENCE, 2 * LENGTHS), once)


def test_ln_dpo_to_a_reference_that_is_constant_per_token_is_simpo_without_target():
    found = exact(ln_dpo_loss, POLICY, -1.7 * LENGTHS, LENGTHS, beta=2.0)
    close(found, exact(simpo_loss, POLICY, LENGTHS, beta=2.0, gamma_beta_ratio=0.0))


def test_r_dpo_counts_a_longer_chosen_completion_as_ahead():
    longer = LENGTHS[:, 0] - LENGTHS[:, 1]
    found = exact(r_dpo_loss, POLICY, REFERENCE, LENGTHS, beta=BETA, alpha=0.1)
    close(found, softplus(-(BETA * MARGINS + 0.1 * longer)))
    push = [
        -gradient(r_dpo_loss, POLICY[0], REFERENCE[0], np.array([n, 5.0]), alpha=0.1)[0]
        for n in (5.0, 9.0)
    ]
    assert push[1] < push[0]


# Three and five tokens. Gaps in the mask: a turn of the user inside a completion, say.
MASK = np.array([[1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0]], bool)
TOKENS = np.linspace(-0.2, -2.0, 14).reshape(2, 7)
REFERENCE_TOKENS = np.sin(np.arange(14.0)).reshape(2, 7) - 1.5
TOKEN_RATIOS = TOKENS - REFERENCE_TOKENS


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_discounts_the_tokens_behind_the_shorter_length(alpha):
    # The longer completion's fourth and fifth tokens are at 4 and 5.
    chosen = TOKEN_RATIOS[0, [0, 2, 3]].sum()
    rejected = TOKEN_RATIOS[1, [0, 1, 3]].sum() + alpha * TOKEN_RATIOS[1, [4, 5]].sum()
    found = exact(ld_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, alpha=alpha)
    close(found, softplus(-BETA * (chosen - rejected)))


@pytest.mark.parametrize("loss", [ld_dpo_loss, sampo_loss], ids=["ld_dpo", "sampo"])
def test_equal_lengths_give_dpo(loss):
    mask = MASK[[0, 0]]
    options = {"key": KEY} if loss is sampo_loss else {}
    dpo = exact(dpo_loss, (TOKENS * mask).sum(-1), (REFERENCE_TOKENS * mask).sum(-1), beta=BETA)
    close(exact(loss, TOKENS, REFERENCE_TOKENS, mask, beta=BETA, **options), dpo)


def test_ld_dpo_with_alpha_one_is_dpo():
    sums = (TOKENS * MASK).sum(-1), (REFERENCE_TOKENS * MASK).sum(-1)
    found = exact(ld_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, alpha=1.0)
    close(found, exact(dpo_loss, *sums, beta=BETA))


def test_ld_dpo_discounts_the_reference_too():
    # Old TRL discounted the policy's tokens only: then policy == reference has a margin.
    close(exact(ld_dpo_loss, TOKENS, TOKENS, MASK, beta=BETA), np.log(2))


def test_token_level_gradients_are_those_of_finite_differences():
    check_gradient(ld_dpo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA)
    check_gradient(sampo_loss, TOKENS, REFERENCE_TOKENS, MASK, beta=BETA, key=KEY)


def test_sampo_draws_as_many_tokens_of_the_longer_completion_as_the_shorter_one_has():
    same = np.zeros((600, 2, 7))
    # The tokens that count are those with a gradient.
    arrays = (same, same, np.broadcast_to(MASK, same.shape))
    found = gradient(sampo_loss, *arrays, beta=BETA, key=KEY) != 0
    assert (found[:, 0] == MASK[0]).all()
    assert (found[:, 1].sum(-1) == 3).all()
    assert not found[:, 1, ~MASK[1]].any()
    # Each of five tokens in three of five draws: 0.6, with a deviation of 0.02.
    np.testing.assert_allclose(found[:, 1, MASK[1]].mean(0), 0.6, atol=0.08)


def test_sampo_compares_policy_and_reference_at_the_same_tokens():
    # Every token 0.5 nats up: 3 * 0.5 in both completions, whatever is drawn. Tokens drawn apart
    # for policy and reference would leave a difference of other tokens.
    for seed in range(5):
        found = exact(sampo_loss, TOKENS + 0.5, TOKENS, MASK, beta=BETA, key=jax.random.key(seed))
        close(found, np.log(2))
