"""New tokens a second, in turns with `generate` of transformers on the same weights and prompts.

    python -m benchmarks.sampling --transformers ../.venv-torch/bin/python --laps 8
    python -m benchmarks.sampling --prompts 2 --candidates 8 --prompt-length 512

Weights and the meter are those of the bench folder (`PAXO_BENCH`, default `../shared/bench` beside
the project). Both programs stay alive and draw in turns, lap by lap, so that the load of the
machine falls on both alike; wall time counts only where others used little (`foreign`), CPU seconds
nearly always. `--threads 1` pins both to one core. With K candidates transformers computes each
prompt K times (`num_return_sequences`).

Prints a line of JSON for each program, and the medians of the ratios of neighbouring laps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.dpo_step import bench_folder, load_common, missing, model_config, params


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and gives 2 where the bench folder is missing."""
    options = parse(arguments)
    folder = bench_folder()
    if missing(folder):
        return 2
    if options.serve:
        os.environ["BENCH_THREADS"] = str(options.threads)
        if options.threads == 1:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        serve(load_common(folder), options)
        return 0
    programs = {"paxo": sys.executable}
    if options.transformers:
        programs["transformers"] = options.transformers
    for name, laps in take_turns(programs, options).items():
        print(json.dumps({"program": name, **laps}))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", default="W1", choices=("W1", "W2"))
    parser.add_argument("--transformers", help="a Python that has torch and transformers")
    parser.add_argument("--laps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=1, help="completions a prompt")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--serve", choices=("paxo", "transformers"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def take_turns(programs: dict[str, str], options: Any) -> dict[str, dict[str, float]]:
    """Laps of each program in turns; medians, and of the ratios to paxo's lap before."""
    running = {}
    for name, python in programs.items():
        own = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()
               if key not in ("serve", "transformers", "laps")]  # fmt: skip
        running[name] = subprocess.Popen(
            [python, "-m", "benchmarks.sampling", f"--serve={name}", *own],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        answer(running[name])  # it has drawn once, compiled and is warm
    laps: dict[str, list] = {name: [] for name in programs}
    for _ in range(options.laps):
        for name, process in running.items():
            process.stdin.write("lap\n")
            process.stdin.flush()
            laps[name].append(answer(process))
    for process in running.values():
        process.stdin.close()
        process.wait()
    tokens = options.prompts * options.candidates * options.new_tokens
    out = {}
    for name, own in laps.items():
        median = {key: statistics.median(lap[key] for lap in own) for key in ("wall", "cpu")}
        ratios = {
            f"times_paxo_{key}": statistics.median(
                a[key] / b[key] for a, b in zip(own, laps["paxo"])
            )
            for key in ("wall", "cpu")
        }
        out[name] = {
            **median,
            "cpu_min": min(lap["cpu"] for lap in own),
            "foreign": statistics.median(lap["foreign"] for lap in own),
            "tokens_per_s": tokens / median["wall"],
            "tokens_per_cpu_s": tokens / median["cpu"],
            **ratios,
        }
        out[name] = {key: round(value, 4) for key, value in out[name].items()}
    return out


def answer(process: Any) -> dict[str, float]:
    """The next lap of a program."""
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            f"{process.args[0]} ended with code {process.wait()}; see its output above"
        )
    return json.loads(line)


def serve(common: Any, options: Any) -> None:
    """Draws once, and again for every line that comes in; answers with the lap."""
    draw = (paxo_sampler if options.serve == "paxo" else transformers_sampler)(common, options)
    draw(0)
    number = 1
    while True:
        meter = common.Meter()
        draw(number)
        meter.lap()
        print(json.dumps(meter.laps[0]), flush=True)
        number += 1
        if not sys.stdin.readline():
            return


def made_prompts(common: Any, options: Any) -> np.ndarray:
    """`[B, P]` random token ids, as the bench's peers draw them."""
    vocabulary = common.WORKLOADS[options.workload]["vocab"]
    shape = (options.prompts, options.prompt_length)
    return np.random.default_rng(0).integers(3, vocabulary, shape)


def paxo_sampler(common: Any, options: Any) -> Callable[[int], None]:
    """One call draws all completions, none of which ends before its last token."""
    import jax

    from paxo.models.policy import make_policy
    from paxo.sampling import SamplingConfig, make_sampler
    from paxo.types import PromptBatch

    workload = common.WORKLOADS[options.workload]
    config = model_config(common, workload)
    weights = jax.device_put(params(config, common.make_params(workload)))
    tokens = made_prompts(common, options).astype(np.int32)
    batch, length = tokens.shape
    prompts = PromptBatch(tokens, np.full(batch, length, np.int32), np.arange(batch))
    settings = SamplingConfig(
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        num_candidates=options.candidates,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    sampler = make_sampler(make_policy(config), settings, (2,))

    def draw(number: int) -> None:
        drawn = sampler(weights, prompts, jax.random.key(number))
        assert np.asarray(drawn.mask).all()

    return draw


def transformers_sampler(common: Any, options: Any) -> Callable[[int], None]:
    """The same by `generate` with its default cache."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(common.THREADS)
    workload = common.WORKLOADS[options.workload]
    model = common.hf_model(workload, common.make_params(workload)).eval()
    tokens = torch.from_numpy(made_prompts(common, options))
    settings = {
        "max_new_tokens": options.new_tokens,
        "min_new_tokens": options.new_tokens,
        "num_return_sequences": options.candidates,
        "pad_token_id": 0,
        "eos_token_id": None,
        "do_sample": options.temperature > 0,
    }
    if options.temperature > 0:
        settings |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}

    def draw(number: int) -> None:
        torch.manual_seed(number)
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            drawn = model.generate(input_ids=tokens, attention_mask=mask, **settings)
        rows = options.prompts * options.candidates
        assert drawn.shape == (rows, options.prompt_length + options.new_tokens)

    return draw


if __name__ == "__main__":
    sys.exit(main())
