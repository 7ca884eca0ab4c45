"""The lookup of token embeddings where the table is split over the devices of a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from paxo.models.sharding import partition_spec
from paxo.types import Array


def embed(table: Array, tokens: Array, dtype: Any) -> Array:
    """`table [V, D], tokens [R, ...] -> [R, ..., D]` of a dtype; rows of `tokens` stay in place.

    The table stays where it is too: each device looks its part of the vocabulary and of the width
    up for the rows of all devices that share its copy of the parameters, and these swap what they
    found. Left to itself the compiler brings the whole batch, or the table, to every device.

    >>> embed(jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([[1, 1, 0]]), jnp.float32)
    Array([[[2., 3.],
            [2., 3.],
            [0., 1.]]], dtype=float32)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape or mesh.size == 1:
        return table[tokens].astype(dtype)
    rows = partition_spec(("batch",), tokens.shape[:1], mesh.shape)
    if rows == P(None):
        return table[tokens].astype(dtype)
    split = partition_spec(("vocab", "embed"), table.shape, mesh.shape)
    by_vocab, by_width = (axis if axis and mesh.shape[axis] > 1 else None for axis in split)

    def of_device(table: Array, tokens: Array) -> Array:
        if by_width is not None:
            tokens = jax.lax.all_gather(tokens, by_width, tiled=True)
        if by_vocab is None:
            found = table[tokens].astype(dtype)
        else:
            own = tokens - jax.lax.axis_index(by_vocab) * len(table)
            here = (own >= 0) & (own < len(table))
            found = table[jnp.where(here, own, 0)].astype(dtype)
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), by_vocab)
        if by_width is None:
            return found
        return jax.lax.all_to_all(found, by_width, 0, found.ndim - 1, tiled=True)

    into = P(by_vocab, by_width), rows
    return jax.shard_map(of_device, in_specs=into, out_specs=rows)(table, tokens)
