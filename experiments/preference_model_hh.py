"""A general preference model on Anthropic's pairs: `reward_model_hh.py` with another objective.

    paxo run experiments/preference_model_hh.py --set data.path=pairs_hh_harmless \\
        model.path=model_stories260k optimizer.learning_rate=1e-3 \\
        train.num_steps=100 data.limits.max_prompt=96 data.limits.max_completion=64

The head gives an embedding of each completion, and the score of a pair is skew-symmetric in both
(Zhang et al. 2024, arXiv:2410.02197), so that preferences may run in circles; as a judge it is
`EmbeddingJudge(CompletionScorer(..., "embeddings"), temperature=1.0)`.

These flags, a 260K-parameter model that knew only children's stories, 173 held-out pairs, about 3
minutes on two CPU cores: accuracy 0.497 before and 0.578 after (95 % interval 0.503 to 0.653). With
the temperature of the authors' scripts, 0.1, it is 0.520 (0.445 to 0.595) after as many steps:
outputs of a new head have unit variance, and its first log-odds are then tens of nats.
"""

import dataclasses
import pathlib

import paxo
from paxo.experiment import Experiment, load

REWARD = pathlib.Path(__file__).with_name("reward_model_hh.py")


def experiment() -> Experiment:
    """Embeddings of six numbers."""
    settings = load(REWARD).experiment()
    return dataclasses.replace(
        settings,
        objective=paxo.objective("general_preference", temperature=1.0),
        model=dataclasses.replace(settings.model, heads=("embeddings:6",)),
    )
