"""SimPO on Anthropic's helpful-and-harmless pairs: `dpo_hh.py` with another objective.

paxo run experiments/simpo_hh.py --set data.path=pairs.jsonl model.path=my_llama
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

DPO = pathlib.Path(__file__).with_name("dpo_hh.py")


def experiment() -> Experiment:
    """No reference model; beta and margin are the recipe for Llama-3 base models."""
    objective = paxo.objective("simpo", beta=2.0, gamma_beta_ratio=0.5)
    return dataclasses.replace(load(DPO).experiment(), objective=objective)
