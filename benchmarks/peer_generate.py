"""`generate` of transformers with several completions a prompt, as `w4` draws them.

    PEER_PYTHON -m benchmarks.peer_generate --prompts 2 --candidates 8

Runs in a Python that has torch and transformers. Prints one line, `JSON {...}`.
"""

import sys

from benchmarks import sampling
from benchmarks.dpo_step import bench_folder, load_common


def main() -> int:
    """Measures and prints the line."""
    options = sampling.parse(None)
    common = load_common(bench_folder())
    draw = sampling.transformers_sampler(common, options)
    draw(0)
    meter = common.Meter()
    for number in range(min(options.laps, 3)):
        draw(number + 1)
        meter.lap()
    common.emit(
        bench="generate", peer="transformers", step=meter.summary(), prompts=options.prompts,
        candidates=options.candidates, peak_rss_mb=common.peak_rss_mb(), threads=common.THREADS,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
