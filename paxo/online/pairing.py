"""Which candidates are trained on, and which of them stands first.

A pairing is `(bench, rng) -> Chosen`. It looks at the candidates that may be trained on
(`bench.eligible`), asks the judge for what it must know and no more, and counts what it leaves out
and why. Its attribute `size` is the number of candidates of its groups; without one they have all.
"""

import collections
import functools
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import numpy as np

from paxo.online.judging import Bench
from paxo.sampling import rejection_sample

Pairing = Callable[[Bench, np.random.Generator], "Chosen"]

UNFINISHED = "no candidate finished"
EQUAL = "all candidates are equal"
TIE = "a tie"
UNJUDGED = "the judge gave up"
NO_PAIR = "no pair is far enough apart"


class Chosen(NamedTuple):
    """Groups of candidates.

    Attributes:
        prompt: `[M]` number of each group's prompt within the round.
        indices: `[M, n]` its candidates; -1 behind the last one.
        skipped: reason -> prompts (or pairs) that gave no group.
    """

    prompt: np.ndarray
    indices: np.ndarray
    skipped: collections.Counter


def all_candidates(bench: Bench, rng: np.random.Generator, *, least: int = 2) -> Chosen:
    """One group a prompt: its candidates in the order of the draws, those that may be trained on.

    Args:
        bench: the candidates.
        rng: not used.
        least: a prompt with fewer of them gives no group.
    """
    del rng
    size, skipped, rows = bench.num_candidates, collections.Counter(), []
    for b in range(bench.num_prompts):
        kept = np.flatnonzero(bench.eligible[b, :size])
        if len(kept) < least:
            skipped[UNFINISHED] += 1
            continue
        rows.append((b, [*kept, *[-1] * (size - len(kept))]))
    return _chosen(rows, size, skipped)


def of_size(size: int) -> Callable[[Pairing], Pairing]:
    """Marks a pairing whose groups have so many candidates."""

    def mark(pairing: Pairing) -> Pairing:
        pairing.size = size
        return pairing

    return mark


def pairs(order: Literal["none", "winner", "drawn"] = "none") -> Pairing:
    """Candidates 0 and 1, 2 and 3, ...: independent pairs.

    Args:
        order: "none" leaves them as drawn and asks no judge; "winner" puts the preferred one first
            and leaves out ties; "drawn" draws who is first with the judge's probability, as the
            theory of INPO and online IPO has it.
    """
    return of_size(2)(functools.partial(_pairs, order))


def _pairs(order: str, bench: Bench, rng: np.random.Generator) -> Chosen:
    skipped, rows = collections.Counter(), []
    count = bench.num_candidates // 2
    first, second = np.arange(count) * 2, np.arange(count) * 2 + 1
    p = None
    if order != "none":
        p = np.stack(
            [bench.preferences([i], [j])[:, i, j] for i, j in zip(first, second)], -1
        ).reshape(bench.num_prompts, count)
    uniform = rng.random((bench.num_prompts, count))
    for b in range(bench.num_prompts):
        for m, (i, j) in enumerate(zip(first, second)):
            if not bench.eligible[b, [i, j]].all():
                skipped[UNFINISHED] += 1
            elif order == "none":
                rows.append((b, [i, j]))
            elif np.isnan(p[b, m]):
                skipped[UNJUDGED] += 1
            elif bench.same(b, i, j):
                skipped[EQUAL] += 1
            elif order == "winner" and p[b, m] == 0.5:
                skipped[TIE] += 1
            else:
                ahead = uniform[b, m] < p[b, m] if order == "drawn" else p[b, m] > 0.5
                rows.append((b, [i, j] if ahead else [j, i]))
    return _chosen(rows, 2, skipped)


def best_and_worst(by: str = "preferences", *, rest: bool = False) -> Pairing:
    """For each prompt the candidates with most and fewest wins, if they differ.

    Args:
        by: "preferences" counts wins against the other candidates, a comparison with itself as 1/2;
            else the name of a reward function.
        rest: the others follow in the order of the draws (SELM).
    """
    found = functools.partial(_best_and_worst, by, rest)
    return found if rest else of_size(2)(found)


