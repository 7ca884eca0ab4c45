"""Shapes of published models by name, for plans and for models from scratch: no weights.

>>> known_config("llama3-8b").num_layers
32
"""

import difflib

from paxo.models.config import ModelConfig, RopeScaling

_LLAMA_31 = RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA_32 = RopeScaling(32.0, 1.0, 4.0, 8192)


def _llama3(width, layers, heads, mlp, **changes) -> ModelConfig:
    shape = {"num_kv_heads": 8, "head_dim": 128, "max_positions": 8192, "tie_embeddings": False}
    return ModelConfig(
        vocab_size=128256,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=mlp,
        rope_theta=5e5,
        **(shape | changes),
    )


def _qwen25(width, layers, heads, kv_heads, mlp, **changes) -> ModelConfig:
    shape = {"vocab_size": 152064, "head_dim": 128, "tie_embeddings": False}
    return ModelConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=mlp,
        max_positions=32768,
        norm_eps=1e-6,
        rope_theta=1e6,
        attention_bias=True,
        **(shape | changes),
    )


def _llama2(width, layers, heads, kv_heads, head_dim, mlp, positions, **changes) -> ModelConfig:
    shape = {"vocab_size": 32000, "tie_embeddings": False}
    return ModelConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        max_positions=positions,
        **(shape | changes),
    )


_LONG = {"max_positions": 131072}
_SMALL = _LONG | {"tie_embeddings": True, "rope_scaling": _LLAMA_32}
_TIED = {"vocab_size": 151936, "tie_embeddings": True}

KNOWN: dict[str, ModelConfig] = {
    "llama2-7b": _llama2(4096, 32, 32, 32, 128, 11008, 4096),
    "llama3-1b": _llama3(2048, 16, 32, 8192, head_dim=64, **_SMALL),
    "llama3-3b": _llama3(3072, 28, 24, 8192, **_SMALL),
    "llama3-8b": _llama3(4096, 32, 32, 14336),
    "llama3-70b": _llama3(8192, 80, 64, 28672),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, rope_scaling=_LLAMA_31, **_LONG),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, rope_scaling=_LLAMA_31, **_LONG),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, rope_scaling=_LLAMA_31, **_LONG),
    "mistral-7b": _llama2(
        4096, 32, 32, 8, 128, 14336, 32768, vocab_size=32768, rope_theta=1e6
    ),  # v0.3, which has no sliding window
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, head_dim=64, **_TIED),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, **_TIED),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 27648),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 29568),
    "tinyllama-1.1b": _llama2(2048, 22, 32, 4, 64, 5632, 2048),
}


def known_config(name: str) -> ModelConfig:
    """The shape of the model that goes by this name; its numbers are those of its `config.json`.

    Raises:
        ValueError: for a name that is not in `KNOWN`; the nearest is named.

    >>> known_config("llama3-8")
    Traceback (most recent call last):
    ValueError: unknown model 'llama3-8'; did you mean 'llama3-8b'? Known are llama2-7b, ...
    """
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown model {name!r}{meant} Known are {', '.join(KNOWN)}")
    return KNOWN[name]
