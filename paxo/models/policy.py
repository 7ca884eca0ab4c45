"""A decoder as pure functions: the only file that splits and merges NNX modules.

Outside, parameters are nested dicts of arrays; the arrays of all layers are stacked on a leading
axis and the layers run in one `lax.scan`, unrolled for small models (`ModelConfig.unroll`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from paxo.models import transformer
from paxo.models.attention import MASKED, packed_attention
from paxo.models.config import ModelConfig
from paxo.models.sharding import constrain
from paxo.types import Array, Decode, Params, Policy

CHECKPOINT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Cache(NamedTuple):
    """Keys and values of N layers; the prompt's are stored once for its K candidates.

    Attributes:
        prompt_keys: `[N, B, P, G, H]`, and `prompt_values` alike.
        prompt_values: see `prompt_keys`.
        lengths: `[B]` tokens of each prompt.
        keys: `[N, B, K, T, G, H]` of the new tokens, and `values` alike.
        values: see `keys`.
    """

    prompt_keys: Array
    prompt_values: Array
    lengths: Array
    keys: Array
    values: Array


@functools.lru_cache(maxsize=64)
def make_policy(config: ModelConfig) -> Policy:
    """The Llama-family decoder of `config` as a `Policy`.

    >>> config = ModelConfig(vocab_size=16, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, intermediate_size=16, max_positions=32)
    >>> policy = make_policy(config)
    >>> params = policy.init(jax.random.key(0))
    >>> tokens = jnp.array([[3, 1, 4]])
    >>> ones = jnp.ones_like(tokens)
    >>> policy.trunk(params, tokens, jnp.array([[0, 1, 2]]), ones, ones - 1).shape
    (1, 3, 8)
    """
    return Policy(
        init=functools.partial(_init, config),
        trunk=functools.partial(_trunk, config),
        head=functools.partial(_head, config),
        unembed=functools.partial(_unembed, config),
        logical_axes=_logical_axes(config),
        decode=Decode(functools.partial(_prefill, config), functools.partial(_decode, config)),
    )


def param_shapes(config: ModelConfig) -> Params:
    """The parameters' `ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def _init(config: ModelConfig, key: Array) -> Params:
    model = transformer.Decoder(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _logical_axes(config: ModelConfig) -> Params:
    """Axis names of every parameter; those of the layers get the axis over layers in front."""
    model = nnx.eval_shape(lambda: transformer.Decoder(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    axes = nnx.to_pure_dict(
        jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=is_variable)
    )
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    axes["layers"] = jax.tree.map(lambda names: ("layer", *names), axes["layers"], is_leaf=is_names)
    return axes


@functools.lru_cache(maxsize=16)
def _abstract_block(config: ModelConfig) -> tuple[Any, Any]:
    block = nnx.eval_shape(lambda: transformer.Block(config, rngs=nnx.Rngs(0)))
    return nnx.split(block)


def _run_layers(
    config: ModelConfig, params: Params, x: Array, attend: Callable, per_layer: Any = None
):
    """Runs `x` through all layers: `attend(q, k, v, of_this_layer) -> (attended, kept)`.

    Returns the last `x` and what each layer kept, stacked.
    """
    graph, state = _abstract_block(config)

    def layer(x, inputs):
        weights, of_this_layer = inputs
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, weights)
        block = nnx.merge(graph, filled)
        return block(x, lambda q, k, v: attend(q, k, v, of_this_layer))

    if config.remat != "none":
        layer = jax.checkpoint(
            layer, policy=CHECKPOINT_POLICIES[config.remat], prevent_cse=config.unrolled
        )
    return jax.lax.scan(layer, x, (params["layers"], per_layer), unroll=config.unrolled or 1)


def _embed(config: ModelConfig, params: Params, tokens: Array) -> Array:
    return params["embed"]["embedding"][tokens].astype(config.compute_dtype)


def _norm(config: ModelConfig, params: Params, x: Array) -> Array:
    norm = nnx.eval_shape(lambda: transformer.RMSNorm(config))
    graph, state = nnx.split(norm)
    nnx.replace_by_pure_dict(state, params["norm"])
    return nnx.merge(graph, state)(x)


def _trunk(config, params, tokens, positions, group, branch) -> Array:
    frequencies = transformer.rotary_frequencies(config)

    def attend(q, k, v, _):
        q = transformer.rotate(q, positions, frequencies)
        k = transformer.rotate(k, positions, frequencies)
        return packed_attention(q, k, v, group, branch), None

    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, _ = _run_layers(config, params, x, attend)
    return _norm(config, params, x)


def _unembed(config: ModelConfig, params: Params) -> Array:
    if config.tie_embeddings:
        return params["embed"]["embedding"].T
    return params["head"]["kernel"]


def _head(config: ModelConfig, params: Params, hidden: Array) -> Array:
    matrix = _unembed(config, params).astype(config.compute_dtype)
    return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


def _prefill(config, params, tokens, lengths, num_candidates, max_new) -> tuple[Cache, Array]:
    batch, length = tokens.shape
    index = jnp.arange(length)
    positions = jnp.broadcast_to(index, tokens.shape)
    # Right padding lies after every prompt token, so the causal rule alone keeps it out.
    group = (index < lengths[:, None]).astype(jnp.int32)
    frequencies = transformer.rotary_frequencies(config)
    branch = jnp.zeros_like(group)

    def attend(q, k, v, _):
        q = transformer.rotate(q, positions, frequencies)
        k = transformer.rotate(k, positions, frequencies)
        return packed_attention(q, k, v, group, branch), (k, v)

    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, (keys, values) = _run_layers(config, params, x, attend)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    shape = (
        config.num_layers,
        batch,
        num_candidates,
        max_new,
        config.num_kv_heads,
        config.head_dim,
    )
    empty = jnp.zeros(shape, keys.dtype)
    return Cache(keys, values, lengths, empty, empty), _norm(config, params, last)[:, 0]


def _decode(config, params, cache: Cache, tokens, index) -> tuple[Cache, Array]:
    """One token for each of the candidates `[B, K]`, the index-th after the prompt."""
    frequencies = transformer.rotary_frequencies(config)
    positions = jnp.broadcast_to((cache.lengths + index)[:, None], tokens.shape)
    prompt_length, new_length = cache.prompt_keys.shape[2], cache.keys.shape[3]
    in_prompt = jnp.arange(prompt_length) < cache.lengths[:, None]
    before = jnp.arange(new_length) < index

    def attend(q, k, v, layer_cache):
        q = transformer.rotate(q, positions, frequencies)
        k = transformer.rotate(k, positions, frequencies)
        return _cached_attention(q, k, v, layer_cache, in_prompt, before), (k, v)

    per_layer = (cache.prompt_keys, cache.prompt_values, cache.keys, cache.values)
    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, (keys, values) = _run_layers(config, params, x, attend, per_layer)
    # Layers only read the cache; their new entries are written once, in place.
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=3)
    cache = cache._replace(keys=put(cache.keys, keys), values=put(cache.values, values))
    return cache, _norm(config, params, x)


def _cached_attention(q, k, v, layer_cache, in_prompt, before) -> Array:
    """`q [B, K, G, Q, H]` over the shared prompt, the candidate's past and itself (`k, v`)."""
    prompt_k, prompt_v, own_k, own_v = layer_cache
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * q.shape[-1] ** -0.5
    to_prompt = score("bkgqh,bpgh->bkgqp", q, prompt_k)
    to_prompt = jnp.where(in_prompt[:, None, None, None], to_prompt, MASKED)
    to_own = score("bkgqh,bktgh->bkgqt", q, own_k)
    to_own = jnp.where(before, to_own, MASKED)
    to_self = score("bkgqh,bkgh->bkgq", q, k)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own, to_self], -1), -1).astype(v.dtype)
    split = prompt_k.shape[1], prompt_k.shape[1] + own_k.shape[2]
    on_prompt, on_own, on_self = jnp.split(weights, split, -1)
    return (
        jnp.einsum("bkgqp,bpgh->bkgqh", on_prompt, prompt_v)
        + jnp.einsum("bkgqt,bktgh->bkgqh", on_own, own_v)
        + on_self * v[:, :, :, None]
    )