def _best_and_worst(by: str, rest: bool, bench: Bench, rng: np.random.Generator) -> Chosen:
    del rng
    size = bench.num_candidates
    scores = win_rates_among(bench) if by == "preferences" else bench.rewards(by)[:, :size]
    skipped, rows = collections.Counter(), []
    for b in range(bench.num_prompts):
        kept = np.flatnonzero(bench.eligible[b, :size])
        if len(kept) < 2:
            skipped[UNFINISHED] += 1
            continue
        if all(bench.same(b, kept[0], k) for k in kept[1:]):
            skipped[EQUAL] += 1
            continue
        judged = kept[~np.isnan(scores[b, kept])]
        if len(judged) < 2:
            skipped[UNJUDGED] += 1
            continue
        best = judged[np.argmax(scores[b, judged])]
        worst = judged[np.argmin(scores[b, judged])]
        if scores[b, best] == scores[b, worst]:
            skipped[TIE] += 1
            continue
        others = [k for k in kept if k not in (best, worst)] if rest else []
        missing = [-1] * (size - 2 - len(others)) if rest else []
        rows.append((b, [best, worst, *others, *missing]))
    return _chosen(rows, size if rest else 2, skipped)


@of_size(2)
def tournament(bench: Bench, rng: np.random.Generator) -> Chosen:
    """INPO's: knock-out for the best, for the worst among the first round's losers, then both meet.

    Eight candidates take 11 comparisons instead of 28. A pair is kept only if the judge prefers the
    best to the worst. A candidate that may not be trained on loses every match unasked.
    """
    del rng
    size = bench.num_candidates
    if size < 2:
        raise ValueError(f"a tournament needs at least 2 candidates; got {size}")
    everyone = np.tile(np.arange(size), (bench.num_prompts, 1))
    winners, losers = _matches(bench, everyone)
    best, worst = winners, losers
    while best.shape[1] > 1:
        best = _matches(bench, best)[0]
    while worst.shape[1] > 1:
        worst = _matches(bench, worst)[1]
    best, worst = best[:, 0], worst[:, 0]
    p = bench.beats(best[:, None], worst[:, None])[:, 0]
    skipped, rows = collections.Counter(), []
    for b in range(bench.num_prompts):
        if not bench.eligible[b, [best[b], worst[b]]].all():
            skipped[UNFINISHED] += 1
        elif np.isnan(p[b]):
            skipped[UNJUDGED] += 1
        elif bench.same(b, best[b], worst[b]):
            skipped[EQUAL] += 1
        elif p[b] <= 0.5:
            skipped[TIE] += 1
        else:
            rows.append((b, [best[b], worst[b]]))
    return _chosen(rows, 2, skipped)


