"""The rows of the table: what runs in each, and how its figures become a ratio.

A command is run in every round, all of a row in turns; a ratio is taken round by round, so that the
load of the machine falls on both sides alike. `goal` is the least ratio, or with `most` the largest
figure, that the row is to reach.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HUGE = "glibc.malloc.hugetlb=1"
Found = Mapping[str, Any]  # a command's line of JSON


@dataclasses.dataclass(frozen=True)
class Command:
    """A program of a row.

    Attributes:
        peer: whose Python runs it: "paxo", "trl", "tunix" or "transformers".
        arguments: of that Python; `{bench}` and `{pairs}` stand for the bench folder and W5's file.
        huge: with huge pages.
        rounds: at most so many; None for all.
    """

    peer: str
    arguments: tuple[str, ...]
    huge: bool = False
    rounds: int | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of the table: `over` by `under`, or the figure of `under` alone.

    Attributes:
        text: what it says.
        value: reads the figure from a command's line, given whether wall time counts.
        under: name of paxo's command.
        over: name of the command that it is compared with.
        goal: to be reached.
        most: whether the goal is the largest figure allowed; a ratio is then under by over.
        chart: whether it is a bar of the chart.
    """

    text: str
    value: Callable[[Found, bool], float]
    under: str
    over: str | None = None
    goal: float = 0.0
    most: bool = False
    chart: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """Commands that take turns, and the figures that are read from them."""

    commands: Mapping[str, Command]
    figures: Sequence[Figure]


def seconds(found: Found, wall: bool) -> float:
    """Seconds of a lap: quiet wall time, or the process's own CPU time."""
    step = found.get("step") or {}
    if wall:
        return step.get("quiet", step.get("wall", found.get("time_s")))
    return step.get("cpu", found.get("cpu_s"))


def seconds_a_pair(found: Found, wall: bool) -> float:
    """Of W5, whose steps hold unequal numbers of pairs."""
    return 1 / found["pairs_per_s" if wall else "pairs_per_cpu_s"]


def peak(found: Found, wall: bool) -> float:
    """Peak resident memory in MB."""
    return found["peak_rss_mb"]


def extra(found: Found, wall: bool) -> float:
    """Peak above the inputs in MB."""
    return found["extra_mb"]


def entry(*path: str) -> Callable[[Found, bool], float]:
    """Reads an entry of an entry."""

    def read(found: Found, wall: bool) -> float:
        for name in path:
            found = found[name]
        return found

    return read


def _paxo(module: str, *arguments: str) -> Command:
    return Command("paxo", ("-m", f"benchmarks.{module}", *arguments), huge=True)


def _trained(script: str, *arguments: str) -> tuple[str, ...]:
    return (f"{{bench}}/{script}", *arguments)


def _both(name: str, command: Command, rounds: int | None = None) -> dict[str, Command]:
    """A peer as its users run it, and with huge pages as paxo has them."""
    same = dataclasses.replace(command, huge=True, rounds=rounds)
    return {name: command, f"{name} huge": same}


def _times(work: str, value: Callable, under: str, over: str, goal: float, same: float = 0):
    """A speed-up, as users run the peer and with the same setting for both."""
    return [
        Figure(f"{work}: speed over {over}", value, under, over, goal),
        Figure(f"{work}: the same, huge pages for all", value, under, f"{over} huge", same,
               chart=False),
    ]  # fmt: skip


_STEPS = ("--steps", "3", "--warmup", "1")
_LENGTHS = ("benchmarks/peer_lengths.py", "--pairs", "{pairs}", "--bench", "{bench}")
_MANY = ("--prompts", "2", "--candidates", "8")

