"""Rows of a batch over the devices of a mesh, and over the processes whose devices these are.

Every process reads, packs and judges the rows of its own devices alone. The global array is put
together of what each has (`place_rows`); what is computed from it comes back either as a process's
own rows (`own_rows`) or whole, on all of them (`everywhere`). What the processes have on their
hosts is put together by `from_all`, what they were told to do each by `from_each`. Process 0 alone
writes what people read (`written_by_first`).
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = PartitionSpec(("data", "fsdp"))
GATHERED_BYTES = 1 << 26  # what `from_each` holds on a device at a time


class RowShare(NamedTuple):
    """Which part of each batch is a process's own: the `index`-th of `count` equal ones."""

    index: int
    count: int


def row_share(mesh: Mesh) -> RowShare:
    """The share of every batch whose rows lie on this process's devices.

    Processes have the same index where `tensor` spans hosts: they hold, and give, the same rows.

    Args:
        mesh: with axes `data` and `fsdp`, over all processes.

    Raises:
        ValueError: if the devices of two processes hold rows in common, but not the same ones.

    >>> row_share(jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1]))
    RowShare(index=0, count=1)
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in NamedSharding(mesh, ROWS).devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    here = held.get(jax.process_index())
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if here is None or len({len(s) for s in shares}) > 1 or sum(map(len, shares)) != ways:
        raise ValueError(
            f"mesh {dict(mesh.shape)} cuts the {ways} row shards across {len(held)} processes "
            "unevenly: choose sizes of data and fsdp whose product divides, or is divided by, the "
            "number of processes"
        )
    return RowShare(shares.index(tuple(sorted(here))), len(shares))


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch on the devices of a mesh.

    Args:
        batch: pytree of `[R, ...]`: host arrays with this process's rows, in the order of its
            devices, or arrays that lie on a mesh over the same processes already.
        mesh: with axes `data` and `fsdp`, whose product divides the global number of rows.

    Returns:
        The same pytree of global arrays, split by rows.
    """
    sharding = NamedSharding(mesh, ROWS)

    def place(x: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(x, jax.Array):
            # What a scorer on this mesh has computed lies there already.
            if x.sharding.is_equivalent_to(sharding, x.ndim):
                return x
            if not x.is_fully_addressable:
                return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, batch)


def own_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Of global arrays `[R, ...]` on a mesh, the rows of this process as host arrays.

    Host arrays, and arrays that only this process has, are its own as a whole.
    """

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        x = jax.device_put(x, NamedSharding(mesh, ROWS))
        # Devices along `tensor` hold copies.
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(fetch, tree)


def everywhere(tree: Any) -> Any:
    """Global arrays as whole host arrays on every process; each process must call it.

    >>> everywhere({"labels": jax.numpy.ones(2)})
    {'labels': array([1., 1.], dtype=float32)}
    """

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def from_first(call: Callable[[], Any]) -> Any:
    """What a call gives on process 0, on all of them; each process must call this.

    For what is done once: to ask a judge, to read or write a file. The value is pickled.

    Raises:
        Exception: what the call raised, on every process.

    >>> from_first(lambda: {"wins": 3})
    {'wins': 3}
    """
    if jax.process_count() == 1:
        return call()
    told = _outcome(call) if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    data = np.frombuffer(told.ljust(size, b"\0"), np.uint8)
    return _value(multihost_utils.broadcast_one_to_all(data).tobytes())


def from_each(call: Callable[[], Any]) -> list[Any]:
    """What a call gives on each process, in their order, on all of them; each must call this.

    For work on the host that is shared out. The values are pickled.

    Raises:
        Exception: what the call raised on the first process on which it raised, on every process.

    >>> from_each(lambda: {"records": 3})
    [{'records': 3}]
    """
    count = jax.process_count()
    if count == 1:
        return [call()]
    told = _outcome(call)
    piece = max(GATHERED_BYTES // count, 1)
    sizes = multihost_utils.process_allgather(np.array(divmod(len(told), piece), np.int32))
    sizes = [int(pieces) * piece + int(rest) for pieces, rest in sizes]
    parts = []
    for start in range(0, max(sizes), piece):
        data = np.frombuffer(told[start : start + piece].ljust(piece, b"\0"), np.uint8)
        parts.append(multihost_utils.process_allgather(data))
    whole = np.concatenate(parts, axis=1)
    return [_value(row[:size].tobytes()) for row, size in zip(whole, sizes)]


def written_by_first(write: Callable[..., None]) -> Callable[..., None]:
    """The function on process 0, nothing on the others; alone, a process starts no backend for it.

    >>> written_by_first(print)("results")
    results
    """

    @functools.wraps(write)
    def on_first(*args: Any, **kwargs: Any) -> None:
        if not jax.distributed.is_initialized() or jax.process_index() == 0:
            write(*args, **kwargs)

    return on_first


def _outcome(call: Callable[[], Any]) -> bytes:
    """What a call returns or raises, pickled."""
    try:
        return pickle.dumps((True, call()))
    except Exception as error:
        return pickle.dumps((False, error))


def _value(told: bytes) -> Any:
    good, value = pickle.loads(told)
    if not good:
        raise value
    return value


def own_part(batch: Any, mesh: Mesh) -> Any:
    """Of host arrays `[R, ...]` that every process has whole, the rows that are this one's."""
    share = row_share(mesh)
    return jax.tree.map(lambda x: np.array_split(x, share.count)[share.index], batch)


def from_all(tree: Any, mesh: Mesh) -> Any:
    """The host arrays `[N, ...]` of all processes one behind another, on every one of them.

    The N may differ, the further axes may not. Of processes that hold the same rows of batches, one
    counts. Each process must call it.

    Args:
        tree: pytree of host arrays that lead with the same N.
        mesh: over all processes.

    >>> mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    >>> from_all({"ids": np.arange(3)}, mesh)
    {'ids': array([0, 1, 2])}
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    share, rows = row_share(mesh).index, len(jax.tree.leaves(tree)[0])
    shares, sizes = multihost_utils.process_allgather(np.array([share, rows])).T
    first = [int(np.flatnonzero(shares == index)[0]) for index in range(shares.max() + 1)]

    def join(x: np.ndarray) -> np.ndarray:
        short = ((0, sizes.max() - rows), *((0, 0),) * (np.ndim(x) - 1))
        each = multihost_utils.process_allgather(np.pad(x, short))
        return np.concatenate([each[process, : sizes[process]] for process in first])

    return jax.tree.map(join, tree)
