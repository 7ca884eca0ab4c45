"""Games as language models of one token, through the ordinary sampler, judge and step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.games import builders, exact
from paxo.games.as_policy import GameJudge, pair_batch, prompts_of, stop_ids, table_policy
from paxo.games.expected import expected_loss
from paxo.games.policies import GamePolicy
from paxo.games.preference_game import PreferenceGame
from paxo.games.solve import Update, solve
from paxo.judges.checks import CheckedJudge
from paxo.judges.matrices import MatrixJudge
from paxo.objectives import objective
from paxo.sampling import SamplingConfig, make_sampler
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state
from paxo.training.step import make_train_step
from tests.games.playing import METHODS

BETA = 0.3
KEY = jax.random.key(11)


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
    value, expected = jax.jit(jax.value_and_grad(plain))(logits)
    np.testing.assert_allclose(grad, expected, atol=3e-7)  # the step's head computes in float32
    np.testing.assert_allclose(report["loss"], value, rtol=1e-6)


def _each_order_once(loss, game, logits, opponent):
    """`expected_loss` on even preferences, with the win rates of the true ones."""
    even = game.replace(preferences=jnp.full_like(game.preferences, 0.5))
    extras = {"win_rates": game.win_rates(opponent)}
    return expected_loss(loss, even, logits, extras=extras)


def test_the_training_step_is_an_update_of_solve_and_taken_twice_is_egpo():
    game, eta = games(1)[0], 1 / (BETA + 3)
    loss = objective("online_ipo_v1", beta=BETA)
    optimizer = optax.sgd(eta * BETA * game.num_actions / 4)
    step = make_train_step(table_policy(game), loss, optimizer)
    table = GamePolicy(
        lambda key, game: init_state({"logits": some_logits(game)[None]}, loss, optimizer, key),
        lambda state: state.params["logits"][0],
    )

    def extragradient(state, game, t, key, memory):
        half, _ = step(state, pair_batch(game, opponent=table.logits(state)))
        return step(state, pair_batch(game, opponent=table.logits(half)))[0], memory

    by_step = solve(game, Update(extragradient), 20, policy=table, at=(1, 20))
    sizes = jnp.array([eta, 0.0])
    exactly = solve(game, METHODS["egpo"], 20, at=(1, 20), params=some_logits(game), memory=sizes)
    difference = jax.nn.log_softmax(by_step.logits) - jax.nn.log_softmax(exactly.logits)
    np.testing.assert_allclose(difference, 0, atol=2e-6)  # the step's head computes in float32
    assert int(by_step.params.step) == 20


@pytest.fixture(scope="module")
def drawn():
    """Four thousand prompts of each of three games, two completions each."""
    with jax.enable_x64(True):
        game = games()
        sampler = make_sampler(
            table_policy(game), SamplingConfig(3, num_candidates=2), stop_ids(game)
        )
        prompts, params = prompts_of(game, 4000), {"logits": some_logits(game)}
        return game, prompts, sampler(params, prompts, jax.random.key(1))


def test_the_sampler_draws_each_games_policy_and_reports_its_log_probs(drawn):
    game, _, found = drawn
    assert bool(found.finished.all())
    np.testing.assert_array_equal(found.mask, np.arange(3) < 1 + 0 * found.tokens)
    logps = np.asarray(jax.nn.log_softmax(some_logits(game)))
    actions, reported = (
        np.asarray(x)[..., 0].reshape(4000, 3, 2) for x in (found.tokens, found.logps)
    )
    for g in range(3):
        np.testing.assert_allclose(reported[:, g], logps[g][actions[:, g]], atol=1e-6)
        frequency = np.bincount(actions[:, g].ravel(), minlength=6) / 8000
        p = np.exp(logps[g])
        assert (np.abs(frequency - p) < 5 * np.sqrt(p / 8000)).all()


def test_the_judge_knows_the_game(drawn):
    game, prompts, found = drawn
    judged = GameJudge(game)(prompts, found)
    assert judged.shape == (12000, 2, 2)
    np.testing.assert_array_equal(judged + judged.swapaxes(-1, -2), 1)
    for b in (7, 6001, 11999):
        y, z = (int(x) for x in found.tokens[b, :, 0])
        assert judged[b, 0, 1] == game.preferences[b % 3, y, z]


@pytest.fixture(scope="module")
def played():
    """A game of three, `round_(state, opponent's params, key) -> state`, and its first state.

    All of it ordinary: the sampler draws pairs from the uniform policy and an opponent for each
    from the live one, a judge of a preference matrix compares their texts, a training step follows.
    """
    with jax.enable_x64(True):
        game = builders.cyclic(3, beta=BETA, win=0.9, reference_logits=jnp.array([1.0, 0.0, 0.0]))
        policy, loss = table_policy(game), objective("online_ipo_v1", beta=BETA)
        optimizer = optax.sgd(RATE)
        step = jax.jit(make_train_step(policy, loss, optimizer))
        start = policy.init(jax.random.key(0))
        first = init_state(start, loss, optimizer, jax.random.key(0))
        uniform = {"logits": jnp.zeros((1, 3))}
        draw = make_sampler(policy, SamplingConfig(1, num_candidates=2), stop_ids(game))
        judge = CheckedJudge(MatrixJudge(game.preferences, lambda prompt, text: "RPS".index(text)))
        reference = make_scorer(policy, start)
        batch_of = jax.jit(lambda actions, rates: pair_batch(game, actions).replace(extras=rates))

    def round_(state, opponent, key):
        prompts = prompts_of(game, NUM_PROMPTS)
        for_pairs, for_opponent = jax.random.split(key)
        pairs = draw(uniform, prompts, for_pairs).tokens[..., 0]
        against = draw(opponent, prompts, for_opponent).tokens[:, :1, 0]
        texts = [["RPS"[y] for y in row] for row in np.concatenate([pairs, against], 1)]
        judged = judge(["Your move?"] * NUM_PROMPTS, texts)
        rates = {"win_rates": jnp.asarray(judged[:, None, :2, 2])}
        batch = attach_logps(batch_of(pairs[None], rates), "reference", reference)
        return step(state, batch)[0]

    return game, round_, first


RATE, NUM_PROMPTS = 0.5 * BETA * 3 / 4, 2048  # a mirror step of 0.5


def test_sampled_judged_steps_are_the_exact_mirror_step_in_expectation(played):
    game, round_, first = played
    before = first.params["logits"]
    moved = np.stack(
        [round_(first, first.params, k).params["logits"] for k in jax.random.split(KEY, 16)]
    )
    exactly = exact.mirror_step(game, before[0], eta=0.5) - before[0]
    found = (moved - before)[:, 0]
    found, exactly = (x - x.mean(-1, keepdims=True) for x in (found, exactly))
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - exactly) < 4 * error).all()
    assert (error < 0.03 * np.abs(exactly).max()).all()  # small enough to tell


def test_a_game_is_played_by_sampler_judge_and_steps_to_its_nash_policy(played):
    game, round_, state = played
    nash, policies = np.exp(exact.nash_policy(game)), []
    first = np.exp(jax.nn.log_softmax(state.params["logits"][0]))
    for key in jax.random.split(KEY, 45):
        # EGPO: the second step from the same state, against where the first one led.
        half_key, key = jax.random.split(key)
        half = round_(state, state.params, half_key)
        state = round_(state, half.params, key)
        policies.append(np.exp(jax.nn.log_softmax(state.params["logits"][0])))
    assert np.abs(first - nash).sum() > 0.2
    assert np.abs(policies[-1] - nash).sum() < 0.06
    assert np.abs(np.mean(policies[25:], 0) - nash).sum() < 0.02
    assert float(exact.duality_gap(game, state.params["logits"][0])) < 1e-3


def test_games_on_several_axes_are_refused():
    game = PreferenceGame(np.full((2, 2, 3, 3), 0.5), np.zeros((2, 2, 3)), 0.1)
    with pytest.raises(ValueError, match=r"one axis; got \[2, 2\]"):
        table_policy(game)
    with pytest.raises(ValueError, match=r"actions must have shape \[3, M, K\].*got \[2, 5, 2\]"):
        pair_batch(games(), np.zeros((2, 5, 2), int))
