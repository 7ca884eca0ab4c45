"""Magnetic preference optimisation: its closed form, and where its rounds lead."""

import numpy as np

from paxo.losses.magnetic import mpo_magnetic_loss
from paxo.losses.nash import online_ipo_v1_loss
from tests.losses.tabular import (
    assert_close,
    expected,
    float64,  # noqa: F401  (a fixture)
    gradient,
    log_softmax,
    made_game,
    made_logits,
    minimise,
    pairs,
    softmax,
    uniform,
)

GAME, PREVIOUS, MAGNET = made_game(1), made_logits(1), made_logits(2)
ALPHA, ETA = 0.3, 0.8


def step(previous, magnet):
    """The published update of a whole policy."""
    moved = previous + ETA * ALPHA * magnet + ETA * GAME.win_rates(softmax(previous))
    return log_softmax(moved / (1 + ETA * ALPHA))


def loss(logps):
    win_rates = GAME.win_rates(softmax(PREVIOUS))
    arrays = (pairs(x) for x in (logps, MAGNET, PREVIOUS, win_rates))
    return expected(mpo_magnetic_loss(*arrays, alpha=ALPHA, eta=ETA), uniform(GAME))


def test_minimiser_is_the_closed_form():
    assert_close(minimise(loss, PREVIOUS, steps=3), step(PREVIOUS, MAGNET), atol=1e-9)


def test_it_is_an_online_ipo_v1_step_towards_the_magnet():
    # Mirror step eta / (1 + eta alpha) on the game of KL weight alpha to the magnet.
    mirror = ETA / (1 + ETA * ALPHA)
    moved = (1 - mirror * ALPHA) * PREVIOUS + mirror * ALPHA * MAGNET
    wanted = log_softmax(moved + mirror * GAME.win_rates(softmax(PREVIOUS)))
    assert_close(step(PREVIOUS, MAGNET), wanted)
    win_rates = GAME.win_rates(softmax(PREVIOUS))
    target = lambda s: expected(  # noqa: E731
        online_ipo_v1_loss(pairs(s), pairs(MAGNET), pairs(win_rates), beta=ALPHA), uniform(GAME)
    )
    # Without a snapshot's KL (eta without bound) it is that loss.
    free = lambda s: expected(  # noqa: E731
        mpo_magnetic_loss(
            pairs(s), pairs(MAGNET), pairs(PREVIOUS), pairs(win_rates), alpha=ALPHA, eta=1e12
        ),
        uniform(GAME),
    )
    assert_close(gradient(free, PREVIOUS), gradient(target, PREVIOUS), atol=1e-9)


def test_rounds_with_a_fixed_magnet_find_its_regularised_nash_policy():
    policy = PREVIOUS
    for _ in range(300):
        policy = step(policy, GAME.reference)
    assert GAME.beta == ALPHA
    assert_close(policy, GAME.nash(), atol=1e-9)


def test_rounds_with_a_moving_magnet_find_the_games_own_nash_policy():
    policy = magnet = PREVIOUS
    for _ in range(200):
        for _ in range(60):
            policy = step(policy, magnet)
        magnet = policy
    win_rates = GAME.win_rates(softmax(policy))
    assert win_rates.max() < 0.5 + 1e-6  # nothing beats it


def test_nothing_is_left_to_do_at_equal_policies_and_win_rates():
    equal = np.full(2, 0.5)
    assert float(mpo_magnetic_loss(PREVIOUS[:2], PREVIOUS[:2], PREVIOUS[:2], equal)) == 0
