"""Hugging Face's `config.json` of Llama-family decoders, read into a `ModelConfig` and written."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paxo.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# float16 becomes float32, which holds every value of it; bfloat16 would round.
DTYPES = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
# What transformers takes where a Mistral file does not name a window; null means none.
DEFAULT_WINDOW = 4096


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from its `config.json`.

    Llama, Mistral and Qwen2 are read, with the fields of transformers 4 (`rope_theta`,
    `rope_scaling`, `torch_dtype`) or 5 (`rope_parameters`, `dtype`). `param_dtype` is the dtype of
    the files (float32 where they hold float16); change it with `dataclasses.replace` to train in
    another.

    Raises:
        FileNotFoundError: if there is no `config.json`.
        ValueError: if a field is missing, malformed or asks for what paxo does not compute.
    """
    file = Path(folder) / "config.json"
    fields = _Fields(file, read_json(file))
    kind = _kind(fields)
    _refuse_what_is_not_computed(fields, kind)
    heads = fields.get("num_attention_heads", int)
    theta, scaling = _rope(fields)
    attention_bias = kind == "qwen2" or (
        kind == "llama" and fields.get("attention_bias", bool, False)
    )
    try:
        return ModelConfig(
            vocab_size=fields.get("vocab_size", int),
            hidden_size=fields.get("hidden_size", int),
            num_layers=fields.get("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", int, heads),
            head_dim=_head_dim(fields, heads),
            intermediate_size=fields.get("intermediate_size", int),
            max_positions=fields.get("max_position_embeddings", int),
            norm_eps=fields.get("rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.get("tie_word_embeddings", bool, False),
            attention_bias=attention_bias,
            attention_out_bias=attention_bias and kind == "llama",
            mlp_bias=kind == "llama" and fields.get("mlp_bias", bool, False),
            initializer_range=fields.get("initializer_range", float, 0.02),
            param_dtype=_dtype(fields),
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(file) in message else f"{file}: {message}") from None


def config_json(config: ModelConfig, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of `config.json` for a model, for transformers 4 and 5.

    Args:
        config: shape of the model; `param_dtype` is written as the dtype of the files.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, null where not given.

    Raises:
        ValueError: if no architecture of Hugging Face has this combination of biases.

    >>> tiny = ModelConfig(64, 8, 2, 2, 1, 4, 16, 32)
    >>> config_json(tiny, {"eos_token_id": 1})["architectures"]
    ['LlamaForCausalLM']
    """
    kind = _kind_for(config)
    # null, not left out: transformers would otherwise take the ids of the first Llama.
    ids = {name: (token_ids or {}).get(name) for name in TOKEN_IDS}
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    window = {"sliding_window": None}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_json(config.rope_scaling),
        "hidden_act": "silu",
        **{"llama": biases, "mistral": window, "qwen2": {"use_sliding_window": False} | window}[
            kind
        ],
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
        **ids,
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is not JSON or not an object; names the line.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: no such file; a Hugging Face model folder holds config.json and *.safetensors"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: malformed JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected UTF-8 JSON; got other bytes") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object; got {type(value).__name__}")
    return value


_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Fields of a file; a name "a.b" looks into the object "a". Null counts as absent."""

    file: Path
    raw: dict[str, Any]

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value: Any = self.raw
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.file}: field {name!r} is missing")
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.file}: field {name!r} must be {kind.__name__}; got {value!r}")
        return kind(value)

    def refuse(self, name: str, got: Any, supported: str) -> None:
        raise ValueError(f"{self.file}: field {name!r} is {got!r}; supported: {supported}")


def _kind(fields: _Fields) -> str:
    names = fields.get("architectures", list, [])
    by_name = {name: kind for kind, name in ARCHITECTURES.items()}
    if names:
        if names[0] not in by_name:
            fields.refuse("architectures", names[0], ", ".join(by_name))
        return by_name[names[0]]
    kind = fields.get("model_type", str)
    if kind not in ARCHITECTURES:
        fields.refuse("model_type", kind, ", ".join(ARCHITECTURES))
    return kind


