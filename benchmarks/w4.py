"""W4: sampling, 16 prompts of 64 tokens and 64 new tokens, W1's model.

    python -m benchmarks.w4
    python -m benchmarks.w4 --prompts 2 --candidates 8     # a prompt is computed once for all 8

Prints one line, `JSON {...}`, as the bench folder's `peer_hf_generate.py` does.
`benchmarks.sampling` takes turns with transformers lap by lap.
"""

import sys
import time
from collections.abc import Sequence

from benchmarks import sampling
from benchmarks.dpo_step import bench_folder, load_common, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the line; 2 where the bench folder is missing."""
    options = sampling.parse(arguments)
    folder = bench_folder()
    if missing(folder):
        return 2
    common = load_common(folder)
    draw = sampling.paxo_sampler(common, options)
    start_s = time.perf_counter() - common.T_PROCESS_START
    start = time.perf_counter()
    draw(0)
    first_s = time.perf_counter() - start
    meter = common.Meter()
    for number in range(options.laps):
        draw(number + 1)
        meter.lap()
    laps = meter.summary()
    seconds = laps.get("quiet", laps["wall"])
    tokens = options.prompts * options.candidates * options.new_tokens
    common.emit(
        bench="generate", peer="paxo", workload=options.workload, step=laps, time_s=seconds,
        cpu_s=laps["cpu"], new_tokens_per_s=tokens / seconds, first_s=first_s, start_s=start_s,
        prompts=options.prompts, candidates=options.candidates, peak_rss_mb=common.peak_rss_mb(),
        threads=common.THREADS,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
