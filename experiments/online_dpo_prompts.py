"""Online DPO on the task of three styles, or on given prompts; see `cyclic_prompts.py`.

    paxo run experiments/online_dpo_prompts.py
    paxo run experiments/online_dpo_prompts.py --set method=iterative_dpo

Guo et al. 2024, arXiv:2402.04792. DPO stands for a reward, and here no reward agrees with the
judge: the policy goes round. Iterative DPO, whose reference is the last policy, runs off.

On two CPU cores in half a minute: the exact gap averages 0.30 in the second half of 100 rounds,
and up to 0.86 (0.159 at the start), while the styles go round. Iterative DPO ends by itself in the
30s of its rounds: all texts have one style, and a round in which nothing but ties is left is an
error (exit code 5; `rounds.png` shows what was before it).
"""

import dataclasses
import pathlib

from paxo.experiment import load
from paxo.online import method
from paxo.rounds import SelfPlay

CYCLIC = load(pathlib.Path(__file__).with_name("cyclic_prompts.py"))
run = CYCLIC.run


def experiment() -> SelfPlay:
    """Settings of `cyclic_prompts.py`; beta is the game's KL weight."""
    settings = CYCLIC.experiment()
    return dataclasses.replace(settings, method=method("online_dpo", beta=settings.beta))
