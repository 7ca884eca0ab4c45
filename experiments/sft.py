"""Supervised fine-tuning on demonstrations: the likelihood of each completion's tokens.

    paxo run experiments/sft.py --set data.path=sft.jsonl model.path=my_llama

Columns: `prompt` and `completion` (strings or message lists), `messages`, or `text`.
"""

import paxo
from paxo.data.limits import TokenLimits
from paxo.experiment import DataSettings, Experiment, ModelSettings, TrainSettings


def experiment() -> Experiment:
    """Settings of a 1B model on one accelerator."""
    return Experiment(
        objective=paxo.objective("nll"),
        optimizer=paxo.adamw(1e-5, warmup_steps=50, schedule="cosine"),
        model=ModelSettings(path="meta-llama/Llama-3.2-1B-Instruct"),
        data=DataSettings(
            path="hf:trl-lib/Capybara:train",
            heldout=0.02,
            limits=TokenLimits(
                max_prompt=1024, max_completion=1024, long_prompt="keep_end", long_completion="cut"
            ),
        ),
        train=TrainSettings(
            num_steps=1000, rows_per_batch=16, evaluate_every=200, checkpoint_every=200
        ),
    )
