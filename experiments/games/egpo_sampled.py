"""EGPO's simulations with sampled updates: 100 pairs and opponents drawn for each.

    paxo run experiments/games/egpo_sampled.py

Zhou et al. 2025, arXiv:2503.08942: ten golden games, beta 0.01, learning rate 2e-4. The released
code normalises Nash-MD's opponent over the games instead of the actions, and its Nash-MD ends at a
gap of 0.27; sampled from the mixture of actions, Nash-MD is as good as the others.

On a CPU, 21 seconds of CPU time. Mean gaps after 10,000 updates, from 0.30: online_ipo_v1 0.071,
Nash-MD 0.071, EGPO 0.075, online_ipo_v2 0.16, Nash-MD by policy gradient 0.30. The step is so
small (eta 0.008) that EGPO has nothing to gain over online_ipo_v1.
"""

import dataclasses
import pathlib

import jax

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import plot_tables
from paxo.games.solve import solve


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        beta: KL weight.
        num_steps: updates; the paper makes 100,000.
        num_samples: pairs drawn for an update.
        learning_rate: of gradient descent.
        seed: of the draws.
    """

    beta: float = 0.01
    num_steps: int = 10000
    num_samples: int = 100
    learning_rate: float = 2e-4
    seed: int = 0


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All methods on the same games, in float32."""
    game = builders.egpo_golden(beta=settings.beta)
    at = [0, *(settings.num_steps * k // 10 for k in range(1, 11))]
    gaps = {}
    for name in ("online_ipo_v1", "online_ipo_v2", "nash_md", "nash_md_pg", "egpo"):
        method = getattr(updates, name)(
            rate=settings.learning_rate, num_samples=settings.num_samples
        )
        played = solve(game, method, at[-1], at=at, key=jax.random.key(settings.seed))
        found = exact.duality_gap(game, played.logits).mean(-1)
        gaps[name] = {t: float(g) for t, g in zip(at, found)}
        print(f"{name:16s} gap {gaps[name][0]:.2e} -> {gaps[name][at[-1]]:.2e}")
    write_results(workdir / "results.json", gaps)
    plot_tables(workdir / "gaps.png", {"100 samples an update": gaps}, floor=1e-6)
