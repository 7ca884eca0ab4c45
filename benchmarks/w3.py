"""W3: log-probs of given tokens at a large vocabulary, forward and backward from hidden states.

    python -m benchmarks.w3 --method vocabulary
    python -m benchmarks.w3 --method dense --forward-only

`dense` makes all logits (logsumexp and gather), `vocabulary` a chunk of the vocabulary at a time,
`positions` a chunk of positions at a time, both twice; `one_pass` takes loss and gradient of 256
positions at a time, as a step does where the loss does not couple groups. The gradients are those
of the hidden states and of the head, which lies as embeddings do, `[V, D]`. Sizes, inputs and loss
are those of the bench folder's `logprob_memory.py`. A method a process: the peak is the process's.

Prints one line, `JSON {...}`: `extra_mb` is the peak above the inputs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.dpo_step import bench_folder, load_common, missing

METHODS = ("dense", "vocabulary", "positions", "one_pass")
POSITIONS = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures one method and prints the line; 2 where the bench folder is missing."""
    options = parse(arguments)
    folder = bench_folder()
    if missing(folder):
        return 2
    common = load_common(folder)
    import jax

    arrays = made_arrays(options)
    start = time.perf_counter()
    run = jax.jit(function(options)).lower(*arrays).compile()
    compile_s = time.perf_counter() - start
    base = common.cur_rss_mb()
    common.reset_peak_rss()
    meter, sums = common.Meter(), None
    for _ in range(options.laps):
        meter.mark()
        out = jax.block_until_ready(run(*arrays))
        meter.lap()
        peak = common.hwm_mb()
        sums = [float(abs(np.asarray(x)).sum()) for x in jax.tree.leaves(out)]
        del out
    common.emit(
        bench="logprob", peer="paxo", method=options.method, forward_only=options.forward_only,
        shape=[options.batch, options.length, options.width, options.vocabulary],
        step=meter.summary(), compile_s=compile_s, base_mb=base, peak_mb=peak,
        extra_mb=peak - base, temp_mb=run.memory_analysis().temp_size_in_bytes / 2**20,
        loss=sums[0], sums=sums, threads=common.THREADS,
    )  # fmt: skip
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", default="vocabulary", choices=METHODS)
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--laps", type=int, default=2)
    return parser.parse_args(arguments)


def made_arrays(options: Any) -> tuple:
    """Hidden states, head, tokens, and the weight of each sequence."""
    import jax

    rng = np.random.default_rng(0)
    b, t, d, v = options.batch, options.length, options.width, options.vocabulary
    hidden = rng.standard_normal((b, t, d), dtype=np.float32)
    head = 0.02 * rng.standard_normal((v, d), dtype=np.float32)
    tokens = rng.integers(0, v, (b, t)).astype(np.int32)
    weights = np.where(np.arange(b) < b // 2, -0.05, 0.05).astype(np.float32)
    return tuple(map(jax.device_put, (hidden, head, tokens, weights)))


def function(options: Any) -> Callable:
    """`hidden, head, tokens, weights -> loss`, and gradients unless only the forward is wanted."""
    import jax
    import jax.numpy as jnp

    logps = log_probs(options)

    def loss(hidden, head, tokens, weights):
        return jnp.sum(logps(hidden, head, tokens).sum(-1) * weights)

    if options.forward_only:
        return loss
    if options.method == "one_pass":
        return one_pass(logps)
    return jax.value_and_grad(loss, (0, 1))


def log_probs(options: Any) -> Callable:
    """`hidden, head, tokens -> [B, T]`."""
    import jax
    import jax.numpy as jnp

    from paxo import scoring
    from paxo.chunked_head import head_scores, logits_of
    from paxo.vocabulary_head import vocabulary_logps

    positions = options.batch * options.length

    def dense(hidden, head, tokens):
        logits = logits_of(hidden, head, True)
        own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        return own - jax.nn.logsumexp(logits, -1)

    def vocabulary(hidden, head, tokens):
        chunk = scoring.vocabulary_chunk(positions)
        return vocabulary_logps(chunk, hidden, head, tokens, by_token=True)

    def chunked(chunk, hidden, head, tokens):
        return head_scores(("logps",), chunk, hidden, head, tokens, by_token=True)["logps"]

    return {
        "dense": dense,
        "vocabulary": vocabulary,
        "positions": lambda *arrays: chunked(max(1, POSITIONS // options.batch), *arrays),
        "one_pass": lambda *arrays: chunked(None, *arrays),
    }[options.method]


def one_pass(logps: Callable) -> Callable:
    """Loss and gradients of some positions of a sequence at a time."""
    import jax
    import jax.numpy as jnp

    def run(hidden, head, tokens, weights):
        per = min(POSITIONS, tokens.shape[1])
        cut = lambda x: x.reshape(-1, 1, per, *x.shape[2:])  # noqa: E731
        weight = cut(jnp.broadcast_to(weights[:, None], tokens.shape))

        def add(total, part):
            hidden, tokens, weight = part
            loss = lambda hidden, head: jnp.sum(logps(hidden, head, tokens) * weight)  # noqa: E731
            value, (d_hidden, d_head) = jax.value_and_grad(loss, (0, 1))(hidden, head)
            return (total[0] + value, total[1] + d_head), d_hidden

        start = jnp.zeros(()), jnp.zeros_like(head)
        (value, d_head), d_hidden = jax.lax.scan(add, start, (cut(hidden), cut(tokens), weight))
        return value, (d_hidden.reshape(hidden.shape), d_head)

    return run


if __name__ == "__main__":
    sys.exit(main())
