"""The published tables of methods on EGPO's ten games, cell by cell, and its rates.

Fifteen cells are no property of the games but of the last bits of float64: of them, and of the
cells before them in their rows, see `test_fifteen_cells_hang_on_the_last_bit`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.solve import Update, solve
from tests.games.playing import (
    METHODS,
    SCHEDULED,
    agrees,
    close,
    golden,
    method_gaps,
    mirror_gaps,
    played,
    room,
)


def test_a_cell_leaves_room_for_its_own_rounding_only():
    assert room("4.17e-2") == 0.01 * 4.17e-2
    assert room("1.2e-4") == pytest.approx(0.01 * 1.2e-4 + 0.05e-4)
    assert room(".73") == pytest.approx(0.0073 + 0.005)
    assert room("0") == 1e-14
    agrees([0.0417, 9.0], "4.17e-2 -")
    with pytest.raises(AssertionError):
        agrees([0.0422], "4.17e-2")


# The authors' steps: T2 and T5.

TO_THE_LAST = (0, 100, 1000, 10_000, 30_000, 100_000)


@pytest.mark.parametrize(
    ("name", "mix", "printed"),
    [
        ("online_ipo_v1", 0.0, "9.08e-2 8.42e-2 4.17e-2 1.82e-3 3.55e-5 1.35e-8 5.3e-12 0"),
        ("online_ipo_v2", 0.0, "9.08e-2 8.21e-2 3.96e-2 4.27e-3 8.40e-4 1.26e-4 4.39e-5 1.13e-6"),
        ("nash_md", 0.04, "9.08e-2 8.42e-2 4.20e-2 2.50e-3 6.62e-5 6.60e-5 6.66e-5 6.66e-5"),
        ("nash_md", 0.02, "9.08e-2 8.42e-2 4.18e-2 2.13e-3 3.43e-5 1.60e-5 1.62e-5 1.62e-5"),
        ("nash_md_pg", 0.02, "9.08e-2 9.05e-2 8.84e-2 8.02e-2 7.21e-2 5.96e-2 4.90e-2 1.39e-2"),
        ("egpo", 0.0, "9.08e-2 8.39e-2 4.03e-2 1.45e-3 2.25e-5 5.2e-9 1.3e-12 0"),
    ],
)
def test_table_of_exact_methods_at_a_tenth(name, mix, printed):
    at = (0, 1, 10, 50, 100, 200, 300, 1000)
    agrees(method_gaps(name, golden(0.1), at, eta=0.4, mix=mix), printed)


@pytest.mark.parametrize(
    ("name", "mix", "printed"),
    [
        ("online_ipo_v1", 0.0, "2.99e-1 1.96e-1 1.35e-1 1.31e-1 8.9e-2 8.0e-2 6.2e-2 5.8e-2"),
        ("online_ipo_v2", 0.0, "2.99e-1 2.59e-1 3.81e-1 2.59e-1 2.3e-1 2.5e-1 2.3e-1 2.0e-1"),
        ("nash_md", 0.008, "2.99e-1 1.96e-1 1.33e-1 1.29e-1 8.6e-2 7.4e-2 6.1e-2 6.7e-2"),
        ("nash_md_pg", 0.004, "2.99e-1 2.99e-1 2.95e-1 2.88e-1 2.80e-1 2.7e-1 2.5e-1 3.0e-1"),
        ("egpo", 0.0, "2.99e-1 1.80e-1 4.12e-2 6.35e-4 1.40e-5 2.55e-9 0 0"),
    ],
)
def test_table_of_exact_methods_at_a_hundredth(name, mix, printed):
    at = (0, 10, 100, 300, 500, 1000, 2000, 5000)
    agrees(method_gaps(name, golden(0.01), at, eta=0.8, mix=mix), printed)


@pytest.mark.parametrize(
    ("name", "mix", "printed"),
    [
        ("online_ipo_v1", 0.0, "3.43e-1 2.31e-1 1.71e-1 1.75e-1 1.61e-1 9.1e-2"),
        ("online_ipo_v2", 0.0, "3.43e-1 3.2e-1 5.1e-1 6.0e-1"),
        ("nash_md", 8e-5, "3.43e-1 2.31e-1 1.71e-1 1.75e-1 1.6e-1 8.9e-2"),
        ("nash_md_pg", 4e-5, "3.43e-1 3.43e-1 3.43e-1 3.39e-1 3.31e-1 3.17e-1"),
        ("egpo", 0.0, "3.43e-1 2.29e-1 1.62e-1 5.17e-2 6.9e-3 2.5e-8"),
    ],
)
def test_table_of_exact_methods_at_a_thousandth(name, mix, printed):
    at = TO_THE_LAST[: len(printed.split())]
    agrees(method_gaps(name, golden(0.001), at, eta=0.08, mix=mix), printed)


def test_game_zero_alone_is_as_the_paper_plots_it():
    game = golden(0.01)
    for name, at, printed in (
        ("online_ipo_v1", (500, 1000, 2000), "5.14e-3 1.26e-4 6.0e-8"),
        ("egpo", (300, 1000), "2.53e-4 7.2e-10"),
    ):
        run, kept = played(game, METHODS[name], at, memory=jnp.array([0.8, 0.0]))
        agrees(exact.duality_gap(game, run.logits)[kept, 0], printed)


# The step 1 / (beta + 3) for all, and the schedules of the theorems.


@pytest.mark.parametrize("beta", [0.1, 0.01, 0.001])
def test_table_of_one_step_for_all(beta):
    proved, decaying = 1 / (beta + 3), lambda t: 2 / (beta * (t + 2))
    at, rows = {
        0.1: (
            (10, 100, 300),
            (
                (proved, False, "4.9e-2 1.6e-4 4.6e-10"),
                (proved, True, "4.9e-2 2.1e-4 4.3e-5"),
                (decaying, True, "3.5e-3 2.4e-5 2.6e-6"),
                (decaying, False, "5.3e-3 1.9e-6 2.6e-8"),
                (1 / 0.3, False, "1.4e-3 2.4e-11 0"),
                (None, None, "4.8e-2 1.2e-4 1.9e-10"),
            ),
        ),
        0.01: (
            (100, 1000, 2000, 5000),
            (
                (proved, False, "1.5e-1 1.1e-2 4.3e-4 4.0e-8"),
                (proved, True, "1.5e-1 1.1e-2 4.7e-4 7.7e-6"),
                (decaying, True, "4.3e-1 4.7e-2 7.3e-3 3.5e-4"),
                (decaying, False, "4.3e-1 5.0e-2 9.2e-3 3.8e-4"),
                (None, None, "1.2e-1 1.6e-4 9.7e-8 0"),
            ),
        ),
        0.001: (
            (1000, 10_000, 30_000, 100_000),
            (
                (1 / 0.003, False, ".78 .79 .70 .72"),
                (None, None, "7.6e-2 2.4e-4 9.4e-11 0"),
            ),
        ),
    }[beta]
    game = golden(beta)
    for eta, mix, printed in rows:
        if eta is None:
            found = method_gaps("egpo", game, at, eta=proved)
        else:
            found = mirror_gaps(game, at, eta=eta, mix=mix)
        agrees(found, printed)


# The rows that cycle for thousands of rounds, `~` before the cells that hang on the last bit.
ROUNDS = (100, 1000, 2000, 5000, 10_000, 30_000, 100_000)
HANGING = {  # KL weight, constant step or None for 2 / (beta (t + 2)), form, cells
    "inpo, eta = 3 tau": (0.01, 1 / 0.03, "", ".73 ~.65 ~.67 ~.67 - - -"),
    "online_ipo_v1": (0.001, 1 / 3.001, "", "- 3.0e-1 - - 4.5e-1 ~5.1e-1 ~4.0e-1"),
    "nash_md, decaying": (0.001, None, "mixed", "- 7.0e-1 - - ~4.5e-1 ~2.8e-1 ~7.0e-2"),
    "inpo, decaying": (0.001, None, "", "- 6.4e-1 - - ~4.2e-1 ~2.9e-1 ~5.8e-2"),
    "online_ipo_v2": (0.001, 0.08, "v2", "3.2e-1 5.1e-1 - - 6.0e-1 ~6.4e-1 ~5.6e-1"),
    "multiplicative weights": (0.0, 1.0, "", "3.7e-1 5.5e-1 - - ~7.0e-1 - ~7.4e-1"),
}


def side_by_side(logits, game, t, key, rows):
    """A step of every row of `HANGING`, from references that differ by what rounding does."""
    reference, beta, constant, mixed, v2 = rows
    eta = jnp.where(constant > 0, constant, 2 / (beta * (t + 2)))
    pull = eta * beta
    rates = game.win_rates(exact.mixture(logits, reference, mixed * pull))
    mirror = (1 - pull) * logits + pull * reference + eta * rates
    p, advantages = jnp.exp(logits), rates - beta * (logits - reference)
    centred = p * (advantages - jnp.sum(p * advantages, -1, keepdims=True))
    moved = jnp.where(v2, logits + eta * game.num_actions * centred, mirror)
    return jax.nn.log_softmax(moved), rows


SIDE_BY_SIDE = Update(side_by_side)


@pytest.mark.parametrize("last", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_fifteen_cells_hang_on_the_last_bit(last):
    # Eight references that differ by 1e-15 of a logit, as other orders of summing would make them,
    # are the same game until the rows have cycled for long. Then their mean gaps differ by more
    # than the 1 % to which a cell can be held: it is no figure of the game, and what is held to is
    # its place among them, and what it says.
    game = golden(0.001)
    wobble = 1e-15 * np.random.default_rng(0).standard_normal((8, len(HANGING), 10, 10))
    reference = game.reference_logps * (1 + wobble)
    betas, constants, forms, _ = zip(*HANGING.values())
    columns = (betas, [c or 0.0 for c in constants], [f == "mixed" for f in forms])
    columns = (*columns, [f == "v2" for f in forms])
    rows = (reference, *(jnp.asarray(x)[:, None, None] for x in columns))
    at = [t for t in ROUNDS if t <= last] + list(range(last + 1, last + 3)) * (last < 100_000)
    run = solve(game, SIDE_BY_SIDE, at[-1], at=at, params=reference, memory=rows)
    hanging = 0
    for k, (beta, constant, _, printed) in enumerate(HANGING.values()):
        cells = printed.split()
        assert len(cells) == len(ROUNDS)
        gap = exact.duality_gap(game.replace(beta=beta), run.logits[:, :, k])
        found = np.asarray(gap).mean(-1)  # [rounds, 8]
        assert np.ptp(found[0]) < 1e-8  # not yet
        for t, several, cell in zip(ROUNDS, found, cells):
            middle, spread = several.mean(), several.std(ddof=1)
            if t <= last and cell.startswith("~"):
                hanging += 1
                assert np.ptp(several) > 0.02 * middle
                off = abs(middle - float(cell[1:]))
                assert off < min(room(cell[1:]) + 5 * spread, 0.25 * middle)
            elif t <= last:
                agrees([middle], cell)
                assert cell == "-" or spread < 0.005 * middle
        # Decaying steps come down, constant ones cycle for ever.
        middles = found[ROUNDS.index(1000) : len([t for t in ROUNDS if t <= last])].mean(-1)
        assert (np.diff(middles) < 0).all() if constant is None else (middles > 0.25).all()
    assert hanging == (15 if last == 100_000 else 6)


# T3, T4: EGPO's rate.


@pytest.mark.parametrize(
    ("beta", "eta"), [(0.1, 0.4), (0.1, 1 / 3.1), (0.01, 0.8), (0.01, 1 / 3.01)]
)
def test_egpo_contracts_by_the_square_of_its_bound_and_never_above_it(beta, eta):
    game, rate = golden(beta), (1 - eta * beta) ** 2
    run = solve(game, METHODS["egpo"], 1000, memory=jnp.array([eta, 0.0]))
    distance = exact.kl_divergence(exact.nash_policy(game), run.logits)
    bound = exact.egpo_bound(distance[0], jnp.arange(1001.0)[:, None], eta=eta, beta=beta)
    assert bool((distance <= bound + 1e-28).all())
    found = np.asarray(exact.duality_gap(game, run.logits))
    window = np.arange(60, 201) if beta == 0.1 else np.arange(200, 1001)
    slope, _ = np.polyfit(window, np.log(found[window]), 1)
    close(np.exp(slope), rate, 5e-3)
    if beta == 0.1:
        published = (0.9189, 0.9207) if eta == 0.4 else (0.9346, 0.9359)
        close([np.exp(slope).min(), np.exp(slope).max()], published, 3e-4)
        # Step by step: the mean gap always, and with the step that is proved every game. With 0.4
        # two of 1,400 steps of single games are 0.0002 outside, *faster*: 0.9164 in game 2 at 60
        # and 61, where the turning directions, which die out sooner, are not yet gone.
        factors = found[61:201] / found[60:200]
        close(found[61:201].mean(1) / found[60:200].mean(1), rate, 5e-3)
        close(factors[2:] if eta == 0.4 else factors, rate, 5e-3)
        close(factors[:2], rate, 5.2e-3)


# T5, T6.


def test_mirror_descent_converges_below_its_stability_limit_and_not_above():
    game = golden(0.01)
    limit = exact.stability_limit(game)
    sizes = jnp.array([0.8, 0.0])
    run, kept = played(game, METHODS["online_ipo_v1"], (5000, 20_000), memory=sizes)
    found = exact.duality_gap(game, run.logits)[kept]
    np.testing.assert_array_equal(found[1] < 1e-6, limit > 0.8)
    assert float(found[0].mean()) >= 1e-2
    assert float(method_gaps("egpo", game, (1000,), eta=0.8)[0]) <= 1e-8


def test_constant_nash_md_solves_the_game_of_a_larger_kl_weight():
    game, mix = golden(0.1), 0.04
    run, kept = played(game, METHODS["nash_md"], (1000, 3000), memory=jnp.array([0.4, mix]))
    plateau = exact.duality_gap(game, run.logits)[kept].mean(-1)
    np.testing.assert_allclose(plateau, 6.66e-5, rtol=0.05)
    mixture = exact.mixture(run.logits[-1], game.reference_logps, mix)
    larger = game.replace(beta=0.1 / (1 - mix))
    assert float(exact.duality_gap(larger, mixture).max()) < 1e-12


# T8.


def test_float32_reproduces_float64():
    at = (10, 100, 1000, 5000)
    runs = (
        ("online_ipo_v1", 0.1, 0.4, at, 1e-7),
        ("egpo", 0.1, 0.4, at, 1e-7),
        ("egpo", 0.01, 0.8, at, 1e-7),
        ("egpo", 0.001, 0.08, TO_THE_LAST, 2e-6),
    )
    wanted = [method_gaps(name, golden(b), at, eta=eta) for name, b, eta, at, _ in runs]
    with jax.enable_x64(False):
        found = [method_gaps(name, golden(b), at, eta=eta) for name, b, eta, at, _ in runs]
    for single, double, (*_, at_, room_) in zip(found, wanted, runs):
        assert single.dtype == np.float32
        # At the smallest KL weight T8 is about the end point alone.
        of = -1 if at_ is TO_THE_LAST else slice(None)
        np.testing.assert_allclose(single[of], double[of], rtol=0, atol=room_)


# B.3. Schedules on the games of numpy's seed.


def test_schedules_of_inpo_and_nash_md():
    game = builders.numpy_game(builders.EGPO_SEED, beta=0.1)
    at, decaying = (10, 100, 1000, 10_000), lambda t: 2 / (0.1 * (t + 2))
    agrees(mirror_gaps(game, at, eta=1 / 0.3), "1.45e-3 1.7e-12 0 0")
    agrees(mirror_gaps(game, at, eta=decaying), "- 2.2e-6 2.5e-10 -")
    agrees(mirror_gaps(game, at, eta=decaying, mix=True), "- 2.9e-5 3.1e-7 3.1e-9")
    best_responses = mirror_gaps(game, at, eta=1 / 0.1)
    assert ((best_responses > 0.15) & (best_responses < 0.25)).all()


@pytest.mark.parametrize("mix", [False, True])
def test_the_kl_to_the_nash_policy_stays_below_the_bound_of_decaying_steps(mix):
    game = builders.numpy_game(builders.EGPO_SEED, beta=0.1)
    size = 2 / (0.1 * (jnp.arange(1000.0) + 2))
    sizes = jnp.stack([size, size * 0.1 if mix else jnp.zeros(1000)])
    run = solve(game, SCHEDULED, 1000, memory=sizes)
    distance = exact.kl_divergence(exact.nash_policy(game), run.logits).max(-1)
    bound = exact.decaying_step_bound(jnp.arange(1000), beta=0.1)
    assert bool((distance[1:] <= bound).all())


def test_inpos_paper_ratio_is_stable_only_below_its_limit():
    # 1/eta = 1/(3 tau) is stable where omega < sqrt(5) tau.
    for beta, stable in ((0.2, True), (0.1, False)):
        game = builders.cyclic(5, beta=beta, reference_logits=0.1 * jnp.arange(5.0))
        assert bool(1 / (3 * beta) < exact.stability_limit(game)) == stable
        last = mirror_gaps(game, (3000,), eta=1 / (3 * beta))
        assert (last[0] < 1e-9) == stable
