"""What holds for all pairwise losses with a reference: values at it, gradients, limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses import anchored, batchwise, divergence, imitation, length, links, margins, noisy
from paxo.losses.pairwise import dpo_loss
from tests.losses.pairs import (
    LENGTHS,
    POLICY,
    RATIOS,
    REFERENCE,
    check_gradient,
    close,
    exact,
    gradient,
)

LOG_2 = math.log(2)


def bind(loss, *arrays, **options):
    """`(policy_logps, reference_logps) -> loss` with the other inputs fixed."""

    def bound(policy, reference):
        return loss(policy, reference, *(jnp.asarray(a, policy.dtype) for a in arrays), **options)

    functools.update_wrapper(bound, loss)
    return bound


def bco_pair(policy, reference, **options):
    state = {"mean": jnp.zeros(()), "count": jnp.zeros(())}
    return batchwise.bco_pair_loss(policy, reference, state=state, **options)[0]


EQUAL = np.ones_like(LENGTHS)
F_DPO = [
    bind(divergence.f_dpo_loss, beta=0.3, divergence=d)
    for d in ("reverse_kl", "forward_kl", "js", "alpha")
]

# (loss, its value where policy and reference agree): catalogue 0.5.
AT_REFERENCE = [
    (bind(noisy.cdpo_loss, label_smoothing=0.3), LOG_2),
    (bind(noisy.robust_dpo_loss, eps=0.3), LOG_2),
    (bind(margins.dpop_loss), LOG_2),
    (bind(margins.flex_dpo_loss), LOG_2),
    (bind(margins.odpo_loss, np.tile([5.0, 2.0], (4, 1)), alpha=0.0), LOG_2),
    (bind(margins.modpo_loss, np.ones((4, 2))), LOG_2),
    (bind(margins.dove_loss), LOG_2),
    (bind(length.ln_dpo_loss, LENGTHS), LOG_2),
    (bind(length.r_dpo_loss, EQUAL), LOG_2),
    (bind(divergence.chipo_loss), LOG_2),
    *((loss, LOG_2) for loss in F_DPO),
    (bind(batchwise.aot_unpaired_loss), LOG_2),
    (bind(links.rso_hinge_loss), 1.0),
    (bind(links.exo_pair_loss, eps=1e-3), -LOG_2 - 0.5 * math.log(1e-3 * 0.999)),
    (bind(links.exo_pair_loss, eps=0.2), -LOG_2 - 0.5 * math.log(0.2 * 0.8)),
    (bind(links.discopop_loss, tau=0.05), 0.5 * LOG_2 + 0.5),
    (bind(links.discopop_loss, tau=2.0), 0.5 * LOG_2 + 0.5),
    (bind(anchored.nca_pair_loss), 2 * LOG_2),
    (bco_pair, 2 * LOG_2),
    (bind(anchored.apo_zero_loss), 1.0),
    (bind(anchored.apo_down_loss), 1.0),
    (bind(anchored.cal_dpo_loss, beta=0.1), LOG_2 + 25.0),
    (bind(imitation.iterative_rpo_loss, EQUAL, alpha=0.0), LOG_2),
]


@pytest.mark.parametrize(
    ("loss", "expected"), AT_REFERENCE, ids=lambda x: getattr(x, "__name__", None)
)
def test_value_where_policy_and_reference_agree(loss, expected):
    # Not the paired AOT: there it is not the pairs but the sorted margins that agree.
    close(exact(loss, REFERENCE, REFERENCE), np.full(4, expected), rtol=1e-12)


# (loss, what DPO it is): limits and special cases.
IS_DPO = [
    (bind(noisy.cdpo_loss, beta=0.3, label_smoothing=0.0), 0.3),
    (bind(noisy.robust_dpo_loss, beta=0.3, eps=0.0), 0.3),
    (F_DPO[0], 0.3),
    (bind(divergence.f_dpo_loss, beta=0.3, divergence="alpha", alpha=0.0), 0.3),
    (bind(margins.odpo_loss, LENGTHS, beta=0.3, alpha=0.0), 0.3),
    (bind(margins.modpo_loss, LENGTHS, beta=0.3, w0=1.0, w1=0.0), 0.3),
    (bind(margins.modpo_loss, EQUAL, beta=0.3, w0=0.5), 0.6),
    (bind(margins.dpop_loss, beta=0.3, lam=0.0), 0.3),
    (bind(margins.flex_dpo_loss, beta_w=0.3, beta_l=0.3), 0.3),
    (bind(margins.dove_loss, beta=0.3), 0.3),
    (bind(length.ln_dpo_loss, EQUAL, beta=0.3), 0.3),
    (bind(length.ln_dpo_loss, 5 * EQUAL, beta=0.3), 0.06),
    (bind(length.r_dpo_loss, 7 * EQUAL, beta=0.3, alpha=0.5), 0.3),
    (bind(length.r_dpo_loss, LENGTHS, beta=0.3, alpha=0.0), 0.3),
    (bind(imitation.rpo_loss, LENGTHS, beta=0.3, eta=0.0), 0.3),
    (bind(imitation.iterative_rpo_loss, LENGTHS, beta=0.3, alpha=0.0), 0.3),
]


@pytest.mark.parametrize(("loss", "beta"), IS_DPO, ids=lambda x: getattr(x, "__name__", None))
def test_special_case_is_dpo_in_value_and_gradient(loss, beta):
    dpo = bind(dpo_loss, beta=beta)
    close(exact(loss, POLICY, REFERENCE), exact(dpo, POLICY, REFERENCE))
    close(gradient(loss, POLICY, REFERENCE), gradient(dpo, POLICY, REFERENCE))


MARGIN_ONLY = [
    bind(noisy.cdpo_loss, label_smoothing=0.2),
    bind(noisy.robust_dpo_loss),
    bind(links.rso_hinge_loss),
    bind(links.exo_pair_loss),
    bind(links.discopop_loss),
    bind(margins.odpo_loss, LENGTHS, beta=0.3),
    bind(margins.modpo_loss, LENGTHS, beta=0.3),
    bind(margins.dove_loss),
    bind(length.r_dpo_loss, LENGTHS),
]


@pytest.mark.parametrize("loss", MARGIN_ONLY, ids=lambda loss: loss.__name__)
def test_gradients_of_chosen_and_rejected_cancel_if_only_the_margin_counts(loss):
    found = gradient(loss, POLICY, REFERENCE)
    assert np.abs(found).max() > 1e-3
    close(found.sum(-1), np.zeros(4), atol=1e-12)


BOTH_REWARDS = [
    *F_DPO[1:],
    bind(divergence.chipo_loss, beta=0.2),
    bind(divergence.chipo_loss, beta=0.2, alpha=0.25, gamma=0.1),
    bind(anchored.nca_pair_loss, beta=0.3),
    bind(anchored.apo_zero_loss, beta=0.3),
    bind(anchored.apo_down_loss, beta=0.3),
    bind(anchored.cal_dpo_loss, beta=0.3),
    bind(margins.dpop_loss, beta=0.1, lam=3.0),
    bind(margins.flex_dpo_loss),
    bind(length.ln_dpo_loss, LENGTHS),
    bind(imitation.rpo_loss, LENGTHS, eta=0.5),
    bind(imitation.iterative_rpo_loss, LENGTHS),
    bind(batchwise.aot_loss, beta=0.3, label_smoothing=0.1),
    bind(batchwise.aot_unpaired_loss, beta=0.3),
    bind(links.discopop_loss, beta=0.3, tau=1.5),
]


@pytest.mark.parametrize("loss", MARGIN_ONLY + BOTH_REWARDS, ids=lambda loss: loss.__name__)
def test_gradient_is_that_of_finite_differences(loss):
    check_gradient(loss, POLICY, REFERENCE)


EXTREMES = np.array([-1e4, -1e2, -10.0, 0.0, 10.0, 1e2, 1e4], np.float32)


@pytest.mark.parametrize(
    "loss",
    [
        *F_DPO,
        bind(divergence.chipo_loss, r_max=3.0),
        bind(divergence.chipo_loss, alpha=0.25, gamma=0.1),
        bind(links.discopop_loss, beta=1.0, tau=0.01),
        bind(links.discopop_loss, beta=1.0, tau=5.0),
        bind(links.exo_pair_loss, beta=1.0, eps=1e-6),
        bind(noisy.robust_dpo_loss, beta=1.0, eps=0.49),
        bind(anchored.nca_pair_loss, beta=1.0),
        bind(margins.dpop_loss, beta=1.0),
    ],
    ids=lambda loss: loss.__name__,
)
def test_finite_for_log_ratios_of_any_size(loss):
    policy = jnp.asarray(np.stack(np.meshgrid(EXTREMES, EXTREMES), -1))
    value, grad = jax.value_and_grad(lambda p: jnp.sum(loss(p, jnp.zeros_like(p))))(policy)
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_made_pairs_are_right_and_wrong_ones():
    margin = RATIOS[:, 0] - RATIOS[:, 1]
    assert margin.min() < 0 < margin.max()