def _matches(bench: Bench, players: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Winners and losers of neighbours' matches; one without a neighbour is in both."""
    even = players.shape[1] // 2 * 2
    first, second, left = players[:, 0:even:2], players[:, 1:even:2], players[:, even:]
    p = np.nan_to_num(bench.beats(first, second), nan=0.5)
    rows = np.arange(bench.num_prompts)[:, None]
    able = bench.eligible[rows, first], bench.eligible[rows, second]
    ahead = np.where(able[0] == able[1], p >= 0.5, able[0])
    winners, losers = np.where(ahead, first, second), np.where(ahead, second, first)
    return np.concatenate([winners, left], 1), np.concatenate([losers, left], 1)


def margin_pairs(
    score: str = "reward", *, good: float = 5.0, margin: float = 2.0, own_margin: float = 1.0
) -> Pairing:
    """DNO-Prct's: a good answer, and one far enough below it.

    The winner is the best-scored candidate, with a score of at least `good`; the loser is drawn
    from those `margin` points below it, or `own_margin` where the winner is the policy's own. The
    paper trains on such pairs without saying which of several; this takes one a prompt.

    Args:
        score: reward function with a score in points (0 to 6 in the paper).
        good: least score of a winner.
        margin: least distance to a loser if the winner comes from the data set (the teacher).
        own_margin: the same if it is the policy's own.
    """
    return of_size(2)(functools.partial(_margin_pairs, score, good, margin, own_margin))


def _margin_pairs(score, good, margin, own_margin, bench: Bench, rng) -> Chosen:
    size = bench.num_candidates
    scores = bench.rewards(score)[:, :size]
    skipped, rows = collections.Counter(), []
    for b in range(bench.num_prompts):
        kept = np.flatnonzero(bench.eligible[b, :size])
        if len(kept) < 2:
            skipped[UNFINISHED] += 1
            continue
        best = kept[np.argmax(scores[b, kept])]
        needed = margin if bench.sources[best] == "data" else own_margin
        below = kept[scores[b, kept] <= scores[b, best] - needed]
        if scores[b, best] < good or not len(below):
            skipped[NO_PAIR] += 1
            continue
        rows.append((b, [best, rng.choice(below)]))
    return _chosen(rows, 2, skipped)


def ordered_pair(bench: Bench, rng: np.random.Generator) -> Chosen:
    """Of candidates 0 and 1 the preferred one first; the others follow (XPO, VPO)."""
    first = _pairs("winner", _FirstTwo(bench), rng)
    size, rows = bench.num_candidates, []
    for b, pair in zip(first.prompt, first.indices.tolist()):
        others = [k for k in range(2, size) if bench.eligible[b, k]]
        rows.append((b, [*pair, *others, *[-1] * (size - 2 - len(others))]))
    return _chosen(rows, size, first.skipped)


class _FirstTwo:
    """A bench of which only the first two candidates are seen."""

    def __init__(self, bench: Bench):
        self._bench = bench
        self.num_candidates = 2

    def __getattr__(self, name: str):
        return getattr(self._bench, name)


def filtered(
    rule: Literal["best_worst", "best_random", "best"] = "best_worst", reward: str = "reward"
) -> Pairing:
    """PF-PPO's: of each prompt's candidates those whose reward can be trusted most.

    Args:
        rule: the best and the worst, the best and another one, or the best alone.
        reward: name of the reward function.

    arXiv:2409.06957.
    """
    if rule not in ("best_worst", "best_random", "best"):
        raise ValueError(f"rule must be best_worst, best_random or best; got {rule!r}")
    return of_size(1 if rule == "best" else 2)(functools.partial(_filtered, rule, reward))


def _filtered(rule: str, reward: str, bench: Bench, rng: np.random.Generator) -> Chosen:
    size = bench.num_candidates
    scores, skipped, rows = bench.rewards(reward)[:, :size], collections.Counter(), []
    for b in range(bench.num_prompts):
        kept = np.flatnonzero(bench.eligible[b, :size])
        if len(kept) < 2:
            skipped[UNFINISHED] += 1
            continue
        best = kept[np.argmax(scores[b, kept])]
        others = kept[kept != best]
        worst = others[np.argmin(scores[b, others])]
        second = {"best_worst": [worst], "best_random": [rng.choice(others)], "best": []}[rule]
        rows.append((b, [best, *second]))
    return _chosen(rows, 1 if rule == "best" else 2, skipped)


def accepted_pairs(num: int = 8, beta: float = 0.5, reward: str = "reward") -> Pairing:
    """RSO's: statistical rejection sampling keeps `num`; they are paired as accepted, winner first.

    Args:
        num: accepted candidates a prompt, even.
        beta: temperature of the target, in units of the reward.
        reward: name of the reward function.

    arXiv:2309.06657; the labels are the judge's.
    """
    if num < 2 or num % 2:
        raise ValueError(f"num must be even and at least 2; got {num}")
    return of_size(2)(functools.partial(_accepted_pairs, num, beta, reward))


def _accepted_pairs(num, beta, reward, bench: Bench, rng: np.random.Generator) -> Chosen:
    size = bench.num_candidates
    distinct = np.array(
        [[not any(bench.same(b, k, j) for j in range(k)) for k in range(size)]
         for b in range(bench.num_prompts)]
    )  # fmt: skip
    key = jax.random.key(int(rng.integers(2**31)))
    kept = rejection_sample(
        key, bench.rewards(reward)[:, :size], np.arange(bench.num_prompts, dtype=np.int32),
        num=num, beta=beta, where=distinct & bench.eligible[:, :size],
    )  # fmt: skip
    indices, there = np.asarray(kept.indices), np.asarray(kept.where)
    p = bench.beats(indices[:, 0::2], indices[:, 1::2])
    skipped, rows = collections.Counter(), []
    for b in range(bench.num_prompts):
        for m in range(num // 2):
            i, j = indices[b, 2 * m], indices[b, 2 * m + 1]
            if not there[b, 2 * m + 1]:
                skipped[EQUAL] += 1
            elif np.isnan(p[b, m]):
                skipped[UNJUDGED] += 1
            elif p[b, m] == 0.5:
                skipped[TIE] += 1
            else:
                rows.append((b, [i, j] if p[b, m] > 0.5 else [j, i]))
    return _chosen(rows, 2, skipped)


def win_rates_among(bench: Bench) -> np.ndarray:
    """`[B, K]` mean P(i beats j) over all K candidates, itself included as 1/2; NaN if unjudged."""
    return bench.among_candidates().mean(-1)


def _chosen(
    rows: Iterable[tuple[int, list[int]]], size: int, skipped: collections.Counter
) -> Chosen:
    rows = list(rows)
    return Chosen(
        np.array([b for b, _ in rows], np.int64),
        np.array([row for _, row in rows], np.int64).reshape(-1, size),
        skipped,
    )
