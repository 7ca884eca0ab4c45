"""Attention within the groups of packed rows.

A group lies in one piece, so a block of query tokens needs the keys from the start of its first
group up to its own end: a few blocks where a row has many. Few scores are computed densely. Where
there are more, only those pairs of blocks are computed, with a running softmax and without keeping
any score; the backward pass computes them again (Dao et al. 2022, arXiv:2205.14135).

Shapes in names: B rows, T query tokens, S key tokens, G key-value heads, Q query heads a key-value
head, H head width; M blocks of C tokens in all rows, N of which are worked on side by side.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from paxo.models.sharding import partition_spec, platform

Array = jax.Array
# Large enough to vanish after the softmax, small enough to stay finite in bfloat16.
MASKED = -1e30
# A device computes up to `dense` scores densely, more in blocks of C = `block` tokens; then about
# `scores` exist at a time, which on CPU a cache should hold. Measured: benchmarks/NOTES.md.
Sizes = collections.namedtuple("Sizes", "dense block scores")
SIZES = {"cpu": Sizes(2**20, 64, 2**17)}
SIZES_ELSEWHERE = Sizes(2**22, 128, 2**24)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def packed_attention(
    q_BTGQH: Array, k_BTGH: Array, v_BTGH: Array, group_BT: Array, branch_BT: Array
) -> Array:
    """Softmax attention of each token to itself and the earlier ones of its prompt and its branch.

    `group_BT` is 0 on padding, and the tokens of a group lie side by side; `branch_BT` is 0 on its
    prompt and k on its completion k. Scores and softmax are float32. On a mesh rows and key-value
    heads stay where they are. Differentiable once, in reverse mode.

    Returns `[B, T, G, Q, H]` in the dtype of the queries, 0 on padding.

    >>> zeros, value = jnp.zeros((1, 4, 1, 1, 1)), jnp.array([0.0, 2.0, 7.0, 4.0])
    >>> group, branch = jnp.array([[1, 1, 1, 1]]), jnp.array([[0, 0, 1, 2]])
    >>> packed_attention(zeros, zeros[..., 0], value.reshape(1, 4, 1, 1), group, branch).ravel()
    Array([0., 1., 3., 2.], dtype=float32)
    """
    b, t, g, q, _ = q_BTGQH.shape
    mesh = jax.sharding.get_abstract_mesh()
    if b * g * q * t * t <= _sizes().dense * (1 if mesh.empty else mesh.size):
        return _dense(q_BTGQH, k_BTGH, v_BTGH, group_BT, branch_BT)
    short = -t % _sizes().block
    pad = lambda x: jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    return _sparse(*map(pad, (q_BTGQH, k_BTGH, v_BTGH, group_BT, branch_BT)))[:, :t]


def _sizes() -> Sizes:
    return SIZES.get(platform(), SIZES_ELSEWHERE)


def _related(group_q: Array, branch_q: Array, group_k: Array, branch_k: Array) -> Array:
    """`[..., T], [..., S] -> [..., T, S]`: of one group, and of its prompt or the own branch."""
    group_q, branch_q = group_q[..., :, None], branch_q[..., :, None]
    group_k, branch_k = group_k[..., None, :], branch_k[..., None, :]
    return (group_q == group_k) & (group_q != 0) & ((branch_k == 0) | (branch_k == branch_q))


def _dense(q: Array, k: Array, v: Array, group: Array, branch: Array) -> Array:
    b, t, g, per_key, h = q.shape
    # Heads before tokens: batched products over contiguous matrices are much faster on CPU.
    query = (q * h**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, g, per_key * t, h)
    key, value = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    mask = _related(group, branch, group, branch) & jnp.tril(jnp.ones((t, t), bool))
    bias = jnp.where(mask, 0.0, MASKED)[:, None, None]
    scores = _product("bgth,bgsh->bgts", query, key).reshape(b, g, per_key, t, t)
    weights = jax.nn.softmax(scores + bias, -1).astype(v.dtype).reshape(b, g, per_key * t, t)
    mixed = jnp.einsum("bgts,bgsh->bgth", weights, value).reshape(b, g, per_key, t, h)
    return jnp.where((group != 0)[..., None, None, None], mixed.transpose(0, 3, 1, 2, 4), 0)


# --- pairs of blocks --------------------------------------------------------------------------


@jax.custom_vjp
def _sparse(q: Array, k: Array, v: Array, group: Array, branch: Array) -> Array:
    return _sparse_forward(q, k, v, group, branch)[0]


def _sparse_forward(q, k, v, group, branch):
    out, lse = _on_each_device(_forward, "www..", "wm")(q, k, v, group, branch)
    return out, (q, k, v, group, branch, out, lse)


def _sparse_backward(kept, d_out):
    return *_on_each_device(_backward, "www..wmw", "www")(*kept, d_out), None, None


_sparse.defvjp(_sparse_forward, _sparse_backward)


def _on_each_device(function: Callable, takes: str, gives: str) -> Callable:
    """`function` of each device's own rows and heads, so that loops are as long as these need.

    Arrays are `[B, T, G, ...]` (w), `[B, T]` (.) and `[M, G, ...]` (m); the first is one of w.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape or mesh.size == 1:
        return function

    def run(q, *others):
        axes = ("batch", "length", "activation_kv_heads", None, None)
        rows, _, heads, *_ = partition_spec(axes, q.shape, mesh.shape)
        spec = {"w": P(rows, None, heads), ".": P(rows), "m": P(rows, heads)}
        into, out_of = (tuple(spec[kind] for kind in kinds) for kinds in (takes, gives))
        # The check would want every loop's start to be marked as differing between devices.
        placed = jax.shard_map(function, in_specs=into, out_specs=out_of, check_vma=False)
        return placed(q, *others)

    return run


