"""A Llama-family decoder layer in Flax NNX, and the attention of packed rows.

Shapes in names: B rows or prompts, T query tokens, S key tokens, G key-value heads, Q query heads a
key-value head, H head width, D residual width, F width of the SwiGLU.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paxo.models.config import ModelConfig, RopeScaling
from paxo.models.sharding import constrain

Array = jax.Array
# Large enough to vanish after the softmax, small enough to stay finite in bfloat16.
MASKED = -1e30
# Attention scores that exist at a time on a device: 16 MB in float32, which caches still help.
SCORES_AT_A_TIME = 2**22


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

    def __call__(self, x: Array) -> Array:
        """Contracts the last `inputs` axes of `x` with the first of the kernel."""
        kernel = self.kernel[...].astype(self.dtype)
        over = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
        y = jax.lax.dot_general(x, kernel, (over, ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


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
    """One layer. How it attends is an argument: packed rows and cached decoding share the weights."""

    def __init__(self, config: ModelConfig, *, rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs=rngs)

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


def packed_mask(group_BT: Array, branch_BT: Array) -> Array:
    """`[B, T, S]` True where a token may attend: earlier, of its group, of the prompt or its branch."""
    index = jnp.arange(group_BT.shape[-1])
    earlier = index[None, :] <= index[:, None]
    same_group = (group_BT[:, :, None] == group_BT[:, None, :]) & (group_BT[:, :, None] != 0)
    own = (branch_BT[:, None, :] == 0) | (branch_BT[:, None, :] == branch_BT[:, :, None])
    return earlier & same_group & own


def attention(q_BTGQH: Array, k_BSGH: Array, v_BSGH: Array, mask_BTS: Array) -> Array:
    """Softmax attention in which Q query heads share a key head; scores and softmax in float32.

    Where the scores of all queries would be large, queries are taken in blocks whose scores are
    dropped and computed again in the backward pass.
    """
    batch, t, g, q, h = q_BTGQH.shape
    # Heads before tokens: batched products over contiguous matrices are much faster on CPU.
    query = (q_BTGQH * h**-0.5).transpose(0, 2, 3, 1, 4)
    key, value = k_BSGH.transpose(0, 2, 1, 3), v_BSGH.transpose(0, 2, 1, 3)
    block = _query_block(batch * g * q * mask_BTS.shape[-1], t)
    if block == t:
        mixed = _attend(query, mask_BTS, key, value)
    else:
        count = -(-t // block)
        extra = ((0, 0), (0, count * block - t), (0, 0))
        mask = jnp.pad(mask_BTS, extra).reshape(batch, count, block, -1)
        query = jnp.pad(query, (*extra[:1] * 3, extra[1], (0, 0)))
        query = jnp.moveaxis(query.reshape(batch, g, q, count, block, h), 3, 0)
        one = jax.checkpoint(lambda part: _attend(*part, key, value))
        mixed = jax.lax.map(one, (query, jnp.moveaxis(mask, 1, 0)))
        mixed = jnp.moveaxis(mixed, 0, 3).reshape(batch, g, q, count * block, h)[:, :, :, :t]
    return mixed.transpose(0, 3, 1, 2, 4)


def _attend(query: Array, mask_BTS: Array, key: Array, value: Array) -> Array:
    """`query [B, G, Q, T, H]` over `key, value [B, G, S, H]`."""
    batch, g, q, t, h = query.shape
    query = query.reshape(batch, g, q * t, h)
    scores = jnp.einsum("bgth,bgsh->bgts", query, key, preferred_element_type=jnp.float32)
    bias = jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    weights = jax.nn.softmax(scores.reshape(batch, g, q, t, -1) + bias, -1)
    weights = weights.astype(value.dtype).reshape(batch, g, q * t, -1)
    return jnp.einsum("bgts,bgsh->bgth", weights, value).reshape(batch, g, q, t, h)


def _query_block(scores_per_query: int, length: int) -> int:
    """Queries whose scores exist at a time: all of them if those of a device are few."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    most = SCORES_AT_A_TIME * devices // scores_per_query
    return length if most >= length else max(16, most // 16 * 16)
