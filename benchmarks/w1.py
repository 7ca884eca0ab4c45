"""W1: a DPO step of 8 pairs of 128 + 128 tokens, a 15M-parameter Llama; see `dpo_step`.

python -m benchmarks.w1
"""

import sys

from benchmarks import dpo_step

if __name__ == "__main__":
    sys.exit(dpo_step.main(workload="W1"))
