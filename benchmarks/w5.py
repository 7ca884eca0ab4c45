"""W5: a DPO step on pairs of real lengths, W1's model, the reference scored in every step.

    python -m benchmarks.w5 --steps 8
    python -m benchmarks.w5 --row-length 896 --rows 4

The pairs are those of `pairs_hh_harmless` (`real_lengths`). All of them are trained on: a row is
long enough for the longest, and attention is computed within each pair alone.

Prints one line, `JSON {...}`: `pairs_per_s`, or by CPU seconds `pairs_per_cpu_s`, of the pairs in
the steps that were measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.dpo_step import (
    BETA,
    LEARNING_RATE,
    bench_folder,
    load_common,
    missing,
    model_config,
    params,
)
from benchmarks.real_lengths import groups_of, missing_data

DATA = "pairs_hh_harmless"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the line; 2 where the bench folder or the data are missing."""
    options = parse(arguments)
    folder = bench_folder()
    if missing(folder) or missing_data(DATA):
        return 2
    common = load_common(folder)
    import jax

    workload = common.WORKLOADS[options.workload]
    batches, step, scorer, state, mesh = prepare(common, workload, options)
    start_s = time.perf_counter() - common.T_PROCESS_START
    meter, losses, pairs, first_s = common.Meter(), [], 0, 0.0
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            common.reset_peak_rss()
            meter.drop()
            meter.mark()
            pairs = 0
        state, metrics = step(state, attached(next(batches), scorer, mesh))
        losses.append(round(float(metrics["loss"]), 5))
        jax.block_until_ready(state)
        pairs += int(metrics["num_groups"])
        meter.lap()
        first_s = first_s or meter.laps[0]["wall"]
    batches.close()
    walls, cpus = (sum(lap[key] for lap in meter.laps) for key in ("wall", "cpu"))
    common.emit(
        bench="lengths", peer="paxo", workload="W5", step=meter.summary(), pairs=pairs,
        pairs_per_s=pairs / walls, pairs_per_cpu_s=pairs / cpus, losses=losses[:6],
        padding=float(metrics["padding/share"]), row_length=batches.shape.length,
        slots=batches.shape.slots, rows=options.rows, pairs_in_set=len(batches.groups),
        start_s=start_s, first_s=first_s, peak_rss_mb=common.peak_rss_mb(),
        peak_steady_mb=common.hwm_mb(), threads=common.THREADS,
    )  # fmt: skip
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", default="W1", choices=("W1", "W2"), help="whose model")
    parser.add_argument("--rows", type=int, default=3, help="rows of a step")
    parser.add_argument(
        "--row-length", type=int, help="tokens of a row (default: as a run chooses)"
    )
    parser.add_argument("--pairs", type=int, help="use only the first of the set")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1)
    return parser.parse_args(arguments)


def prepare(common: Any, workload: Any, options: Any) -> tuple:
    """Batches, compiled step, scorer, state and mesh."""
    import jax

    from paxo.data.batching import Batches
    from paxo.experiment import DataSettings
    from paxo.loading import row_shape
    from paxo.models.policy import make_policy
    from paxo.models.sharding import make_mesh, param_shardings
    from paxo.objectives import objective
    from paxo.scoring import make_scorer
    from paxo.training.optimizers import adamw
    from paxo.training.state import init_state, snapshot, state_shardings
    from paxo.training.step import compile_step, make_train_step

    groups = groups_of(DATA, workload["vocab"], options.pairs)
    config = model_config(common, workload)
    shape = row_shape(groups, DataSettings(row_length=options.row_length), config)
    policy, mesh = make_policy(config), make_mesh(devices=jax.devices()[:1])
    weights = params(config, common.make_params(workload))
    placed = param_shardings(policy.logical_axes, weights, mesh)
    weights = jax.device_put(weights, placed)
    goal = objective("dpo", beta=BETA)
    optimizer = adamw(LEARNING_RATE, weight_decay=0.0, max_grad_norm=None).build()
    state = init_state(snapshot(weights), goal, optimizer, jax.random.key(0))
    shardings = state_shardings(state, placed, optimizer)
    return (
        Batches(groups, shape, options.rows, prefetch=0),
        compile_step(make_train_step(policy, goal, optimizer), mesh, shardings),
        make_scorer(policy, weights, mesh=mesh),
        jax.device_put(state, shardings),
        mesh,
    )


def attached(batch: Any, scorer: Any, mesh: Any) -> Any:
    """The batch on the device, with the reference's log-probs."""
    from paxo.scoring import attach_logps, place_rows

    return attach_logps(place_rows(batch, mesh), "reference", scorer)


if __name__ == "__main__":
    sys.exit(main())
