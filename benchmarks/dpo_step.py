"""Time and memory of one DPO step on the workloads that all peers are measured with.

    python -m benchmarks.w1 --steps 8 --max-steps 60
    python -m benchmarks.w2 --reference stored

Weights, batch, learning rate and the meter are those of the bench folder (`PAXO_BENCH`, default
`../shared/bench` beside the project), so the first losses must be those of every other trainer. A
row is one pair: its prompt once, then both completions. The reference is scored in every step, or
once before the first with `--reference stored`.

Prints one line, `JSON {...}`: `step` holds the laps (wall, own CPU, and what others used
meanwhile; `quiet` is the median of the laps with little of that), `compile_s` is the training
step's alone.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 1e-4
BETA = 0.1


class Prepared(NamedTuple):
    """A state and a batch on one device, and what is done with them in a step."""

    step: Any
    scorer: Any
    state: Any
    batch: Any
    mesh: Any


def main(arguments: Sequence[str] | None = None, workload: str = "W1") -> int:
    """Measures one workload and prints the line; 2 where the bench folder is missing."""
    options = parse(arguments, workload)
    folder = bench_folder()
    if missing(folder):
        return 2
    common = load_common(folder)  # before jax: it sets the number of threads
    workload = common.WORKLOADS[options.workload]
    prepared = prepare(common, workload)
    start_s = time.perf_counter() - common.T_PROCESS_START

    start = time.perf_counter()
    batch = attached(prepared)
    reference_s = time.perf_counter() - start
    if options.reference == "stored":
        prepared = prepared._replace(batch=batch, scorer=None)
    start, start_cpu = time.perf_counter(), time.process_time()
    compiled = prepared.step.lower(prepared.state, batch).compile()
    compile_s, compile_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    memory = compiled.memory_analysis()

    meter, losses = run(common, compiled, prepared, options)
    common.report_train(
        "paxo", options.workload, workload, meter, start_s, compile_s,
        "separate" if options.reference == "separate" else "precomputed", "completion",
        losses=losses[:6], peak_steady=common.hwm_mb(),
        extra={
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "compile_cpu_s": compile_cpu_s,
            "first_scoring_s": reference_s,
            "row_length": int(batch.tokens.shape[1]),
        },
    )  # fmt: skip
    return 0


def parse(arguments: Sequence[str] | None, workload: str = "W1") -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", default=workload, choices=("W1", "W2"))
    parser.add_argument(
        "--reference", default="separate", choices=("separate", "stored"),
        help="score the reference in every step, or once before the first",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=8, help="laps that count (default: 8)")
    parser.add_argument("--warmup", type=int, default=2, help="laps before them (default: 2)")
    parser.add_argument(
        "--max-steps", type=int, default=0, help="go on so far until --steps laps were quiet"
    )
    return parser.parse_args(arguments)


def bench_folder() -> pathlib.Path:
    """Where the workloads are described."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "bench"
    return pathlib.Path(os.environ.get("PAXO_BENCH", beside))


def missing(folder: pathlib.Path) -> bool:
    """Whether there is no bench folder, which is then said."""
    if (folder / "common.py").is_file():
        return False
    print(f"{folder}: no common.py there; set PAXO_BENCH to the bench folder", file=sys.stderr)
    return True


def load_common(folder: pathlib.Path) -> ModuleType:
    """The bench folder's `common.py`."""
    spec = importlib.util.spec_from_file_location("paxo_bench_common", folder / "common.py")
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    return common


def run(common: ModuleType, compiled: Any, prepared: Prepared, options: Any) -> tuple[Any, list]:
    """The meter with its laps, and the loss of every step from the first on."""
    import jax

    state, meter, losses = prepared.state, common.Meter(), []
    with jax.set_mesh(prepared.mesh):
        while len(losses) < options.warmup + options.steps or (
            len(losses) < options.max_steps and not meter.enough(options.steps)
        ):
            if len(losses) == options.warmup:
                common.reset_peak_rss()
                meter.drop()
                meter.mark()
            # As `CompiledStep` calls it: what is frozen is no part of what is donated.
            state, metrics = compiled(state, {}, attached(prepared))
            losses.append(round(float(metrics["loss"]), 5))
            jax.block_until_ready(state)
            meter.lap()
    return meter, losses


