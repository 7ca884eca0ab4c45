"""Which candidates are trained on, and which of them stands first.

A pairing is `(bench, rng) -> Chosen`. It looks at the candidates that may be trained on
(`bench.eligible`), asks the judge for what it must know and no more, and counts what it leaves out
and why. Its attribute `size` is the number of candidates of its groups; without one they have all.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from paxo.online.judging import Bench
from paxo.sampling import rejection_sample

Pairing = Callable[[Bench, np.random.Generator], "Chosen"]

UNFINISHED = "too few candidates that may be trained on"
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


def all_candidates(bench: Bench, rng: np.random.Generator) -> Chosen:
    """One group a prompt: its candidates, two at least, in the order of the draws."""
    del rng
    return _one_each(bench, lambda _, kept: [*kept])


def every_candidate(bench: Bench, rng: np.random.Generator) -> Chosen:
    """`all_candidates`, also of a prompt that has only one."""
    del rng
    return _one_each(bench, lambda _, kept: [*kept], least=1)


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
            theory of INPO, arXiv:2407.00617, has it.
    """
    if order not in ("none", "winner", "drawn"):
        raise ValueError(f"order must be none, winner or drawn; got {order!r}")
    return of_size(2)(functools.partial(_pairs, order))


def _pairs(order: str, bench: Bench, rng: np.random.Generator) -> Chosen:
    first = np.tile(np.arange(bench.num_candidates // 2) * 2, (bench.num_prompts, 1))
    return _of_pairs(order, bench, rng, first, first + 1)


def _of_pairs(
    order: str, bench: Bench, rng: np.random.Generator, first: np.ndarray, second: np.ndarray
) -> Chosen:
    """Groups of two from `[B, m]` candidates each, in that order."""
    p = np.full(first.shape, 1.0) if order == "none" else bench.beats(first, second)
    ahead = p > (rng.random(p.shape) if order == "drawn" else 0.5)
    skipped, rows = collections.Counter(), []
    for b, m in np.ndindex(p.shape):
        i, j = int(first[b, m]), int(second[b, m])
        if not bench.eligible[b, [i, j]].all():
            skipped[UNFINISHED] += 1
        elif order != "none" and bench.same(b, i, j):
            skipped[EQUAL] += 1
        elif np.isnan(p[b, m]):
            skipped[UNJUDGED] += 1
        elif order == "winner" and p[b, m] == 0.5:
            skipped[TIE] += 1
        else:
            rows.append((b, [i, j] if ahead[b, m] else [j, i]))
    return _chosen(rows, 2, skipped)


def ordered_pair(bench: Bench, rng: np.random.Generator) -> Chosen:
    """Of candidates 0 and 1 the preferred one first; the others follow.

    For XPO, arXiv:2405.21046, and VPO, arXiv:2405.19320.
    """
    return _with_others(bench, _first_two("winner", bench, rng))


def given_pair(bench: Bench, rng: np.random.Generator) -> Chosen:
    """Candidates 0 and 1 as the data set has them, chosen first; the others follow.

    For HyPO, arXiv:2406.01462.
    """
    return _with_others(bench, _first_two("none", bench, rng))


def _first_two(order: str, bench: Bench, rng: np.random.Generator) -> Chosen:
    zeros = np.zeros((bench.num_prompts, 1), int)
    return _of_pairs(order, bench, rng, zeros, zeros + 1)


def _with_others(bench: Bench, chosen: Chosen) -> Chosen:
    """The pairs with all other candidates that may be trained on behind them."""
    rows = []
    for b, pair in zip(chosen.prompt.tolist(), chosen.indices.tolist()):
        kept = np.flatnonzero(bench.eligible[b, : bench.num_candidates]).tolist()
        rows.append((b, [*pair, *(k for k in kept if k not in pair)]))
    return _chosen(rows, bench.num_candidates, chosen.skipped)


def best_and_worst(by: str = "preferences", *, rest: bool = False) -> Pairing:
    """For each prompt the candidates with most and fewest wins, if they differ.

    Args:
        by: "preferences" counts wins against the other candidates, a comparison with itself as 1/2;
            else the name of a reward function. Candidates that the judge gave up on, or that have
            no reward, are not among them.
        rest: the others follow in the order of the draws (SELM, arXiv:2405.19332).
    """
    found = functools.partial(_best_and_worst, by, rest)
    return found if rest else of_size(2)(found)


def _best_and_worst(by: str, rest: bool, bench: Bench, rng: np.random.Generator) -> Chosen:
    del rng
    scores = win_rates_among(bench) if by == "preferences" else bench.rewards(by)

    def extremes(b: int, kept: np.ndarray) -> list[int] | str:
        if all(bench.same(b, kept[0], k) for k in kept[1:]):
            return EQUAL
        judged = _with_score(scores[b], kept)
        if len(judged) < 2:
            return UNJUDGED
        best, worst = (judged[f(scores[b, judged])] for f in (np.argmax, np.argmin))
        return TIE if scores[b, best] == scores[b, worst] else [best, worst]

    found = _one_each(bench, extremes, size=2)
    return _with_others(bench, found) if rest else found


@of_size(2)
def tournament(bench: Bench, rng: np.random.Generator) -> Chosen:
    """INPO's: knock-out for the best, for the worst among the first round's losers, then both meet.

    Eight candidates take 11 comparisons instead of 28. A pair is kept only if the judge prefers the
    best to the worst. A candidate that may not be trained on loses every match unasked; a prompt of
    which the judge gave up on a match is left out. arXiv:2407.00617.
    """
    del rng
    size = bench.num_candidates
    if size < 2:
        raise ValueError(f"a tournament needs at least 2 candidates; got {size}")
    unjudged = np.zeros(bench.num_prompts, bool)
    best, worst = _matches(bench, np.tile(np.arange(size), (bench.num_prompts, 1)), unjudged)
    while best.shape[1] > 1:
        best = _matches(bench, best, unjudged)[0]
    while worst.shape[1] > 1:
        worst = _matches(bench, worst, unjudged)[1]
    p = bench.beats(best, worst)[:, 0]

    def final(b: int, kept: np.ndarray) -> list[int] | str:
        i, j = int(best[b, 0]), int(worst[b, 0])
        if not np.isin([i, j], kept).all():
            return UNFINISHED
        if bench.same(b, i, j):
            return EQUAL
        if unjudged[b] or np.isnan(p[b]):
            return UNJUDGED
        return [i, j] if p[b] > 0.5 else TIE

    return _one_each(bench, final, size=2)


def _matches(
    bench: Bench, players: np.ndarray, unjudged: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`[B, m]` winners and losers of neighbours' matches; one without a neighbour is in both.

    Marks in `unjudged` the prompts in which a match was not answered.
    """
    even = players.shape[1] // 2 * 2
    first, second, left = players[:, 0:even:2], players[:, 1:even:2], players[:, even:]
    p = bench.beats(first, second)
    rows = np.arange(bench.num_prompts)[:, None]
    able, other_able = bench.eligible[rows, first], bench.eligible[rows, second]
    unjudged |= (np.isnan(p) & able & other_able).any(1)
    ahead = np.where(able & other_able, p >= 0.5, able)
    winners, losers = np.where(ahead, first, second), np.where(ahead, second, first)
    return np.concatenate([winners, left], 1), np.concatenate([losers, left], 1)


def margin_pairs(
    score: str = "points", *, good: float = 5.0, margin: float = 2.0, own_margin: float = 1.0
) -> Pairing:
    """DNO-Prct's: a good answer, and one far enough below it.

    The winner is the best-scored candidate, with a score of at least `good`; the loser is drawn
    from those `margin` points below it, or `own_margin` where the winner is the policy's own. The
    paper trains on such pairs without saying which of several; this takes one a prompt.

    Args:
        score: reward function with a score in points, 0 to 6 in the paper.
        good: least score of a winner.
        margin: least distance to a loser if the winner comes from the data set (the teacher).
        own_margin: the same if it is the policy's own.

    arXiv:2404.03715.
    """
    return of_size(2)(functools.partial(_margin_pairs, score, good, margin, own_margin))


def _margin_pairs(score, good, margin, own_margin, bench: Bench, rng) -> Chosen:
    scores = bench.rewards(score)

    def pair(b: int, kept: np.ndarray) -> list[int] | str:
        kept = _with_score(scores[b], kept)
        if len(kept) < 2:
            return UNJUDGED
        best = kept[np.argmax(scores[b, kept])]
        needed = margin if bench.sources[best] == "data" else own_margin
        below = kept[scores[b, kept] <= scores[b, best] - needed]
        far = scores[b, best] >= good and len(below)
        return [best, rng.choice(below)] if far else NO_PAIR

    return _one_each(bench, pair, size=2)


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
    scores = bench.rewards(reward)

    def group(b: int, kept: np.ndarray) -> list[int] | str:
        kept = _with_score(scores[b], kept)
        if len(kept) < 2:
            return UNJUDGED
        best = kept[np.argmax(scores[b, kept])]
        others = kept[kept != best]
        if rule == "best":
            return [best]
        second = others[np.argmin(scores[b, others])] if rule == "best_worst" else None
        return [best, rng.choice(others) if second is None else second]

    return _one_each(bench, group, size=1 if rule == "best" else 2)


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
    pool = bench.eligible[:, :size].copy()  # of equal candidates the first
    for b, k in np.argwhere(pool):
        pool[b, k] = not any(bench.same(b, k, j) for j in np.flatnonzero(pool[b, :k]))
    accepted = rejection_sample(
        jax.random.key(int(rng.integers(2**31))),
        bench.rewards(reward)[:, :size],
        np.arange(bench.num_prompts, dtype=np.int32),
        num=num,
        beta=beta,
        where=pool,
    )
    indices, there = np.asarray(accepted.indices), np.asarray(accepted.where)
    first, second = indices[:, 0::2], indices[:, 1::2]
    second = np.where(there[:, 1::2], second, first)  # too few were distinct: equal, and left out
    return _of_pairs("winner", bench, rng, first, second)


def win_rates_among(bench: Bench) -> np.ndarray:
    """`[B, K]` mean P(i beats j) over all K candidates, itself included as 1/2; NaN if unjudged."""
    return bench.among_candidates().mean(-1)


def _with_score(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return kept[~np.isnan(scores[kept])]


def _one_each(
    bench: Bench,
    group_of: Callable[[int, np.ndarray], Sequence[int] | str],
    *,
    least: int = 2,
    size: int | None = None,
) -> Chosen:
    """A group of each prompt.

    Args:
        bench: the candidates.
        group_of: `(prompt, its candidates that may be trained on) -> group`, or why there is none.
        least: a prompt with fewer such candidates is not asked for.
        size: candidates of a group; all where None.
    """
    skipped, rows = collections.Counter(), []
    for b in range(bench.num_prompts):
        kept = np.flatnonzero(bench.eligible[b, : bench.num_candidates])
        found = group_of(b, kept) if len(kept) >= least else UNFINISHED
        if isinstance(found, str):
            skipped[found] += 1
        else:
            rows.append((b, found))
    return _chosen(rows, bench.num_candidates if size is None else size, skipped)


def _chosen(
    rows: Sequence[tuple[int, Sequence[int]]], size: int, skipped: collections.Counter
) -> Chosen:
    indices = np.full((len(rows), size), -1)
    for row, (_, group) in zip(indices, rows):
        row[: len(group)] = group
    return Chosen(np.array([b for b, _ in rows], np.int64), indices, skipped)
