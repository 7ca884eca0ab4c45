"""KTO on single completions that were liked or not, or on pairs taken apart.

    paxo run experiments/kto_hh.py --set data.path=unpaired.jsonl model.path=my_llama

Columns `prompt`, `completion`, `label` (true or false), or the pairs of `dpo_hh.py`. Each group is
given a completion of another prompt, drawn anew every epoch, on which the KL divergence is
estimated. `--set objective=bco` or `objective=apo_zero_unpaired` train on the same data.
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

DPO = pathlib.Path(__file__).with_name("dpo_hh.py")


def experiment() -> Experiment:
    """Settings of `dpo_hh.py`; beta and the weights are the paper's defaults."""
    objective = paxo.objective("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    return dataclasses.replace(load(DPO).experiment(), objective=objective)
