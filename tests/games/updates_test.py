"""Methods on games: each step against its closed form, and the published tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.expected import expected_loss
from paxo.games.policies import game_around, neural_policy
from paxo.games.solve import Update, solve
from paxo.games.updates import (
    best_response_iteration,
    comal,
    dno,
    egpo,
    extrapolated,
    fitted,
    gradient_move,
    inpo,
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

with jax.enable_x64(True):
    GAMES = builders.numpy_game(3, 6, beta=0.3, num_games=4)
    POLICIES = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
TENTH = functools.partial(builders.egpo_golden, beta=0.1)
HUNDREDTH = functools.partial(builders.egpo_golden, beta=0.01)


def step(update, logits=POLICIES, game=GAMES, t=0, memory=None):
    """Log-probs after one update."""
    memory = update.init(logits, game) if memory is None else memory
    run = jax.jit(lambda x, memory: update.step(x, game, t, jax.random.key(0), memory))
    moved, memory = run(logits, memory)
    return jax.nn.log_softmax(moved), memory


def gaps(game, update, at, *, average=False):
    """Mean duality gaps at these iterations."""
    played = solve(game, update, at[-1], at=at)
    found = exact.duality_gap(game, played.average if average else played.logits)
    return np.asarray(found).reshape(len(at), -1).mean(-1)


def scheduled(logits, game, t, key, sizes):
    """Mirror steps of given sizes against mixtures of given weights: compiled once for all."""
    eta, weight = sizes[:, t]
    against = exact.mixture(logits, game.reference_logps, weight)
    return exact.mirror_step(game, logits, eta=eta, opponent=against), sizes


def mirror_gaps(game, at, *, eta, mix=False):
    """What `mirror_descent(eta=eta, mix=mix)` gives, with `eta` a number or a schedule."""
    t = jnp.arange(at[-1] + 1.0)
    size = eta(t) if callable(eta) else jnp.full(t.shape, eta)
    sizes = jnp.stack([size, size * game.beta if mix else jnp.zeros(t.shape)])
    at = np.asarray(at)
    played = solve(game, Update(scheduled), at[-1], at=at, memory=sizes)
    found = np.asarray(exact.duality_gap(game, played.logits))
    return found.reshape(len(at), -1).mean(-1)


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


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
    close(step(inpo(eta=0.9))[0], exact.mirror_step(GAMES, POLICIES, eta=1 / 0.9), 1e-11)
    schedule = lambda t: 0.3 * (t + 2) / 2  # noqa: E731
    expected = exact.mirror_step(GAMES, POLICIES, eta=1 / schedule(3))
    close(step(inpo(eta=schedule), t=3)[0], expected, 1e-11)


def test_a_dno_round_is_multiplicative_weights_of_the_inverse_of_its_eta():
    game = GAMES.replace(beta=0.0)
    expected = exact.mirror_step(game, POLICIES, eta=1 / 0.8)
    close(step(dno(eta=0.8), game=game)[0], expected, 1e-10)


def test_an_sppo_round_is_nearly_multiplicative_weights_for_small_steps_only():
    game = GAMES.replace(beta=0.0)
    distance = []
    for eta in (0.1, 1.0):
        p = np.exp(step(sppo(eta=eta), game=game)[0])
        q = np.exp(exact.mirror_step(game, POLICIES, eta=eta))
        distance.append(np.abs(p - q).sum(-1).max() / 2)
    assert 0 < distance[0] < 1e-4
    assert distance[0] < distance[1] / 50


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


def test_any_objective_is_a_move():
    # DPO on the policy's own pairs stays where the Bradley–Terry rewards are best served.
    rewards, beta = jnp.array([1.0, 0.2, -0.5]), 0.4
    game = builders.bradley_terry(rewards, beta=beta)
    best = jax.nn.log_softmax(game.reference_logps + rewards / beta)
    move = gradient_move(objective("dpo", beta=beta), rate=5.0, on_policy=True)
    played = solve(game, play(move), 3000, at=(0, 3000))
    close(jax.nn.log_softmax(played.logits[-1]), best, 1e-6)


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
    moved, _ = plain.step(params, game, 0, jax.random.key(0), ())
    expected = jax.tree.map(lambda x, g: x - 0.02 * g, params, jax.grad(loss)(params))
    jax.tree.map(close, moved, expected)


def test_sampled_nash_md_comes_near_and_the_released_fault_of_nash_md_is_not_there():
    # Normalised over the games instead of the actions, Nash-MD's opponent keeps it from learning.
    game = TENTH()
    exact_gaps = gaps(game, online_ipo_v1(eta=0.1), (300,))
    sampled = gaps(game, nash_md(eta=0.1, num_samples=100), (300,))
    np.testing.assert_allclose(sampled, exact_gaps, atol=5e-3)
    assert exact_gaps < 2e-3


# T2-T6, T8 and the tables, on the golden games.


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (online_ipo_v1(eta=0.4), [8.42e-2, 4.17e-2, 1.82e-3, 3.55e-5, 1.35e-8, 5.3e-12]),
        (online_ipo_v2(eta=0.4), [8.21e-2, 3.96e-2, 4.27e-3, 8.40e-4, 1.26e-4, 4.39e-5]),
        (nash_md(eta=0.4), [8.42e-2, 4.20e-2, 2.50e-3, 6.62e-5, 6.60e-5, 6.66e-5]),
        (nash_md(eta=0.4, mix=0.02), [8.42e-2, 4.18e-2, 2.13e-3, 3.43e-5, 1.60e-5, 1.62e-5]),
        (nash_md_pg(eta=0.4, mix=0.02), [9.05e-2, 8.84e-2, 8.02e-2, 7.21e-2, 5.96e-2, 4.90e-2]),
        (egpo(eta=0.4), [8.39e-2, 4.03e-2, 1.45e-3, 2.25e-5, 5.2e-9, 1.3e-12]),
    ],
    ids=["omd", "v2", "nash_md", "nash_md_half_mix", "nash_md_pg", "egpo"],
)
def test_table_of_exact_methods_at_a_tenth(update, expected):
    found = gaps(TENTH(), update, (1, 10, 50, 100, 200, 300))
    np.testing.assert_allclose(found[:5], expected[:5], rtol=0.01)
    np.testing.assert_allclose(found[5], expected[5], rtol=0.04)  # the table has two digits


def test_table_of_exact_methods_at_a_hundredth():
    game = HUNDREDTH()
    at = (0, 10, 100, 300, 1000, 5000)
    omd = gaps(game, online_ipo_v1(eta=0.8), at)
    np.testing.assert_allclose(omd, [2.99e-1, 1.96e-1, 1.35e-1, 1.31e-1, 8.0e-2, 5.8e-2], rtol=0.01)
    assert omd[-1] >= 1e-2
    extra = gaps(game, egpo(eta=0.8), at)
    np.testing.assert_allclose(extra[1:5], [1.80e-1, 4.12e-2, 6.35e-4, 2.55e-9], rtol=0.01)
    assert extra[4] <= 1e-8
    assert extra[5] < 1e-14
    v2 = gaps(game, online_ipo_v2(eta=0.8), at[1:4])
    np.testing.assert_allclose(v2, [2.59e-1, 3.81e-1, 2.59e-1], rtol=0.01)


def test_game_zero_alone_is_as_the_paper_plots_it():
    game = HUNDREDTH()[0]
    omd = mirror_gaps(game, (500, 1000, 2000), eta=0.8)
    np.testing.assert_allclose(omd, [5.14e-3, 1.26e-4, 6.0e-8], rtol=0.01)
    extra = gaps(game, egpo(eta=0.8), (300, 1000))
    np.testing.assert_allclose(extra, [2.53e-4, 7.2e-10], rtol=0.01)


@pytest.mark.parametrize("mix", [False, True])
def test_mirror_descent_follows_its_schedule(mix):
    schedule = lambda t: 2 / (0.1 * (t + 2))  # noqa: E731
    found = gaps(TENTH(), mirror_descent(eta=schedule, mix=mix), (3, 40))
    np.testing.assert_allclose(found, mirror_gaps(TENTH(), (3, 40), eta=schedule, mix=mix))


def test_table_of_one_step_for_all_at_a_tenth():
    at, decaying = (10, 100, 300), lambda t: 2 / (0.1 * (t + 2))
    for eta, mix, expected in (
        (1 / 3.1, False, [4.9e-2, 1.6e-4, 4.6e-10]),
        (1 / 3.1, True, [4.9e-2, 2.1e-4, 4.3e-5]),
        (decaying, True, [3.5e-3, 2.4e-5, 2.6e-6]),
        (decaying, False, [5.3e-3, 1.9e-6, 2.6e-8]),
        (1 / 0.3, False, [1.4e-3, 2.4e-11, 0]),
    ):
        # Two digits, rounded: at most half a unit of the second, 3.6 %.
        found = mirror_gaps(TENTH(), at, eta=eta, mix=mix)
        np.testing.assert_allclose(found, expected, rtol=0.036, atol=1e-20)
    found = gaps(TENTH(), egpo(eta=1 / 3.1), at)
    np.testing.assert_allclose(found, [4.8e-2, 1.2e-4, 1.9e-10], rtol=0.036)


def test_table_of_one_step_for_all_at_a_hundredth():
    at, decaying = (100, 1000, 2000, 5000), lambda t: 2 / (0.01 * (t + 2))
    for eta, mix, expected in (
        (1 / 3.01, False, [1.5e-1, 1.1e-2, 4.3e-4, 4.0e-8]),
        (1 / 3.01, True, [1.5e-1, 1.1e-2, 4.7e-4, 7.7e-6]),
        (decaying, True, [4.3e-1, 4.7e-2, 7.3e-3, 3.5e-4]),
        (decaying, False, [4.3e-1, 5.0e-2, 9.2e-3, 3.8e-4]),
    ):
        found = mirror_gaps(HUNDREDTH(), at, eta=eta, mix=mix)
        np.testing.assert_allclose(found, expected, rtol=0.036, atol=1e-14)
    found = gaps(HUNDREDTH(), egpo(eta=1 / 3.01), at)
    np.testing.assert_allclose(found, [1.2e-1, 1.6e-4, 9.7e-8, 0], rtol=0.036, atol=1e-14)
    cycling = mirror_gaps(HUNDREDTH(), at, eta=1 / 0.03)
    assert cycling[0] == pytest.approx(0.73, rel=0.01)
    assert (cycling > 0.6).all()


def test_egpo_contracts_by_the_square_of_its_bound_and_never_above_it():
    for game, eta in ((TENTH(), 0.4), (HUNDREDTH(), 0.8), (HUNDREDTH(), 1 / 3.01)):
        beta, nash = float(game.beta), exact.nash_policy(game)
        played = solve(game, egpo(eta=eta), 1000)
        distance = exact.kl_divergence(nash, played.logits)
        bound = exact.egpo_bound(distance[0], jnp.arange(1001.0)[:, None], eta=eta, beta=beta)
        assert bool((distance <= bound + 1e-28).all())
        found = np.asarray(exact.duality_gap(game, played.logits))
        window = slice(60, 201) if beta == 0.1 else slice(200, 1001)
        slope = np.polyfit(np.arange(1001)[window], np.log(found[window]), 1)[0]
        np.testing.assert_allclose(np.exp(slope), (1 - eta * beta) ** 2, atol=5e-3)


def test_mirror_descent_converges_below_its_stability_limit_and_not_above():
    game = HUNDREDTH()
    limit = exact.stability_limit(game)
    played = solve(game, mirror_descent(eta=0.8), 20000, at=(20000,))
    np.testing.assert_array_equal(exact.duality_gap(game, played.logits[0]) < 1e-6, limit > 0.8)


def test_constant_nash_md_solves_the_game_of_a_larger_kl_weight():
    game, mix = TENTH(), 0.04
    played = solve(game, nash_md(eta=0.4), 3000, at=(1000, 3000))
    plateau = exact.duality_gap(game, played.logits).mean(-1)
    np.testing.assert_allclose(plateau, 6.66e-5, rtol=0.05)
    mixture = exact.mixture(played.logits[-1], game.reference_logps, mix)
    larger = game.replace(beta=0.1 / (1 - mix))
    assert float(exact.duality_gap(larger, mixture).max()) < 1e-12


def test_float32_reproduces_float64():
    wanted = [
        gaps(TENTH(), online_ipo_v1(eta=0.4), (10, 100, 1000)),
        gaps(HUNDREDTH(), egpo(eta=0.8), (10, 100, 1000)),
    ]
    with jax.enable_x64(False):
        found = [
            gaps(TENTH(), online_ipo_v1(eta=0.4), (10, 100, 1000)),
            gaps(HUNDREDTH(), egpo(eta=0.8), (10, 100, 1000)),
        ]
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_tables_at_a_thousandth():
    game, at = builders.egpo_golden(beta=0.001), (0, 100, 1000, 10000, 30000, 100000)
    extra = gaps(game, egpo(eta=0.08), at)
    np.testing.assert_allclose(
        extra, [3.43e-1, 2.29e-1, 1.62e-1, 5.17e-2, 6.9e-3, 2.5e-8], rtol=0.01
    )
    omd = gaps(game, online_ipo_v1(eta=0.08), at)
    np.testing.assert_allclose(
        omd, [3.43e-1, 2.31e-1, 1.71e-1, 1.75e-1, 1.61e-1, 9.1e-2], rtol=0.01
    )
    same = gaps(game, egpo(eta=1 / 3.001), (1000, 10000, 30000, 100000))
    np.testing.assert_allclose(same, [7.6e-2, 2.4e-4, 9.4e-11, 0], rtol=0.03, atol=1e-14)
    with jax.enable_x64(False):
        found = gaps(builders.egpo_golden(beta=0.001), egpo(eta=0.08), (100000,))
    assert abs(float(found[0]) - extra[-1]) < 2e-6


# B.3. Schedules.


def test_schedules_of_inpo_and_nash_md():
    game = builders.numpy_game(builders.EGPO_SEED, beta=0.1)
    at, decaying = (10, 100, 1000, 10000), lambda t: 2 / (0.1 * (t + 2))
    third = mirror_gaps(game, at, eta=1 / 0.3)
    np.testing.assert_allclose(third[:2], [1.45e-3, 1.7e-12], rtol=0.02)
    inpo_gaps = mirror_gaps(game, at, eta=decaying)
    np.testing.assert_allclose(inpo_gaps[1:3], [2.2e-6, 2.5e-10], rtol=0.02)
    nash_md_gaps = mirror_gaps(game, at, eta=decaying, mix=True)
    np.testing.assert_allclose(nash_md_gaps[1:], [2.9e-5, 3.1e-7, 3.1e-9], rtol=0.02)
    cycling = mirror_gaps(game, at, eta=1 / 0.1)
    assert ((cycling > 0.15) & (cycling < 0.25)).all()


@pytest.mark.parametrize("mix", [False, True])
def test_the_kl_to_the_nash_policy_stays_below_the_bound_of_decaying_steps(mix):
    game = builders.numpy_game(builders.EGPO_SEED, beta=0.1)
    update = mirror_descent(eta=lambda t: 2 / (0.1 * (t + 2)), mix=mix)
    played = solve(game, update, 1000)
    distance = exact.kl_divergence(exact.nash_policy(game), played.logits).max(-1)
    bound = exact.decaying_step_bound(jnp.arange(1000), beta=0.1)
    assert bool((distance[1:] <= bound).all())


def test_inpos_paper_ratio_is_stable_only_below_its_limit():
    # 1/eta = 1/(3 tau) is stable where omega < sqrt(5) tau.
    for beta, stable in ((0.2, True), (0.1, False)):
        game = builders.cyclic(5, beta=beta, reference_logits=0.1 * jnp.arange(5.0))
        assert bool(1 / (3 * beta) < exact.stability_limit(game)) == stable
        last = mirror_gaps(game, (3000,), eta=1 / (3 * beta))
        assert (last[0] < 1e-9) == stable


# B.4. COMAL's game of three.


@pytest.mark.parametrize("reference", [None, [0.2, 0.5, 0.3]])
def test_comals_game(reference):
    logits = None if reference is None else jnp.log(jnp.array(reference))
    game = builders.comal_3x3(beta=0.0, reference_logits=logits)
    nash = np.array([4, 3, 4]) / 11
    weights = mirror_gaps(game, (0, 10000), eta=1.0)
    assert weights[1] == pytest.approx(0.8, abs=0.01)
    regularised = game.replace(beta=0.1)
    floor = 2.45e-2 if reference is None else 5.88e-2
    played = solve(regularised, egpo(eta=1 / 3.1), 3000, at=(3000,))
    nash_of_it = exact.nash_policy(regularised)
    close(jax.nn.log_softmax(played.logits[0]), nash_of_it, 1e-9)
    found = float(exact.unregularised_gap(regularised, nash_of_it))
    assert found == pytest.approx(floor, rel=0.01)
    assert mirror_gaps(regularised, (3000,), eta=1 / 0.3)[0] < 1e-14  # INPO stalls there too
    outer = gaps(game, proximal_point(tau=0.1), (10, 20, 50))
    if reference is None:
        np.testing.assert_allclose(outer[:2], [1.9e-5, 2e-9], rtol=0.07)
    assert outer[2] < 2e-14
    meta = comal(mirror_descent(eta=1 / 0.3), tau=0.1, every=12)
    played = solve(game, meta, 1000, at=(1000,))
    assert float(exact.duality_gap(game, played.logits[0])) < 2e-14
    close(jnp.exp(jax.nn.log_softmax(played.logits[0])), nash, 1e-10)


def test_comal_with_its_own_loss_moves_the_reference_every_k_rounds():
    game = builders.comal_3x3(beta=0.0)
    by_loss = solve(game, comal(inpo(eta=0.3), tau=0.1, every=3), 7)
    closed = solve(game, comal(mirror_descent(eta=1 / 0.3), tau=0.1, every=3), 7)
    close(jax.nn.softmax(by_loss.logits), jax.nn.softmax(closed.logits), 1e-9)
    reference, _ = closed.memory
    close(reference, closed.logits[6])


# B.5. Without a KL term.


def test_table_of_unregularised_self_play():
    game, at = builders.egpo_golden(beta=0.0), (0, 10, 100, 1000)
    weights = solve(game, mirror_descent(eta=1.0), 10000, at=(*at, 10000))
    gap = lambda x: np.asarray(exact.duality_gap(game, x)).mean(-1)  # noqa: E731
    np.testing.assert_allclose(gap(weights.logits)[:4], [3.5e-1, 2.4e-1, 3.7e-1, 5.5e-1], rtol=0.02)
    assert gap(weights.logits)[4] > 0.65
    np.testing.assert_allclose(
        gap(weights.average)[1:], [2.7e-1, 5.8e-2, 1.4e-2, 4.4e-3], rtol=0.03
    )
    optimistic = solve(game, optimistic_mirror_descent(eta=0.5), 10000, at=(*at, 10000))
    np.testing.assert_allclose(
        gap(optimistic.logits)[1:], [2.7e-1, 1.6e-1, 5.2e-2, 3.1e-2], rtol=0.02
    )
    np.testing.assert_allclose(gap(optimistic.average)[2:], [7.0e-2, 8.7e-3, 7.5e-4], rtol=0.01)


def test_table_of_comal_on_the_golden_games():
    game = builders.egpo_golden(beta=0.0)
    outer = gaps(game, proximal_point(tau=0.01), (1, 5, 10, 20))
    np.testing.assert_allclose(outer, [1.9e-2, 4.8e-3, 3.1e-4, 2.6e-5], rtol=0.02)
    inner = comal(egpo(eta=1 / 3.01), tau=0.01, every=2000)
    found = gaps(game, inner, (2000, 10000))
    np.testing.assert_allclose(found, [1.9e-2, 4.8e-3], rtol=0.01)


@pytest.mark.slow
def test_long_tables_without_a_kl_term():
    game = builders.egpo_golden(beta=0.0)
    inner = comal(egpo(eta=1 / 3.01), tau=0.01, every=2000)
    found = gaps(game, inner, (20000, 40000, 100000, 200000))
    np.testing.assert_allclose(found, [3.1e-4, 2.6e-5, 9.3e-8, 3.0e-10], rtol=0.02)
    at = (10000, 100000)
    averages = gaps(game, mirror_descent(eta=1.0), at, average=True)
    np.testing.assert_allclose(averages, [4.4e-3, 1.4e-3], rtol=0.02)
    optimistic = gaps(game, optimistic_mirror_descent(eta=0.5), at)
    np.testing.assert_allclose(optimistic, [3.1e-2, 5.0e-3], rtol=0.01)


@pytest.mark.slow
def test_momentum_drives_cyclic_games_apart_and_speeds_up_transitive_ones():
    found = [
        gaps(builders.egpo_golden(beta=0.0), extrapolated(mirror_descent(eta=1.0), alpha=a), (100,))
        for a in (0.0, 0.3, 0.5)
    ]
    np.testing.assert_allclose(np.ravel(found), [0.366, 0.500, 0.614], rtol=0.01)
    game = builders.bradley_terry(jnp.linspace(0.0, 2.0, 6), beta=0.0)
    slow, fast = (
        gaps(game, extrapolated(mirror_descent(eta=1.0), alpha=a), (60,)) for a in (0.0, 0.5)
    )
    assert fast < 0.2 * slow


# B.6. CoPG's bandit: the stationary regrets of four methods on its offline pairs.


def stationary(loss, rewards, values=lambda bandit, logits: 0.0, rate=0.5, steps=60000):
    """Regret where gradient descent on the expected offline loss comes to rest."""
    bandit = builders.copg_bandit()
    game = bandit.game()

    def run(logits):
        shown = {rewards: bandit.rewards + 0.5 - values(bandit, jax.lax.stop_gradient(logits))}
        return expected_loss(
            loss, game, logits, sampler=list(bandit.offline_logps), extras=shown if rewards else {}
        )

    def descend(x, _):
        return x - rate * jax.grad(run)(x), None

    logits = jax.jit(lambda x: jax.lax.scan(descend, x, None, length=steps)[0])(jnp.zeros(3))
    assert float(jnp.abs(jax.grad(run)(logits)).max()) < 1e-10
    return float(bandit.regret(logits)), np.exp(jax.nn.log_softmax(logits))


def test_stationary_regrets_on_copgs_bandit():
    expected_reward = lambda bandit, logits: jax.nn.softmax(logits) @ bandit.rewards  # noqa: E731
    gradient = objective("nash_md_pg", tau=0.5)  # -(reward - 1/2 - tau log-ratio) log-prob
    assert stationary(objective("copg", beta=0.5), "rewards")[0] == pytest.approx(0, abs=1e-12)
    regret, policy = stationary(objective("ipo", tau=0.5), "")
    assert regret == pytest.approx(0.15253, abs=5e-6)
    np.testing.assert_allclose(policy, [0.424, 0.353, 0.223], atol=5e-4)
    assert stationary(gradient, "win_rates")[0] == pytest.approx(0.63779, abs=5e-6)
    with_value, _ = stationary(gradient, "win_rates", expected_reward)
    assert with_value == pytest.approx(0.014817, abs=5e-7)


def test_copg_rests_at_the_same_policy_wherever_the_pairs_come_from():
    bandit = builders.copg_bandit()
    best, loss = bandit.best_policy, objective("copg", beta=0.5)
    for seed in range(3):
        samplers = list(jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3))))
        run = functools.partial(
            expected_loss, loss, bandit.game(), sampler=samplers,
            extras={"rewards": bandit.rewards},
        )  # fmt: skip
        close(jax.grad(lambda x, run=run: run(x))(best), 0)


# B.8. Identities.


def test_online_ipo_is_four_over_tau_of_self_play():
    def self_play(x):
        p = jax.nn.softmax(x)
        played = jnp.sum(p * GAMES.win_rates(jax.lax.stop_gradient(x)), -1)
        return (played - 0.3 * exact.kl_divergence(x, GAMES.reference_logps)).sum()

    loss = objective("online_ipo", tau=0.3)
    found = jax.grad(lambda x: expected_loss(loss, GAMES, x, sampler=POLICIES).sum())(POLICIES)
    close(found, -4 / 0.3 * jax.grad(self_play)(POLICIES))


def test_ipo_md_rests_where_the_mixture_is_the_nash_policy_of_a_larger_kl_weight():
    tau, mix = 0.3, 0.125
    mixture = exact.nash_policy(GAMES.replace(beta=tau / (1 - mix)))
    policy = GAMES.reference_logps + GAMES.win_rates(mixture) / tau
    close(exact.mixture(policy, GAMES.reference_logps, mix), mixture)
    loss = objective("ipo_md", tau=tau)
    close(jax.grad(lambda x: expected_loss(loss, GAMES, x, sampler=mixture).sum())(policy), 0)
    cycle = builders.cyclic(3, beta=0.1, win=0.9)
    run = lambda x: expected_loss(objective("ipo_md", tau=0.1), cycle, x, sampler=x)  # noqa: E731
    close(jax.grad(run)(jnp.zeros(3)), 0)


def test_inpos_label_and_win_rate_forms_differ_by_a_constant():
    forms = [objective("inpo", eta=0.9, tau=0.3, target=x) for x in ("label", "win_rate")]
    run = lambda loss, x: expected_loss(  # noqa: E731
        loss, GAMES, x, sampler=POLICIES, opponent=POLICIES, previous=POLICIES
    )
    spread = np.stack([run(forms[0], x) - run(forms[1], x) for x in (POLICIES, 2 * POLICIES)])
    np.testing.assert_allclose(spread[0], spread[1], atol=1e-13)


def test_a_dno_round_improves_by_at_least_eta_times_the_kl():
    fit = fitted(objective("dno", eta=0.7), newton_steps=8)
    found = fit(POLICIES, GAMES, 0)
    wins = (jax.nn.softmax(found) * GAMES.win_rates(POLICIES)).sum(-1)
    assert bool((wins >= 0.5 + 0.7 * exact.kl_divergence(found, POLICIES) - 1e-12).all())


def test_vpos_bonus_is_the_value_of_the_best_policy():
    # For rewards centred under a policy c: J* = -beta E_c log(best / reference).
    beta, rewards = 0.4, jnp.array([1.0, -0.3, 0.2])
    reference = jax.nn.log_softmax(jnp.array([0.3, 0.0, -1.0]))
    centre = jax.nn.softmax(jnp.array([0.0, 1.0, 0.5]))
    bandit = builders.Bandit(rewards - centre @ rewards, reference, jnp.asarray(beta))
    bonus = -beta * centre @ (bandit.best_policy - reference)
    close(bandit.value(bandit.best_policy), bonus, 1e-15)
