"""Logits against transformers' own torch models: imports of their folders, and they of ours."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.models import lora, policy, pretrained
from paxo.models.config import LoraSettings, ModelConfig, RopeScaling

pytestmark = pytest.mark.parity

BASE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    # Larger than usual, so that attention is far from uniform and an error in it shows.
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "multi_head": ("Llama", {"num_key_value_heads": 6}),
    "multi_query": ("Llama", {"num_key_value_heads": 1}),
    "grouped_query": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "wide_heads": ("Llama", {"head_dim": 12}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "rope_theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "norm_eps": ("Llama", {"rms_norm_eps": 0.1}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
}
OURS = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    max_positions=128,
    initializer_range=0.3,
    tie_embeddings=False,
)
OUR_VARIANTS = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qwen2": {"attention_bias": True},
    "llama3_rope": {"rope_theta": 1000.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)},
    "mistral": {"num_heads": 10},
}
TOKENS = np.random.default_rng(0).integers(0, 61, size=(2, 96))


def paxo_logits(folder, tokens):
    """`[B, L, V]` logits from a folder; each row is one group without candidates."""
    model = policy.make_policy(pretrained.read_config(folder))
    params = pretrained.load_params(folder)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ones = jnp.ones_like(tokens)
    with jax.default_matmul_precision("highest"):
        return model.head(params, model.trunk(params, tokens, positions, ones, ones - 1))


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.asarray(tokens))).logits.numpy()


def reload(folder):
    """A folder as transformers loads it, which must have found every tensor."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_transformers_model_are_the_same_in_paxo(variant, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at 1 and biases at 0, which would hide a swap
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    expected = torch_logits(model, TOKENS)
    assert expected.std() > 0.5  # far from uniform
    np.testing.assert_allclose(paxo_logits(tmp_path / "hf", TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("variant", OUR_VARIANTS)
def test_transformers_computes_the_same_from_an_export(variant, tmp_path):
    pytest.importorskip("torch")
    config = dataclasses.replace(OURS, **OUR_VARIANTS[variant])
    shapes = policy.param_shapes(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape) + (len(s.shape) < 3), s.dtype), shapes
    )
    folder = pretrained.export(params, config, tmp_path / "export", max_shard_bytes=40_000)
    ours = paxo_logits(folder, TOKENS)
    np.testing.assert_allclose(ours, torch_logits(reload(folder), TOKENS), atol=1e-4)


def test_transformers_computes_the_logits_of_adapters_from_their_merged_export(tmp_path):
    pytest.importorskip("torch")
    settings = LoraSettings(rank=4, alpha=2.0)
    model = lora.with_lora(policy.make_policy(OURS), OURS, settings)
    params = model.init(jax.random.key(0))
    for pair, key in zip(params["lora"].values(), jax.random.split(jax.random.key(1), 4)):
        pair["lora_b"] = 0.3 * jax.random.normal(key, pair["lora_b"].shape)
    merged = lora.merge_lora(params, OURS, settings)
    folder = pretrained.export(merged, OURS, tmp_path / "export")
    tokens = jnp.asarray(TOKENS)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        ours = model.head(params, model.trunk(params, tokens, positions, ones, ones - 1))
    theirs = torch_logits(reload(folder), TOKENS)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())


def test_a_bfloat16_export_is_loaded_in_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(OURS, param_dtype="bfloat16")
    params = policy.make_policy(config).init(jax.random.key(0))
    folder = pretrained.export(params, config, tmp_path / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    ours = np.asarray(params["embed"]["embedding"].astype(jnp.float32))
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().float().numpy(), ours)


def test_stories260k_agrees_before_and_after_export(shared_data, tmp_path):
    pytest.importorskip("torch")
    import transformers

    source = shared_data / "model_stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with gzip.open(shared_data / "text_tinystories" / "train.jsonl.gz", "rt") as lines:
        ids = tokenizer(json.loads(next(lines))["text"])["input_ids"][:256]
    expected = torch_logits(reload(source), [ids])
    np.testing.assert_allclose(paxo_logits(source, [ids]), expected, atol=1e-4)
    params, config = pretrained.load_params(source), pretrained.read_config(source)
    folder = pretrained.export(params, config, tmp_path / "export", tokenizer_from=source)
    np.testing.assert_array_equal(torch_logits(reload(folder), [ids]), expected)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [1, 2]
