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
from paxo.models.embedding import embed
from paxo.models.sharding import constrain
from paxo.types import Array, Decode, Params, Policy

CHECKPOINT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Axis names of a layer's cache.
PROMPT_AXES = ("batch", "activation_kv_heads", "length", None)
OWN_AXES = ("batch", "activation_kv_heads", "length", None)


class LayerCache(NamedTuple):
    """Keys and values of a layer; the prompt's are stored once for its K candidates.

    Heads come before tokens, so that no product over the cache has to transpose it first.

    Attributes:
        prompt_keys: `[B, G, P, H]`, and `prompt_values` alike.
        prompt_values: see `prompt_keys`.
        keys: `[B * K, G, T, H]` of the new tokens, and `values` alike.
        values: see `keys`.
    """

    prompt_keys: Array
    prompt_values: Array
    keys: Array
    values: Array


class Cache(NamedTuple):
    """What decoding keeps.

    Attributes:
        lengths: `[B]` tokens of each prompt.
        layers: a `LayerCache` for each layer in a tuple, or one with an axis over layers in front,
            as the layers' parameters come.
    """

    lengths: Array
    layers: Any


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
        decode=Decode(
            functools.partial(_prefill, config),
            functools.partial(_decode, config),
            prepare=functools.partial(_prepare, config),
            select=_select,
        ),
        unembed_by_token=_embeddings if config.tie_embeddings else None,
        max_positions=config.max_positions,
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

    Returns the last `x` and what each layer kept, stacked; `per_layer` and what was kept are tuples
    where the layers' parameters are. `params["adapters"]`, if there, lie as the layers do: name of
    a projection -> its low-rank pair.
    """
    graph, state = _abstract_block(config)

    def layer(x, inputs):
        weights, adapters, of_this_layer = inputs
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, weights)
        block = nnx.merge(graph, filled)
        for name, pair in adapters.items():
            block.projection(name).adapt(**pair)
        return block(x, lambda q, k, v: attend(q, k, v, of_this_layer))

    if config.remat != "none":
        layer = jax.checkpoint(
            layer, policy=CHECKPOINT_POLICIES[config.remat], prevent_cse=config.unrolled
        )
    layers = params["layers"]
    if isinstance(layers, tuple):
        none, kept = (None,) * len(layers), []
        adapters = params.get("adapters", ({},) * len(layers))
        for inputs in zip(layers, adapters, per_layer or none):
            x, of_this = layer(x, inputs)
            kept.append(of_this)
        return x, tuple(kept)
    inputs = layers, params.get("adapters", {}), per_layer
    return jax.lax.scan(layer, x, inputs, unroll=config.unrolled or 1)


def _embed(config: ModelConfig, params: Params, tokens: Array) -> Array:
    return embed(params["embed"]["embedding"], tokens, config.compute_dtype)


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
        return packed_attention(q, k, v, group, branch, config.attention), None

    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, _ = _run_layers(config, params, x, attend)
    return _norm(config, params, x)


def _unembed(config: ModelConfig, params: Params) -> Array:
    if config.tie_embeddings:
        return params["embed"]["embedding"].T
    return params["head"]["kernel"]


def _embeddings(params: Params) -> Array:
    return params["embed"]["embedding"]


def _head(config: ModelConfig, params: Params, hidden: Array) -> Array:
    matrix = _unembed(config, params).astype(config.compute_dtype)
    return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


def _prepare(config: ModelConfig, params: Params) -> Params:
    """Decoding's parameters: in the dtype of the products; where layers unroll, a tuple of them.

    A step would otherwise cast all weights, and cut every layer's out of the stacked arrays, again.
    """
    names = ("embed", "layers", "adapters", "norm", "head")
    kept = {name: params[name] for name in names if name in params}
    kept = jax.tree.map(lambda x: x.astype(config.compute_dtype), kept)
    stacked = {name: kept[name] for name in ("layers", "adapters") if name in kept}
    return kept | {name: _layer_by_layer(config, tree) for name, tree in stacked.items()}


def _layer_by_layer(config: ModelConfig, stacked: Any) -> Any:
    """A tuple of the layers' trees where layers unroll, else the stacked tree itself."""
    if not config.unrolled:
        return stacked
    of_layer = lambda number: jax.tree.map(lambda x: x[number], stacked)  # noqa: E731
    return tuple(map(of_layer, range(config.num_layers)))


