"""Where each tensor of a Hugging Face Llama lies in paxo's parameters: one table for both ways.

paxo stacks the layers and fuses projections that read the same input, with the input first
(`[in, ...]`); Hugging Face keeps a matrix `[out, in]` per projection and layer. Query heads are
ordered by key-value head: row `(kv * Q + q) * H + h` of `q_proj` is head q of kv head kv.

N layers, D width, V vocabulary, KV key-value heads, Q query heads per kv head, H head width,
F intermediate width.
"""

from typing import NamedTuple

import numpy as np

from paxo.models.config import ModelConfig

LM_HEAD = "lm_head.weight"


class Source(NamedTuple):
    """A Hugging Face tensor and its place in a parameter (of one layer, if stacked).

    Attributes:
        name: with `{layer}` for the number of the layer.
        shape: of the tensor in the file.
        split: the same with `out` taken apart into heads.
        axes: order of the axes of `split` in the parameter.
        index: the part of the parameter that it fills.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    index: tuple[slice, ...]

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the part `index` of the parameter."""
        return tensor.reshape(self.split).transpose(self.axes)

    def from_parameter(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor, cut out of the parameter."""
        part = parameter[self.index]
        return np.ascontiguousarray(part.transpose(np.argsort(self.axes)).reshape(self.shape))


class Parameter(NamedTuple):
    """A leaf of the params pytree and the tensors it is made of.

    Attributes:
        path: keys from the root of params.
        shape: of one layer, if `stacked`, else of the whole.
        stacked: whether the leaf has a leading axis of layers.
        sources: tensors that fill it together.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    sources: tuple[Source, ...]


def layout(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of a model, with the tensors of Hugging Face that it is made of.

    >>> config = ModelConfig(64, 8, 2, 2, 1, 4, 16, 32, tie_embeddings=False)
    >>> [source.name for source in layout(config)[-1].sources]
    ['lm_head.weight']
    """
    embedding = (config.vocab_size, config.hidden_size)
    parameters = [
        _plain(("embed", "embedding"), "model.embed_tokens.weight", embedding, stacked=False),
        *_attention(config),
        *_mlp(config),
        _plain(("norm", "scale"), "model.norm.weight", embedding[1:], stacked=False),
    ]
    if not config.tie_embeddings:
        parameters.append(_plain(("head", "kernel"), LM_HEAD, embedding, (1, 0), stacked=False))
    return tuple(parameters)


def _attention(config: ModelConfig) -> list[Parameter]:
    d, kv, q, h = config.hidden_size, config.num_kv_heads, config.queries_per_kv, config.head_dim
    layer, path = "model.layers.{layer}.", ("layers", "attention")
    attention = layer + "self_attn."
    # The part of the axis Q + 2 that each projection fills.
    parts = {"q": slice(0, q), "k": slice(q, q + 1), "v": slice(q + 1, q + 2)}
    heads = {name: part.stop - part.start for name, part in parts.items()}
    kernels, biases = [], []
    for name, part in parts.items():
        out, everything = kv * heads[name] * h, slice(None)
        kernels.append(
            Source(
                f"{attention}{name}_proj.weight",
                shape=(out, d),
                split=(kv, heads[name], h, d),
                axes=(3, 0, 1, 2),
                index=(everything, everything, part, everything),
            )
        )
        biases.append(
            Source(
                f"{attention}{name}_proj.bias",
                shape=(out,),
                split=(kv, heads[name], h),
                axes=(0, 1, 2),
                index=(everything, part, everything),
            )
        )
    out_kernel = Source(
        f"{attention}o_proj.weight",
        shape=(d, kv * q * h),
        split=(d, kv, q, h),
        axes=(1, 2, 3, 0),
        index=(slice(None),) * 4,
    )
    norm = _plain(("layers", "attention_norm", "scale"), f"{layer}input_layernorm.weight", (d,))
    parameters = [
        norm,
        Parameter((*path, "qkv", "kernel"), (d, kv, q + 2, h), True, tuple(kernels)),
        Parameter((*path, "out", "kernel"), (kv, q, h, d), True, (out_kernel,)),
    ]
    if config.attention_bias:
        parameters.append(Parameter((*path, "qkv", "bias"), (kv, q + 2, h), True, tuple(biases)))
    if config.attention_out_bias:
        parameters.append(_plain((*path, "out", "bias"), f"{attention}o_proj.bias", (d,)))
    return parameters


def _mlp(config: ModelConfig) -> list[Parameter]:
    d, f = config.hidden_size, config.intermediate_size
    layer, path = "model.layers.{layer}.", ("layers", "mlp")
    everything = slice(None)
    kernels, biases = [], []
    for place, name in enumerate(("gate", "up")):
        part = slice(place, place + 1)
        weight, bias = f"{layer}mlp.{name}_proj.weight", f"{layer}mlp.{name}_proj.bias"
        kernels.append(
            Source(weight, (f, d), (f, 1, d), axes=(2, 1, 0), index=(everything, part, everything))
        )
        biases.append(Source(bias, (f,), (1, f), axes=(0, 1), index=(part, everything)))
    norm_name = f"{layer}post_attention_layernorm.weight"
    parameters = [
        _plain(("layers", "mlp_norm", "scale"), norm_name, (d,)),
        Parameter((*path, "gate_up", "kernel"), (d, 2, f), True, tuple(kernels)),
        _plain((*path, "down", "kernel"), f"{layer}mlp.down_proj.weight", (d, f), (1, 0)),
    ]
    if config.mlp_bias:
        parameters.append(Parameter((*path, "gate_up", "bias"), (2, f), True, tuple(biases)))
        parameters.append(_plain((*path, "down", "bias"), f"{layer}mlp.down_proj.bias", (d,)))
    return parameters


def _plain(
    path: tuple[str, ...],
    name: str,
    shape: tuple[int, ...],
    axes: tuple[int, ...] | None = None,
    stacked: bool = True,
) -> Parameter:
    """A parameter that is one tensor, with its axes in another order if `axes` is given."""
    axes = axes or tuple(range(len(shape)))
    source = Source(name, shape, split=shape, axes=axes, index=(slice(None),) * len(shape))
    return Parameter(path, tuple(shape[axis] for axis in axes), stacked, (source,))
