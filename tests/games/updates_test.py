"""Methods on games: each step against its closed form, and the published tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.expected import expected_loss
from paxo.games.policies import game_around, neural_policy
from paxo.games.rows import from_row
from paxo.games.solve import Update, solve
from paxo.games.updates import (
    best_response_iteration,
    comal,
    dno,
    egpo,
    gradient_move,
    inpo,
    iterated,
    mirror_descent,
    nash_md,
    nash_md_pg,
    online_ipo_v1,
    online_ipo_v2,
    onpo,
    optimistic_mirror_descent,
    play,
    proximal_point,
    sppo,
)
from paxo.objectives import objective
from paxo.online import method
from tests.games.playing import close, gaps, golden, method_gaps, mirror_gaps

KEY = jax.random.key(0)
with jax.enable_x64(True):
    GAMES = builders.numpy_game(3, 6, beta=0.3, num_games=4)
    POLICIES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))


def step(update, logits=POLICIES, game=GAMES, t=0, memory=None):
    """Log-probs after one update."""
    memory = update.init(logits, game) if memory is None else memory
    run = jax.jit(lambda x, memory: update.step(x, game, t, KEY, memory))
    moved, memory = run(logits, memory)
    return jax.nn.log_softmax(moved), memory


def stepper(make, game=GAMES):
    """`(eta, t) -> log-probs` after one round of `make(eta)`: one program for all."""
    run = jax.jit(lambda eta, t: make(eta).step(POLICIES, game, t, KEY, ())[0])
    return lambda eta, t=0: jax.nn.log_softmax(run(eta, t))


# T7. The losses' own gradients and minimisers are the closed forms.


def test_online_ipo_v1_takes_a_mirror_step():
    close(step(online_ipo_v1(eta=0.4))[0], exact.mirror_step(GAMES, POLICIES, eta=0.4))


def test_egpo_takes_two_mirror_steps_from_the_same_policy():
    half = exact.mirror_step(GAMES, POLICIES, eta=0.4)
    expected = exact.mirror_step(GAMES, POLICIES, eta=0.4, opponent=half)
    close(step(egpo(eta=0.4))[0], expected)


@pytest.mark.parametrize("mix", [None, 0.2])
def test_nash_md_steps_from_the_mixture(mix):
    weight = 0.4 * 0.3 if mix is None else mix
    mixture = exact.mixture(POLICIES, GAMES.reference_logps, weight)
    expected = exact.mirror_step(GAMES, POLICIES, eta=0.4, opponent=mixture)
    close(step(nash_md(eta=0.4, mix=mix))[0], expected)
    if mix is None:
        tilted = jax.nn.log_softmax(mixture + 0.4 * GAMES.win_rates(mixture))
        close(expected, tilted)
        close(step(mirror_descent(eta=0.4, mix=True))[0], tilted)


def covariances(opponent):
    """`[..., N]` policy times centred (win rate - beta log-ratio): the policy gradient."""
    p, logps = jax.nn.softmax(POLICIES), jax.nn.log_softmax(POLICIES)
    advantages = GAMES.win_rates(opponent) - 0.3 * (logps - GAMES.reference_logps)
    return p * (advantages - (p * advantages).sum(-1, keepdims=True))


def test_online_ipo_v2_follows_the_policy_gradient():
    moved = jax.nn.log_softmax(POLICIES + 0.05 * 4 / 0.3 * covariances(POLICIES))
    close(step(online_ipo_v2(rate=0.05))[0], moved)


def test_nash_md_pg_follows_the_policy_gradient_against_the_mixture():
    mixture = exact.mixture(POLICIES, GAMES.reference_logps, 0.125)
    moved = jax.nn.log_softmax(POLICIES + 0.05 * covariances(mixture))
    close(step(nash_md_pg(rate=0.05, mix=0.125))[0], moved)


def test_an_inpo_round_is_a_mirror_step_of_the_inverse_of_its_eta():
    run = stepper(lambda eta: inpo(eta=lambda t: eta * (t + 2) / 2))
    for eta, t in ((0.9, 0), (0.3, 3)):
        expected = exact.mirror_step(GAMES, POLICIES, eta=2 / (eta * (t + 2)))
        close(run(eta, t), expected, 1e-11)


def test_a_dno_round_is_multiplicative_weights_of_the_inverse_of_its_eta():
    game = GAMES.replace(beta=0.0)
    expected = exact.mirror_step(game, POLICIES, eta=1 / 0.8)
    close(step(dno(eta=0.8), game=game)[0], expected, 1e-10)


def test_an_sppo_round_is_nearly_multiplicative_weights_for_small_steps_only():
    game = GAMES.replace(beta=0.0)
    distance, run = [], stepper(lambda eta: sppo(eta=eta), game)
    for eta in (0.1, 1.0):
        p = np.exp(run(eta))
        q = np.exp(exact.mirror_step(game, POLICIES, eta=eta))
        distance.append(np.abs(p - q).sum(-1).max() / 2)
    # Published for one game of ten actions: 3.6e-7 and 3.4e-4, that is eta cubed.
    assert 3e-8 < distance[0] < 3e-6
    assert 700 < distance[1] / distance[0] < 1400


def test_onpo_is_optimistic_mirror_descent():
    fit, closed = onpo(eta=0.4), optimistic_mirror_descent(eta=0.4)
    first, second = POLICIES, POLICIES
    anchor, rates = fit.init(first, GAMES), closed.init(second, GAMES)
    for t in range(3):
        first, anchor = step(fit, first, t=t, memory=anchor)
        second, rates = step(closed, second, t=t, memory=rates)
        close(first, second, 1e-10)


def test_best_response_iteration_is_a_mirror_step_of_one_over_beta():
    expected = exact.mirror_step(GAMES, POLICIES, eta=1 / 0.3)
    close(step(best_response_iteration())[0], expected)
    close(step(online_ipo_v1(eta=1 / 0.3))[0], expected)


def test_a_move_needs_one_size():
    with pytest.raises(ValueError, match="either eta or rate; got eta=None and rate=None"):
        online_ipo_v1()
    with pytest.raises(ValueError, match="either eta or rate"):
        egpo(eta=0.1, rate=0.1)


def test_sizes_that_no_method_can_have_are_refused():
    for make in (mirror_descent, optimistic_mirror_descent, inpo, dno, sppo, onpo, egpo):
        for wrong in (0.0, -0.1, float("nan")):
            with pytest.raises(ValueError, match="eta must be a finite number above 0; got"):
                make(eta=wrong)
    with pytest.raises(ValueError, match="every must be a finite number above 0; got 0"):
        comal(egpo(eta=0.1), tau=0.1, every=0)
    with pytest.raises(ValueError, match="tau must be a finite number above 0; got 0"):
        proximal_point(tau=0)
    with pytest.raises(ValueError, match=r"mix must be a weight, in \[0, 1\]; got 1.5"):
        nash_md(eta=0.1, mix=1.5)
    with pytest.raises(TypeError, match="an objective or a function of game and t; got 'dpo'"):
        step(iterated("dpo"))


def test_any_objective_is_a_move():
    # DPO on the policy's own pairs stays where the Bradley–Terry rewards are best served.
    rewards, beta = jnp.array([1.0, 0.2, -0.5]), 0.4
    game = builders.bradley_terry(rewards, beta=beta)
    best = jax.nn.log_softmax(game.reference_logps + rewards / beta)
    move = gradient_move(objective("dpo", beta=beta), rate=5.0, on_policy=True)
    played = solve(game, play(move), 3000, at=(0, 3000))
    close(jax.nn.log_softmax(played.logits[-1]), best, 1e-6)


# Rows of `paxo.online`, which the games do not know: they are passed in.


def by_row(name, game=GAMES, *, newton_steps=0, size=None, **settings):
    update = from_row(method(name, **settings), newton_steps=newton_steps, **(size or {}))
    return step(update, game=game)[0]


def test_rows_of_self_play_are_played_in_exact_expectation():
    size = {"eta": 0.4}
    half = exact.mirror_step(GAMES, POLICIES, eta=0.4)
    mixture = exact.mixture(POLICIES, GAMES.reference_logps, 0.125)
    for name, settings, opponent in (
        ("egpo", {"beta": 0.3}, half),
        ("nash_md", {"beta": 0.3}, mixture),  # the row's mix
    ):
        expected = exact.mirror_step(GAMES, POLICIES, eta=0.4, opponent=opponent)
        close(by_row(name, size=size, **settings), expected)
    moved = jax.nn.log_softmax(POLICIES + 0.05 * covariances(mixture))
    close(by_row("nash_md_pg", size={"rate": 0.05}, tau=0.3), moved)
    inpo_round = by_row("inpo_pairs", newton_steps=1, eta=0.9, tau=0.3)
    close(inpo_round, exact.mirror_step(GAMES, POLICIES, eta=1 / 0.9), 1e-11)


def test_rows_move_their_references_and_look_ahead_by_their_schedules():
    comal_row = method("comal", eta=0.9, tau=0.3, reference_every=2)
    played = solve(GAMES, from_row(comal_row, newton_steps=1), 5)
    closed = solve(GAMES, comal(mirror_descent(eta=1 / 0.9), tau=0.3, every=2), 5)
    close(jax.nn.softmax(played.logits), jax.nn.softmax(closed.logits), 1e-9)
    first_of_onpo = step(optimistic_mirror_descent(eta=0.4))[0]
    close(by_row("onpo", newton_steps=1, eta=0.4), first_of_onpo, 1e-10)
    plain = from_row(method("iterative_dpo", beta=1.0, draws=(2,)), newton_steps=8)
    ahead = from_row(method("apo", beta=1.0, draws=(2,), extrapolation=0.5), newton_steps=8)
    round_ = jax.jit(lambda x: jax.nn.log_softmax(plain.step(x, GAMES, 0, KEY, ())[0]))
    first = round_(GAMES.reference_logps)
    second, fast = round_(first), solve(GAMES, ahead, 3).logits
    # From the second round on half a round further than it led, and the next one starts there.
    close(jax.nn.log_softmax(fast[2]), jax.nn.log_softmax(second + 0.5 * (second - first)), 1e-9)
    third = round_(fast[2])
    close(jax.nn.log_softmax(fast[3]), jax.nn.log_softmax(third + 0.5 * (third - second)), 1e-9)


def test_rows_that_are_more_than_judged_pairs_are_refused():
    for name in ("grpo", "inpo", "selm", "xpo", "ipo_md", "nash_ema_pg", "self_rewarding"):
        with pytest.raises(ValueError, match=f"row '{name}' is more than pairs of the policy"):
            from_row(method(name), rate=0.1)
    with pytest.raises(ValueError, match=r"row 'dno' measures from its.*newton_steps=8"):
        from_row(method("dno"), rate=0.1)


# `solve`.


def test_solve_keeps_the_iterations_asked_for_and_averages_policies_before_them():
    update = mirror_descent(eta=0.5)
    every = solve(GAMES, update, 5)
    some = solve(GAMES, update, 5, at=(0, 2, 4))
    np.testing.assert_array_equal(every.iterations, range(6))
    close(some.logits, every.logits[jnp.array([0, 2, 4])])
    close(some.params, every.logits[5])
    close(jnp.exp(some.average[2]), jax.nn.softmax(every.logits[:4]).mean(0))
    close(jnp.exp(some.average[0]), jax.nn.softmax(every.logits[0]))


@pytest.mark.parametrize(
    ("at", "message"),
    [((3, 1), "rising"), ((), "rising"), ((0, 9), r"0..5.num_steps = 5|num_steps = 5")],
)
def test_solve_refuses_iterations_out_of_order_or_range(at, message):
    with pytest.raises(ValueError, match=message):
        solve(GAMES, mirror_descent(eta=0.5), 5, at=at)


def test_solve_names_what_does_not_fit():
    update = mirror_descent(eta=0.5)
    for wrong in (-1, 2.5):
        with pytest.raises(ValueError, match=f"num_steps must be an integer.*got {wrong}"):
            solve(GAMES, update, wrong)
    with pytest.raises(ValueError, match=r"params must have shape \[4, 6\].*got \[6\]"):
        solve(GAMES, update, 5, params=jnp.zeros(6))
    with pytest.raises(TypeError, match=r"must be an Update, as egpo\(eta=0.3\)"):
        solve(GAMES, update.step, 5)
    with pytest.raises(TypeError, match="got a dict: give `solve` and the update the same"):
        solve(GAMES, egpo(rate=0.1), 5, policy=neural_policy())
    lost = Update(lambda x, game, t, key, m: (jnp.where(t == 2, jnp.nan, x), m))
    with pytest.raises(ValueError, match="policy is NaN at iteration 3: a step that is too large"):
        solve(GAMES, lost, 4)


def test_parameters_are_computed_in_the_games_precision():
    rough = np.float32(POLICIES)
    assert solve(GAMES, mirror_descent(eta=0.5), 2, params=rough).logits.dtype == jnp.float64


def test_random_keys_differ_by_iteration_and_repeat_by_run():
    update = Update(lambda x, game, t, key, m: (x + jax.random.normal(key, x.shape), m))
    first, again = (solve(GAMES, update, 3, key=jax.random.key(4)) for _ in range(2))
    np.testing.assert_array_equal(first.logits, again.logits)
    moves = np.diff(first.logits, axis=0)
    assert np.abs(moves[0] - moves[1]).max() > 0.1


def test_memory_travels_from_iteration_to_iteration():
    update = Update(lambda x, game, t, key, m: (x, m + t), lambda x, game: jnp.zeros((), int))
    assert int(solve(GAMES, update, 5, at=(0,)).memory) == 0 + 1 + 2 + 3 + 4


def test_a_neural_policy_is_trained_through_its_parameters():
    policy = neural_policy()
    params = policy.init(jax.random.key(0), GAMES)
    game = game_around(GAMES, policy, params)
    update = egpo(rate=0.02, policy=policy)
    played = solve(game, update, 1000, at=(0, 1000), policy=policy, params=params)
    before, after = exact.duality_gap(game, played.logits).mean(-1)
    assert after < 0.1 * before
    close(played.logits[0], policy.logits(params))

    def loss(params):
        logits = policy.logits(params)
        run = objective("online_ipo_v1", beta=0.3)
        return expected_loss(run, game, logits, opponent=policy.logits(start)).sum()

    start = params
    plain = online_ipo_v1(rate=0.02, policy=policy)
    moved, slope = jax.jit(lambda x: (plain.step(x, game, 0, KEY, ())[0], jax.grad(loss)(x)))(
        params
    )
    expected = jax.tree.map(lambda x, g: x - 0.02 * g, params, slope)
    jax.tree.map(close, moved, expected)


def test_sampled_nash_md_comes_near_and_the_released_fault_of_nash_md_is_not_there():
    # Normalised over the games instead of the actions, Nash-MD's opponent keeps it from learning.
    game = golden(0.1)
    exact_gaps = method_gaps("online_ipo_v1", game, (300,), eta=0.1)
    sampled = gaps(game, nash_md(eta=0.1, num_samples=100), (300,))
    np.testing.assert_allclose(sampled, exact_gaps, atol=5e-3)
    assert exact_gaps < 2e-3


@pytest.mark.parametrize("mix", [False, True])
def test_mirror_descent_follows_its_schedule(mix):
    schedule = lambda t: 2 / (0.1 * (t + 2))  # noqa: E731
    found = gaps(golden(0.1), mirror_descent(eta=schedule, mix=mix), (3, 40))
    np.testing.assert_allclose(found, mirror_gaps(golden(0.1), (3, 40), eta=schedule, mix=mix))
