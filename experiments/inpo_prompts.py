"""INPO on the task of three styles, or on given prompts; see `cyclic_prompts.py`.

    paxo run experiments/inpo_prompts.py

Zhang et al. 2024, arXiv:2407.00617, with independent pairs whose winner is drawn as the judge says,
as in the paper's theory: with the best and the worst of eight, its practice (the row `inpo`), pairs
are not of the policy any more, and the Nash policy is not where they lead. eta is three times tau,
the paper's ratio; tau is the game's KL weight, 0.2, above what can cycle.

On two CPU cores in 40 seconds: over the last ten evaluations of 60 rounds the exact gap is 0.008
(0.159 at the start) and the styles are 0.04 from the Nash policy (0.29 at the start).
"""

import dataclasses
import pathlib

from paxo.experiment import load
from paxo.online import RoundSettings, method
from paxo.rounds import SelfPlay

CYCLIC = load(pathlib.Path(__file__).with_name("cyclic_prompts.py"))
run = CYCLIC.run


def experiment() -> SelfPlay:
    """Settings of `cyclic_prompts.py`; a round is four steps, so that it fits what it drew."""
    settings = CYCLIC.experiment()
    rounds = RoundSettings(60, prompts_per_round=128, epochs=2, minibatches=2, evaluate_every=2)
    row = method("inpo_pairs", eta=3 * settings.beta, tau=settings.beta)
    return dataclasses.replace(settings, method=row, rounds=rounds)
