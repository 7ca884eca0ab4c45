"""Losses of self-play in rounds on exact games: their minimisers are steps of mirror descent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.nash import online_ipo_v1_loss
from paxo.losses.pairwise import dpo_loss, ipo_loss
from paxo.losses.selfplay import (
    dno_loss,
    dno_prct_loss,
    gpo_loss,
    inpo_loss,
    onpo_loss,
    spo_rewards,
    sppo_loss,
)
from tests.losses.tabular import (
    assert_close,
    expected,
    float64,  # noqa: F401  (a fixture)
    gradient,
    kl,
    log_softmax,
    made_game,
    made_logits,
    minimise,
    pairs,
    product,
    softmax,
    tilted,
    uniform,
)

GAME = made_game(seed=1, size=5, beta=0.3)
PREVIOUS = made_logits(2)
OWN_PAIRS = product(softmax(PREVIOUS), softmax(PREVIOUS))
WIN_RATES = GAME.win_rates(softmax(PREVIOUS))

S = np.array([[-4.0, -6.5], [-3.0, -2.0]])
Q = np.array([[-5.0, -5.5], [-1.0, -4.0]])
U = np.array([[-4.5, -6.0], [-2.0, -2.5]])


def labelled(game, weights):
    """Weights of ordered pairs, winner first, when the judge labels pairs drawn with `weights`."""
    return weights * 2 * game.preferences


def inpo(eta, tau, previous=PREVIOUS, target="label"):
    """`log-probs [N] -> expected INPO loss` on the snapshot's own pairs."""
    own = product(softmax(previous), softmax(previous))
    weights = labelled(GAME, own) if target == "label" else own
    rates = pairs(GAME.win_rates(softmax(previous)))

    def run(logps):
        q, u = pairs(GAME.reference), pairs(previous)
        settings = {"eta": eta, "tau": tau, "target": target}
        return expected(inpo_loss(pairs(logps), q, u, rates, **settings), weights)

    return run


def test_inpo_is_the_squared_distance_of_its_mixed_margin_from_half_an_inverse_eta():
    found = inpo_loss(S, Q, U, eta=0.4, tau=0.1)
    for row in range(2):
        h = (
            (S[row, 0] - S[row, 1])
            - 0.25 * (Q[row, 0] - Q[row, 1])
            - 0.75 * (U[row, 0] - U[row, 1])
        )
        assert float(found[row]) == pytest.approx((h - 1 / 0.8) ** 2, rel=1e-12)


@pytest.mark.parametrize("target", ["label", "win_rate"])
@pytest.mark.parametrize(("eta", "tau"), [(0.9, 0.3), (0.5, 0.5), (2.0, 0.0)])
def test_inpo_minimiser_is_one_mirror_descent_step(eta, tau, target):
    # ref^(tau/eta) previous^(1 - tau/eta) exp(w/eta): a step of 1/eta at KL weight tau
    found = minimise(inpo(eta, tau, target=target), PREVIOUS, steps=3)
    mixed = tau / eta * GAME.reference + (1 - tau / eta) * PREVIOUS
    assert_close(found, tilted(mixed, WIN_RATES, 1 / eta), atol=1e-10)
    same = type(GAME)(GAME.preferences, GAME.reference, tau)
    assert_close(found, same.mirror_step(PREVIOUS, 1 / eta), atol=1e-10)


def test_inpo_minimiser_is_an_online_ipo_v1_step_of_one_over_eta():
    eta, rate = 0.9, GAME.size * GAME.beta / (4 * 0.9)
    v1 = lambda s: expected(  # noqa: E731
        online_ipo_v1_loss(pairs(s), pairs(GAME.reference), pairs(WIN_RATES), beta=GAME.beta),
        uniform(GAME),
    )
    step = log_softmax(PREVIOUS - rate * gradient(v1, PREVIOUS))
    assert_close(minimise(inpo(eta, GAME.beta), PREVIOUS, steps=3), step, atol=1e-10)


