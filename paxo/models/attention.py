"""Attention within the groups of packed rows.

A group lies in one piece, so a block of query tokens needs the keys from the start of its first
group up to its own end: a few blocks where a row has many. Few scores are computed densely. Where
there are more, only those pairs of blocks are computed, with a running softmax and without keeping
any score; the backward pass computes them again (Dao et al. 2022, arXiv:2205.14135). TPUs and GPUs
have kernels for that, `splash` and cuDNN's, which are given the rows' masks.

Shapes in names: B rows, T query tokens, S key tokens, G key-value heads, Q query heads a key-value
head, H head width; M blocks of C tokens in all rows, N of which are worked on side by side.
"""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from paxo.models.config import Attention
from paxo.models.sharding import partition_spec, platform
from paxo.models.splash import LANES, splash_backward, splash_forward

Array = jax.Array
# Large enough to vanish after the softmax, small enough to stay finite in bfloat16.
MASKED = -1e30
# A device computes up to `dense` scores densely, more in blocks of C = `block` tokens; then about
# `scores` exist at a time, which on CPU a cache should hold. Measured: benchmarks/NOTES.md.
Sizes = collections.namedtuple("Sizes", "dense block scores")
SIZES = {"cpu": Sizes(2**20, 64, 2**17)}
SIZES_ELSEWHERE = Sizes(2**22, 128, 2**24)
# Where each kernel runs; on CPU splash is interpreted.
PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def packed_attention(
    q_BTGQH: Array,
    k_BTGH: Array,
    v_BTGH: Array,
    group_BT: Array,
    branch_BT: Array,
    how: Attention = "auto",
) -> Array:
    """Softmax attention of each token to itself and the earlier ones of its prompt and its branch.

    `group_BT` is 0 on padding, and the tokens of a group lie side by side; `branch_BT` is 0 on its
    prompt and k on its completion k. Scores and softmax are float32. On a mesh rows and key-value
    heads stay where they are. Differentiable once, in reverse mode.

    `how` it is computed changes the last bits only, see `ModelConfig.attention`; a ValueError says
    where a kernel does not run.

    Returns `[B, T, G, Q, H]` in the dtype of the queries, 0 on padding.

    >>> zeros, value = jnp.zeros((1, 4, 1, 1, 1)), jnp.array([0.0, 2.0, 7.0, 4.0])
    >>> group, branch = jnp.array([[1, 1, 1, 1]]), jnp.array([[0, 0, 1, 2]])
    >>> value = value.reshape(1, 4, 1, 1)
    >>> packed_attention(zeros, zeros[..., 0], value, group, branch).ravel().round(4)
    Array([0., 1., 3., 2.], dtype=float32)
    """
    how = _chosen(q_BTGQH) if how == "auto" else how
    if platform() not in PLATFORMS.get(how, (platform(),)):
        raise ValueError(
            f"attention {how!r} runs on {' and '.join(PLATFORMS[how])}; this program is for "
            f"{platform()}: set model.attention=auto"
        )
    rows = q_BTGQH, k_BTGH, v_BTGH, group_BT, branch_BT
    if how == "dense":
        return _dense(*rows)
    if how == "cudnn":
        return _on_each_device(functools.partial(_fused, how), "www..", "w")(*rows)
    length = q_BTGQH.shape[1]
    short = -length % (LANES if how == "splash" else _sizes().block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    return (_splash if how == "splash" else _sparse)(*map(pad, rows))[:, :length]


def _chosen(q: Array) -> Attention:
    """The way for queries of this shape and dtype, where the program is going to run."""
    b, t, g, per_key, h = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    if b * g * per_key * t * t <= _sizes().dense * (1 if mesh.empty else mesh.size):
        return "dense"
    if platform() == "tpu":
        return "splash"
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and h % 8 == 0 and h <= 128 and t % 2 == 0
    return "cudnn" if platform() == "gpu" and fits else "blocks"


def _sizes() -> Sizes:
    return SIZES.get(platform(), SIZES_ELSEWHERE)


def _related(group_q: Array, branch_q: Array, group_k: Array, branch_k: Array) -> Array:
    """`[..., T], [..., S] -> [..., T, S]`: of one group, and of its prompt or the own branch."""
    group_q, branch_q = group_q[..., :, None], branch_q[..., :, None]
    group_k, branch_k = group_k[..., None, :], branch_k[..., None, :]
    return (group_q == group_k) & (group_q != 0) & ((branch_k == 0) | (branch_k == branch_q))


def _visible(group: Array, branch: Array) -> Array:
    """`[..., T] -> [..., T, T]`: whom a token sees; padding itself, so that no sum is empty."""
    index = jnp.arange(group.shape[-1])
    earlier = index[:, None] >= index
    return (_related(group, branch, group, branch) & earlier) | (index[:, None] == index)


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


def _fused(implementation: str, q: Array, k: Array, v: Array, group: Array, branch: Array) -> Array:
    """By `jax.nn`: "cudnn", or "xla" for tests of what is handed to it."""
    b, t, g, per_key, h = q.shape
    mask = _visible(group, branch)[:, None]
    query = q.reshape(b, t, g * per_key, h)
    out = jax.nn.dot_product_attention(query, k, v, mask=mask, implementation=implementation)
    return jnp.where((group != 0)[..., None, None, None], out.reshape(q.shape), 0)


def _with_own_gradient(forward: Callable, backward: Callable) -> Callable:
    """`(q, k, v, group, branch) -> out` of which out and the logs of the sums are kept, no scores.

    `forward` gives both for a device's own rows and heads, `backward` takes all that, and the
    gradient of out.
    """

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, group: Array, branch: Array) -> Array:
        return keep(q, k, v, group, branch)[0]

    def keep(q, k, v, group, branch):
        out, lse = _on_each_device(forward, "www..", "wm")(q, k, v, group, branch)
        return out, (q, k, v, group, branch, out, lse)

    def gradients(kept, d_out):
        return *_on_each_device(backward, "www..wmw", "www")(*kept, d_out), None, None

    attend.defvjp(keep, gradients)
    return attend


