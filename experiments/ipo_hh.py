"""IPO on Anthropic's helpful-and-harmless pairs: `dpo_hh.py` with another objective.

paxo run experiments/ipo_hh.py --set data.path=pairs.jsonl model.path=my_llama
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

DPO = pathlib.Path(__file__).with_name("dpo_hh.py")


def experiment() -> Experiment:
    """The target margin is 1 / (2 tau) nats per token: the averaged form, as its authors ran it."""
    return dataclasses.replace(load(DPO).experiment(), objective=paxo.objective("ipo", tau=0.1))
