"""Coupled losses: optimal transport between sorted margins, batches that set beta or a shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses.batchwise import aot_loss, aot_unpaired_loss, bco_pair_loss, beta_dpo_loss
from paxo.losses.pairwise import dpo_loss
from tests.compiling import quick_compiles  # noqa: F401
from tests.losses.pairs import (
    MARGINS,
    POLICY,
    RATIOS,
    REFERENCE,
    close,
    exact,
    gradient,
    pair_at,
    sigmoid,
    softplus,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

BETA = 0.3
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MANY = RNG.normal(-20, 6, (64, 2)), RNG.normal(-20, 6, (64, 2))


def sorted_margins(paired):
    """What the paper subtracts: two sorted lists."""
    policy, reference = MANY
    if paired:
        return np.sort(policy[:, 0] - policy[:, 1]), np.sort(reference[:, 0] - reference[:, 1])
    ratios = policy - reference
    return np.sort(ratios[:, 0]), np.sort(ratios[:, 1])


AOT = pytest.mark.parametrize(
    ("loss", "paired"), [(aot_loss, True), (aot_unpaired_loss, False)], ids=["aot", "aot_unpaired"]
)


@AOT
def test_aot_is_the_logistic_loss_of_sorted_margins(loss, paired):
    high, low = sorted_margins(paired)
    z = BETA * (high - low)
    found = exact(loss, *MANY, beta=BETA, label_smoothing=0.1)
    close(np.sort(found), np.sort(0.9 * softplus(-z) + 0.1 * softplus(z)))


@AOT
def test_aot_of_one_pair_is_dpo(loss, paired):
    found = exact(loss, POLICY[:1], REFERENCE[:1], beta=BETA)
    close(found, exact(dpo_loss, POLICY[:1], REFERENCE[:1], beta=BETA))


@AOT
def test_aot_is_at_most_dpo_on_the_same_batch(loss, paired):
    # Rearrangement: sorting minimises the sum of a convex function of differences.
    assert exact(loss, *MANY, beta=BETA).sum() < exact(dpo_loss, *MANY, beta=BETA).sum()


@AOT
def test_aot_puts_each_loss_at_its_pair(loss, paired):
    order = RNG.permutation(64)
    shuffled = [x[order] for x in MANY]
    close(exact(loss, *shuffled, beta=BETA), exact(loss, *MANY, beta=BETA)[order])


def test_paired_aot_does_not_care_which_reference_margin_belongs_to_a_pair():
    policy, reference = MANY
    found = exact(aot_loss, policy, RNG.permutation(reference), beta=BETA)
    close(found, exact(aot_loss, policy, reference, beta=BETA))


def test_unpaired_aot_does_not_care_which_rejected_belongs_to_a_chosen_completion():
    order = RNG.permutation(64)
    moved = [np.stack([x[:, 0], x[order, 1]], -1) for x in MANY]
    close(exact(aot_unpaired_loss, *moved, beta=BETA), exact(aot_unpaired_loss, *MANY, beta=BETA))


@AOT
def test_aot_sorts_what_is_not_masked(loss, paired):
    where = np.ones((64, 2), bool)
    where[[3, 17], 1] = False
    where[40] = False
    whole = where.all(-1)
    junk = [np.where(where, x, np.nan) for x in MANY]
    found = exact(loss, *junk, beta=BETA, where=where)
    close(found[whole], exact(loss, *(x[whole] for x in MANY), beta=BETA))
    assert not found[~whole].any()
    assert not gradient(loss, *junk, beta=BETA, where=where)[~whole].any()


@AOT
def test_aot_spreads_the_gradient_of_tied_pairs_as_one_sum(loss, paired):
    policy, reference = np.zeros((3, 2)), np.array([[0.0, 1.0], [0.0, 3.0], [0.0, -2.0]])
    found = gradient(loss, policy, reference, beta=BETA)
    high, low = np.zeros(3), np.sort(reference[:, 0] - reference[:, 1])
    if not paired:
        low = np.sort(-reference[:, 1])
    close(found[:, 0].sum(), -BETA * sigmoid(-BETA * (high - low)).sum())


MOMENTS = {"mean": jnp.zeros(()), "std": jnp.zeros(())}


def beta_dpo(policy=POLICY, reference=REFERENCE, state=MOMENTS, key=KEY, **options):
    options = {"beta": BETA, "a": 0.6, "rho": 0.0} | options
    return exact(beta_dpo_loss, policy, reference, key=key, state=state, **options)


def test_beta_dpo_without_filter_and_scaling_is_dpo():
    loss, _ = beta_dpo(a=0.0)
    close(loss.total, exact(dpo_loss, POLICY, REFERENCE, beta=BETA).sum())
    assert loss.count == 4


def test_beta_dpo_scales_beta_by_how_far_the_batch_is_above_the_moved_mean():
    old = {"mean": jnp.float32(1.0), "std": jnp.float32(2.0)}
    loss, state = beta_dpo(state=old, gamma=0.75)
    mean = 0.75 * 1.0 + 0.25 * MARGINS.mean()
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(state["std"], 1.5 + 0.25 * MARGINS.std(ddof=1), rtol=1e-6)
    used = BETA * (1 + 0.6 * (MARGINS.mean() - mean))
    np.testing.assert_allclose(loss.total, softplus(-used * MARGINS).sum(), rtol=1e-6)


def test_beta_dpo_has_a_least_beta_and_no_gradient_through_it():
    def mean_loss(policy, reference):
        loss, _ = beta_dpo_loss(
            policy, reference, beta=BETA, a=0.6, rho=0.0, key=KEY, state=MOMENTS
        )
        return loss.value

    low = POLICY - np.array([100.0, 0.0])
    floor = softplus(-1e-3 * (MARGINS - 100)).mean()
    np.testing.assert_allclose(exact(mean_loss, low, REFERENCE), floor, rtol=1e-6)
    used = BETA * (1 + 0.6 * 0.9 * MARGINS.mean())
    weight = used * sigmoid(-used * MARGINS) / 4
    found = gradient(mean_loss, POLICY, REFERENCE)
    np.testing.assert_allclose(found, np.stack([-weight, weight], -1), rtol=1e-6)


@pytest.mark.parametrize(("rho", "kept"), [(0.2, 51), (0.5, 32), (0.9, 6), (1.0, 1)])
def test_beta_dpo_keeps_exactly_its_share_of_the_pairs(rho, kept):
    def total(policy):
        loss, _ = beta_dpo_loss(policy, MANY[1], rho=rho, key=KEY, state=MOMENTS)
        return loss.total, loss.count

    grad, count = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(MANY[0], jnp.float32))
    assert count == kept == (grad[:, 0] != 0).sum()


def test_beta_dpo_draws_in_proportion_to_how_usual_the_margin_is():
    margins, state = np.array([0.5, 2.0]), {"mean": jnp.zeros(()), "std": jnp.ones(())}
    mean, std = 0.1 * margins.mean(), 0.9 + 0.1 * margins.std(ddof=1)
    usual = np.exp(-0.5 * ((margins - mean) / std) ** 2)
    policy, reference = (np.float32(x) for x in pair_at(margins, beta=1.0))

    def total(key):
        options = {"beta": BETA, "a": 0.0, "rho": 0.5, "state": state}
        return beta_dpo_loss(policy, reference, key=key, **options)[0].total

    # Of one pair drawn the loss says which it was.
    found = jax.jit(jax.vmap(total))(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(np.unique(found), softplus(-BETA * margins[::-1]), rtol=1e-6)
    share = np.mean(found > softplus(-BETA * 1.0))
    np.testing.assert_allclose(share, usual[0] / usual.sum(), atol=0.04)


def test_beta_dpo_neither_draws_nor_counts_masked_pairs():
    where = np.ones((4, 2), bool)
    where[1, 0] = False
    whole = where.all(-1)
    loss, state = beta_dpo(np.where(where, POLICY, np.nan), where=where)
    expected, alone = beta_dpo(POLICY[whole], REFERENCE[whole])
    close(loss.total, expected.total, 1e-7)
    assert loss.count == 3
    close(state["std"], alone["std"], 1e-7)
    nothing, same = beta_dpo(where=np.zeros((4, 2), bool))
    assert nothing.total == nothing.count == same["mean"] == 0


SHIFT = {"mean": jnp.zeros(()), "count": jnp.zeros(())}


def bco_pair(policy=POLICY, reference=REFERENCE, state=SHIFT, **options):
    return exact(bco_pair_loss, policy, reference, beta=BETA, state=state, **options)


def test_bco_pair_classifies_rewards_against_the_mean_of_all_so_far():
    rewards = BETA * RATIOS
    loss, state = bco_pair()
    delta = rewards.mean()
    np.testing.assert_allclose(
        loss, softplus(delta - rewards[:, 0]) + softplus(rewards[:, 1] - delta), rtol=1e-6
    )
    assert state["count"] == 8
    more = POLICY[:2] + 1.0
    loss, state = bco_pair(more, REFERENCE[:2], state)
    delta = np.concatenate([rewards.ravel(), (BETA * (more - REFERENCE[:2])).ravel()]).mean()
    np.testing.assert_allclose(state["mean"], delta, rtol=1e-5)
    assert state["count"] == 12


def test_bco_pair_without_shift_is_biased_nca():
    rewards = BETA * RATIOS
    loss, _ = bco_pair(shift="none")
    close(loss, softplus(-rewards[:, 0]) + softplus(rewards[:, 1]))


def test_no_gradient_flows_through_bco_pairs_shift():
    delta = (BETA * RATIOS).mean()
    found = gradient(lambda p, q: bco_pair_loss(p, q, beta=BETA, state=SHIFT)[0], POLICY, REFERENCE)
    expected = np.stack(
        [-sigmoid(delta - BETA * RATIOS[:, 0]), sigmoid(BETA * RATIOS[:, 1] - delta)], -1
    )
    np.testing.assert_allclose(found, BETA * expected, rtol=1e-6)


def test_bco_pair_is_above_dpo_by_the_papers_gap():
    delta = (BETA * RATIOS).mean()
    x, y = BETA * RATIOS[:, 0] - delta, delta - BETA * RATIOS[:, 1]
    both = np.exp(-x - y)
    gap = np.log(1 + np.exp(-x) + np.exp(-y) + both) - np.log(1 + both)
    loss, _ = bco_pair()
    dpo = exact(dpo_loss, POLICY, REFERENCE, beta=BETA)
    np.testing.assert_allclose(loss - dpo, gap, rtol=1e-5)
    assert (gap > 0).all()


def test_masked_pairs_do_not_move_bco_pairs_mean():
    where = np.ones((4, 2), bool)
    where[2, 1] = False
    _, state = bco_pair(np.where(where, POLICY, np.inf), where=where)
    np.testing.assert_allclose(state["mean"], (BETA * RATIOS)[[0, 1, 3]].mean(), rtol=1e-6)
    assert state["count"] == 6