def test_inpo_label_and_win_rate_forms_differ_by_a_constant():
    policies = [made_logits(seed) for seed in range(5, 9)]
    gaps = [
        float(inpo(0.6, 0.2)(jnp.asarray(x)) - inpo(0.6, 0.2, target="win_rate")(jnp.asarray(x)))
        for x in policies
    ]
    assert np.ptp(gaps) < 1e-12


def test_inpo_gradient_vanishes_at_the_regularised_nash_policy():
    nash = GAME.nash()
    for eta in (0.3, 0.9):
        for target in ("label", "win_rate"):
            assert_close(gradient(inpo(eta, GAME.beta, nash, target), nash), np.zeros(5))
    elsewhere = gradient(inpo(0.9, GAME.beta, PREVIOUS), PREVIOUS)
    assert np.abs(elsewhere).max() > 1e-2


def test_inpo_in_the_first_round_is_ipo_against_the_reference():
    found = inpo_loss(S, Q, Q, eta=0.3, tau=0.1)
    assert_close(found, ipo_loss(S, Q, tau=0.3))
    assert_close(inpo_loss(S, Q, U, eta=0.3, tau=0.3), ipo_loss(S, Q, tau=0.3))
    assert_close(inpo_loss(S, Q, U, eta=0.3, tau=0.0), ipo_loss(S, U, tau=0.3))


def test_inpo_asks_for_the_win_rates_that_its_target_needs():
    with pytest.raises(ValueError, match="win_rates"):
        inpo_loss(S, Q, U, target="win_rate")


def test_onpo_fitted_twice_is_optimistic_mirror_descent():
    # With anchors a_t and policies a_t exp(eta r_{t-1}): pi+ ∝ pi exp(eta (2 r_t - r_{t-1}))
    eta, anchor, before = 0.4, made_logits(4), np.array([0.3, 0.6, 0.4, 0.7, 0.5])
    policy = tilted(anchor, before, eta)
    own = product(softmax(policy), softmax(policy))
    fit = lambda anchor: minimise(  # noqa: E731
        lambda s: expected(onpo_loss(pairs(s), pairs(anchor), eta=eta), labelled(GAME, own)),
        policy,
        steps=3,
    )
    found = fit(fit(anchor))
    now = GAME.win_rates(softmax(policy))
    assert_close(found, tilted(policy, 2 * now - before, eta), atol=1e-10)


def test_onpo_is_ipo_from_the_anchor():
    assert_close(onpo_loss(S, U, eta=0.25), ipo_loss(S, U, tau=4.0))


def test_sppo_is_the_authors_half_sum_for_a_pair_and_a_mean_for_lists():
    w, g, eta = np.array([[0.9, 0.2], [0.6, 0.4]]), S - U, 3.0
    code = 0.5 * ((g - eta * (w - 0.5)) ** 2).sum(-1)
    assert_close(sppo_loss(S, U, w, eta=eta), code)
    # `sppo_single`: (g_w - (p - 1/2)/b)² and (g_l + (p - 1/2)/b)², p the pair's own preference
    p = w[1, 0]
    single = 0.5 * ((g[1, 0] - eta * (p - 0.5)) ** 2 + (g[1, 1] + eta * (p - 0.5)) ** 2)
    assert float(sppo_loss(S[1], U[1], w[1], eta=eta)) == pytest.approx(single)
    three = lambda x: np.append(x[0], x[1, 0])  # noqa: E731
    listed = ((three(g) - eta * (three(w) - 0.5)) ** 2).mean()
    assert float(sppo_loss(three(S), three(U), three(w), eta=eta)) == pytest.approx(listed)


