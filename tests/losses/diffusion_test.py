"""Diffusion: DPO of denoising errors, and when SePPO takes the other image for a good one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.diffusion import diffusion_dpo_loss, seppo_loss
from paxo.losses.pairwise import dpo_loss
from tests.losses.cases import Case
from tests.losses.conformance import CHECKS
from tests.losses.pairs import check_gradient, close, exact, gradient, sigmoid, softplus

ERRORS = np.array([[0.10, 0.30], [0.35, 0.20], [0.20, 0.15], [0.25, 0.30]])
REFERENCE = np.array([[0.20, 0.20], [0.30, 0.25], [0.25, 0.10], [0.20, 0.20]])
EXCESS = ERRORS - REFERENCE
BEHIND = EXCESS[:, 0] > 0  # the reference denoises the good image better


def test_diffusion_dpo_is_dpo_with_minus_half_the_errors_for_log_probs():
    found = exact(diffusion_dpo_loss, ERRORS, REFERENCE, beta=20.0)
    close(found, exact(dpo_loss, -ERRORS / 2, -REFERENCE / 2, beta=20.0))
    close(found, softplus(10.0 * (EXCESS[:, 0] - EXCESS[:, 1])))


def test_diffusion_dpo_lowers_the_chosen_error_and_raises_the_rejected():
    found = gradient(diffusion_dpo_loss, ERRORS, REFERENCE, beta=20.0)
    weight = 10.0 * sigmoid(10.0 * (EXCESS[:, 0] - EXCESS[:, 1]))
    close(found, np.stack([weight, -weight], -1))


def test_both_are_log_two_where_policy_and_reference_denoise_alike():
    for loss in (diffusion_dpo_loss, seppo_loss):
        close(exact(loss, REFERENCE, REFERENCE), np.full(4, np.log(2)))


def test_seppo_takes_the_references_image_for_good_where_the_policy_is_behind():
    assert BEHIND.any()
    assert not BEHIND.all()
    sign = np.where(BEHIND, -1.0, 1.0)
    found = exact(seppo_loss, ERRORS, REFERENCE, beta=20.0)
    close(found, softplus(10.0 * (EXCESS[:, 0] - sign * EXCESS[:, 1])))
    direction = np.sign(gradient(seppo_loss, ERRORS, REFERENCE, beta=20.0))
    np.testing.assert_array_equal(direction, np.stack([np.ones(4), -sign], -1))


def test_seppo_that_never_flips_is_diffusion_dpo():
    found = exact(seppo_loss, ERRORS, REFERENCE, beta=20.0, flip="never")
    close(found, exact(diffusion_dpo_loss, ERRORS, REFERENCE, beta=20.0))
    close(
        exact(seppo_loss, ERRORS, REFERENCE, beta=20.0)[~BEHIND],
        exact(diffusion_dpo_loss, ERRORS, REFERENCE, beta=20.0)[~BEHIND],
    )


@pytest.mark.parametrize("loss", [diffusion_dpo_loss, seppo_loss])
def test_gradients_are_finite_differences_finite_at_large_errors_and_0_for_the_reference(loss):
    check_gradient(loss, ERRORS, REFERENCE, beta=20.0)
    assert not gradient(loss, ERRORS, REFERENCE, argnum=1).any()
    far = jnp.array([[1e4, 0.0], [0.0, 1e4], [1e4, 1e4]], jnp.float32)
    value, found = jax.value_and_grad(lambda e: jnp.sum(loss(e, far[::-1])))(far)
    assert np.isfinite(value)
    assert np.isfinite(found).all()


def test_a_masked_image_has_no_gradient():
    where, errors = np.array([True, False]), np.array([0.1, np.nan])
    for loss in (diffusion_dpo_loss, seppo_loss):
        value, found = jax.value_and_grad(loss)(errors, np.array([0.2, np.inf]), where=where)
        assert float(value) == 0
        assert not np.asarray(found).any()


# None of its inputs is a log-prob, so the shifts of log-probs change nothing.
ROW = {"log_ratios": True, "group_shift": True, "base": {"beta": 5.0}}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", [diffusion_dpo_loss, seppo_loss])
def test_conformance(loss, check):
    CHECKS[check](Case(loss.__name__, loss, **ROW))