def _on_each_device(function: Callable, takes: str, gives: str) -> Callable:
    """`function` of each device's own rows and heads, so that loops are as long as these need.

    Arrays are `[B, T, G, ...]` (w), `[B, T]` (.) and `[B or M, G, ...]` (m); the first is one of w.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape or mesh.size == 1:
        return function

    def run(q, *others):
        axes = ("batch", "length", "activation_kv_heads", None, None)
        rows, _, heads, *_ = partition_spec(axes, q.shape, mesh.shape)
        spec = {"w": P(rows, None, heads), ".": P(rows), "m": P(rows, heads)}
        into, out_of = (tuple(spec[kind] for kind in kinds) for kinds in (takes, gives))
        out_of = out_of if len(gives) > 1 else out_of[0]
        # The check would want every loop's start to be marked as differing between devices.
        placed = jax.shard_map(function, in_specs=into, out_specs=out_of, check_vma=False)
        return placed(q, *others)

    return run


# --- pairs of blocks --------------------------------------------------------------------------


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


_sparse = _with_own_gradient(_forward, _backward)


# --- splash -----------------------------------------------------------------------------------


def _splash_forward(q, k, v, group, branch) -> tuple[Array, Array]:
    """Row by row: each has a mask of its own."""

    def of_row(row):
        *arrays, group, branch = row
        out, lse = splash_forward(*arrays, _visible(group, branch))
        return jnp.where((group != 0)[:, None, None, None], out, 0), lse

    return jax.lax.map(of_row, (q, k, v, group, branch))


def _splash_backward(q, k, v, group, branch, out, lse, d_out) -> tuple[Array, Array, Array]:
    def of_row(row):
        q, k, v, group, branch, out, lse, d_out = row
        d_out = jnp.where((group != 0)[:, None, None, None], d_out, 0)
        return splash_backward(q, k, v, _visible(group, branch), out, lse, d_out)

    return jax.lax.map(of_row, (q, k, v, group, branch, out, lse, d_out))


_splash = _with_own_gradient(_splash_forward, _splash_backward)