def _prefill(config, params, tokens, lengths, num_candidates, max_new) -> tuple[Cache, Array]:
    index = jnp.arange(tokens.shape[1])
    positions = jnp.broadcast_to(index, tokens.shape)
    # Right padding lies after every prompt token, so the causal rule alone keeps it out.
    group = (index < lengths[:, None]).astype(jnp.int32)
    frequencies = transformer.rotary_frequencies(config)
    branch = jnp.zeros_like(group)

    def attend(q, k, v, _):
        q = transformer.rotate(q, positions, frequencies)
        k = transformer.rotate(k, positions, frequencies)
        shape = (len(tokens) * num_candidates, config.num_kv_heads, max_new, config.head_dim)
        empty = constrain(jnp.zeros(shape, k.dtype), *OWN_AXES)
        prompt = (constrain(x.swapaxes(1, 2), *PROMPT_AXES) for x in (k, v))
        return packed_attention(q, k, v, group, branch, config.attention), LayerCache(
            *prompt, empty, empty
        )

    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, layers = _run_layers(config, params, x, attend)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return Cache(lengths, layers), _norm(config, params, last)[:, 0]


def _decode(config, params, cache: Cache, tokens, index) -> tuple[Cache, Array]:
    """One token for each of the candidates `[B, K]`, the index-th after the prompt."""
    frequencies = transformer.rotary_frequencies(config)
    positions = jnp.broadcast_to((cache.lengths + index)[:, None], tokens.shape)

    def attend(q, k, v, layer: LayerCache):
        q = transformer.rotate(q, positions, frequencies)
        k = transformer.rotate(k, positions, frequencies)
        # Written before it is read, and in the very shape that is read: XLA then writes in place,
        # where it would copy the cache of every layer for another shape.
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=2)
        layer = layer._replace(keys=put(layer.keys, _rows(k)), values=put(layer.values, _rows(v)))
        return _cached_attention(q, layer, cache.lengths, index), layer

    x = constrain(_embed(config, params, tokens), "batch", "length", "activation_embed")
    x, layers = _run_layers(config, params, x, attend, cache.layers)
    return Cache(cache.lengths, layers), _norm(config, params, x)


def _rows(x: Array) -> Array:
    """`[B, K, ...] -> [B * K, ...]`."""
    return x.reshape(-1, *x.shape[2:])


def _cached_attention(q: Array, cache: LayerCache, lengths: Array, index: Array) -> Array:
    """`q [B, K, G, Q, H]` over the shared prompt and the candidate's tokens up to `index`."""
    prompt_length, new_length = cache.prompt_keys.shape[2], cache.keys.shape[2]
    score = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * q.shape[-1] ** -0.5
    to_prompt = score("bkgqh,bgph->bkgqp", q, cache.prompt_keys)
    in_prompt = jnp.arange(prompt_length) < lengths[:, None]
    to_prompt = jnp.where(in_prompt[:, None, None, None], to_prompt, MASKED)
    to_own = score("ngqh,ngth->ngqt", _rows(q), cache.keys)
    to_own = jnp.where(jnp.arange(new_length) <= index, to_own, MASKED)
    scores = jnp.concatenate([to_prompt, to_own.reshape(*q.shape[:-1], new_length)], -1)
    weights = jax.nn.softmax(scores, -1).astype(q.dtype)
    on_prompt, on_own = jnp.split(weights, [prompt_length], -1)
    from_prompt = jnp.einsum("bkgqp,bgph->bkgqh", on_prompt, cache.prompt_values)
    from_own = jnp.einsum("ngqt,ngth->ngqh", _rows(on_own), cache.values)
    return from_prompt + from_own.reshape(q.shape)


def _select(cache: Cache, candidates: Array) -> Cache:
    """Candidate j goes on from what candidate `candidates[b, j]` has written."""
    width = candidates.shape[1]
    rows = (candidates + width * jnp.arange(len(candidates))[:, None]).ravel()

    def of_layer(layer: LayerCache, axis: int) -> LayerCache:
        take = functools.partial(jnp.take, indices=rows, axis=axis)
        return layer._replace(keys=take(layer.keys), values=take(layer.values))

    if isinstance(cache.layers, LayerCache):
        return cache._replace(layers=of_layer(cache.layers, 1))
    return cache._replace(layers=tuple(of_layer(layer, 0) for layer in cache.layers))
