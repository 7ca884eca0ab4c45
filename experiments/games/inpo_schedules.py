"""Step schedules of INPO and Nash-MD, and where the paper's ratio tau = eta / 3 begins to cycle.

    paxo run experiments/games/inpo_schedules.py

Zhang et al. 2024, arXiv:2407.00617 (INPO's letter eta is the inverse of the step), and Munos et
al. 2023, arXiv:2312.00886. Ten games of EGPO's construction from numpy's seed. A constant step of
1 / (3 tau) is locally stable where the game's rotation rate omega is below sqrt(5) tau.

On a CPU, 15 seconds of CPU time. Gaps after 10,000 rounds at tau 0.1, 0.03 and 0.01: INPO with eta
= 3 tau 4e-32, 3.4e-1, 7.2e-1 (stable on 10, 1 and 1 of the 10 games); with its decaying step
2.5e-14, 1.5e-9, 1.8e-5; Nash-MD with the same 3.1e-9, 1.4e-8, 1.4e-5; EGPO 1e-30 each; best
responses cycle at 0.2 to 0.8.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import by_method, plot_tables
from paxo.games.solve import solve


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        taus: KL weights of the games.
        num_steps: rounds.
        seed: of the games.
    """

    taus: tuple[float, ...] = (0.1, 0.03, 0.01)
    num_steps: int = 10000
    seed: int = builders.EGPO_SEED


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """Every schedule on the games of every KL weight."""
    at = [0, *sorted({int(settings.num_steps ** (k / 16)) for k in range(1, 17)})]
    tables = {}
    with jax.enable_x64(True):
        for tau in settings.taus:
            game = builders.numpy_game(settings.seed, beta=tau)
            stable = jnp.sum(1 / (3 * tau) < exact.stability_limit(game))
            print(f"tau {tau:g}: eta = 3 tau is stable on {int(stable)} of 10 games")
            decaying = lambda t: 2 / (tau * (t + 2))  # noqa: B023, E731
            methods = {
                "inpo, eta = 3 tau": updates.mirror_descent(eta=1 / (3 * tau)),
                "inpo, eta = tau(t+2)/2": updates.mirror_descent(eta=decaying),
                "nash_md, step 2/(tau(t+2))": updates.mirror_descent(eta=decaying, mix=True),
                "best responses": updates.best_response_iteration(),
                "egpo": updates.egpo(eta=exact.egpo_step_size(tau)),
            }
            tables[f"tau {tau:g}"] = {}
            for name, method in methods.items():
                played = solve(game, method, at[-1], at=at)
                gaps = exact.duality_gap(game, played.logits).mean(-1)
                tables[f"tau {tau:g}"][name] = {t: float(g) for t, g in zip(at, gaps)}
                print(f"  {name:28s} gap {float(gaps[-1]):.2e} after {at[-1]} rounds")
    write_results(workdir / "results.json", by_method(tables))
    plot_tables(workdir / "gaps.png", tables)
