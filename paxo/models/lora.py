"""LoRA: a decoder whose weights stay frozen while low-rank adapters beside them are trained.

The adapters lie under `params["lora"][projection]`, `lora_a [N, *inputs, r]` and `lora_b [N, r,
*outputs]` of all N layers stacked; all entries of the decoder are frozen (`Policy.frozen`), so a
training state keeps them apart, without gradient or moments. Its reference is the same decoder
called without the adapters.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from paxo.models import transformer
from paxo.models.config import LoraSettings, ModelConfig
from paxo.models.policy import param_shapes
from paxo.types import Array, Params, Policy


def with_lora(policy: Policy, config: ModelConfig, lora: LoraSettings) -> Policy:
    """The same policy with adapters; the decoder's own weights are frozen.

    With B at 0, as `init` and `init_lora` give it, all outputs are those of the decoder to the bit.

    Args:
        policy: from `make_policy(config)`, perhaps with heads, which are trained in full.
        config: shape of the decoder.
        lora: rank, scale and projections.

    >>> from paxo.models.policy import make_policy
    >>> config = ModelConfig(vocab_size=16, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, intermediate_size=16, max_positions=32)
    >>> policy = with_lora(make_policy(config), config, LoraSettings(rank=4, targets=("qkv",)))
    >>> trained, frozen = policy.split(jax.eval_shape(policy.init, jax.random.key(0)))
    >>> jax.tree.map(lambda x: x.shape, trained)
    {'lora': {'qkv': {'lora_a': (2, 8, 4), 'lora_b': (2, 4, 1, 4, 4)}}}
    >>> sorted(frozen)
    ['embed', 'layers', 'norm']
    """
    decode = policy.decode

    def applied(params: Params) -> Params:
        """With the adapters as the layers take them: the scale is part of B."""

        def scaled(pair: dict[str, Array]) -> dict[str, Array]:
            return pair | {"lora_b": lora.scale * pair["lora_b"]}

        return params | {"adapters": {name: scaled(x) for name, x in params["lora"].items()}}

    return dataclasses.replace(
        policy,
        init=lambda key: policy.init(key) | {"lora": init_lora(key, config, lora)},
        trunk=lambda params, *rows: policy.trunk(applied(params), *rows),
        logical_axes=policy.logical_axes | {"lora": _logical_axes(config, lora)},
        decode=decode._replace(prepare=lambda params: decode.prepare(applied(params))),
        frozen=tuple(param_shapes(config)),
    )


def init_lora(key: Array, config: ModelConfig, lora: LoraSettings) -> Params:
    """First adapters, `params["lora"]`: B is 0, A makes outputs of about unit variance."""
    weights = _weights(config, lora)
    keys = jax.random.split(jax.random.fold_in(key, 2), len(weights))

    def pair(key: Array, weight: transformer.Weight) -> dict[str, Array]:
        inputs, outputs = _cut(weight, weight.kernel.shape)
        draw = jax.random.normal(key, (config.num_layers, *inputs, lora.rank))
        zeros = jnp.zeros((config.num_layers, lora.rank, *outputs), config.param_dtype)
        a = (draw / math.sqrt(math.prod(inputs))).astype(config.param_dtype)
        return {"lora_a": a, "lora_b": zeros}

    return {name: pair(k, weight) for k, (name, weight) in zip(keys, weights.items())}


@functools.partial(jax.jit, static_argnums=(1, 2))
def merge_lora(params: Params, config: ModelConfig, lora: LoraSettings) -> Params:
    """The decoder's parameters with the adapters added in, as they are exported.

    W + scale * A B is computed in float32; all is returned in `config.param_dtype`.

    Args:
        params: of `with_lora`'s policy.
        config: shape of the decoder.
        lora: as given to `with_lora`.
    """
    merged = {name: params[name] for name in param_shapes(config)}
    layers = merged["layers"]
    layers = merged["layers"] = {name: dict(part) for name, part in layers.items()}
    for name, pair in params["lora"].items():
        part = layers["attention" if name in layers["attention"] else "mlp"]
        kernel = part[name]["kernel"]
        a, b = (x.astype(jnp.float32) for x in (pair["lora_a"], pair["lora_b"]))
        flat_a, flat_b = a.reshape(len(a), -1, lora.rank), b.reshape(len(b), lora.rank, -1)
        product = jnp.matmul(flat_a, flat_b, precision=jax.lax.Precision.HIGHEST)
        whole = kernel.astype(jnp.float32) + lora.scale * product.reshape(kernel.shape)
        part[name] = part[name] | {"kernel": whole}
    return jax.tree.map(lambda x: x.astype(config.param_dtype), merged)


def _weights(config: ModelConfig, lora: LoraSettings) -> dict[str, transformer.Weight]:
    """The projections of one layer that have adapters; their arrays are shapes only."""
    block = nnx.eval_shape(lambda: transformer.Block(config, rngs=nnx.Rngs(0)))
    return {name: block.projection(name) for name in lora.targets}


def _cut(weight: transformer.Weight, axes: tuple) -> tuple[tuple, tuple]:
    """What is told of each axis of a kernel, for its inputs and for its outputs."""
    return axes[: weight.inputs], axes[weight.inputs :]


def _logical_axes(config: ModelConfig, lora: LoraSettings) -> Params:
    axes = {}
    for name, weight in _weights(config, lora).items():
        inputs, outputs = _cut(weight, weight.kernel.get_metadata("axes"))
        axes[name] = {
            "lora_a": ("layer", *inputs, "lora_rank"),
            "lora_b": ("layer", "lora_rank", *outputs),
        }
    return axes
