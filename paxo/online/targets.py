"""What the losses read of the chosen candidates: labels, win rates, rewards.

A target is `(bench, chosen) -> {name: [M, n]}`, where the name is "labels" or that of an extra
array that a loss names. What stands at places without a candidate is not read. NaN where the judge
gave up: `collect` leaves such groups out.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from paxo.losses.mixture_of_judges import passes_all
from paxo.losses.selfplay import spo_rewards
from paxo.online.judging import Bench
from paxo.online.pairing import Chosen, win_rates_among

Target = Callable[[Bench, Chosen], Mapping[str, np.ndarray]]


def hard_labels(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """1 for the first candidate of a group, 0 for the others."""
    del bench
    return {"labels": (np.arange(chosen.indices.shape[1]) == 0) * np.ones(chosen.indices.shape)}


def soft_labels(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """(p, 1 - p) of a pair: how often each beats the other."""
    table = bench.among_candidates()
    p = table[chosen.prompt, chosen.indices[:, 0], chosen.indices[:, 1]]
    return {"labels": np.stack([p, 1 - p], -1)}


def win_rates(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """How often each beats the opponents; without opponents, all candidates, itself as 1/2."""
    if bench.num_opponents:
        rates = bench.against_opponents().mean(-1)
    else:
        rates = win_rates_among(bench)
    return {"win_rates": of_chosen(rates, chosen)}


def preference_scores(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """Mean logit of winning against all candidates, itself as 0: GPO's, arXiv:2410.02197."""
    p = bench.among_candidates()
    tiny = np.finfo(np.float32).tiny  # a sure win is a large score, not an infinite one
    scores = np.log(np.maximum(p, tiny)) - np.log(np.maximum(1 - p, tiny))
    return {"preference_scores": of_chosen(scores.mean(-1), chosen)}


def rewards(name: str = "reward", *, extra: str = "rewards") -> Target:
    """A reward function's values.

    Args:
        name: of the reward function.
        extra: what the loss calls them.
    """

    def target(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
        return {extra: of_chosen(bench.rewards(name), chosen)}

    return target


def wins_as_rewards(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """SPO's rewards: win rates against the prompt's other candidates. arXiv:2401.04056."""
    table = bench.among_candidates()
    where = bench.eligible[:, : bench.num_candidates]
    found = np.array(spo_rewards(np.nan_to_num(table, nan=0.5), where), np.float64)
    found[np.isnan(table).any(-1)] = np.nan
    return {"rewards": of_chosen(found, chosen)}


def leave_one_out(name: str = "reward") -> Target:
    """Advantages of whole completions: the reward minus the mean of the group's others.

    RLOO's, arXiv:2402.14740, given to MDPO.
    """

    def target(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
        found, there = of_chosen(bench.rewards(name), chosen), chosen.indices >= 0
        total = np.sum(np.where(there, found, 0), -1, keepdims=True)
        others = np.maximum(there.sum(-1, keepdims=True) - 1, 1)
        return {"advantages": found - (total - found) / others}

    return target


def lowest_mean_reward(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    """MaxMin: the reward of the group of users whose mean over the round is lowest.

    arXiv:2402.08925; each reward function of the run is one group of users.
    """
    size = bench.num_candidates
    found = {name: bench.rewards(name) for name in bench.reward_names}
    for name, values in found.items():
        if values.ndim != 2:
            raise ValueError(
                f"reward {name!r} gives {values.shape[2]} numbers a candidate; a group of users "
                "has one reward: give a function [B, N] for each"
            )
    worst = min(found, key=lambda name: np.nanmean(found[name][:, :size]))
    bench.counts[f"rounds whose lowest mean reward is {worst!r}"] += 1
    return {"rewards": of_chosen(found[worst], chosen)}


def constraints(name: str = "constraints") -> Target:
    """Several rewards of each candidate `[M, n, rewards]`: constrained RLHF, arXiv:2310.04373."""

    def target(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
        found = bench.rewards(name)
        found = found[..., None] if found.ndim == 2 else found
        return {"constraint_rewards:KD": of_chosen(found, chosen)}

    return target


def judgements(name: str = "passed") -> Target:
    """1 for candidates that pass all judges of a function `[B, N]` or `[B, N, judges]`.

    CGPO's, arXiv:2409.20370.
    """

    def target(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
        found = bench.rewards(name)
        found = found[..., None] if found.ndim == 2 else found
        return {"passed": of_chosen(np.asarray(passes_all(found), np.float64), chosen)}

    return target


def baseline(name: str = "reward") -> Target:
    """The mean reward of the prompt's opponents, the same for all of its candidates.

    CGPO's baseline, arXiv:2409.20370.
    """

    def target(bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
        found = bench.rewards(name)[:, bench.num_candidates :].mean(-1, keepdims=True)
        spread = np.broadcast_to(found, (bench.num_prompts, bench.num_candidates))
        return {"baseline_rewards": of_chosen(spread, chosen)}

    return target


def marks(source: str) -> Target:
    """1 for candidates drawn from there, 0 for others: the `samples` of XPO, VPO, SELM, HyPO."""
    return functools.partial(_marks, source)


def _marks(source: str, bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    here = np.array([s == source for s in bench.sources[: bench.num_candidates]], np.float64)
    return {"samples": np.where(chosen.indices >= 0, here[chosen.indices], 0.0)}


def of_chosen(values: np.ndarray, chosen: Chosen) -> np.ndarray:
    """`[B, N, ...] -> [M, n, ...]`."""
    return values[chosen.prompt[:, None], chosen.indices]
