"""Games as language models of one token, through the ordinary sampler, judge and step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.games import builders, exact
from paxo.games.as_policy import GameJudge, pair_batch, prompts_of, stop_ids, table_policy
from paxo.games.expected import expected_loss
from paxo.objectives import objective
from paxo.sampling import SamplingConfig, make_sampler
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state
from paxo.training.step import make_train_step

BETA = 0.3


def games(num_games=3):
    return builders.numpy_game(5, 6, beta=BETA, num_games=num_games)


def some_logits(game):
    return game.reference_logps + jnp.sin(jnp.arange(game.reference_logps.size)).reshape(
        game.reference_logps.shape
    )


def one_step(loss, game, logits, batch, rate=1.0):
    policy, optimizer = table_policy(game), optax.sgd(rate)
    step = jax.jit(make_train_step(policy, loss, optimizer))
    rows = logits.reshape(-1, game.num_actions)
    state = init_state({"logits": rows}, loss, optimizer, jax.random.key(0))
    state, report = step(state, batch)
    return (rows - state.params["logits"]).reshape(logits.shape) / rate, report


@pytest.mark.parametrize(
    ("name", "settings"),
    [("online_ipo_v1", {"beta": BETA}), ("ipo", {"tau": 0.4})],
)
def test_the_training_steps_gradient_on_all_pairs_is_the_tabular_one(name, settings):
    game = games()
    loss, logits = objective(name, **settings), some_logits(game)
    batch = pair_batch(game, opponent=logits)
    grad, report = one_step(loss, game, logits, batch)
    # Each pair stands in both orders, once: the winner stands first as often as not.
    plain = lambda x: jnp.mean(_each_order_once(loss, game, x, logits))  # noqa: E731
    value, expected = jax.value_and_grad(plain)(logits)
    np.testing.assert_allclose(grad, expected, atol=3e-7)  # the step's head computes in float32
    np.testing.assert_allclose(report["loss"], value, rtol=1e-6)


def _each_order_once(loss, game, logits, opponent):
    """`expected_loss` on even preferences, with the win rates of the true ones."""
    even = game.replace(preferences=jnp.full_like(game.preferences, 0.5))
    extras = {"win_rates": game.win_rates(opponent)}
    return expected_loss(loss, even, logits, extras=extras)


def test_a_step_is_a_mirror_step_and_two_from_the_same_state_an_extragradient_step():
    game = games(1)[0]
    logits, eta = some_logits(game), 1 / (BETA + 3)
    loss, optimizer = (
        objective("online_ipo_v1", beta=BETA),
        optax.sgd(eta * BETA * game.num_actions / 4),
    )
    step = jax.jit(make_train_step(table_policy(game), loss, optimizer))
    state = init_state({"logits": logits[None]}, loss, optimizer, jax.random.key(0))
    against = lambda state: pair_batch(game, opponent=state.params["logits"][0])  # noqa: E731
    half, _ = step(state, against(state))
    state, _ = step(state, against(half))
    expected = exact.mirror_step(game, logits, eta=eta)
    np.testing.assert_allclose(jax.nn.log_softmax(half.params["logits"][0]), expected, atol=1e-6)
    expected = exact.mirror_step(game, logits, eta=eta, opponent=expected)
    np.testing.assert_allclose(jax.nn.log_softmax(state.params["logits"][0]), expected, atol=1e-6)


def test_the_sampler_draws_each_games_policy_and_reports_its_log_probs():
    game, draws = games(), 4000
    policy = table_policy(game)
    params = {"logits": some_logits(game)}
    sampler = make_sampler(policy, SamplingConfig(3, num_candidates=2), stop_ids(game))
    drawn = sampler(params, prompts_of(game, draws), jax.random.key(1))
    assert bool(drawn.finished.all())
    np.testing.assert_array_equal(drawn.mask, np.arange(3) < 1 + 0 * drawn.tokens)
    logps = jax.nn.log_softmax(params["logits"])
    actions = np.asarray(drawn.tokens)[..., 0].reshape(draws, 3, 2)
    for g in range(3):
        np.testing.assert_allclose(
            np.asarray(drawn.logps)[..., 0].reshape(draws, 3, 2)[:, g],
            np.asarray(logps)[g][actions[:, g]],
            atol=1e-6,
        )
        frequency = np.bincount(actions[:, g].ravel(), minlength=6) / (2 * draws)
        p = np.exp(logps[g])
        assert (np.abs(frequency - p) < 5 * np.sqrt(p / (2 * draws))).all()


def test_the_judge_knows_the_game():
    game = games()
    sampler = make_sampler(table_policy(game), SamplingConfig(1, num_candidates=4), stop_ids(game))
    prompts = prompts_of(game, 5)
    drawn = sampler({"logits": game.reference_logps}, prompts, jax.random.key(2))
    judged = GameJudge(game)(prompts, drawn)
    assert judged.shape == (15, 4, 4)
    np.testing.assert_array_equal(judged + judged.swapaxes(-1, -2), 1)
    b, i, j = 7, 0, 3
    y, z = int(drawn.tokens[b, i, 0]), int(drawn.tokens[b, j, 0])
    assert judged[b, i, j] == game.preferences[b % 3, y, z]


def test_a_round_of_sampling_judging_and_steps_moves_towards_the_nash_policy():
    # Pairs of the uniform policy, an opponent drawn from the live one: sampled mirror descent.
    game = builders.cyclic(3, beta=BETA, reference_logits=jnp.array([2.0, 0.0, 0.0]))[None]
    policy, loss = table_policy(game), objective("online_ipo_v1", beta=BETA)
    optimizer = optax.sgd(0.3 * BETA * 3 / 4)
    step = jax.jit(make_train_step(policy, loss, optimizer))
    state = init_state(policy.init(jax.random.key(0)), loss, optimizer, jax.random.key(0))
    sampler = make_sampler(policy, SamplingConfig(1, num_candidates=1), stop_ids(game))
    prompts, judge, rng = prompts_of(game, 256), GameJudge(game), np.random.default_rng(0)
    reference = make_scorer(policy, policy.init(jax.random.key(0)))
    before = float(exact.duality_gap(game, state.params["logits"])[0])
    for round_ in range(40):
        against = sampler(state.params, prompts, jax.random.key(round_))
        actions = rng.integers(0, 3, (1, 256, 2))
        both = np.concatenate([actions[0], np.asarray(against.tokens)[:, 0]], -1)
        judged = judge(prompts, against.__class__(both[..., None], None, None, None))
        batch = pair_batch(game, actions)
        batch = batch.replace(extras={"win_rates": jnp.asarray(judged[:, None, :2, 2])})
        batch = attach_logps(batch, "reference", reference)
        state, _ = step(state, batch)
    assert float(exact.duality_gap(game, state.params["logits"])[0]) < 0.05 * before


def test_games_on_several_axes_are_refused():
    game = builders.random_game(jax.random.key(0), 3, beta=0.1, batch_shape=(2, 2))
    with pytest.raises(ValueError, match=r"one axis; got \[2, 2\]"):
        table_policy(game)
