"""Trained models as the functions that judges take, on a small trained model and its tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.data.limits import TokenLimits
from paxo.data.records import DataError, Record
from paxo.data.row_shape import RowShape
from paxo.data.tokenise import load_tokenizer, tokenise
from paxo.judges import EmbeddingJudge, PairModelJudge, RewardJudge, bradley_terry
from paxo.models.heads import with_heads
from paxo.models.policy import make_policy
from paxo.models.pretrained import load_params, read_config
from paxo.models.sharding import make_mesh
from paxo.reward_scoring import (
    CompletionScorer,
    HeadScorer,
    VerdictScorer,
    _outputs,
    load_heads,
    save_heads,
)
from tests.made import made_batch

SHAPE = RowShape(length=96, slots=48, groups=4, candidates=3, max_completion=24)
PROMPTS = ["Once upon a time, a cat", "The sun", "Lily saw a big dog. She"]
TEXTS = [[" sat.", " ran away to play."], [" is hot.", " was"], [" was happy", " cried and cried."]]


@pytest.fixture(scope="module")
def model(shared_data):
    """The model with random heads of rewards and embeddings, its parameters and its tokenizer."""
    folder = shared_data / "model_stories260k"
    config = read_config(folder)
    policy = with_heads(make_policy(config), config.hidden_size, ["scores", "embeddings:4"])
    heads = policy.init(jax.random.key(3))["heads"]
    return policy, {**load_params(folder, config), "heads": heads}, load_tokenizer(folder)


def alone(model, prompt, text):
    """Token ids of prompt and completion, and the hidden states of both read as one sequence."""
    policy, params, tokenizer = model
    (group,) = tokenise([Record(prompt, (text,), (0.0,))], tokenizer).groups
    ids = np.concatenate([group.prompt, group.completions[0]])[None]
    ones = np.ones_like(ids)
    hidden = policy.trunk(params, ids, np.arange(ids.size)[None], ones, ones)
    return group.prompt.size, ids[0], hidden[0]


def test_scores_are_those_of_each_completion_read_alone(model):
    policy, params, tokenizer = model
    scorer = CompletionScorer(policy, params, tokenizer, SHAPE, rows_per_batch=1)
    found = scorer(PROMPTS, TEXTS)
    expected = [
        [policy.heads["scores"](params, alone(model, p, text)[2][-1]) for text in row]
        for p, row in zip(PROMPTS, TEXTS)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        RewardJudge(scorer)(PROMPTS, TEXTS), bradley_terry(scorer(PROMPTS, TEXTS))
    )


def test_logps_are_those_of_each_completion_read_alone(model):
    policy, params, tokenizer = model
    found = CompletionScorer(policy, params, tokenizer, SHAPE, "logps")(PROMPTS, TEXTS)
    for b, (prompt, row) in enumerate(zip(PROMPTS, TEXTS)):
        for k, text in enumerate(row):
            start, ids, hidden = alone(model, prompt, text)
            logps = jax.nn.log_softmax(policy.head(params, hidden))
            steps = jnp.arange(start - 1, ids.size - 1)
            assert found[b, k] == pytest.approx(float(logps[steps, ids[start:]].sum()), rel=1e-5)


def test_nothing_is_compiled_again_for_other_numbers_of_prompts_and_completions(model):
    scorer = CompletionScorer(*model, SHAPE, rows_per_batch=2)
    first = scorer(PROMPTS, TEXTS)
    before = _outputs._cache_size()
    again = scorer(PROMPTS[:1], [[*TEXTS[0], " flew."]])
    assert _outputs._cache_size() == before
    np.testing.assert_allclose(again[0, :2], first[0], rtol=1e-5, atol=1e-5)


def test_a_mesh_gives_the_same(model):
    here = CompletionScorer(*model, SHAPE)(PROMPTS, TEXTS)
    mesh = make_mesh(data=2, fsdp=4)
    found = CompletionScorer(*model, SHAPE, mesh=mesh)(PROMPTS, TEXTS)
    np.testing.assert_allclose(found, here, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_or_cannot_be_read_is_named_with_its_prompt(model):
    scorer = CompletionScorer(*model, SHAPE)
    with pytest.raises(DataError, match=r"prompt 1.*tokens"):
        scorer(["a", "b"], [[" c"], [" and" * 90]])
    with pytest.raises(DataError, match=r"prompt 0: field 'completion.*empty|prompt 0.*some text"):
        scorer(["a"], [[""]])
    dropping = CompletionScorer(
        *model, SHAPE, limits=TokenLimits(max_completion=8, long_completion="drop")
    )
    with pytest.raises(ValueError, match="leave prompts out"):
        dropping(["a", "b"], [[" c"], [" and" * 40]])


def test_an_output_that_the_policy_has_not_is_refused_when_it_is_built(model):
    policy, params, tokenizer = model
    with pytest.raises(ValueError, match="'values' is none of embeddings, logps, scores"):
        CompletionScorer(policy, params, tokenizer, SHAPE, "values")
    with pytest.raises(ValueError, match="rows_per_batch"):
        CompletionScorer(policy, params, tokenizer, SHAPE, rows_per_batch=0)


def test_embeddings_become_a_general_preference_judge(model):
    policy, params, tokenizer = model
    found = CompletionScorer(policy, params, tokenizer, SHAPE, "embeddings")(PROMPTS, TEXTS)
    assert found.shape == (3, 2, 4)
    expected = policy.heads["embeddings"](params, alone(model, PROMPTS[1], TEXTS[1][1])[2][-1])
    np.testing.assert_allclose(found[1, 1], expected, rtol=1e-5, atol=1e-5)
    scorer = CompletionScorer(policy, params, tokenizer, SHAPE, "embeddings")
    v, w = found[:, 0].astype(float), found[:, 1].astype(float)
    score = (v[:, 0::2] * w[:, 1::2] - v[:, 1::2] * w[:, 0::2]).sum(-1)
    p = EmbeddingJudge(scorer, temperature=1.0)(PROMPTS, TEXTS)[:, 0, 1]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-score)), rtol=1e-5)


@pytest.mark.parametrize("output", ["logps", "scores"])
def test_verdicts_about_two_texts_make_a_pairwise_judge(model, output):
    policy, params, tokenizer = model
    shape = RowShape(length=256, slots=64, groups=4, candidates=2, max_completion=8)
    scorer = CompletionScorer(policy, params, tokenizer, shape, output)
    verdicts = VerdictScorer(scorer, template="{prompt}|{a}|{b}|", verdicts=(" yes", " no"))
    found = verdicts(["p", "q"], ["a", "b"], ["c", "d"])
    np.testing.assert_array_equal(found, scorer(["p|a|c|", "q|b|d|"], [[" yes", " no"]] * 2))
    judge = PairModelJudge(verdicts)
    p = judge(PROMPTS, TEXTS)
    there, back = (bradley_terry(verdicts(PROMPTS, *pair))[:, 0, 1]
                   for pair in (zip(*TEXTS), zip(*[row[::-1] for row in TEXTS])))  # fmt: skip
    np.testing.assert_allclose(p[:, 0, 1], (there + 1 - back) / 2, rtol=1e-5)


@pytest.mark.parametrize("head", ["scores", "embeddings"])
def test_rewards_of_packed_rows_compare_the_candidates_that_are_there(model, head):
    policy, params, _ = model
    batch = made_batch(6, candidates=3, ragged=True)
    found = np.asarray(HeadScorer(policy, params, head)(batch))
    outputs = np.asarray(_outputs(policy, head, params, batch))
    expected = np.zeros(batch.where.shape)
    for place in np.argwhere(batch.where):
        r, g, k = place
        if head == "scores":
            expected[r, g, k] = outputs[r, g, k]
            continue
        for j in np.flatnonzero(batch.where[r, g]):
            v, w = outputs[r, g, k], outputs[r, g, j]
            expected[r, g, k] += (v[0::2] * w[1::2] - v[1::2] * w[0::2]).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    mesh = make_mesh(data=2, fsdp=4)
    np.testing.assert_allclose(
        HeadScorer(policy, params, head, mesh)(batch), found, rtol=1e-4, atol=1e-5
    )


def test_heads_are_written_and_read_back_bit_for_bit(model, tmp_path):
    _, params, _ = model
    save_heads(params, tmp_path / "heads.safetensors")
    zeros = {**params, "heads": jax.tree.map(jnp.zeros_like, params["heads"])}
    found = load_heads(zeros, tmp_path / "heads.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    other = {**params, "heads": {"scores": params["heads"]["scores"]}}
    with pytest.raises(ValueError, match=r"expected heads .*got .*embeddings"):
        load_heads(other, tmp_path / "heads.safetensors")
