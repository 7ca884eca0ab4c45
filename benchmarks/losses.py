"""What a loss costs beside DPO: value and gradient of 65,536 pairs under jit.

    python -m benchmarks.losses                 # all closed forms on pairs
    python -m benchmarks.losses --names orpo cpl --laps 400

Each loss takes turns with DPO; a lap is many calls, timed in CPU seconds of this process, and the
figure is the median of the ratios. Limit: 4 times DPO. Lists are measured at K = 16 and 32 in
operations of the compiled program, which grow by a factor of 4 at most, O(K²); those that sort by a
network of K layers by 8, O(K³).

Prints a table and one line, `JSON {...}`.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxo.objectives import LOSSES, objective

PAIRS, LIMIT = 65_536, 4.0
SUMS = {"policy_logps", "reference_logps", "previous_logps", "lengths", "labels", "win_rates"}
GIVEN = {"rewards", "margin_rewards", "preference_scores", "advantages"}
# They draw, sort or remember over the batch, or want more than a pair: not closed forms of a pair.
OTHERS = {
    *("bpo", "rationale_dpo", "rationale_orpo", "srpo", "triple_po", "triple_po_l"),
    *("xpo", "vpo", "selm", "hypo"),
}
LISTS = (
    *("plackett_luce", "lipo", "lipo_lambda", "pro", "swepo", "mppo", "rrhf", "infonca", "nca"),
    *("exo", "diff_ndcg", "unique_softmax", "poly1_softmax", "pairwise_mse", "pairwise_quantile"),
    *("pairwise_soft01", "approx_ndcg", "neural_ndcg", "rloo", "copg", "sppo", "gpo", "brain"),
    "slic_list",
)
CUBIC = {"diff_ndcg"}


def pairwise_names() -> list[str]:
    """Losses that are closed forms of a pair's sums."""
    return [
        name
        for name in LOSSES
        if name not in {*OTHERS, *LISTS}
        and not objective(name).whole_batch
        and {a for a, needed in _arrays(name).items() if needed} <= SUMS | GIVEN
    ]


def made_inputs(name: str, groups: int, candidates: int) -> dict[str, jax.Array]:
    """Log-probs of about thirty tokens, and numbers in (0, 1) for the rest."""
    rng = np.random.default_rng(0)
    shape = (groups, candidates)
    made = {"where": np.ones(shape, bool)}
    for array, needed in _arrays(name).items():
        if array == "lengths":
            made[array] = rng.integers(8, 64, shape).astype(np.float32)
        elif array.endswith("_logps"):
            made[array] = -rng.uniform(20, 90, shape).astype(np.float32)
        elif array == "labels":
            made[array] = -np.sort(-rng.uniform(0, 1, shape).astype(np.float32), -1)
        elif needed:
            made[array] = rng.uniform(0, 1, shape).astype(np.float32)
    return {array: jnp.asarray(x) for array, x in made.items()}


def value_and_gradient(name: str) -> Callable:
    """Compiled: `inputs -> (sum of the loss, its gradient)`."""
    term = objective(name).terms[0]

    def total(logps, inputs):
        return term({**inputs, "policy_logps": logps})[0].total.sum()

    return jax.jit(lambda inputs: jax.value_and_grad(total)(inputs["policy_logps"], inputs))


def times_dpo(name: str, laps: int = 60, calls: int = 10) -> float:
    """Median over laps, in turns, of the loss's CPU time by DPO's."""
    both = []
    for each in ("dpo", name):
        inputs, run = made_inputs(each, PAIRS, 2), value_and_gradient(each)
        jax.block_until_ready(run(inputs))
        both.append((run, inputs))
    laps = [[_lap(run, inputs, calls) for run, inputs in both] for _ in range(laps)]
    return statistics.median(own / dpo for dpo, own in laps)


def operations(name: str, candidates: int, groups: int = 64) -> float:
    """Floating-point operations of value and gradient, by XLA's count."""
    inputs = made_inputs(name, groups, candidates)
    return value_and_gradient(name).lower(inputs).compile().cost_analysis()["flops"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; 1 where a loss is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--names", nargs="+", default=None, choices=pairwise_names())
    parser.add_argument("--laps", type=int, default=60)
    options = parser.parse_args(arguments)
    ratios = {name: times_dpo(name, options.laps) for name in options.names or pairwise_names()}
    for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        print(f"{name:18} {ratio:5.2f} x dpo{'  over the limit' if ratio > LIMIT else ''}")
    growth = {}
    if options.names is None:
        growth = {name: operations(name, 32) / operations(name, 16) for name in LISTS}
        for name, factor in growth.items():
            print(f"{name:18} {factor:5.2f} x the operations at K = 32 as at K = 16")
    print("JSON " + json.dumps({"times_dpo": ratios, "growth": growth}))
    too_steep = [name for name, factor in growth.items() if factor > (9 if name in CUBIC else 4.5)]
    return int(max(ratios.values()) > LIMIT or bool(too_steep))


def _lap(run: Callable, inputs: Any, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        found = run(inputs)
    jax.block_until_ready(found)
    return time.process_time() - start


def _arrays(name: str) -> dict[str, bool]:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


if __name__ == "__main__":
    raise SystemExit(main())
