"""Nash-MD on the task of three styles, or on given prompts; see `cyclic_prompts.py`.

    paxo run experiments/nash_md_prompts.py

Munos et al. 2023, arXiv:2312.00886, as a regression on win rates against the mixture of policy and
first policy. With a constant mixture it comes to rest near the Nash policy, not at it.

On two CPU cores in a minute: over the last ten evaluations of 100 rounds the exact gap is 0.014
(0.159 at the start) and the styles are 0.06 from the Nash policy (0.29 at the start).
"""

import dataclasses
import pathlib

from paxo.experiment import load
from paxo.online import Draw, method
from paxo.rounds import SelfPlay

CYCLIC = load(pathlib.Path(__file__).with_name("cyclic_prompts.py"))
run = CYCLIC.run


def experiment() -> SelfPlay:
    """Settings of `cyclic_prompts.py`; the paper's weight of the reference, 0.125."""
    settings = CYCLIC.experiment()
    row = method("nash_md", beta=settings.beta, mix=0.125, opponents=4)
    return dataclasses.replace(
        settings, method=dataclasses.replace(row, draws=(Draw("reference", 2),))
    )