def attached(prepared: Prepared) -> Any:
    """The batch with the log-probs of the reference, scored anew unless they are stored."""
    from paxo.scoring import attach_logps

    if prepared.scorer is None:
        return prepared.batch
    return attach_logps(prepared.batch, "reference", prepared.scorer)


def prepare(common: ModuleType, workload: Mapping[str, Any]) -> Prepared:
    """Everything on the device, nothing compiled."""
    import jax

    from paxo.models.policy import make_policy
    from paxo.models.sharding import make_mesh, param_shardings
    from paxo.objectives import objective
    from paxo.scoring import make_scorer
    from paxo.training.optimizers import adamw
    from paxo.training.state import init_state, snapshot, state_shardings
    from paxo.training.step import compile_step, make_train_step, place_rows

    config = model_config(common, workload)
    policy = make_policy(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    goal = objective("dpo", beta=BETA)
    optimizer = adamw(LEARNING_RATE, weight_decay=0.0, max_grad_norm=None).build()
    weights = params(config, common.make_params(workload))
    placed = param_shardings(policy.logical_axes, weights, mesh)
    weights = jax.device_put(weights, placed)
    state = init_state(snapshot(weights), goal, optimizer, jax.random.key(0))
    shardings = state_shardings(state, placed, optimizer)
    return Prepared(
        step=compile_step(make_train_step(policy, goal, optimizer), mesh, shardings),
        scorer=make_scorer(policy, weights, mesh=mesh),
        state=jax.device_put(state, shardings),
        batch=place_rows(packed_rows(common.make_batch(workload)), mesh),
        mesh=mesh,
    )


def model_config(common: ModuleType, workload: Mapping[str, Any]) -> Any:
    """The shape of the workload's model."""
    from paxo.models.config import ModelConfig

    return ModelConfig(
        vocab_size=workload["vocab"],
        hidden_size=workload["hidden"],
        num_layers=workload["layers"],
        num_heads=workload["heads"],
        num_kv_heads=workload["kv_heads"],
        head_dim=workload["hidden"] // workload["heads"],
        intermediate_size=workload["inter"],
        max_positions=2048,
        norm_eps=common.NORM_EPS,
        rope_theta=common.ROPE_THETA,
        tie_embeddings=workload["tied"],
    )


def params(config: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The bench's weights, of which matrices are `[in, out]`, as parameters of paxo's."""
    from paxo.models.hf_layout import layout

    tensors = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    if "head" in weights:
        tensors["lm_head.weight"] = weights["head"].T
    names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    names |= {name: f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for number, layer in enumerate(weights["layers"]):
        for name, array in layer.items():
            tensors[f"model.layers.{number}.{names[name]}.weight"] = array.T
    made: dict[str, Any] = {}
    for parameter in layout(config):
        layers = range(config.num_layers) if parameter.stacked else (None,)
        parts = np.empty((len(layers), *parameter.shape), np.float32)
        for part, layer in zip(parts, layers):
            for source in parameter.sources:
                part[source.index] = source.to_parameter(tensors[source.name.format(layer=layer)])
        *parents, leaf = parameter.path
        node = made
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = parts if parameter.stacked else parts[0]
    return made


def packed_rows(arrays: Mapping[str, np.ndarray]) -> Any:
    """One row for each pair: the prompt, the chosen, the rejected completion."""
    from paxo.data.packing import fill_rows
    from paxo.data.records import TokenGroup
    from paxo.data.row_shape import RowShape

    groups = [
        TokenGroup(
            prompt=arrays["prompt"][i].astype(np.int32),
            completions=tuple(
                arrays[name][i, : arrays[f"{name}_len"][i]].astype(np.int32)
                for name in ("chosen", "rejected")
            ),
            finished=(True, True),
            labels=(1.0, 0.0),
            extras={},
            index=i,
            source=f"bench:{i + 1}",
        )
        for i in range(len(arrays["prompt"]))
    ]
    longest = arrays["chosen"].shape[1]
    shape = RowShape(
        length=max(group.num_tokens for group in groups),
        slots=max(sum(map(len, group.completions)) for group in groups),
        groups=1,
        candidates=2,
        max_completion=longest,
    )
    return fill_rows(groups, [[i] for i in range(len(groups))], shape)


if __name__ == "__main__":
    sys.exit(main())