def _refuse_what_is_not_computed(fields: _Fields, kind: str) -> None:
    activation = fields.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        fields.refuse("hidden_act", activation, "silu")
    if fields.get("quantization_config", dict, {}):
        fields.refuse("quantization_config", "quantized weights", "float32, float16, bfloat16")
    window = _window(fields, kind)
    # A window that spans every position changes nothing.
    if window is not None and window < fields.get("max_position_embeddings", int):
        fields.refuse(
            "sliding_window",
            window,
            "null, or at least max_position_embeddings (lower that to train on shorter texts)",
        )


def _window(fields: _Fields, kind: str) -> int | None:
    """Positions that a token sees; None for all of them."""
    if kind == "llama" or (kind == "qwen2" and not fields.get("use_sliding_window", bool, False)):
        return None
    if fields.raw.get("sliding_window", DEFAULT_WINDOW) is None:
        return None
    return fields.get("sliding_window", int, DEFAULT_WINDOW)


def _head_dim(fields: _Fields, heads: int) -> int:
    given = fields.get("head_dim", int, 0)
    hidden = fields.get("hidden_size", int)
    if not given and hidden % heads:
        raise ValueError(
            f"{fields.file}: field 'head_dim' is missing and hidden_size {hidden} is not a "
            f"multiple of num_attention_heads {heads}"
        )
    return given or hidden // heads


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, as transformers looks for them: `rope_scaling`, then `rope_parameters`."""
    name = "rope_scaling" if fields.get("rope_scaling", dict, {}) else "rope_parameters"
    theta = fields.get("rope_theta", float, 10000.0)
    theta = fields.get(f"{name}.rope_theta", float, theta)
    rope_type = fields.get(f"{name}.type", str, "default")
    rope_type = fields.get(f"{name}.rope_type", str, rope_type)
    for field in ("partial_rotary_factor", f"{name}.partial_rotary_factor"):
        if fields.get(field, float, 1.0) != 1.0:
            fields.refuse(field, fields.get(field, float), "1.0")
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        fields.refuse(f"{name}.rope_type", rope_type, "default, llama3")
    return theta, RopeScaling(
        factor=fields.get(f"{name}.factor", float),
        low_freq_factor=fields.get(f"{name}.low_freq_factor", float),
        high_freq_factor=fields.get(f"{name}.high_freq_factor", float),
        original_max_positions=fields.get(f"{name}.original_max_position_embeddings", int),
    )


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(scaling.factor),
        "low_freq_factor": float(scaling.low_freq_factor),
        "high_freq_factor": float(scaling.high_freq_factor),
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _dtype(fields: _Fields) -> str:
    name = "dtype" if "dtype" in fields.raw else "torch_dtype"
    given = fields.get(name, str, "float32").removeprefix("torch.")
    if given not in DTYPES:
        fields.refuse(name, given, ", ".join(DTYPES))
    return DTYPES[given]


def _kind_for(config: ModelConfig) -> str:
    """The architecture that computes this config: Llama where it can, else Qwen2 or Mistral."""
    if config.attention_bias and not config.attention_out_bias and not config.mlp_bias:
        return "qwen2"
    # transformers' Llama refuses such a head_dim; Mistral computes the same without the check.
    uneven = config.hidden_size % config.num_heads != 0
    if config.attention_bias == config.attention_out_bias and not uneven:
        return "llama"
    if uneven and not (config.attention_bias or config.attention_out_bias or config.mlp_bias):
        return "mistral"
    raise ValueError(
        "no Hugging Face architecture has model.attention_bias="
        f"{config.attention_bias}, attention_out_bias={config.attention_out_bias}, "
        f"mlp_bias={config.mlp_bias}, hidden_size={config.hidden_size}, "
        f"num_heads={config.num_heads}; Llama has both attention biases or none, Qwen2 the first "
        "alone without mlp_bias"
    )