def test_sppo_at_hard_labels_is_half_of_trls_sppo_hard():
    # TRL's sppo_hard: (g_w - 1/(2 beta))² + (g_l + 1/(2 beta))², beta = 1/eta
    g, beta = S - U, 0.5
    hard = (g[:, 0] - 1 / (2 * beta)) ** 2 + (g[:, 1] + 1 / (2 * beta)) ** 2
    assert_close(sppo_loss(S, U, np.array([[1.0, 0.0]] * 2), eta=1 / beta), hard / 2)


def sppo_distance(eta):
    """Total variation between SPPO's minimiser and the exact mirror step."""
    weights = jnp.asarray(softmax(PREVIOUS))[:, None]

    def run(logps):
        columns = [x[:, None] for x in (logps, jnp.asarray(PREVIOUS), jnp.asarray(WIN_RATES))]
        return jnp.sum(weights[:, 0] * sppo_loss(*columns, eta=eta))

    found = minimise(run, tilted(PREVIOUS, WIN_RATES, eta), steps=30)
    return 0.5 * np.abs(softmax(found) - softmax(tilted(PREVIOUS, WIN_RATES, eta))).sum()


def test_sppo_is_near_a_mirror_step_for_small_steps_only():
    distances = [sppo_distance(eta) for eta in (0.1, 1.0, 10.0)]
    assert distances[0] < 1e-5
    assert distances[0] < distances[1] / 100
    assert distances[1] < distances[2] / 10
    assert distances[2] > 1e-3


def test_sppo_and_gpo_are_stationary_where_nobody_wins():
    # Rock, paper, scissors: uniform play wins half of the time, and the scores cancel.
    third = np.full(3, -math.log(3))
    half, zero = np.full(3, 0.5), np.zeros(3)
    for eta in (1.0, 1e3):
        assert float(sppo_loss(third, third, half, eta=eta)) == 0
        assert_close(jax.grad(sppo_loss)(jnp.asarray(third), third, half, eta=eta), zero)
    assert_close(jax.grad(gpo_loss)(jnp.asarray(third), third, zero), zero)


def test_gpo_is_sppo_where_scores_over_beta_are_steps_on_win_rates():
    w = np.array([[0.9, 0.2], [0.6, 0.4]])
    scores = 0.05 * 8.0 * (w - 0.5)
    assert_close(gpo_loss(S, U, scores, beta=0.05), sppo_loss(S, U, w, eta=8.0))
    fitted = U + scores / 0.05
    assert_close(gpo_loss(fitted, U, scores, beta=0.05), [0, 0])


def dno(eta, weights, rates=WIN_RATES):
    """`log-probs [N] -> expected DNO loss` on pairs drawn with `weights`."""
    return lambda logps: expected(
        dno_loss(pairs(logps), pairs(PREVIOUS), pairs(rates), eta=eta), weights
    )


@pytest.mark.parametrize("seed", [0, 7])
def test_dno_minimiser_is_a_mirror_step_whatever_the_pairs_distribution(seed):
    weights = np.random.default_rng(seed).dirichlet(np.ones(25)).reshape(5, 5)
    found = minimise(dno(0.8, weights), PREVIOUS, steps=12)
    assert_close(found, tilted(PREVIOUS, WIN_RATES, 1 / 0.8), atol=1e-9)


def test_dno_is_the_cross_entropy_of_the_soft_target():
    w, eta = np.array([0.9, 0.2]), 0.5
    target = 1 / (1 + math.exp(-(0.9 - 0.2)))
    fitted = 1 / (1 + math.exp(-eta * (0.5 + 0.5)))
    entropy = -(target * math.log(fitted) + (1 - target) * math.log(1 - fitted))
    assert float(dno_loss(S[0], U[0], w, eta=eta)) == pytest.approx(entropy, rel=1e-12)


def test_dno_gradient_vanishes_exactly_where_the_scaled_margin_is_the_difference_of_rewards():
    w, eta = np.array([0.9, 0.2]), 0.5
    slope = lambda m: jax.grad(dno_loss)(  # noqa: E731
        jnp.array([m, 0.0]), jnp.zeros(2), jnp.asarray(w), eta=eta
    )[0]
    assert_close(slope(0.7 / eta), 0)
    assert slope(0.7 / eta - 0.1) < 0 < slope(0.7 / eta + 0.1)


