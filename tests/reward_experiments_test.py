"""Reward and preference models of `experiments/`: trained, exported, used as judges."""

import jax
import numpy as np
import pytest

from paxo.data.row_shape import RowShape
from paxo.data.tokenise import load_tokenizer
from paxo.judges import CheckedJudge, EmbeddingJudge, PairModelJudge, RewardJudge
from paxo.models.heads import with_heads
from paxo.models.policy import make_policy
from paxo.models.pretrained import load_params, read_config
from paxo.reward_scoring import CompletionScorer, VerdictScorer, load_heads
from tests.made_run import PROJECT, paxo, results

FLAGS = [
    "data.limits.max_prompt=64",
    "data.limits.max_completion=32",
    "data.max_records=60",
    "train.num_steps=2",
    "train.rows_per_batch=8",
]


def pair_judge(scorer):
    return PairModelJudge(VerdictScorer(scorer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "output", "judge"),
    [
        ("reward_model_hh", "scores", "scores", RewardJudge),
        ("preference_model_hh", "embeddings:6", "embeddings", EmbeddingJudge),
        ("pair_preference_hh", "scores", "scores", pair_judge),
    ],
)
def test_a_run_leaves_a_model_that_judges(shared_data, tmp_path, name, head, output, judge):
    source = shared_data / "model_stories260k"
    flags = [f"data.path={shared_data / 'pairs_hh_harmless'}", f"model.path={source}", *FLAGS]
    file = PROJECT / "experiments" / f"{name}.py"
    assert paxo("run", file, "--workdir", tmp_path, "--set", *flags) == 0
    found = results(tmp_path)
    low, high = found["heldout_accuracy_interval"]["after"]
    assert low <= found["heldout_accuracy"]["after"] <= high

    config = read_config(tmp_path / "export")
    policy = with_heads(make_policy(config), config.hidden_size, [head])
    heads = policy.init(jax.random.key(9))["heads"]
    params = {**load_params(tmp_path / "export", config), "heads": heads}
    params = load_heads(params, tmp_path / "export" / "heads.safetensors")
    shape = RowShape(length=192, slots=64, groups=4, candidates=2, max_completion=32)
    tokenizer = load_tokenizer(tmp_path / "export")
    scorer = CompletionScorer(policy, params, tokenizer, shape, output)
    p = CheckedJudge(judge(scorer))(["Hello, dog."], [[" Yes, I do.", " No."]])
    assert p[0, 0, 1] != 0.5
    assert np.isfinite(p).all()
