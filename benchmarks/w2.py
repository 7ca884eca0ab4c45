"""W2: a DPO step of 32 pairs of 64 + 64 tokens, a small model; see `dpo_step`.

python -m benchmarks.w2
"""

import sys

from benchmarks import dpo_step

if __name__ == "__main__":
    sys.exit(dpo_step.main(workload="W2"))
