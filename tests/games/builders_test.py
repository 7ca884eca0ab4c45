"""Builders against published checksums and facts about the games."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.losses.reward import general_preference_scores

CYCLIC_NASH = np.log(np.array([4, 3, 4]) / 11)


def test_golden_game_has_its_checksums():
    game = builders.egpo_golden(beta=0.1)
    stream = builders._TorchStream(builders.EGPO_SEED)
    logits = stream.normals(100).reshape(10, 10)
    first = [-1.0409, 1.2753, 1.8447, -0.3462, 0.5819, 1.2979, 1.5328, -0.7541, 0.1614, 0.6510]
    np.testing.assert_allclose(logits[0], first, atol=5e-5)
    assert logits.sum() == pytest.approx(-5.0687203, abs=1e-5)  # torch's are float32
    assert float(game.preferences[0, 1, 0]) == pytest.approx(0.74345791, abs=5e-9)
    assert float(game.preferences[9, 9, 8]) == pytest.approx(0.08210254, abs=5e-9)
    assert float(jnp.tril(game.preferences, -1).sum()) == pytest.approx(219.95974857, abs=5e-9)
    np.testing.assert_allclose(
        game.reference_logps, jax.nn.log_softmax(jnp.asarray(logits)), rtol=1e-14
    )
    nash = [0.049001, 0.112852, 0.142972, 0.044872, 0.246797]
    nash += [0.035011, 0.146758, 0.021621, 0.016059, 0.184056]
    np.testing.assert_allclose(jnp.exp(exact.nash_policy(game)[0]), nash, atol=5e-7)


def test_torchs_numbers_are_emulated():
    stream = builders._TorchStream(0)
    np.testing.assert_allclose(stream.uniforms(3), [0.4962566, 0.7682218, 0.0884774], atol=5e-8)
    normals = builders._TorchStream(0).normals(16)
    np.testing.assert_allclose(normals[:4], [-1.1258, -1.1524, -0.2506, -0.4339], atol=5e-5)
    with pytest.raises(ValueError, match="fewer than 16"):
        builders.egpo_golden(beta=0.1, num_actions=3, num_games=5)


def test_a_cycle_beats_those_that_follow_and_its_nash_policy_is_uniform():
    game = builders.cyclic(5, beta=0.1, win=0.9)
    np.testing.assert_allclose(game.preferences[0], [0.5, 0.9, 0.9, 0.1, 0.1])
    even = builders.cyclic(4, beta=0.1)
    np.testing.assert_allclose(even.preferences[1], [0.0, 0.5, 1.0, 0.5])
    for cycle in (game, even):
        assert float(exact.duality_gap(cycle, jnp.zeros(cycle.num_actions))) < 1e-24
    for wrong in (2, 3.5):
        with pytest.raises(ValueError, match="integer of at least 3"):
            builders.cyclic(wrong, beta=0.1)
    with pytest.raises(ValueError, match=r"win must be a probability.*got 1.5"):
        builders.cyclic(3, beta=0.1, win=1.5)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_no_reward_ranks_all_edges_of_a_cycle(n):
    # Adjacent edges that an order of the actions gets right: at most n - 1 of n.
    wins = np.asarray(builders.cyclic(n, beta=0.1).preferences) > 0.5
    right = [
        sum(wins[i, (i + 1) % n] == (place[i] > place[(i + 1) % n]) for i in range(n))
        for place in itertools.permutations(range(n))
    ]
    assert max(right) / n == (n - 1) / n
    if n > 3:
        return
    # Two numbers a candidate do what one cannot: three embeddings, a third of a turn apart.
    turns = 2 * np.pi / 3 * np.arange(3)
    embeddings = jnp.asarray(np.stack([np.cos(turns), np.sin(turns)], -1))
    scores = general_preference_scores(embeddings)
    np.testing.assert_array_equal(scores > 1e-9, wins)
    np.testing.assert_allclose(scores[0, 1], np.sqrt(0.75), rtol=1e-12)


def test_bradley_terry_rewards_tilt_the_nash_policy_towards_them():
    game = builders.bradley_terry(jnp.array([1.0, 0.0, -1.0]), beta=0.2)
    np.testing.assert_allclose(game.preferences[0, 2], 1 / (1 + np.exp(-2)), rtol=1e-14)
    nash = exact.nash_policy(game)
    assert nash[0] > nash[1] > nash[2]
    with pytest.raises(ValueError, match=r"rewards must have shape \[..., N\]"):
        builders.bradley_terry(1.0, beta=0.2)


def test_random_games_are_reproducible_and_batched():
    make = jax.jit(lambda key: builders.random_game(key, 6, beta=0.1, batch_shape=(2, 4)))
    game, again = make(jax.random.key(3)), make(jax.random.key(3))
    assert game.batch_shape == (2, 4)
    np.testing.assert_array_equal(game.preferences, again.preferences)
    assert 0.4 < float(jnp.tril(game.preferences, -1).sum() / (8 * 15)) < 0.6


def test_comals_cycle_has_the_nash_policy_four_three_four():
    game = builders.comal_3x3(beta=0.0)
    np.testing.assert_allclose(game.win_rates(CYCLIC_NASH), 0.5, atol=1e-15)
    assert float(game.preferences[0, 2]) == 0.8


def test_copg_bandit_has_its_published_solution():
    bandit = builders.copg_bandit()
    np.testing.assert_allclose(jnp.exp(bandit.best_policy), [0.70538, 0.25950, 0.03512], atol=5e-6)
    assert float(bandit.value(bandit.best_policy)) == pytest.approx(2.1252, abs=5e-5)
    assert float(bandit.regret(jnp.zeros(3))) == pytest.approx(0.29187, abs=5e-6)
    game = bandit.game()
    assert float(game.preferences[0, 2]) == pytest.approx(1 / (1 + np.exp(-1.5)))


def test_didactic_bandit_has_its_exact_figures():
    bandit = builders.didactic_bandit()
    reference = np.exp(bandit.reference_logps)
    np.testing.assert_allclose(
        bandit.rewards @ reference, [0.0390, 0.3772, 0.0955, 0.1876], atol=6e-5
    )
    np.testing.assert_allclose(
        reference[[70, 20, 0, 99]], [2.1e-3, 2.4e-2, 0.078, 0.042], rtol=0.03
    )
    assert reference.sum() == pytest.approx(1, rel=1e-12)
    # Without a KL term the best policy is the peak, and regret the reward that is missed.
    np.testing.assert_array_equal(jnp.argmax(bandit.best_policy, -1), [70, 20, 70, 70])
    missed = jax.jit(bandit.regret)(jnp.log(reference))
    np.testing.assert_allclose(missed, 1 - bandit.rewards @ reference, rtol=1e-12)
    with pytest.raises(ValueError, match="beta must be at least 0; got -1"):
        builders.didactic_bandit(beta=-1)
