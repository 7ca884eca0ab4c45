"""How long one waits: imports, and compilation with the first step of W1, without a cache.

    python -m benchmarks.compile
    python -m benchmarks.compile --quickstart       # and the share of compilation in the quickstart

Prints one line, `JSON {...}`, in seconds: wall, and CPU where it says so. An import is timed in a
process of its own, less the start of Python; the least of the laps counts, as reading from a cold
disk is not the import's.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.dpo_step import bench_folder, missing

# Sums up what JAX says of tracing, lowering and compiling.
LISTENER = """
import json, sys, time
import jax
total = {"s": 0.0}
def listen(name, seconds, **_):
    if name.startswith("/jax/core/compile/"):
        total["s"] += seconds
jax.monitoring.register_event_duration_secs_listener(listen)
from paxo import cli
start = time.perf_counter()
code = cli.main(sys.argv[1:])
whole = time.perf_counter() - start
print("JSON " + json.dumps({"code": code, "compile_s": total["s"], "s": whole}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the line; 2 where the bench folder is missing."""
    options = parse(arguments)
    if missing(bench_folder()):
        return 2
    start = least("pass", options.laps)
    found = {
        "import_paxo": minus(least("import paxo", options.laps), start),
        "import_losses": minus(least("import paxo.losses", options.laps), start),
        "w1": first_step(options.workload),
    }
    if options.quickstart:
        found["quickstart"] = quickstart()
    print("JSON " + json.dumps({"bench": "compile", "peer": "paxo", **found}))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", default="W1", choices=("W1", "W2"))
    parser.add_argument("--laps", type=int, default=3, help="of each import")
    parser.add_argument("--quickstart", action="store_true", help="run it whole, about 70 s")
    return parser.parse_args(arguments)


def least(code: str, laps: int) -> dict[str, float]:
    """Wall and CPU seconds of a Python that runs `code`."""
    found = []
    for _ in range(laps):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=environment())
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append({"wall": wall, "cpu": cpu})
    return {key: min(lap[key] for lap in found) for key in ("wall", "cpu")}


def minus(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """The difference, entry by entry."""
    return {key: round(a[key] - b[key], 4) for key in a}


def environment() -> dict[str, str]:
    """This process's, without a cache of compiled programs."""
    return {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}


def first_step(workload: str) -> dict[str, float]:
    """Compilation of the step and of the scorer (with its first run), and the first step's lap."""
    command = [sys.executable, "-m", "benchmarks.dpo_step", "--workload", workload]
    command += ["--steps", "1", "--warmup", "0"]
    out = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
    found = json.loads(out.stdout.splitlines()[-1].removeprefix("JSON "))
    parts = {
        "compile_s": found["compile_s"],
        "compile_cpu_s": found["compile_cpu_s"],
        "first_scoring_s": found["first_scoring_s"],
        "step_s": found["step"]["wall"],
        "foreign": found["step"]["foreign"],
    }
    return parts | {"compile_and_first_step_s": found["compile_s"] + found["step"]["wall"]}


def quickstart() -> dict[str, float]:
    """Seconds that JAX spent on tracing, lowering and compiling, and their share of the run."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", LISTENER, "run", "experiments/quickstart.py"]
        command += ["--workdir", os.path.join(place, "run")]
        out = subprocess.run(command, env=environment(), capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.startswith("JSON ")]
    if out.returncode or not lines:
        raise RuntimeError(f"the quickstart ended with code {out.returncode}: {out.stderr[-500:]}")
    found = json.loads(lines[-1].removeprefix("JSON "))
    return found | {"share": found["compile_s"] / found["s"]}


if __name__ == "__main__":
    sys.exit(main())
