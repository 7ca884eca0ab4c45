"""A game is checked when built, and is a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.preference_game import PreferenceGame

GOOD = np.array([[0.5, 0.9], [0.1, 0.5]])


def test_antisymmetry_is_made_exact_within_rounding_and_the_reference_normalised():
    with jax.enable_x64(False):
        rough = jnp.array([[0.5, 0.9 - 3e-7], [0.1, 0.5 + 1e-7]], jnp.float32)
        game = PreferenceGame(rough, jnp.array([3.0, 1.0]), 0.1)
        np.testing.assert_array_equal(game.preferences + game.preferences.T, 1)
        np.testing.assert_array_equal(jnp.diagonal(game.preferences), 0.5)
        assert game.preferences.dtype == jnp.float32
    game = PreferenceGame(GOOD, np.array([3.0, 1.0]), 0.1)
    assert game.preferences.dtype == jnp.float64
    np.testing.assert_allclose(jnp.exp(game.reference_logps).sum(), 1, rtol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preferences": np.ones((2, 3)) / 2}, r"preferences must have shape \[..., N, N\]"),
        ({"reference_logps": np.zeros(3)}, r"reference_logps must have shape \[2\].*got \[3\]"),
        ({"reference_logps": np.zeros((4, 2))}, r"got \[4, 2\]. Use jnp.broadcast_to"),
        ({"beta": np.ones(2)}, r"beta must be one number.*got shape \[2\].*jax.vmap"),
        ({"beta": -0.1}, "beta must be at least 0; got -0.1"),
        ({"beta": np.nan}, "beta must be finite; got nan"),
        ({"beta": "low"}, "beta must be an array of numbers; got 'low'"),
        ({"preferences": GOOD + 0j}, "preferences must be an array of real numbers; got complex"),
        ({"reference_logps": np.array([0, -np.inf])}, r"reference_logps\[1\] must be finite"),
        ({"preferences": np.array([[0.5, 1.2], [-0.2, 0.5]])}, r"\[0, 1\] must lie in \[0, 1\]"),
        ({"preferences": np.array([[0.5, np.nan], [0, 0.5]])}, r"\[0, 1\] must be finite; got nan"),
        ({"preferences": np.array([[0.5, 0.9], [0.1, 1.0]])}, r"\[1, 1\] must be 1/2.*got 1"),
        ({"preferences": np.array([[0.5, 0.9], [0.2, 0.5]])}, r"must be 1; got 0.9 \+ 0.2.*pass"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"preferences": GOOD, "reference_logps": np.zeros(2), "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        PreferenceGame(**(good | arguments))


def test_the_failing_game_of_several_is_named():
    several = np.stack([GOOD, GOOD])
    several[1, 0, 0] = 0.6
    with pytest.raises(ValueError, match=r"preferences\[1, 0, 0\] must be 1/2"):
        PreferenceGame(several, np.zeros((2, 2)), 0.1)


def test_a_game_goes_through_jit_vmap_and_tree_map_without_being_checked_again():
    game = builders.numpy_game(0, 5, beta=0.2, num_games=3)
    gaps = exact.duality_gap(game, jnp.zeros((3, 5)))
    np.testing.assert_allclose(jax.jit(exact.duality_gap)(game, jnp.zeros((3, 5))), gaps)
    betas = jnp.array([0.2, 0.4])
    by_beta = jax.vmap(lambda b: exact.duality_gap(game.replace(beta=b), jnp.zeros((3, 5))))(betas)
    np.testing.assert_allclose(by_beta[0], gaps)
    shapes = jax.tree.map(lambda x: x.shape, game)
    assert (shapes.preferences, shapes.beta) == ((3, 5, 5), ())
    assert jax.tree.structure(game) == jax.tree.structure(game[0])
    np.testing.assert_array_equal(game[1].preferences, game.preferences[1])


def test_games_are_indexed_and_walked_through_as_far_as_there_are_any():
    games = builders.numpy_game(0, 4, beta=0.2, num_games=3)
    np.testing.assert_array_equal(games[-1].preferences, games[2].preferences)
    for index in (3, -4, (0, 0)):  # jax would take the last one, or an action
        with pytest.raises(IndexError):
            games[index]
    assert [game.batch_shape for game in games] == [(), (), ()]  # an end, because of that error
    with pytest.raises(IndexError):
        games[0][0]
    taken = jax.jit(lambda i: games[i].preferences)(1)  # an index that is not known yet
    np.testing.assert_array_equal(taken, games.preferences[1])


def test_logits_that_do_not_fit_are_named():
    games = builders.numpy_game(0, 4, beta=0.2, num_games=3)
    for run in (exact.duality_gap, exact.unregularised_gap, exact.rotation_rate):
        with pytest.raises(ValueError, match=r"logits must have shape \[..., 3, 4\].*got \[3, 5\]"):
            run(games, jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"logits must have.*a row for each game.*got \[2, 4\]"):
        exact.mirror_step(games, jnp.zeros((2, 4)), eta=0.1)
    with pytest.raises(ValueError, match=r"opponent must have shape \[..., 3, 4\].*got \[5\]"):
        exact.best_response(games, jnp.zeros(5))
    with pytest.raises(ValueError, match="second must have shape"):
        exact.payoff(games, jnp.zeros(4), jnp.zeros(3))
    for fits in ((4,), (1, 4), (3, 4), (7, 3, 4), (7, 1, 4)):
        assert games.checked("logits", jnp.zeros(fits)).shape == fits


def test_win_rates_are_expectations_over_the_opponent():
    game = builders.numpy_game(0, 4, beta=0.2, num_games=2)
    opponent = jnp.array([0.3, -1.0, 2.0, 0.0])
    expected = game.preferences[1] @ (np.exp(opponent) / np.exp(opponent).sum())
    np.testing.assert_allclose(game[1].win_rates(opponent), expected, rtol=1e-13)


def test_a_float32_reference_beside_float64_preferences_is_computed_in_float64():
    game = PreferenceGame(GOOD, np.array([3.0, 1.0], np.float32), np.float32(0.1))
    assert {x.dtype for x in jax.tree.leaves(game)} == {np.dtype("float64")}
