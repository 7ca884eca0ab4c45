"""LiPO-lambda on lists of graded answers to one prompt, of any length.

    paxo run experiments/lists.py --set data.path=lists.jsonl model.path=my_llama

Columns `prompt`, `completions` (or `responses`), `scores` (or `ranks`). The prompt is computed once
for all its answers. Any other objective on lists takes the same data: `--set
objective=plackett_luce`, `objective=drpo_rank`, `objective=swepo`; `paxo methods` names them.
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

DPO = pathlib.Path(__file__).with_name("dpo_hh.py")


def experiment() -> Experiment:
    """Settings of `dpo_hh.py` with the paper's beta."""
    objective = paxo.objective("lipo_lambda", beta=0.05)
    return dataclasses.replace(load(DPO).experiment(), objective=objective)
