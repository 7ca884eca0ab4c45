"""The layers of a Llama-family decoder in Flax NNX.

Shapes in names: B rows or prompts, T tokens, G key-value heads, Q query heads a key-value head,
H head width, D residual width, F width of the SwiGLU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paxo.models.config import ModelConfig, RopeScaling
from paxo.models.sharding import constrain

Array = jax.Array


class Weight(nnx.Module):
    """A kernel, its axis names, and perhaps a bias over its output axes."""

    def __init__(self, shape, axes, inputs, config: ModelConfig, *, bias=False, scale=1.0, rngs):
        dtype = jnp.dtype(config.param_dtype)
        draw = config.initializer_range * scale * jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(draw.astype(dtype), axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(shape[inputs:], dtype), axes=axes[inputs:]) if bias else None
        )
        self.inputs = inputs
        self.dtype = jnp.dtype(config.compute_dtype)
        self.adapter: Callable[[Array], Array] | None = None

    def __call__(self, x: Array) -> Array:
        """Contracts the last `inputs` axes of `x` with the first of the kernel."""
        y = self._product(x, self.kernel[...], self.inputs)
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return y if self.adapter is None else y + self.adapter(x)

    def adapt(self, lora_a: Array, lora_b: Array) -> None:
        """Adds `(x A) B` to the output: `A [*inputs, r]`, `B [r, *outputs]`."""
        self.adapter = lambda x: self._product(
            self._product(x, lora_a, self.inputs), lora_b, inputs=1
        )

    def _product(self, x: Array, kernel: Array, inputs: int) -> Array:
        return product(inputs, x, kernel.astype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(inputs: int, x: Array, kernel: Array) -> Array:
    """Contracts the last `inputs` axes of `x` with the first of `kernel`.

    The kernel's gradient sums over tokens, which XLA on CPU begins by transposing the first
    operand. Here that is the narrower one; JAX's own gradient always puts the output's there.

    >>> product(1, jnp.ones((4, 2)), jnp.ones((2, 3))).shape
    (4, 3)
    """
    return _contracted(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs))


def _contracted(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
    return jax.lax.dot_general(x, y, ((tuple(x_axes), tuple(y_axes)), ((), ())))


def _product_forward(inputs: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(inputs, x, kernel), (x, kernel)


def _product_backward(inputs: int, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    outputs = kernel.ndim - inputs
    tokens = range(x.ndim - inputs)
    dx = _contracted(dy, kernel, range(dy.ndim - outputs, dy.ndim), range(inputs, kernel.ndim))
    if x.size <= dy.size:
        return dx, _contracted(x, dy, tokens, tokens)
    transposed = _contracted(dy, x, tokens, tokens)
    return dx, jnp.moveaxis(transposed, range(outputs), range(inputs, kernel.ndim))


product.defvjp(_product_forward, _product_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype), axes=("norm",))
        self.eps = config.norm_eps

    def __call__(self, x: Array) -> Array:
        """`[..., D] -> [..., D]` in the dtype of `x`."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """The projections of grouped-query attention, query, key and value in one product."""

    def __init__(self, config: ModelConfig, *, rngs):
        d, g, q, h = config.hidden_size, config.num_kv_heads, config.queries_per_kv, config.head_dim
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        self.qkv = Weight(
            (d, g, q + 2, h), ("embed", "kv_heads", "head_group", "head_dim"), 1, config,
            bias=config.attention_bias, rngs=rngs,
        )  # fmt: skip
        self.out = Weight(
            (g, q, h, d), ("kv_heads", "head_group", "head_dim", "embed"), 3, config,
            bias=config.attention_out_bias, scale=out_scale, rngs=rngs,
        )  # fmt: skip

    def project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Queries `[B, T, G, Q, H]`, keys and values `[B, T, G, H]`."""
        qkv = constrain(self.qkv(x_BTD), "batch", "length", "activation_kv_heads", None, None)
        return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, config: ModelConfig, *, rngs):
        d, f = config.hidden_size, config.intermediate_size
        out_scale = 1 / math.sqrt(2 * config.num_layers)
        bias = config.mlp_bias
        self.gate_up = Weight(
            (d, 2, f), ("embed", "gate_up", "mlp"), 1, config, bias=bias, rngs=rngs
        )
        self.down = Weight(
            (f, d), ("mlp", "embed"), 1, config, bias=bias, scale=out_scale, rngs=rngs
        )

    def __call__(self, x_BTD: Array) -> Array:
        """`[B, T, D] -> [B, T, D]`."""
        both = constrain(self.gate_up(x_BTD), "batch", "length", None, "activation_mlp")
        return self.down(jax.nn.silu(both[..., 0, :]) * both[..., 1, :])


class Block(nnx.Module):
    """One layer. How it attends is an argument: packed rows and decoding share the weights."""

    def __init__(self, config: ModelConfig, *, rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs=rngs)

    def projection(self, name: str) -> Weight:
        """The weight of this name (`config.PROJECTIONS`)."""
        return getattr(self.attention if hasattr(self.attention, name) else self.mlp, name)

    def __call__(self, x: Array, attend: Callable[..., tuple[Array, Any]]) -> tuple[Array, Any]:
        """`attend(q, k, v) -> (attended [B, T, G, Q, H], kept)`; returns the new `x` and `kept`."""
        attended, kept = attend(*self.attention.project(self.attention_norm(x)))
        x = constrain(x + self.attention.out(attended), "batch", "length", "activation_embed")
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "length", "activation_embed"), kept


class Decoder(nnx.Module):
    """Embedding, one stack of layers and the final norm; an untied head is a kernel `[D, V]`."""

    def __init__(self, config: ModelConfig, *, rngs):
        d, v = config.hidden_size, config.vocab_size
        self.embed = Embedding(config, rngs=rngs)
        stacked = nnx.vmap(lambda keys: Block(config, rngs=keys), in_axes=0, out_axes=0)
        self.layers = stacked(rngs.split(config.num_layers))
        self.norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = Weight((d, v), ("embed", "vocab"), 1, config, rngs=rngs)


class Embedding(nnx.Module):
    """Token embeddings."""

    def __init__(self, config: ModelConfig, *, rngs):
        shape = (config.vocab_size, config.hidden_size)
        draw = config.initializer_range * jax.random.normal(rngs.params(), shape)
        self.embedding = nnx.Param(draw.astype(config.param_dtype), axes=("vocab", "embed"))


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """`[H/2]` radians per position, float32 (Su et al. 2021, arXiv:2104.09864; Llama 3 scaling)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    return frequencies


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones stay, those between are blended."""
    wavelengths = 2 * np.pi / frequencies
    original = scaling.original_max_positions
    blend = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Turns the halves of each head by its position: `x [B, T, ..., H]`, `positions [B, T]`."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), frequencies.size)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
