"""Lists of K answers in paxo's own two layouts: whole lists, or all pairs of unequal grade.

    python -m benchmarks.lists --data lists_gsm8k_solutions       # K = 4
    python -m benchmarks.lists --data lists_alpaca_eval           # K = 9

The same lists are trained on once in each layout, W1's model, DPO's loss on pairs and the
Plackett-Luce loss on lists, reference log-probs stored. As lists a prompt is computed once and each
answer once; as pairs an answer meets its prompt again in every pair. Scored tokens are those of the
lists, whatever the layout, so the ratio is that of the times.

Prints one line, `JSON {...}`: `times_pairs` is the speed of lists over that of pairs.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.dpo_step import bench_folder, load_common, missing, model_config, params
from benchmarks.real_lengths import groups_of, missing_data


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the line; 2 where the bench folder or the data are missing."""
    options = parse(arguments)
    folder = bench_folder()
    if missing(folder) or missing_data(options.data):
        return 2
    common = load_common(folder)
    workload = common.WORKLOADS[options.workload]
    lists = groups_of(options.data, workload["vocab"], 4 * options.lists)
    lists = [g for g in lists if g.num_tokens <= options.longest and len(set(g.labels)) > 1]
    lists = lists[: options.lists]
    scored = sum(len(c) for group in lists for c in group.completions)
    found: dict[str, Any] = {}
    for layout, groups in (("lists", lists), ("pairs", all_pairs(lists))):
        found[layout] = measured(common, workload, groups, layout, options)
    times = {key: found["pairs"][key] / found["lists"][key] for key in ("wall", "cpu")}
    common.emit(
        bench="lists", peer="paxo", data=options.data, num_lists=len(lists), scored_tokens=scored,
        lists=found["lists"], pairs=found["pairs"], times_pairs=times["cpu"],
        times_pairs_wall=times["wall"], threads=common.THREADS,
        tokens_per_s={name: scored / x["wall"] for name, x in found.items()},
        tokens_per_cpu_s={name: scored / x["cpu"] for name, x in found.items()},
    )  # fmt: skip
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="lists_gsm8k_solutions")
    parser.add_argument("--workload", default="W1", choices=("W1", "W2"), help="whose model")
    parser.add_argument("--lists", type=int, default=8, help="lists trained on")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a list at most")
    parser.add_argument("--laps", type=int, default=2)
    return parser.parse_args(arguments)


def all_pairs(lists: Sequence[Any]) -> list[Any]:
    """Every pair of unequal grade as a group of its own, the better one first."""
    import dataclasses

    pairs = []
    for group in lists:
        order = sorted(range(len(group.labels)), key=lambda k: -group.labels[k])
        for i, j in itertools.combinations(order, 2):
            if group.labels[i] > group.labels[j]:
                two = {
                    "completions": (group.completions[i], group.completions[j]),
                    "finished": (group.finished[i], group.finished[j]),
                    "labels": (1.0, 0.0),
                    "extras": {},
                    "index": len(pairs),
                }
                pairs.append(dataclasses.replace(group, **two))
    return pairs


def measured(common: Any, workload: Any, groups: Sequence[Any], layout: str, options: Any) -> dict:
    """Seconds of one step over each batch of the groups; batches are of about equal size."""
    import jax
    import jax.numpy as jnp

    from paxo.data.packing import pack_groups, pad_rows
    from paxo.experiment import DataSettings
    from paxo.loading import row_shape
    from paxo.models.policy import make_policy
    from paxo.objectives import objective
    from paxo.training.optimizers import adamw
    from paxo.training.state import init_state
    from paxo.training.step import make_train_step

    config = model_config(common, workload)
    policy = make_policy(config)
    weights = jax.device_put(params(config, common.make_params(workload)))
    goal = objective("plackett_luce" if layout == "lists" else "dpo", beta=0.1)
    optimizer = adamw(1e-5, weight_decay=0.0, max_grad_norm=None).build()
    state = init_state(weights, goal, optimizer, jax.random.key(0))
    shape = row_shape(groups, DataSettings(), config)
    whole, _ = pack_groups(groups, shape)
    rows = min(len(whole.tokens), max(1, 4096 // shape.length))
    whole = pad_rows(whole, -(-len(whole.tokens) // rows) * rows)
    whole = whole.replace(fixed_logps={"reference": jnp.zeros(whole.where.shape)})
    parts = [
        jax.device_put(jax.tree.map(lambda x, i=i: x[i : i + rows], whole))
        for i in range(0, len(whole.tokens), rows)
    ]
    step = jax.jit(make_train_step(policy, goal, optimizer), donate_argnums=0)
    state, _ = step(state, parts[0])
    jax.block_until_ready(state)
    meter = common.Meter()
    for _ in range(options.laps):
        for part in parts:
            state, _ = step(state, part)
        jax.block_until_ready(state)
        meter.lap()
    laps = meter.summary()
    return {
        "wall": laps.get("quiet", laps["wall"]), "cpu": laps["cpu"], "groups": len(groups),
        "row_length": shape.length, "slots": shape.slots, "rows": len(whole.tokens),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
