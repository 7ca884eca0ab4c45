"""CGPO: calibrated rewards, what judges leave of them, and the three losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.imitation import rpo_loss
from paxo.losses.mixture_of_judges import (
    calibrated_rewards,
    cgpo_codpo_loss,
    cgpo_crpg_loss,
    cgpo_crraft_loss,
    cgpo_rewards,
    passes_all,
)

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.uniform(-8, -4, (2, 2, 4)).astype(np.float32)
REWARDS = np.array([[1.0, 3.0, 2.0, 0.0], [0.5, -1.0, 2.0, 4.0]], np.float32)
BASE = np.array([[1.5] * 4, [0.0] * 4], np.float32)
JUDGED = np.array(  # all pass: candidates 0 and 2 of the first group, none of the second's last
    [[[1, 1], [1, 0], [1, 1], [0, 0]], [[1, 1], [1, 1], [0, 1], [1, 0]]], np.float32
)
PASSED = np.asarray(passes_all(JUDGED))
LENGTHS = np.array([[3, 4, 5, 6], [2, 2, 2, 2]], np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_calibrated_rewards_compare_with_the_prompts_baseline():
    found = calibrated_rewards(REWARDS, BASE)
    np.testing.assert_allclose(found, sigmoid(REWARDS - BASE), rtol=1e-6)
    np.testing.assert_allclose(calibrated_rewards(REWARDS + 7, BASE + 7), found, rtol=1e-5)


def test_reward_is_taken_by_any_failed_judge_and_by_the_log_ratio():
    ratios = np.array([[0.0, 0.0, 2.0, 0.0], [5.0, -1.0, 0.0, 0.0]])
    found = cgpo_rewards(REWARDS, BASE, ratios, PASSED, kl_max=4.0)
    left = np.array([[1, 1, 0.5, 1], [0, 1.25, 1, 1]])  # below the reference it is more than 1
    np.testing.assert_allclose(found, left * sigmoid(REWARDS - BASE) * PASSED, rtol=1e-6)


def test_crpg_gradient_is_minus_the_reward_above_the_batchs_mean():
    options = {"kl_max": 20.0}
    found = jax.grad(
        lambda s: cgpo_crpg_loss(s, REFERENCE, REWARDS, BASE, PASSED, **options).value
    )(jnp.asarray(POLICY))
    kept = cgpo_rewards(REWARDS, BASE, POLICY - REFERENCE, PASSED, **options)
    np.testing.assert_allclose(found, -(kept - kept.mean()) / 8, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.sum(), 0, atol=1e-7)


def test_codpo_is_dpo_with_likelihood_of_the_best_that_passes_and_the_worst_that_fails():
    options = {"beta": 0.3, "lam": 0.2}
    found = cgpo_codpo_loss(POLICY, REFERENCE, LENGTHS, REWARDS, PASSED, **options)
    pairs = np.array([[2, 3], [0, 2]])  # group 1: worst of the failing 2.0 and 4.0
    policy, reference, lengths = (
        np.take_along_axis(x, pairs, -1) for x in (POLICY, REFERENCE, LENGTHS)
    )
    wanted = rpo_loss(policy, reference, lengths, beta=0.3, eta=0.2, nll_reduction="sequence_mean")
    np.testing.assert_allclose(found.value, wanted.mean(), rtol=1e-5)
    assert float(found.count) == 2


def test_codpo_raises_the_likelihood_of_the_chosen():
    def loss(s, lam):
        return cgpo_codpo_loss(s, REFERENCE, LENGTHS, REWARDS, PASSED, lam=lam).total

    more, less = (jax.grad(loss)(jnp.asarray(POLICY), lam) for lam in (1.0, 0.0))
    wanted = np.zeros((2, 4))
    wanted[0, 2], wanted[1, 0] = -1 / 5, -1 / 2
    np.testing.assert_allclose(more - less, wanted, atol=1e-6)


@pytest.mark.parametrize("judged", [0.0, 1.0])
def test_codpo_has_no_pair_where_all_pass_or_all_fail(judged):
    found = cgpo_codpo_loss(
        POLICY, REFERENCE, LENGTHS, REWARDS, np.full(PASSED.shape, judged, np.float32)
    )
    assert (float(found.total), float(found.count)) == (0, 0)


def test_crraft_imitates_the_best_that_passes_by_its_calibrated_reward():
    found = cgpo_crraft_loss(POLICY, REWARDS, BASE, PASSED)
    weights = sigmoid(np.array([2.0 - 1.5, 0.5 - 0.0]))
    np.testing.assert_allclose(found.value, -(weights * POLICY[[0, 1], [2, 0]]).mean(), rtol=1e-6)
    none = cgpo_crraft_loss(POLICY, REWARDS, BASE, np.zeros_like(PASSED))
    assert (float(none.total), float(none.count)) == (0, 0)
