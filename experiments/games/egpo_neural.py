"""EGPO's simulations with a neural policy: a small network whose layers ten games share.

    paxo run experiments/games/egpo_neural.py

Zhou et al. 2025, arXiv:2503.08942: 100 actions, beta 0.01, a ReLU network 10-10-10-100 with an
input of its own for each game, plain gradient descent at 0.003 on the exact loss summed over the
games. The network at the start is the reference. The games are random ones of the same
construction: those of the paper's code need torch's initial weights.

TIME: FIGURES
"""

import dataclasses
import pathlib

import jax
import numpy as np

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import plot_tables
from paxo.games.policies import game_around, neural_policy
from paxo.games.solve import solve


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        beta: KL weight.
        num_actions: N.
        num_steps: updates.
        learning_rate: of gradient descent.
        seed: of games and weights.
    """

    beta: float = 0.01
    num_actions: int = 100
    num_steps: int = 10000
    learning_rate: float = 0.003
    seed: int = 0


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All methods from the same weights."""
    policy = neural_policy()
    for_game, for_weights = jax.random.split(jax.random.key(settings.seed))
    game = builders.random_game(
        for_game, settings.num_actions, beta=settings.beta, batch_shape=(10,)
    )
    params = policy.init(for_weights, game)
    game = game_around(game, policy, params)
    kept = np.unique(np.geomspace(1, settings.num_steps, 25).round().astype(int))
    at = [0, *(int(t) for t in kept)]
    gaps = {}
    for name in ("online_ipo_v1", "online_ipo_v2", "nash_md", "nash_md_pg", "egpo"):
        # EGPO's code: half of the mixture that matches the rate, 2 rate / (beta N) * beta.
        mix = {"mix": 2 * settings.learning_rate / settings.num_actions}
        options = {"rate": settings.learning_rate, "policy": policy}
        method = getattr(updates, name)(**options, **(mix if name.startswith("nash") else {}))
        played = solve(game, method, at[-1], at=at, policy=policy, params=params)
        found = exact.duality_gap(game, played.logits).mean(-1)
        gaps[name] = {t: float(g) for t, g in zip(at, found)}
        print(f"{name:16s} gap {gaps[name][0]:.2e} -> {gaps[name][at[-1]]:.2e}")
    write_results(workdir / "results.json", gaps)
    plot_tables(workdir / "gaps.png", {f"neural policy, beta {settings.beta:g}": gaps}, floor=1e-6)
