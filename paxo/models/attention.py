"""Attention within the groups of packed rows.

A group lies in one piece, so a block of query tokens needs the keys from the start of its first
group up to its own end: a few blocks where a row has many. Short rows are computed densely. In
long ones only those pairs of blocks are computed, with a running softmax, so that no scores are
kept; the backward pass computes them again (Dao et al. 2022, arXiv:2205.14135).

Shapes in names: B rows, T query tokens, S key tokens, G key-value heads, Q query heads a key-value
head, H head width; M blocks of C tokens in all rows, N of which are worked on side by side.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from paxo.models.sharding import partition_spec

Array = jax.Array
# Large enough to vanish after the softmax, small enough to stay finite in bfloat16.
MASKED = -1e30
# Rows whose scores are no more than this on a device, 16 MB in float32, are computed densely.
DENSE_SCORES = 2**22
# Tokens of a block, and scores that exist at a time: on CPU a cache should hold them.
BLOCK = {"cpu": 64}
SCORES_AT_A_TIME = {"cpu": 2**19}
BLOCK_ELSEWHERE, SCORES_ELSEWHERE = 128, 2**24

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def packed_attention(
    q_BTGQH: Array, k_BTGH: Array, v_BTGH: Array, group_BT: Array, branch_BT: Array
) -> Array:
    """Softmax attention of each token to the earlier ones of its group: its prompt and its branch.

    Scores and softmax are float32. On a mesh that is set, rows and key-value heads stay where
    they are.

    Args:
        q_BTGQH: queries.
        k_BTGH: keys.
        v_BTGH: values.
        group_BT: group of each token, 0 on padding; the tokens of a group lie side by side.
        branch_BT: 0 on a prompt, k on completion k.

    Returns:
        `[B, T, G, Q, H]` in the dtype of the queries, 0 on padding.

    >>> zeros, value = jnp.zeros((1, 4, 1, 1, 1)), jnp.array([0.0, 2.0, 7.0, 4.0])
    >>> group, branch = jnp.array([[1, 1, 1, 1]]), jnp.array([[0, 0, 1, 2]])
    >>> packed_attention(zeros, zeros[..., 0], value.reshape(1, 4, 1, 1), group, branch).ravel()
    Array([0., 1., 3., 2.], dtype=float32)
    """
    b, t, g, q, _ = q_BTGQH.shape
    mesh = jax.sharding.get_abstract_mesh()
    if b * g * q * t * t <= DENSE_SCORES * (1 if mesh.empty else mesh.size):
        return _dense(q_BTGQH, k_BTGH, v_BTGH, group_BT, branch_BT)
    short = -t % _block()
    pad = lambda x: jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    return _sparse(*map(pad, (q_BTGQH, k_BTGH, v_BTGH, group_BT, branch_BT)))[:, :t]


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


# --- block-sparse -----------------------------------------------------------------------------


@jax.custom_vjp
def _sparse(q: Array, k: Array, v: Array, group: Array, branch: Array) -> Array:
    return _sparse_forward(q, k, v, group, branch)[0]


def _sparse_forward(q, k, v, group, branch):
    wide, labels, per_head = _specs(q)
    run = _on_each_device(_forward, (*(wide,) * 3, *(labels,) * 2), (wide, per_head))
    out, lse = run(q, k, v, group, branch)
    return out, (q, k, v, group, branch, out, lse)


def _sparse_backward(kept, d_out):
    wide, labels, per_head = _specs(d_out)
    specs = (*(wide,) * 3, *(labels,) * 2, wide, per_head, wide)
    return *_on_each_device(_backward, specs, (wide,) * 3)(*kept, d_out), None, None


_sparse.defvjp(_sparse_forward, _sparse_backward)


def _specs(q_BTGQH: Array) -> tuple[PartitionSpec, ...]:
    """Placement of arrays `[B, T, G, ...]`, `[B, T]` and `[M, G, ...]`."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape:
        return (PartitionSpec(),) * 3
    axes = ("batch", "length", "activation_kv_heads", None, None)
    rows, _, heads, *_ = partition_spec(axes, q_BTGQH.shape, mesh.shape)
    return PartitionSpec(rows, None, heads), PartitionSpec(rows), PartitionSpec(rows, heads)