def _forward(q, k, v, group, branch) -> tuple[Array, Array]:
    """The output, and the log of each query's sum of exponentials `[M, G, Q * C]`."""
    queries, keys, values, *labels = _cut_all(q, k, v, group, branch)

    def of_queries(lanes: tuple[Array, Array]) -> tuple[Array, Array]:
        own, count = lanes
        query = queries[own]

        def add_keys(i, carry):
            most, total, mixed = carry
            # The diagonal first: every token sees itself, so `most` is a real score from there on.
            at = jnp.maximum(own - i, 0)
            scores = _product("ngth,ngsh->ngts", query, keys[at])
            scores = _masked(scores, labels, own, at, i, count)
            new = jnp.maximum(most, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            added = _product("ngts,ngsh->ngth", weights.astype(v.dtype), values[at])
            return new, total * shrink + weights.sum(-1), mixed * shrink[..., None] + added

        zero = jnp.zeros(query.shape, jnp.float32)
        start = zero[..., 0] + MASKED, zero[..., 0], zero
        most, total, mixed = jax.lax.fori_loop(0, count.max(), add_keys, start)
        real = jnp.tile(labels[0][own] != 0, q.shape[3])[:, None]
        lse = jnp.where(real, most + jnp.log(total), 0.0)
        out = jnp.where(real[..., None], mixed / total[..., None], 0.0)
        return out.astype(q.dtype), lse

    lanes, unsorted = _lanes(_reach(group)[0], q.shape)
    out, lse = map(unsorted, jax.lax.map(of_queries, lanes))
    return _join(out, q.shape), lse


def _backward(q, k, v, group, branch, out, lse, d_out) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values: blocks of keys meet the queries behind them."""
    queries, keys, values, *labels = _cut_all(q, k, v, group, branch)
    d_mixed = _cut(d_out)
    # The softmax's gradient needs Σ_s weight_s * d_weight_s, which is the output times its own.
    inner = jnp.sum(_cut(out).astype(jnp.float32) * d_mixed.astype(jnp.float32), -1)

    def of_keys(d_queries: Array, lanes: tuple[Array, Array]):
        own, count = lanes
        key, value = keys[own], values[own]

        def add_queries(i, carry):
            d_queries, d_key, d_value = carry
            at = jnp.minimum(own + i, len(queries) - 1)
            query, d_out = queries[at], d_mixed[at]
            scores = _product("ngth,ngsh->ngts", query, key)
            scores = _masked(scores, labels, at, own, i, count)
            weights = jnp.exp(scores - lse[at][..., None])
            d_weights = _product("ngth,ngsh->ngts", d_out, value)
            d_scores = (weights * (d_weights - inner[at][..., None])).astype(k.dtype)
            d_key += _product("ngts,ngth->ngsh", d_scores, query)
            d_value += _product("ngts,ngth->ngsh", weights.astype(v.dtype), d_out)
            # Each lane adds to another block of queries, one that is done to none: no two meet, so
            # sums have one order.
            d_queries = d_queries.at[jnp.where(i < count, own + i, len(queries))].add(
                _product("ngts,ngsh->ngth", d_scores, key), mode="drop", unique_indices=True
            )
            return d_queries, d_key, d_value

        zero = jnp.zeros(key.shape, jnp.float32)
        d_queries, *d_own = jax.lax.fori_loop(0, count.max(), add_queries, (d_queries, zero, zero))
        return d_queries, d_own

    lanes, unsorted = _lanes(_reach(group)[1], q.shape)
    d_queries, d_own = jax.lax.scan(of_keys, jnp.zeros(queries.shape, jnp.float32), lanes)
    d_query = _join(d_queries * q.shape[-1] ** -0.5, q.shape).astype(q.dtype)
    return d_query, *(_join(unsorted(x), k.shape).astype(k.dtype) for x in d_own)


def _masked(scores, labels, queries, keys, distance, count) -> Array:
    """Masks scores `[N, G, Q * C, C]` of blocks of queries and of keys `distance` before them."""
    group, branch = labels
    mask = _related(group[queries], branch[queries], group[keys], branch[keys])
    mask &= jnp.tril(jnp.ones(mask.shape[1:], bool)) | (distance > 0)
    mask &= (distance < count)[:, None, None]
    by_head = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_head, MASKED).reshape(scores.shape)


def _reach(group_BT: Array) -> tuple[Array, Array]:
    """`[M]` blocks of keys that a block of queries needs, and of queries that need a block of keys.

    Both count the block itself, and are 0 where all of it is padding.
    """
    c = _sizes().block
    blocks = group_BT.reshape(len(group_BT), -1, c)
    own, index = jnp.arange(blocks.shape[1]), jnp.arange(group_BT.shape[1]) // c
    # Groups between the first and the last token's begin and end within the block.
    same = lambda g: (group_BT[:, None] == g[..., None]) & (g[..., None] != 0)  # noqa: E731
    first = jnp.min(jnp.where(same(blocks[..., 0]), index, own[:, None]), -1)
    last = jnp.max(jnp.where(same(blocks[..., -1]), index, own[:, None]), -1)
    real = jnp.any(blocks != 0, -1)
    return tuple(jnp.where(real, x, 0).ravel() for x in (own - first + 1, last - own + 1))


def _lanes(count_M: Array, shape: tuple[int, ...]) -> tuple[tuple[Array, Array], Callable]:
    """Blocks and their counts, both `[M / N, N]`, and what puts results `[M / N, N, ...]` in order.

    The N blocks of a portion go through a loop together, so portions are of like counts.
    """
    size = _sizes()
    n = max(1, min(count_M.size, size.scores // (shape[2] * shape[3] * size.block**2)))
    order = jnp.argsort(-count_M)
    # The last portion is filled up with lanes of count 0.
    lanes = (jnp.pad(x, (0, -count_M.size % n)).reshape(-1, n) for x in (order, count_M[order]))
    return tuple(lanes), lambda x: x.reshape(-1, *x.shape[2:])[jnp.argsort(order)]


def _cut_all(q, k, v, group, branch) -> tuple[Array, ...]:
    labels = (x.reshape(-1, _sizes().block) for x in (group, branch))
    return _cut(q * q.shape[-1] ** -0.5), _cut(k), _cut(v), *labels


def _cut(x: Array) -> Array:
    """`[B, T, G, (Q,) H] -> [M, G, (Q *) C, H]`: query heads of a key head below one another."""
    c, (g, *q, h) = _sizes().block, x.shape[2:]
    blocks = x.reshape(-1, c, g, *(q or [1]), h).transpose(0, 2, 3, 1, 4)
    return blocks.reshape(len(blocks), g, -1, h)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`."""
    blocks = x.reshape(*x.shape[:2], -1, _sizes().block, x.shape[-1])
    return blocks.transpose(0, 3, 1, 2, 4).reshape(shape)
