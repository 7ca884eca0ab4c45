"""Tokens against transformers' `generate`, which is torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.data.tokenise import load_tokenizer
from paxo.models.policy import make_policy
from paxo.models.pretrained import load_params, read_config
from paxo.sampling import BeamConfig, SamplingConfig, make_beam_search, make_sampler
from paxo.types import Finish, PromptBatch

pytestmark = pytest.mark.parity

# Two tokens whose logits are as near as this may change places between programs.
TIE = 1e-5
NEW = 48
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "grouped": {},
    "multi_query": {"num_key_value_heads": 1, "attention_bias": True},
    "deep": {"num_hidden_layers": 10, "hidden_size": 32},  # scanned layers
}


@pytest.fixture(scope="module", params=["stories260k", *VARIANTS])
def folder(request, tmp_path_factory):
    """A model folder, and the longest prompt to be made for it."""
    if request.param == "stories260k":
        return request.getfixturevalue("shared_data") / "model_stories260k"
    import torch
    import transformers

    torch.manual_seed(3)
    shape = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(shape | VARIANTS[request.param]))
    )
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def models(folder):
    import torch
    import transformers

    config = read_config(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return make_policy(config), load_params(folder, config), theirs


def stop_ids(folder):
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return (found,) if isinstance(found, int) else tuple(found)


def made_prompts(folder, policy_vocabulary):
    """Ragged prompts: texts where there is a tokenizer, else random ids."""
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        assert set(tokenizer.stop_ids) == set(stop_ids(folder))
        texts = (
            "Once upon a time",
            "Lily and Tom went to the park. They saw",
            "The",
            "One day, a dog",
        )
        prompts = [tokenizer.encode_prompt(text).tolist() for text in texts]
    else:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, policy_vocabulary, n).tolist() for n in (5, 17, 1, 9, 12, 3)]
    width = max(map(len, prompts))
    tokens = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return prompts, PromptBatch(tokens, lengths, np.arange(len(prompts)))


def generated(model, prompts, stops, new=NEW, **settings):
    """`generate` with the padding on the left, as it wants it: `[B * n, NEW]`."""
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=new, do_sample=False,
            eos_token_id=list(stops), pad_token_id=0, return_dict_in_generate=True,
            output_scores=True, **settings,
        )  # fmt: skip
    return out, out.sequences[:, width:].numpy()


def margin(model, prefix, one, other):
    """By how much transformers itself prefers a token to another after these."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prefix])).logits[0, -1]
    return abs(float(logits[one] - logits[other]))


def test_greedy_tokens_are_those_of_generate(folder, models):
    policy, params, theirs = models
    stops = stop_ids(folder)
    prompts, batch = made_prompts(folder, theirs.config.vocab_size)
    settings = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    out = make_sampler(policy, settings, stops)(params, batch, jax.random.key(0))
    _, wanted = generated(theirs, prompts, stops)
    ties = 0
    for b, prompt in enumerate(prompts):
        found = np.asarray(out.tokens[b, 0])[np.asarray(out.mask[b, 0])].tolist()
        row = wanted[b].tolist()
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        row = row[: min(ends, default=len(row))]
        same = sum(1 for _ in _common(found, row))
        if same < max(len(found), len(row)):
            gap = margin(theirs, prompt + row[:same], found[same], row[same])
            assert gap < TIE, f"prompt {b}, token {same}: {found[same]} for {row[same]}, {gap}"
            ties += 1
        assert (int(out.finish[b, 0]) == Finish.STOP_TOKEN) == (found[-1] in stops)
    assert ties <= 1


def _common(ours, theirs):
    for a, b in zip(ours, theirs):
        if a != b:
            return
        yield a


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_are_those_of_generate(folder, models, length_penalty):
    policy, params, theirs = models
    stops = stop_ids(folder)
    prompts, batch = made_prompts(folder, theirs.config.vocab_size)
    settings = BeamConfig(
        max_new_tokens=20, num_beams=4, num_returned=4, length_penalty=length_penalty
    )
    found = make_beam_search(policy, settings, stops)(params, batch)
    for b, prompt in enumerate(prompts):  # alone: it stops a batch when its first row stops
        out, wanted = generated(
            theirs, [prompt], stops, new=20, num_beams=4, num_return_sequences=4,
            length_penalty=length_penalty, early_stopping="never",
        )  # fmt: skip
        np.testing.assert_allclose(found.scores[b], out.sequences_scores.numpy(), atol=1e-4)
        tokens, mask = (
            np.asarray(x[b])[:, : wanted.shape[1]]
            for x in (found.completions.tokens, found.completions.mask)
        )
        np.testing.assert_array_equal(tokens, np.where(mask, wanted, 0))
        assert np.isin(wanted[~mask], [0, *stops]).all()  # its padding


def test_log_probs_are_those_of_transformers(folder, models):
    import torch

    policy, params, theirs = models
    prompts, batch = made_prompts(folder, theirs.config.vocab_size)
    settings = SamplingConfig(max_new_tokens=16, num_candidates=2, temperature=0.7, top_k=9)
    out = make_sampler(policy, settings, stop_ids(folder))(params, batch, jax.random.key(0))
    for b, prompt in enumerate(prompts):
        for k in range(2):
            drawn = np.asarray(out.tokens[b, k])[np.asarray(out.mask[b, k])]
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + drawn.tolist()])).logits[0]
            logps = jax.nn.log_softmax(jnp.array(logits.numpy()))[len(prompt) - 1 : -1]
            own = out.token_logps["policy"][b, k][out.mask[b, k]]
            np.testing.assert_allclose(own, logps[np.arange(len(drawn)), drawn], atol=2e-5)
