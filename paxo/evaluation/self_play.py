"""What a round of self-play has come to: win rates, KL, length, entropy, duality gap; a plot."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxo.evaluation.duality_gap import duality_gap_estimate
from paxo.evaluation.estimates import bootstrap_mean
from paxo.evaluation.win_rate import win_rate
from paxo.rows import written_by_first

PANELS = {
    "win_rate_first": "win rate against the first policy",
    "win_rate_last": "win rate against the last snapshot",
    "duality_gap": "duality gap, estimate (lower bound)",
    "kl_nats": "KL to the first policy (nats)",
    "tokens": "tokens of a completion",
    "entropy_nats": "entropy of a completion (nats)",
}


def preference_figures(preferences: np.ndarray, num: int) -> dict[str, float]:
    """Win rates and the estimated duality gap, each with its 95 % interval over prompts.

    Args:
        preferences: `[B, 3 E, 3 E]` P(i beats j) of E completions of the policy, then of the first
            policy, then of the last snapshot. Only the columns of the policy's are read.
        num: E.

    Returns:
        "win_rate_first", "win_rate_last", "duality_gap" (where E is at least 2), and each with
        "_low" and "_high" behind it.
    """
    against = 1 - preferences[:, num:, :num]  # P(ours beats theirs)
    estimates = {
        "win_rate_first": win_rate(against[:, :num]),
        "win_rate_last": win_rate(against[:, num:]),
    }
    if num >= 2:
        own = np.concatenate([np.arange(num), np.full(2 * num, -1)])
        estimates["duality_gap"] = duality_gap_estimate(preferences[:, :, :num], own)
    figures = {}
    for name, estimate in estimates.items():
        figures |= {
            name: estimate.value,
            f"{name}_low": estimate.low,
            f"{name}_high": estimate.high,
        }
    return figures


def wanted_comparisons(num: int) -> np.ndarray:
    """`[3 E, 3 E]` bool, the comparisons that `preference_figures` reads."""
    wanted = np.zeros((3 * num, 3 * num), bool)
    wanted[:, :num] = True
    np.fill_diagonal(wanted, False)
    return wanted


def policy_figures(
    log_ratios: np.ndarray, logps: np.ndarray, lengths: np.ndarray, finished: np.ndarray
) -> dict[str, float]:
    """Averages over completions that the policy has drawn.

    Args:
        log_ratios: `[N]` log-prob under the policy less that under the first policy, nats.
        logps: `[N]` log-prob under the policy, nats.
        lengths: `[N]` tokens.
        finished: `[N]` bool.

    Returns:
        "kl_nats" with its interval, "entropy_nats", "tokens", "finished".
    """
    kl = bootstrap_mean(log_ratios)
    return {
        "kl_nats": kl.value,
        "kl_nats_low": kl.low,
        "kl_nats_high": kl.high,
        "entropy_nats": float(-np.mean(logps)),
        "tokens": float(np.mean(lengths)),
        "finished": float(np.mean(finished)),
    }


@written_by_first
def plot_rounds(
    path: str | os.PathLike[str],
    history: Sequence[Mapping[str, float]],
    *,
    panels: Mapping[str, str] = PANELS,
    exact: Mapping[str, Any] | None = None,
    title: str = "",
) -> None:
    """Draws figures over rounds, a panel each, with their intervals where there are any.

    Args:
        path: PNG file.
        history: figures of each evaluation, with "round".
        panels: figure -> title; those that are not in the history are left out. Win rates and
            shares ("share_...") have the same axis from 0 to 1.
        exact: figure -> value to be reached, drawn as a line.
        title: above all panels.
    """
    import matplotlib.figure
    import matplotlib.ticker

    shown = [name for name in panels if any(name in row for row in history)]
    columns = min(3, max(len(shown), 1))
    rows = -(-max(len(shown), 1) // columns)
    figure = matplotlib.figure.Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for place, name in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        seen = [row for row in history if name in row]
        rounds = [row["round"] for row in seen]
        axes.plot(rounds, [row[name] for row in seen], marker=".", linewidth=1.2)
        if f"{name}_low" in seen[0]:
            low, high = ([row[f"{name}_{end}"] for row in seen] for end in ("low", "high"))
            axes.fill_between(rounds, low, high, alpha=0.2)
            if len(seen) == 1:  # an area without a width is not seen
                axes.vlines(rounds, low, high, alpha=0.4)
        if name.startswith("win_rate"):
            axes.axhline(0.5, color="0.6", linewidth=0.8)
        if name.endswith("gap"):
            axes.axhline(0, color="0.6", linewidth=0.8)
        if name.startswith(("win_rate", "share_")):
            axes.set_ylim(-0.02, 1.02)
        if exact and name in exact:
            axes.axhline(exact[name], color="C3", linewidth=0.8, linestyle="--", label="exact")
            axes.legend(fontsize=7)
        axes.set_title(panels[name], fontsize=9)
        axes.set_xlabel("round", fontsize=8)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