ROWS = {
    "w1": Row(
        {
            **_both("TRL", Command("trl", _trained("peer_trl_dpo.py", *_STEPS))),
            **_both("Tunix", Command("tunix", _trained("peer_tunix_dpo.py", *_STEPS))),
            "paxo": _paxo("w1", *_STEPS),
            "paxo stored": _paxo("w1", "--reference", "stored", *_STEPS),
        },
        [
            *_times("W1", seconds, "paxo", "TRL", 4.4, 3.8),
            *_times("W1", seconds, "paxo", "Tunix", 2.0, 1.5),
            Figure("W1: peak memory by TRL's", peak, "paxo", "TRL", 0.35, most=True, chart=False),
            Figure("W1: peak memory by Tunix's", peak, "paxo", "Tunix", 0.56, most=True,
                   chart=False),
            Figure("W1, reference stored: speed over TRL", seconds, "paxo stored", "TRL", 5.5),
            Figure("W1, reference stored: speed over paxo", seconds, "paxo stored", "paxo", 1.2),
        ],
    ),
    "w2": Row(
        {
            **_both("Tunix", Command("tunix", _trained(
                "peer_tunix_dpo.py", "--workload", "W2", *_STEPS))),
            "paxo": _paxo("w2", *_STEPS),
        },
        _times("W2", seconds, "paxo", "Tunix", 2.0),
    ),
    "w3": Row(
        {
            "dense": _paxo("w3", "--method", "dense", "--laps", "1"),
            "vocabulary": _paxo("w3", "--method", "vocabulary", "--laps", "1"),
            "one pass": _paxo("w3", "--method", "one_pass", "--laps", "1"),
            "dense forward": _paxo("w3", "--method", "dense", "--laps", "1", "--forward-only"),
            "forward": _paxo("w3", "--method", "vocabulary", "--laps", "1", "--forward-only"),
        },
        [
            Figure("W3: time by dense", seconds, "vocabulary", "dense", 1.30, most=True),
            Figure("W3: memory by dense", extra, "vocabulary", "dense", 0.16, most=True),
            Figure("W3, one pass: time by dense", seconds, "one pass", "dense", 1.05, most=True),
            Figure("W3, forward only: time by dense", seconds, "forward", "dense forward", 1.30,
                   most=True, chart=False),
        ],
    ),
    "w4": Row(
        {
            "generate": Command("transformers", _trained("peer_hf_generate.py", "--reps", "3")),
            "generate K=8": Command("transformers", ("-m", "benchmarks.peer_generate", *_MANY)),
            "paxo": _paxo("w4", "--laps", "3"),
            "paxo K=8": _paxo("w4", "--laps", "3", *_MANY),
        },
        [
            Figure("W4: speed over generate", seconds, "paxo", "generate", 2.3),
            Figure("W4, K=8: speed over generate", seconds, "paxo K=8", "generate K=8", 3.0),
        ],
    ),
    "w5": Row(
        {
            **_both("TRL", Command("trl", (*_LENGTHS, "--peer", "trl")), rounds=1),
            **_both("Tunix", Command("tunix", (*_LENGTHS, "--peer", "tunix")), rounds=1),
            "paxo": _paxo("w5"),
        },
        [
            *_times("W5", seconds_a_pair, "paxo", "TRL", 9.0),
            *_times("W5", seconds_a_pair, "paxo", "Tunix", 10.0),
            Figure("W5: peak memory by TRL's", peak, "paxo", "TRL", 0.34, most=True, chart=False),
        ],
    ),
    "lists": Row(
        {
            "K=4": _paxo("lists", "--data", "lists_gsm8k_solutions"),
            "K=9": _paxo("lists", "--data", "lists_alpaca_eval", "--lists", "4"),
        },
        [
            Figure("lists, K=4: speed over own pairs", entry("times_pairs"), "K=4", goal=1.5),
            Figure("lists, K=9: speed over own pairs", entry("times_pairs"), "K=9", goal=1.5),
        ],
    ),
    "overhead": Row(
        {"paxo": _paxo("overhead")},
        [Figure("W1: overhead of the loop", entry("overhead"), "paxo", goal=0.03, most=True,
                chart=False)],
    ),
    "compile": Row(
        {"paxo": dataclasses.replace(_paxo("compile", "--quickstart"), rounds=1)},
        [
            Figure("W1: compile and first step, s", entry("w1", "compile_and_first_step_s"),
                   "paxo", goal=5.0, most=True, chart=False),
            Figure("import paxo, s", entry("import_paxo", "wall"), "paxo", goal=0.1, most=True,
                   chart=False),
            Figure("import paxo.losses, s", entry("import_losses", "wall"), "paxo", goal=0.5,
                   most=True, chart=False),
            Figure("quickstart: share of compilation", entry("quickstart", "share"), "paxo",
                   goal=0.25, most=True, chart=False),
        ],
    ),
}  # fmt: skip


def ratios(figure: Figure, rounds: Sequence[Mapping[str, Found]], wall: bool) -> list[float]:
    """The figure of every round in which all that it needs was found."""
    found = []
    for line in rounds:
        if figure.under not in line or (figure.over is not None and figure.over not in line):
            continue
        own = figure.value(line[figure.under], wall)
        if figure.over is None:
            found.append(own)
            continue
        other = figure.value(line[figure.over], wall)
        found.append(own / other if figure.most else other / own)
    return found


def summary(figure: Figure, values: Sequence[float]) -> dict[str, Any]:
    """Median, spread, number of rounds, and whether the goal is reached."""
    if not values:
        return {"text": figure.text, "rounds": 0}
    median = statistics.median(values)
    reached = median <= figure.goal if figure.most else median >= figure.goal
    return {
        "text": figure.text, "median": median, "least": min(values), "most": max(values),
        "rounds": len(values), "goal": figure.goal or None,
        "reached": reached if figure.goal else None, "chart": figure.chart,
        "at_most": figure.most,
    }  # fmt: skip
