"""Exact figures of games against brute force and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact

with jax.enable_x64(True):
    GAMES = builders.numpy_game(1, 6, beta=0.3, num_games=4)
    POLICIES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))


def plain_kl(p, q):
    p, q = np.exp(jax.nn.log_softmax(p)), np.exp(jax.nn.log_softmax(q))
    return (p * np.log(p / q)).sum(-1)


def test_kl_is_the_textbook_sum_and_exact_for_policies_that_nearly_agree():
    other = POLICIES[::-1]
    np.testing.assert_allclose(
        exact.kl_divergence(POLICIES, other), plain_kl(POLICIES, other), rtol=1e-12
    )
    nudge = 1e-9 * np.arange(6)
    p = np.exp(jax.nn.log_softmax(POLICIES[0]))
    second_order = 0.5 * (p @ nudge**2 - (p @ nudge) ** 2)
    found = exact.kl_divergence(POLICIES[0], POLICIES[0] + nudge)
    assert float(found) == pytest.approx(second_order, rel=1e-5)  # 1e-18, far below 1e-16
    lost = jnp.array([0.0, -jnp.inf])
    assert float(exact.kl_divergence(lost, jnp.zeros(2))) == pytest.approx(math.log(2))
    assert bool(jnp.isfinite(jax.grad(exact.kl_divergence)(1e4 * POLICIES[0], POLICIES[1])).all())


def test_payoff_is_antisymmetric_and_one_half_against_oneself():
    there = exact.payoff(GAMES, POLICIES, POLICIES[::-1])
    back = exact.payoff(GAMES, POLICIES[::-1], POLICIES)
    np.testing.assert_allclose(there + back, 1, atol=1e-14)
    np.testing.assert_allclose(exact.payoff(GAMES, POLICIES, POLICIES), 0.5, atol=1e-15)
    by_hand = np.exp(jax.nn.log_softmax(POLICIES[0])) @ GAMES.preferences[0]
    by_hand = by_hand @ np.exp(jax.nn.log_softmax(POLICIES[3]))
    by_hand -= 0.3 * plain_kl(POLICIES[0], GAMES.reference_logps[0])
    by_hand += 0.3 * plain_kl(POLICIES[3], GAMES.reference_logps[0])
    assert float(there[0]) == pytest.approx(float(by_hand), rel=1e-12)


def test_no_policy_does_better_than_the_best_response_and_its_slope_vanishes():
    response = exact.best_response(GAMES, POLICIES)
    best = exact.payoff(GAMES, response, POLICIES)
    rng = np.random.default_rng(1)
    for size in (1e-2, 0.3, 3.0):
        other = response + size * rng.standard_normal(response.shape)
        assert (exact.payoff(GAMES, other, POLICIES) <= best).all()
    slope = jax.grad(lambda x: exact.payoff(GAMES, x, POLICIES).sum())(response)
    np.testing.assert_allclose(slope, 0, atol=1e-15)
    greedy = exact.best_response(GAMES.replace(beta=0.0), POLICIES)
    np.testing.assert_array_equal(jnp.argmax(GAMES.win_rates(POLICIES), -1), jnp.argmax(greedy, -1))
    np.testing.assert_array_equal(jnp.exp(greedy).sum(-1), 1)


@pytest.mark.parametrize("beta", [0.01, 0.3, 5.0])
def test_the_gap_is_the_difference_of_both_players_best_payoffs(beta):
    games = GAMES.replace(beta=beta)
    response = exact.best_response(games, POLICIES)
    highest = exact.payoff(games, response, POLICIES)
    lowest = exact.payoff(games, POLICIES, response)
    np.testing.assert_allclose(
        exact.duality_gap(games, POLICIES), highest - lowest, rtol=1e-11, atol=1e-15
    )


def test_without_regularisation_the_gap_is_twice_the_best_win_rate_beyond_a_half():
    rates = GAMES.preferences @ jax.nn.softmax(POLICIES)[..., None]
    expected = 2 * (rates[..., 0].max(-1) - 0.5)
    np.testing.assert_allclose(exact.unregularised_gap(GAMES, POLICIES), expected, rtol=1e-13)
    without = GAMES.replace(beta=0.0)
    np.testing.assert_allclose(exact.duality_gap(without, POLICIES), expected, rtol=1e-13)
    small = GAMES.replace(beta=1e-7)
    np.testing.assert_allclose(exact.duality_gap(small, POLICIES), expected, atol=1e-5)


def test_gaps_broadcast_over_a_trajectory():
    trajectory = jnp.stack([POLICIES, 2 * POLICIES])
    gaps = exact.duality_gap(GAMES, trajectory)
    np.testing.assert_allclose(gaps[1], exact.duality_gap(GAMES, 2 * POLICIES), rtol=1e-14)


@pytest.mark.parametrize("beta", [1e-3, 0.01, 0.1, 1.0, 30.0])
def test_nash_policies_are_found_to_the_last_digits(beta):
    for seed in range(3):
        games = builders.random_game(jax.random.key(seed), 8, beta=beta, batch_shape=(40,))
        nash = exact.nash_policy(games)
        assert float(exact.duality_gap(games, nash).max()) < 1e-24
        np.testing.assert_allclose(exact.best_response(games, nash), nash, atol=1e-9)
    pure = builders.rock_paper_scissors(beta=beta, reference_logits=jnp.array([5.0, 0.0, -5.0]))
    assert float(exact.duality_gap(pure, exact.nash_policy(pure))) < 1e-24


def test_one_game_and_several_have_the_same_nash_policies():
    np.testing.assert_allclose(exact.nash_policy(GAMES)[2], exact.nash_policy(GAMES[2]), rtol=1e-12)


def test_a_game_without_kl_has_no_single_nash_policy():
    with pytest.raises(ValueError, match="needs beta > 0; got 0"):
        exact.nash_policy(GAMES.replace(beta=0.0))


def test_mirror_step_maximises_its_own_objective():
    # <w, p> - beta KL(p|ref) - (1/eta - beta) KL(p|policy)
    eta, rates = 0.8, GAMES.win_rates(POLICIES)
    found = exact.mirror_step(GAMES, POLICIES, eta=eta)

    def value(x):
        to = exact.kl_divergence
        gained = (jax.nn.softmax(x) * rates).sum(-1) - 0.3 * to(x, GAMES.reference_logps)
        return (gained - (1 / eta - 0.3) * to(x, POLICIES)).sum()

    np.testing.assert_allclose(jax.grad(value)(found), 0, atol=1e-15)
    np.testing.assert_allclose(
        exact.mirror_step(GAMES, POLICIES, eta=1 / 0.3),
        exact.best_response(GAMES, POLICIES),
        atol=1e-14,
    )


@pytest.mark.parametrize(("num_actions", "omega"), [(3, 0.2887), (5, 0.3078)])
def test_rotation_rate_of_a_cycle_is_half_a_cotangent_over_n(num_actions, omega):
    game = builders.cyclic(num_actions, beta=0.1)
    found = float(exact.rotation_rate(game, jnp.zeros(num_actions)))
    assert found == pytest.approx(0.5 / num_actions / math.tan(math.pi / (2 * num_actions)))
    assert found == pytest.approx(omega, abs=5e-5)


def test_rotation_rate_is_the_spectral_radius_and_at_most_a_half():
    for i in range(4):
        p = np.exp(jax.nn.log_softmax(POLICIES[i]))
        matrix = (GAMES.preferences[i] - 0.5) @ (np.diag(p) - np.outer(p, p))
        radius = np.abs(np.linalg.eigvals(matrix)).max()
        assert float(exact.rotation_rate(GAMES, POLICIES)[i]) == pytest.approx(radius, rel=1e-9)
        assert radius <= 0.5


def test_golden_rotation_rates_and_how_many_games_a_step_makes_unstable():
    game = builders.egpo_golden(beta=0.01)
    nash = exact.nash_policy(game)
    published = [0.114, 0.159, 0.183, 0.161, 0.141, 0.121, 0.087, 0.148, 0.173, 0.151]
    np.testing.assert_allclose(exact.rotation_rate(game, nash), published, atol=6e-4)
    limit = exact.stability_limit(game)
    assert int((limit < 0.8).sum()) == 4
    assert int((limit < exact.egpo_step_size(0.01)).sum()) == 0
    smaller = builders.egpo_golden(beta=0.001)
    assert int((exact.stability_limit(smaller) < exact.egpo_step_size(0.001)).sum()) == 9


def test_jacobians_at_the_nash_policy_have_the_predicted_radius():
    # Mirror descent turns by i omega: |lambda|² = (1 - eta beta)² + (eta omega)².
    eta, game = 0.5, GAMES[0]
    nash = exact.nash_policy(game)
    jacobian = jax.jacobian(lambda x: exact.mirror_step(game, x, eta=eta))(nash)
    omega = float(exact.rotation_rate(game, nash))
    radius = np.abs(np.linalg.eigvals(np.asarray(jacobian))).max()
    assert radius == pytest.approx(math.hypot(1 - eta * 0.3, eta * omega), rel=1e-9)

    def extragradient(x):
        return exact.mirror_step(game, x, eta=eta, opponent=exact.mirror_step(game, x, eta=eta))

    radii = np.abs(np.linalg.eigvals(np.asarray(jax.jacobian(extragradient)(nash))))
    turning = math.hypot(1 - eta * 0.3 - (eta * omega) ** 2, eta * omega * (1 - eta * 0.3))
    assert np.abs(radii - turning).min() < 1e-9
    assert radii.max() == pytest.approx(1 - eta * 0.3, rel=1e-9)  # N even: a direction unturned
