"""What paxo's loop adds to the bare compiled step on W1: packing, placing, metrics, writing.

    python -m benchmarks.overhead --steps 4 --laps 3

`fit` with a writer and its line of metrics every step, on batches that are packed and placed as in
a run, takes turns with a bare loop over the compiled step and one batch that lies on the device.
The reference's log-probs are stored in both. Laps of both are of `--steps` steps.

Prints one line, `JSON {...}`: `overhead` is the median of the ratios of neighbouring laps, less 1.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import dpo_step
from benchmarks.dpo_step import bench_folder, load_common, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the line; 2 where the bench folder is missing."""
    options = parse(arguments)
    folder = bench_folder()
    if missing(folder):
        return 2
    common = load_common(folder)
    import jax

    from paxo.training.loop import fit
    from paxo.training.step import place_rows
    from paxo.training.writers import JsonlWriter

    prepared = dpo_step.prepare(common, common.WORKLOADS[options.workload])
    fixed = np.asarray(prepared.scorer(prepared.batch))
    stored = prepared.batch.replace(fixed_logps={"reference": fixed})
    on_device = place_rows(stored, prepared.mesh)
    stream = Stream(common.make_batch(common.WORKLOADS[options.workload]), fixed)
    state, meter, laps = prepared.state, common.Meter(), {"bare": [], "fit": []}
    with tempfile.TemporaryDirectory() as place:
        writer = JsonlWriter(pathlib.Path(place) / "metrics.jsonl")
        for lap in range(options.laps + 1):
            meter.mark()
            for _ in range(options.steps):
                state, _ = prepared.step(state, on_device)
            jax.block_until_ready(state)
            meter.lap()
            state = fit(
                prepared.step, state, stream, num_steps=int(state.step) + options.steps,
                place=lambda batch: place_rows(batch, prepared.mesh), writer=writer,
            )  # fmt: skip
            jax.block_until_ready(state)
            meter.lap()
            if lap:
                laps["bare"].append(meter.laps[-2])
                laps["fit"].append(meter.laps[-1])
    ratios = {
        key: statistics.median(b[key] / a[key] for a, b in zip(laps["bare"], laps["fit"])) - 1
        for key in ("wall", "cpu")
    }
    common.emit(
        bench="overhead", peer="paxo", workload=options.workload, overhead=ratios["cpu"],
        overhead_wall=ratios["wall"], laps=options.laps, steps=options.steps,
        bare_cpu=statistics.median(a["cpu"] for a in laps["bare"]) / options.steps,
        foreign=statistics.median(a["foreign"] for a in laps["bare"]), threads=common.THREADS,
    )  # fmt: skip
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", default="W1", choices=("W1", "W2"))
    parser.add_argument("--steps", type=int, default=4, help="steps of a lap")
    parser.add_argument("--laps", type=int, default=3)
    return parser.parse_args(arguments)


class Stream:
    """Batches as `fit` takes them, each packed anew from its groups."""

    state = None
    identity = "the bench's pairs"

    def __init__(self, arrays: Any, fixed: np.ndarray):
        self._arrays, self._fixed = arrays, fixed
        self.state = self

    def to_dict(self) -> dict:
        """The place in the stream: there is none."""
        return {}

    def __next__(self) -> Any:
        """The bench's batch, filled again."""
        return dpo_step.packed_rows(self._arrays).replace(fixed_logps={"reference": self._fixed})


if __name__ == "__main__":
    sys.exit(main())
