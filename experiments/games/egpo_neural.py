"""EGPO's simulations with a neural policy: a small network whose layers ten games share.

    paxo run experiments/games/egpo_neural.py

Zhou et al. 2025, arXiv:2503.08942: 100 actions, beta 0.01, a ReLU network 10-10-10-100 with an
input of its own for each game, plain gradient descent at 0.003 on the exact loss summed over the
games. The network at the start is the reference. The games are random ones of the same
construction: those of the paper's code need torch's initial weights.

On a CPU, 74 seconds of CPU time. Mean gap of three seeds, from 7.3e-2: EGPO 2.3e-4, online_ipo_v1
8.5e-3, Nash-MD 1.4e-2, online_ipo_v2 1.6e-2, Nash-MD by policy gradient 7.2e-2 (the authors' code,
run once on a CPU: 1.2e-4, 1.8e-3, 1.4e-3, 1.6e-2, 6.7e-2 from 6.8e-2). Seeds differ by powers of
ten.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from paxo.evaluation.report import write_results
from paxo.games import builders, exact, updates
from paxo.games.plots import plot_tables
from paxo.games.policies import GamePolicy, game_around, neural_policy
from paxo.games.preference_game import PreferenceGame
from paxo.games.solve import solve
from paxo.types import Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        beta: KL weight.
        num_actions: N.
        num_steps: updates.
        learning_rate: of gradient descent.
        seeds: of games and weights; the mean over all is kept.
    """

    beta: float = 0.01
    num_actions: int = 100
    num_steps: int = 10000
    learning_rate: float = 0.003
    seeds: tuple[int, ...] = (1, 2, 3)


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All methods from the same weights."""
    policy = neural_policy()
    starts = [first_policy(settings, policy, seed) for seed in settings.seeds]
    kept = np.unique(np.geomspace(1, settings.num_steps, 25).round().astype(int))
    at = [0, *(int(t) for t in kept)]
    gaps = {}
    for name in ("online_ipo_v1", "online_ipo_v2", "nash_md", "nash_md_pg", "egpo"):
        # EGPO's code: half of the mixture that matches the rate, 2 rate / (beta N) * beta.
        mix = {"mix": 2 * settings.learning_rate / settings.num_actions}
        options = {"rate": settings.learning_rate, "policy": policy}
        method = getattr(updates, name)(**options, **(mix if name.startswith("nash") else {}))
        found = []
        for game, params in starts:
            played = solve(game, method, at[-1], at=at, policy=policy, params=params)
            found.append(exact.duality_gap(game, played.logits).mean(-1))
        gaps[name] = {t: float(g) for t, g in zip(at, np.mean(found, 0))}
        each = ", ".join(f"{float(gap[-1]):.1e}" for gap in found)
        print(f"{name:16s} gap {gaps[name][0]:.2e} -> {gaps[name][at[-1]]:.2e} (by seed: {each})")
    write_results(workdir / "results.json", gaps)
    plot_tables(workdir / "gaps.png", {f"neural policy, beta {settings.beta:g}": gaps}, floor=1e-6)


def first_policy(
    settings: Settings, policy: GamePolicy, seed: int
) -> tuple[PreferenceGame, Params]:
    """Ten random games whose reference is a new network, and its weights."""
    for_game, for_weights = jax.random.split(jax.random.key(seed))
    game = builders.random_game(
        for_game, settings.num_actions, beta=settings.beta, batch_shape=(10,)
    )
    params = policy.init(for_weights, game)
    return game_around(game, policy, params), params