def test_dno_step_beats_the_snapshot_by_at_least_eta_times_the_kl():
    for seed in range(6):
        game, previous = made_game(seed), made_logits(seed)
        rates = game.win_rates(softmax(previous))
        for eta in (0.05, 0.5, 3.0):
            following = tilted(previous, rates, 1 / eta)
            assert softmax(following) @ rates >= 0.5 + eta * kl(following, previous) - 1e-12


def test_practical_dno_is_dpo_against_the_snapshot():
    assert_close(dno_prct_loss(S, U, eta=0.2), dpo_loss(S, U, beta=0.2))


def test_spo_rewards_sum_to_half_the_candidates_and_leave_out_oneself():
    rewards = spo_rewards(jnp.asarray(GAME.preferences))
    assert float(rewards.sum()) == pytest.approx(2.5, rel=1e-12)
    others = (GAME.preferences.sum(-1) - 0.5) / 4
    assert_close(rewards, others)


def test_spo_rewards_pass_over_candidates_that_are_not_there():
    where = np.array([True, True, False, True, False])
    kept = spo_rewards(jnp.asarray(GAME.preferences[np.ix_(where, where)]))
    junk = np.where(where[:, None] & where, GAME.preferences, np.nan)
    found = spo_rewards(jnp.asarray(junk), jnp.asarray(where))
    assert_close(found[where], kept)
    assert_close(found[~where], [0, 0])
    alone = spo_rewards(jnp.asarray(GAME.preferences), jnp.arange(5) == 2)
    assert_close(alone, [0, 0, 0.5, 0, 0])


CALLS = {
    "inpo": lambda s, fixed, rates: inpo_loss(s, fixed, fixed, rates, target="win_rate"),
    "onpo": lambda s, fixed, rates: onpo_loss(s, fixed),
    "sppo": lambda s, fixed, rates: sppo_loss(s, fixed, rates, eta=2.0),
    "gpo": lambda s, fixed, rates: gpo_loss(s, fixed, rates, beta=0.5),
    "dno": lambda s, fixed, rates: dno_loss(s, fixed, rates),
}


@pytest.mark.parametrize("name", CALLS)
def test_snapshots_and_win_rates_carry_no_gradient_even_if_made_of_the_policy(name):
    loss, rates = CALLS[name], jnp.array([0.8, 0.3])
    fixed = jnp.array([-3.0, -4.0])
    live = lambda s: loss(s, s + 0.5 * fixed, rates * jnp.exp(s))  # noqa: E731
    held = lambda s, at: loss(s, at + 0.5 * fixed, rates * jnp.exp(at))  # noqa: E731
    s = jnp.array([-1.0, -2.0])
    assert_close(jax.grad(live)(s), jax.grad(held)(s, s))


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_finite_differences(name):
    rates = jnp.array([[0.8, 0.3], [0.4, 0.5]])
    check_grads(lambda s: CALLS[name](s, U, rates), (jnp.asarray(S),), order=2, modes=["rev"])


def test_pairs_with_a_missing_candidate_count_nothing_and_lists_go_on_without_it():
    where, rates = np.array([[True, True], [True, False]]), np.array([[0.8, 0.3], [0.4, np.nan]])
    s = np.where(where, S, np.nan)
    for found in (
        inpo_loss(s, Q, U, where=where),
        onpo_loss(s, U, where=where),
        dno_loss(s, U, rates, where=where),
    ):
        assert found[0] > 0
        assert found[1] == 0
    alone = sppo_loss(s, U, rates, eta=2.0, where=where)[1]
    assert float(alone) == pytest.approx((-1.0 - 2.0 * (0.4 - 0.5)) ** 2, rel=1e-12)
