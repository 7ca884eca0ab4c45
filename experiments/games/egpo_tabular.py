"""EGPO's simulations with exact gradients: five methods on its ten golden games, float64.

    paxo run experiments/games/egpo_tabular.py

Zhou et al. 2025, arXiv:2503.08942, whose figures show one game; here the mean over all ten. First
with the authors' step for each KL weight, then with the same step 1 / (beta + 3) for all methods
and with the decaying steps of Nash-MD and INPO.

On a CPU, 36 seconds of CPU time. Mean gaps with the authors' step after 1,000, 5,000 and 100,000
iterations at beta 0.1, 0.01 and 0.001: EGPO 7e-31, 9e-31, 2.5e-8; online_ipo_v1 7e-31, 5.8e-2,
9.1e-2; online_ipo_v2 1.1e-6, 2.0e-1, 5.6e-1; Nash-MD 6.7e-5, 6.7e-2, 8.9e-2; by policy gradient
1.4e-2, 3.0e-1, 3.2e-1. With the step 1 / (beta + 3) EGPO is at 1e-16 after 5,000 iterations of
beta 0.01 and at 2e-26 after 100,000 of beta 0.001, where all others are above 5e-2.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import by_method, plot_tables
from paxo.games.solve import Update, solve

AUTHORS_ETA = {0.1: 0.4, 0.01: 0.8, 0.001: 0.08}
KEPT = {
    0.1: (0, 1, 10, 50, 100, 200, 300, 1000),
    0.01: (0, 10, 100, 300, 500, 1000, 2000, 5000),
    0.001: (0, 100, 1000, 10000, 30000, 100000),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        betas: KL weights, of 0.1, 0.01 and 0.001.
        seed: of the games.
    """

    betas: tuple[float, ...] = (0.1, 0.01, 0.001)
    seed: int = builders.EGPO_SEED


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All tables, a plot for each kind of step."""
    authors, same = {}, {}
    with jax.enable_x64(True):
        for beta in settings.betas:
            game = builders.egpo_golden(beta=beta, seed=settings.seed)
            eta = AUTHORS_ETA[beta]
            gaps = lambda update: mean_gaps(game, update, KEPT[beta])  # noqa: B023, E731
            authors[f"beta {beta:g}, eta {eta:g}"] = {
                name: gaps(update) for name, update in with_authors_step(eta, beta).items()
            }
            same[f"beta {beta:g}, eta 1/(beta + 3)"] = {
                name: gaps(update) for name, update in with_proved_step(beta).items()
            }
    write_results(workdir / "results.json", by_method(authors | same))
    plot_tables(workdir / "authors_step.png", authors)
    plot_tables(workdir / "same_step.png", same)
    print_last(authors | same)


def with_authors_step(eta: float, beta: float) -> dict[str, Update]:
    """The methods of the paper, at the learning rates of its code."""
    return {
        "online_ipo_v1": updates.online_ipo_v1(eta=eta),
        "online_ipo_v2": updates.online_ipo_v2(eta=eta),
        "nash_md": updates.nash_md(eta=eta),
        # The code's mixture for the policy gradient is half of the matching one.
        "nash_md_pg": updates.nash_md_pg(eta=eta, mix=eta * beta / 2),
        "egpo": updates.egpo(eta=eta),
    }


def with_proved_step(beta: float) -> dict[str, Update]:
    """The step of EGPO's theorem for all, and the schedules of the other methods' theorems."""
    eta, decaying = exact.egpo_step_size(beta), decaying_step(beta)
    return {
        "online_ipo_v1": updates.mirror_descent(eta=eta),
        "egpo": updates.egpo(eta=eta),
        "nash_md": updates.mirror_descent(eta=eta, mix=True),
        "nash_md, 2/(tau(t+2))": updates.mirror_descent(eta=decaying, mix=True),
        "inpo, eta=tau(t+2)/2": updates.mirror_descent(eta=decaying),
        "inpo, eta=3 tau": updates.mirror_descent(eta=1 / (3 * beta)),
    }


def decaying_step(beta: float) -> Callable:
    """Nash-MD's and INPO's step on win rates, 2 / (beta (t + 2))."""
    return lambda t: 2 / (beta * (t + 2))


def mean_gaps(game, update: Update, at: Sequence[int], **options) -> dict[int, float]:
    """Iteration -> mean duality gap over the games."""
    played = solve(game, update, at[-1], at=at, **options)
    gaps = exact.duality_gap(game, played.logits)
    return {t: float(g) for t, g in zip(at, gaps.reshape(len(at), -1).mean(-1))}


def print_last(tables: dict) -> None:
    """The last gap of every method."""
    for title, methods in tables.items():
        for name, gaps in methods.items():
            print(f"{title:32s} {name:24s} {list(gaps.values())[-1]:.2e}")
