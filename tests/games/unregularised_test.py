"""Games without a KL term: COMAL's cycle of three, and self-play on EGPO's ten games."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.solve import Update, solve
from paxo.games.updates import (
    comal,
    egpo,
    extrapolated,
    inpo,
    iterated,
    mirror_descent,
    optimistic_mirror_descent,
    proximal_point,
)
from paxo.objectives import objective
from tests.games.playing import agrees, close, gaps, golden, mirror_gaps, played


def resetting(inner):
    """COMAL with its numbers as memory: one program for all."""

    def step(logits, game, t, key, memory):
        eta, tau, every, kept = memory
        method = comal(inner(eta), tau=tau, every=every)
        logits, kept = method.step(logits, game, t, key, kept)
        return logits, (eta, tau, every, kept)

    return Update(step)


COMAL_INPO = resetting(lambda eta: mirror_descent(eta=eta))
COMAL_EGPO = resetting(lambda eta: egpo(eta=eta))


def numbers(game, eta, tau, every):
    return (jnp.asarray(eta), jnp.asarray(tau), jnp.asarray(every), (game.reference_logps, ()))


def comal_gaps(update, game, at, *, eta, tau, every):
    return gaps(game, update, at, memory=numbers(game, eta, tau, every))


# B.4. The cycle of three.

FLOORS = {None: 2.45e-2, (0.2, 0.5, 0.3): 5.88e-2}


def cycle(reference=None, beta=0.0):
    logits = None if reference is None else jnp.log(jnp.array(reference))
    return builders.comal_3x3(beta=beta, reference_logits=logits)


@pytest.mark.parametrize("reference", FLOORS)
def test_comal_reaches_the_nash_policy_where_regularised_methods_stall(reference):
    game, nash = cycle(reference), np.array([4, 3, 4]) / 11
    regularised = game.replace(beta=0.1)
    nash_of_it = exact.nash_policy(regularised)
    agrees(exact.unregularised_gap(regularised, nash_of_it)[None], f"{FLOORS[reference]:.2e}")
    # Where INPO stalls: the Nash policy of the regularised game, and so does EGPO.
    assert mirror_gaps(regularised, (3000,), eta=1 / 0.3)[0] < 1e-14
    memory = numbers(game, 1 / 3.1, 0.1, 10**9)
    run, kept = played(game, COMAL_EGPO, (3000,), memory=memory)
    close(jax.nn.log_softmax(run.logits)[kept[0]], nash_of_it, 1e-9)
    outer, kept = played(game, PROXIMAL, (10, 20, 50), memory=jnp.asarray(0.1))
    found = exact.duality_gap(game, outer.logits)[kept]
    if reference is None:
        agrees(found[:2], "1.9e-5 2e-9")
    assert found[2] < 2e-14
    close(jnp.exp(outer.logits[-1]), nash, 1e-10)
    assert comal_gaps(COMAL_INPO, game, (1000,), eta=1 / 0.3, tau=0.1, every=12)[0] < 2e-14


def proximal(logits, game, t, key, tau):
    return proximal_point(tau=tau).step(logits, game, t, key, ())[0], tau


PROXIMAL = Update(proximal)


def test_what_steps_on_win_rates_alone_runs_round_the_cycle():
    weights = mirror_gaps(cycle(), (1000, 10_000), eta=1.0)
    assert weights[1] == pytest.approx(0.8, abs=0.01)
    # Iterative IPO is these weights, of step 1 / tau; iterative DPO runs off too.
    first = exact.mirror_step(cycle(), cycle((0.2, 0.5, 0.3)).reference_logps, eta=1.0)
    ipo = iterated(objective("ipo", tau=1.0, length_normalize=False), newton_steps=1)
    found, _ = jax.jit(lambda x: ipo.step(x, cycle(), 0, None, ()))(
        cycle((0.2, 0.5, 0.3)).reference_logps
    )
    close(jax.nn.log_softmax(found), first)
    dpo = gaps(cycle((0.2, 0.5, 0.3)), iterated(objective("dpo", beta=2.0)), (0, 300, 1000))
    assert dpo[0] < dpo[1] < dpo[2]


def test_comal_with_its_own_loss_moves_the_reference_every_k_rounds():
    game = cycle()
    by_loss = solve(game, comal(inpo(eta=0.3), tau=0.1, every=3), 7)
    closed = solve(game, COMAL_INPO, 7, memory=numbers(game, 1 / 0.3, 0.1, 3))
    close(jax.nn.softmax(by_loss.logits), jax.nn.softmax(closed.logits), 1e-9)
    reference, _ = closed.memory[3]
    close(reference, closed.logits[6])


# B.5. The ten games.


def test_table_of_unregularised_self_play():
    game, at = golden(0.0), (0, 10, 100, 1000, 10_000, 100_000)
    # Its last two cells hang on the last bit: `tables_test.HANGING`.
    agrees(mirror_gaps(game, at[:4], eta=1.0), "3.5e-1 2.4e-1 3.7e-1 5.5e-1")
    agrees(mirror_gaps(game, at, eta=1.0, average=True), "- 2.7e-1 5.8e-2 1.4e-2 4.4e-3 1.4e-3")
    run, kept = played(game, optimistic_mirror_descent(eta=0.5), at)
    last, average = run.logits[kept], jnp.exp(run.average[kept])
    gap = lambda x: exact.duality_gap(game, x).mean(-1)  # noqa: E731
    agrees(gap(last), "3.5e-1 2.7e-1 1.6e-1 5.2e-2 3.1e-2 5.0e-3")
    # The table's average counts the policy that has been reached beside those before it.
    t = jnp.array(at)[:, None, None]
    with_last = jnp.log((t * average + jax.nn.softmax(last)) / (t + 1))
    agrees(gap(with_last), "3.5e-1 2.9e-1 7.0e-2 8.7e-3 7.5e-4 7.3e-5")


def test_table_of_comal_on_the_ten_games():
    game = golden(0.0)
    outer = gaps(game, PROXIMAL, (1, 5, 10, 20, 50, 100), memory=jnp.asarray(0.01))
    agrees(outer, "1.9e-2 4.8e-3 3.1e-4 2.6e-5 9.3e-8 3.0e-10")
    reset = functools.partial(comal_gaps, COMAL_EGPO, game)
    at = (2000, 10_000, 20_000)
    agrees(reset(at, eta=1 / 3.01, tau=0.01, every=2000), "1.9e-2 4.8e-3 3.1e-4")
    at = (1000, 10_000, 20_000)
    agrees(reset(at, eta=0.5, tau=0.01, every=500), "7.6e-3 3.8e-5 5.0e-7")
    # Short games of a larger KL weight stall, where the cycle of three is solved to 1e-14.
    for every in (12, 50):
        stalled = reset((2000, 5000, 10_000), eta=0.5, tau=0.1, every=every)
        assert ((stalled > 4e-3) & (stalled < 6e-2)).all()


@pytest.mark.slow
def test_a_hundred_moves_of_comal_on_the_ten_games():
    at = (40_000, 100_000, 200_000)
    found = comal_gaps(COMAL_EGPO, golden(0.0), at, eta=1 / 3.01, tau=0.01, every=2000)
    agrees(found, "2.6e-5 9.3e-8 3.0e-10")


def momentum(logits, game, t, key, memory):
    alpha, kept = memory
    method = extrapolated(mirror_descent(eta=1.0), alpha=alpha)
    logits, kept = method.step(logits, game, t, key, kept)
    return logits, (alpha, kept)


MOMENTUM = Update(momentum)


def test_momentum_drives_cyclic_games_apart_and_speeds_up_transitive_ones():
    def found(game, alpha, at):
        return gaps(game, MOMENTUM, at, memory=(jnp.asarray(alpha), (game.reference_logps, ())))

    for alpha, printed in ((0.0, ".366"), (0.3, ".500"), (0.5, ".614")):
        agrees(found(golden(0.0), alpha, (100,)), printed)
    rewards = jnp.asarray(np.random.default_rng(0).standard_normal((10, 10)))
    game = builders.bradley_terry(rewards, beta=0.0)
    slow, some, fast = (found(game, alpha, (50,))[0] for alpha in (0.0, 0.3, 0.5))
    assert fast < 0.5 * some < 0.5 * slow
