"""DNO on the task of three styles, or on given prompts; see `cyclic_prompts.py`.

    paxo run experiments/dno_prompts.py

Rosset et al. 2024, arXiv:2404.03715, its theoretical form: soft labels from win rates against the
policy's own answers. There is no KL term to a fixed policy, so the theory speaks of the average
policy and of the game without one (the column "average policy", the row "unregularised_gap"): the
last policy goes round. `--set method=dno_prct` is the paper's practice, for given prompts with an
answer of a teacher (a column `reference` or `completion`).

On two CPU cores in a minute: in the second half of 60 rounds the gap without a KL term is 0.68 on
average (0.51 at the start), while the styles go round; that of the average policy is 0.18.
"""

import dataclasses
import pathlib

from paxo.experiment import load
from paxo.online import RoundSettings, method
from paxo.rounds import SelfPlay

CYCLIC = load(pathlib.Path(__file__).with_name("cyclic_prompts.py"))
run = CYCLIC.run


def experiment() -> SelfPlay:
    """Settings of `cyclic_prompts.py`; a round is four steps, eta the inverse of the step."""
    settings = CYCLIC.experiment()
    rounds = RoundSettings(60, prompts_per_round=128, epochs=2, minibatches=2, evaluate_every=1)
    return dataclasses.replace(settings, method=method("dno", eta=1.0), rounds=rounds)