def _on_each_device(function: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    """`function` of each device's own rows and heads: its loops are as long as these need."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape or mesh.size == 1:
        return function
    # Values are equal over the axes that a spec leaves out, which loops hide from the checker.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Blocks(NamedTuple):
    """All rows cut into blocks; query heads of a key head lie below one another.

    Attributes:
        q: `[M, G, Q * C, H]`, scaled.
        k: `[M, G, C, H]`.
        v: `[M, G, C, H]`.
        group: `[M, C]`.
        branch: `[M, C]`.
    """

    q: Array
    k: Array
    v: Array
    group: Array
    branch: Array


def _forward(q, k, v, group, branch) -> tuple[Array, Array]:
    """The output, and the log of the sum of exponentials of each query, `[M, G, Q * C]`."""
    blocks = _cut_all(q, k, v, group, branch)
    per_key, h = q.shape[3:]

    def of_queries(own: Array, count: Array) -> tuple[Array, Array]:
        query = blocks.q[own]

        def add_keys(i, carry):
            most, total, mixed = carry
            # The diagonal first: every token sees itself, so `most` is a real score from the start.
            at = jnp.maximum(own - i, 0)
            mask = _mask(blocks, own, at, i, count)
            scores = _product("ngth,ngsh->ngts", query, blocks.k[at])
            scores = _where(mask, scores, MASKED)
            new = jnp.maximum(most, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            added = _product("ngts,ngsh->ngth", weights.astype(v.dtype), blocks.v[at])
            return new, total * shrink + weights.sum(-1), mixed * shrink[..., None] + added

        zero = jnp.zeros(query.shape[:-1], jnp.float32)
        carry = zero + MASKED, zero, jnp.zeros((*zero.shape, h), jnp.float32)
        most, total, mixed = jax.lax.fori_loop(0, count.max(), add_keys, carry)
        real = jnp.tile(blocks.group[own] != 0, per_key)[:, None]
        mixed = jnp.where(real[..., None], mixed / jnp.where(real, total, 1.0)[..., None], 0.0)
        return mixed.astype(q.dtype), jnp.where(real, most + jnp.log(total), 0.0)

    lanes, inverse = _lanes(_reach(group)[0], q.shape)
    out, lse = jax.lax.map(lambda args: of_queries(*args), lanes)
    return _join(_unsorted(out, inverse), q.shape), _unsorted(lse, inverse)


def _backward(q, k, v, group, branch, out, lse, d_out) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values; N blocks of keys meet the queries behind them."""
    blocks = _cut_all(q, k, v, group, branch)
    d_mixed = _cut(d_out)
    # Σ_s p_s dp_s of each query, which the softmax's gradient needs, is the output times its own.
    inner = jnp.sum(_cut(out).astype(jnp.float32) * d_mixed.astype(jnp.float32), -1)

    def of_keys(d_query: Array, lane: tuple[Array, Array]):
        own, count = lane
        key, value = blocks.k[own], blocks.v[own]

        def add_queries(i, carry):
            d_query, d_key, d_value = carry
            at = jnp.minimum(own + i, len(lse) - 1)
            query, d_out = blocks.q[at], d_mixed[at]
            mask = _mask(blocks, at, own, i, count)
            scores = _product("ngth,ngsh->ngts", query, key)
            weights = jnp.exp(_where(mask, scores, MASKED) - lse[at][..., None])
            d_weights = _product("ngth,ngsh->ngts", d_out, value)
            d_scores = (weights * (d_weights - inner[at][..., None])).astype(k.dtype)
            d_key += _product("ngts,ngth->ngsh", d_scores, query)
            d_value += _product("ngts,ngth->ngsh", weights.astype(v.dtype), d_out)
            # At one distance every lane has other queries, so the order of sums is always the same.
            d_query = d_query.at[jnp.where(i < count, own + i, len(lse))].add(
                _product("ngts,ngsh->ngth", d_scores, key), mode="drop", unique_indices=True
            )
            return d_query, d_key, d_value

        zero = jnp.zeros(key.shape, jnp.float32)
        d_query, *d_own = jax.lax.fori_loop(0, count.max(), add_queries, (d_query, zero, zero))
        return d_query, d_own

    lanes, inverse = _lanes(_reach(group)[1], q.shape)
    d_query, d_own = jax.lax.scan(of_keys, jnp.zeros(blocks.q.shape, jnp.float32), lanes)
    d_query = _join(d_query * q.shape[-1] ** -0.5, q.shape).astype(q.dtype)
    one_head = (*q.shape[:3], 1, q.shape[4])
    d_key, d_value = (_join(_unsorted(x, inverse), one_head)[:, :, :, 0] for x in d_own)
    return d_query, d_key.astype(k.dtype), d_value.astype(v.dtype)


def _mask(blocks: _Blocks, queries: Array, keys: Array, distance: Array, count: Array) -> Array:
    """`[N, C, C]` True where a query may see a key, `distance` blocks ahead of it."""
    group, branch = blocks.group, blocks.branch
    related = _related(group[queries], branch[queries], group[keys], branch[keys])
    earlier = jnp.tril(jnp.ones(related.shape[1:], bool)) | (distance > 0)
    return related & earlier & (distance < count)[:, None, None]


def _where(mask_NCC: Array, scores: Array, other: float) -> Array:
    """Scores `[N, G, Q * C, C]` where the mask of all heads allows."""
    n, g, _, c = scores.shape
    split = scores.reshape(n, g, -1, c, c)
    return jnp.where(mask_NCC[:, None, None], split, other).reshape(scores.shape)


def _block() -> int:
    return BLOCK.get(jax.default_backend(), BLOCK_ELSEWHERE)


def _cut_all(q, k, v, group, branch) -> _Blocks:
    key, value = _cut(k[:, :, :, None]), _cut(v[:, :, :, None])
    labels = (x.reshape(-1, _block()) for x in (group, branch))
    return _Blocks(_cut(q * q.shape[-1] ** -0.5), key, value, *labels)


def _cut(x_BTGQH: Array) -> Array:
    """`[B, T, G, Q, H] -> [M, G, Q * C, H]`."""
    _, _, g, q, h = x_BTGQH.shape
    blocks = x_BTGQH.reshape(-1, _block(), g, q, h).transpose(0, 2, 3, 1, 4)
    return blocks.reshape(-1, g, q * _block(), h)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`."""
    _, _, g, q, h = shape
    return x.reshape(-1, g, q, _block(), h).transpose(0, 3, 1, 2, 4).reshape(shape)


def _reach(group_BT: Array) -> tuple[Array, Array]:
    """`[M]` blocks of keys each block of queries needs, and of queries that need its keys.

    Both count the block itself, and are 0 where all of it is padding.
    """
    t = group_BT.shape[1]
    blocks = group_BT.reshape(len(group_BT), -1, _block())
    own = jnp.arange(blocks.shape[1])

    def ends_of(group: Array, reduce: Callable) -> Array:
        """Block of the first or last token of these groups; of padding, the own block."""
        same = group_BT[:, None, :] == group[:, :, None]
        inside = own[:, None] * _block()
        return reduce(jnp.where(same & (group != 0)[..., None], jnp.arange(t), inside), -1)

    first = ends_of(blocks[..., 0], jnp.min) // _block()
    last = ends_of(blocks[..., -1], jnp.max) // _block()
    real = jnp.any(blocks != 0, -1)
    return tuple(jnp.where(real, x, 0).ravel() for x in (own - first + 1, last - own + 1))


def _lanes(count_M: Array, shape: tuple[int, ...]) -> tuple[tuple[Array, Array], Array]:
    """Blocks in portions of N with like counts, `[M / N, N]` each, and where each block went.

    The blocks of a portion are worked on together, as long as its largest count says.
    """
    total, scores = count_M.size, shape[2] * shape[3] * _block() ** 2
    most = SCORES_AT_A_TIME.get(jax.default_backend(), SCORES_ELSEWHERE)
    n = min(max(most // scores, 1), total)
    order = jnp.argsort(-count_M)
    # The last portion is filled with lanes of count 0.
    count = jnp.pad(count_M[order], (0, -total % n)).reshape(-1, n)
    return (jnp.pad(order, (0, -total % n)).reshape(-1, n), count), jnp.argsort(order)


def _unsorted(x: Array, inverse_M: Array) -> Array:
    """`[M / N, N, ...] -> [M, ...]` in the order of the rows."""
    return x.reshape(-1, *x.shape[2:])[inverse_M]
