"""COMAL's cycle of three answers: what cycles, what stalls, what reaches the Nash policy.

    paxo run experiments/games/comal.py

Liu et al. 2024, arXiv:2410.23223. Gaps are those of the game without a KL term, whose Nash policy
is (4, 3, 4) / 11: multiplicative weights (SPPO, DNO, iterative IPO) and iterative DPO go round,
regularised methods stall where their KL term holds them, COMAL moves the reference.

On a CPU, 13 seconds of CPU time. After 1,000 rounds from a uniform reference: SPPO 0.38, DNO 0.25,
iterative DPO 0.80, INPO and EGPO 2.45e-2, COMAL 2e-16 (moving every 12 rounds of INPO) and 0 (exact
rounds); from (.2, .5, .3) SPPO 0.78, DNO 0.73, iterative DPO 0.60, INPO and EGPO 5.88e-2, COMAL 0
both ways.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import by_method, plot_tables
from paxo.games.solve import solve
from paxo.objectives import objective


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        tau: KL weight of the inner games.
        every: rounds between moves of the reference.
        num_steps: rounds.
    """

    tau: float = 0.1
    every: int = 12
    num_steps: int = 1000


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All methods from two references."""
    at = [0, *range(4, settings.num_steps + 1, 4)]
    tau, tables = settings.tau, {}
    inpo = lambda: updates.inpo(eta=3 * tau)  # noqa: E731
    methods = {
        "sppo (eta 1)": (0.0, updates.sppo(eta=1.0)),
        "dno (eta 1)": (0.0, updates.dno(eta=1.0)),
        "iterative dpo (beta 2)": (0.0, updates.iterated(objective("dpo", beta=2.0))),
        "inpo": (tau, inpo()),
        "egpo": (tau, updates.egpo(eta=exact.egpo_step_size(tau))),
        "comal with inpo": (0.0, updates.comal(inpo(), tau=tau, every=settings.every)),
        "comal, exact rounds": (0.0, updates.proximal_point(tau=tau)),
    }
    references = {"uniform": None, "(.2, .5, .3)": jnp.log(jnp.array([0.2, 0.5, 0.3]))}
    with jax.enable_x64(True):
        for title, reference in references.items():
            table = tables[f"reference {title}"] = {}
            for name, (beta, method) in methods.items():
                game = builders.comal_3x3(beta=beta, reference_logits=reference)
                played = solve(game, method, at[-1], at=at)
                gaps = exact.unregularised_gap(game, played.logits)
                table[name] = {t: float(g) for t, g in zip(at, gaps)}
                print(f"{title:14s} {name:22s} gap {float(gaps[-1]):.2e}")
    write_results(workdir / "results.json", by_method(tables))
    plot_tables(workdir / "gaps.png", tables)
