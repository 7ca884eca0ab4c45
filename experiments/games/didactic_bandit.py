"""A hundred bins: who finds a reward where the reference hardly goes?

    paxo run experiments/games/didactic_bandit.py

Tajwar et al. 2024, arXiv:2404.14367. Rewards peak at bin 70, of which the reference has 0.2 %, or
at bin 20, which it knows. Methods differ in who draws (the reference, once and for all, or the
live policy) and in whether the loser is pushed down (IPO, DPO) or only the best of ten is imitated.
One context, a table of logits, exact expectations and Adam, instead of the paper's network and
draws: the paper gives figures without numbers.

On a CPU, 8 seconds of CPU time. Expected reward at bin 70 (the reference has 0.039): offline IPO
0.42, DPO 0.29, imitation 0.31; on-policy 0.99, 1.00, 0.99. At bin 20 (0.38): offline 0.97, 0.95,
0.94; on-policy 1.00, 1.00, 1.00.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax

from paxo.evaluation.report import write_results
from paxo.games import builders
from paxo.games.expected import expected_loss
from paxo.games.plots import by_method, plot_tables
from paxo.games.policies import TABULAR
from paxo.games.preference_game import PreferenceGame
from paxo.games.solve import Update, solve
from paxo.objectives import Objective, objective


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        num_steps: updates.
        learning_rate: of Adam.
        best_of: draws of which the best is imitated.
        ipo_tau: its target margin is 1 / (2 tau) nats; the authors' code has 10.
        dpo_beta: of DPO.
    """

    num_steps: int = 1500
    learning_rate: float = 0.01
    best_of: int = 10
    ipo_tau: float = 0.05
    dpo_beta: float = 0.1


def experiment() -> Settings:
    """The settings."""
    return Settings()


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """All methods on both rewards."""
    bandit, tables = builders.didactic_bandit(), {}
    at = [0, *range(10, settings.num_steps + 1, 10)]
    ipo, dpo = objective("ipo", tau=settings.ipo_tau), objective("dpo", beta=settings.dpo_beta)
    for name, rewards in (("R4: peak at 70", bandit.rewards[0]), ("R5: at 20", bandit.rewards[1])):
        table = tables[name] = {}
        game = sharp_game(rewards, bandit.reference_logps)
        best = lambda logits: best_of(logits, rewards, settings.best_of)  # noqa: B023, E731
        for on_policy in (False, True):
            where = "on-policy" if on_policy else "offline"
            for method, loss, size, draws in (
                ("ipo", ipo, 2, lambda x: x),
                ("dpo", dpo, 2, lambda x: x),
                (f"best of {settings.best_of}", objective("nll"), 1, best),
            ):
                update = adam(settings.learning_rate, loss, size, draws, on_policy)
                played = solve(game, update, at[-1], at=at)
                expected = jax.nn.softmax(played.logits) @ rewards
                table[f"{method}, {where}"] = {t: float(x) for t, x in zip(at, expected)}
                print(f"{name:16s} {method:12s} {where:10s} reward {float(expected[-1]):.3f}")
    write_results(workdir / "results.json", by_method(tables))
    plot_tables(workdir / "rewards.png", tables, ylabel="expected reward", log_y=False)


def sharp_game(rewards: jax.Array, reference_logps: jax.Array) -> PreferenceGame:
    """The better reward always wins."""
    wins = jnp.where(rewards[:, None] == rewards, 0.5, 1.0 * (rewards[:, None] > rewards))
    return PreferenceGame(wins, reference_logps, 0.0)


def best_of(logits: jax.Array, rewards: jax.Array, number: int) -> jax.Array:
    """Log-probs of the best of some draws: P(all at most y)^n - P(all below y)^n, ties shared."""
    p = jax.nn.softmax(logits)
    upto = (rewards <= rewards[:, None]) @ p
    level = jnp.where(rewards == rewards[:, None], p, 0).sum(-1)
    below = jnp.maximum(upto - level, 0.0)
    share = p / jnp.maximum(level, 1e-37)
    return jnp.log(jnp.maximum(share * (upto**number - below**number), 1e-37))


def adam(rate: float, loss: Objective, size: int, draws, on_policy: bool) -> Update:
    """Adam on the exact expected loss of groups that `draws` makes of the drawing policy."""
    optimizer = optax.adam(rate)

    def step(logits, game, t, key, state):
        sampler = draws(logits if on_policy else game.reference_logps)

        def expected(x):
            return expected_loss(loss, game, x, sampler=sampler, candidates=size)

        change, state = optimizer.update(jax.grad(expected)(logits), state)
        return logits + change, state

    return Update(step, lambda logits, game: optimizer.init(TABULAR.logits(logits)))
