"""A reward model on Anthropic's helpful-and-harmless pairs, from any Llama-family model.

    paxo run experiments/reward_model_hh.py --set data.path=pairs_hh_harmless \\
        model.path=model_stories260k optimizer.learning_rate=1e-3 \\
        train.num_steps=100 data.limits.max_prompt=96 data.limits.max_completion=64

Data and limits are those of `dpo_hh.py`. A linear head on the last token of each completion is the
reward; the Bradley-Terry loss trains head and decoder. `export/` holds the decoder in Hugging
Face's layout and `heads.safetensors`; as a judge:

    scorer = CompletionScorer(policy, load_heads(params, "heads.safetensors"), tokenizer, shape)
    judge = RewardJudge(scorer)

These flags, a 260K-parameter model that knew only children's stories, 173 held-out pairs, about 3
minutes on two CPU cores: accuracy 0.503 before and 0.584 after (95 % interval 0.509 to 0.659).
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

DPO = pathlib.Path(__file__).with_name("dpo_hh.py")


def experiment() -> Experiment:
    """Settings of a 1B model; one epoch is the rule, as reward models overfit soon."""
    return dataclasses.replace(
        load(DPO).experiment(),
        objective=paxo.objective("bradley_terry"),
        optimizer=paxo.adamw(1e-5, warmup_steps=20, schedule="linear"),
    )
