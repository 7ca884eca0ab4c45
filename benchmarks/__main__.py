"""All rows of the table, paxo in turns with its peers, each in a Python of its own.

    python -m benchmarks --torch-python ../torch/bin/python --tunix-python ../tunix/bin/python
    python -m benchmarks --rows w1,w5 --rounds 5 --pin 1

The first Python has torch, transformers and trl, the second google-tunix; without one its peers are
left out by name. Every ratio is given with peers as their users run them and, below it, with huge
pages for all. Wall time counts if in all laps others used at most a tenth of a CPU (`quiet`), else
the processes' own CPU time; `--pin CORE` keeps every process on one core with one thread and counts
CPU time. Writes `results.json` with every line found, and one chart, `ratios.png`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import real_lengths
from benchmarks.dpo_step import bench_folder, load_common, missing
from benchmarks.table import HUGE, ROWS, Command, Row, ratios, summary

PROJECT = pathlib.Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints and writes the table; 2 where the bench folder is missing."""
    options = parse(arguments)
    folder = bench_folder().resolve()
    if missing(folder):
        return 2
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pythons = {
        "paxo": sys.executable, "trl": options.torch_python,
        "transformers": options.torch_python, "tunix": options.tunix_python,
    }  # fmt: skip
    results: dict[str, Any] = {"threads": 1 if options.pin else options.threads, "rows": {}}
    begin = time.monotonic()
    for name in options.rows:
        rounds, failures = run_row(ROWS[name], pythons, folder, out, options, begin)
        wall = not options.pin and all(is_quiet(f) for line in rounds for f in line.values())
        figures = [summary(f, ratios(f, rounds, wall)) for f in ROWS[name].figures]
        results["rows"][name] = {
            "time": "wall" if wall else "cpu", "figures": figures, "failures": failures,
            "found": rounds,
        }  # fmt: skip
        print_row(name, results["rows"][name])
        (out / "results.json").write_text(json.dumps(results, indent=1))
    draw(results, out / "ratios.png")
    print(f"{out / 'results.json'} and {out / 'ratios.png'} in {time.monotonic() - begin:.0f} s")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=_names, default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", help="a Python with torch, transformers and trl")
    parser.add_argument("--tunix-python", help="a Python with google-tunix")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pin", help="one thread on this core, CPU seconds")
    parser.add_argument("--out", default="benchmarks-out", help="folder for results and chart")
    parser.add_argument("--timeout", type=int, default=600, help="seconds of one command")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="begin no round after so many seconds"
    )
    return parser.parse_args(arguments)


def run_row(
    row: Row, pythons: Mapping[str, str | None], folder: pathlib.Path, out: pathlib.Path,
    options: Any, begin: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Of each round what every command said, and why some said nothing."""
    rounds: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for number in range(options.rounds):
        if time.monotonic() - begin > options.budget:
            failures["round"] = f"the time of --budget was over before round {number + 1}"
            break
        line = {}
        for name, command in row.commands.items():
            if name in failures or (command.rounds is not None and number >= command.rounds):
                continue
            python = pythons[command.peer]
            try:
                if python is None:
                    which = "tunix" if command.peer == "tunix" else "torch"
                    raise RuntimeError(f"left out: no --{which}-python")
                line[name] = run(command, python, folder, out, options)
            except (RuntimeError, OSError, subprocess.SubprocessError, ValueError) as error:
                failures[name] = str(error)[-600:]
        rounds.append(line)
    return rounds, failures


def run(
    command: Command, python: str, folder: pathlib.Path, out: pathlib.Path, options: Any
) -> dict[str, Any]:
    """The line of JSON that a command prints last."""
    places = {"bench": str(folder), "pairs": str(pairs_file(command, folder, out))}
    words = [word.format(**places) for word in command.arguments]
    pin = ["taskset", "-c", options.pin] if options.pin else []
    variables = dict(os.environ)
    variables.pop("GLIBC_TUNABLES", None)
    variables["PAXO_BENCH"] = str(folder)
    variables["BENCH_THREADS"] = "1" if options.pin else str(options.threads)
    if command.huge:
        variables["GLIBC_TUNABLES"] = HUGE
    done = subprocess.run(
        [*pin, python, *words], cwd=PROJECT, env=variables, capture_output=True, text=True,
        timeout=options.timeout,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("JSON ")]
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["no line of JSON"]
        raise RuntimeError(f"ended with code {done.returncode}: {last[0]}")
    return json.loads(lines[-1].removeprefix("JSON "))


def pairs_file(command: Command, folder: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """W5's token lists for the peers, written when first asked for."""
    path = (out / "pairs.json").resolve()
    if any("{pairs}" in word for word in command.arguments) and not path.exists():
        from benchmarks.w5 import DATA

        if real_lengths.missing_data(DATA):
            raise RuntimeError(f"no data set {DATA}")
        vocabulary = load_common(folder).WORKLOADS["W1"]["vocab"]
        real_lengths.write_pairs(real_lengths.groups_of(DATA, vocabulary, 256), path)
    return path


def is_quiet(found: Mapping[str, Any]) -> bool:
    """Whether laps of this command were quiet; True of those that have no laps."""
    step = found.get("step")
    return not isinstance(step, dict) or step.get("n_quiet", 0) > 0


def print_row(name: str, row: Mapping[str, Any]) -> None:
    """The figures of a row as lines of a table."""
    for figure in row["figures"]:
        if not figure["rounds"]:
            print(f"{figure['text']:46} not measured", flush=True)
            continue
        goal = ""
        if figure["goal"]:
            sign = "<=" if figure["at_most"] else ">="
            goal = f"goal {sign} {figure['goal']:g}: {'yes' if figure['reached'] else 'NO'}"
        spread = f"{figure['least']:.3g} to {figure['most']:.3g}, n={figure['rounds']}"
        print(f"{figure['text']:46} {figure['median']:7.3g}  ({spread}, {row['time']})  {goal}",
              flush=True)  # fmt: skip
    for command, why in row["failures"].items():
        print(f"{name}: {command}: {why}", flush=True)


def draw(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """One bar for each ratio, its spread, and a mark at its goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        figure
        for row in results["rows"].values()
        for figure in row["figures"]
        if figure["rounds"] and figure["chart"]
    ]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(bars) + 1.2), layout="constrained")
    medians = [bar["median"] for bar in bars]
    spread = [
        [bar["median"] - bar["least"] for bar in bars],
        [bar["most"] - bar["median"] for bar in bars],
    ]
    places = range(len(bars))
    axes.barh(places, medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    goals = [(place, bar["goal"]) for place, bar in zip(places, bars) if bar["goal"]]
    if goals:
        axes.scatter(
            [goal for _, goal in goals], [place for place, _ in goals], marker="|", s=300,
            color="tab:red", zorder=3, label="goal",
        )  # fmt: skip
        axes.legend()
    labels = [bar["text"] + (" (less is better)" if bar["at_most"] else "") for bar in bars]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("ratio (median of rounds; whiskers: least and largest)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"no rows {unknown}; there are {', '.join(ROWS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
