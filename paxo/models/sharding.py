"""Names of array axes, and the one table that maps them to mesh axes.

Parameters and activations have rows of their own: fully sharded data parallelism *is* the
difference between them (parameters split over `fsdp` along the width, activations along the batch).
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "kv_heads": "tensor",
    "head_group": None,
    "head_dim": None,
    "gate_up": None,
    "mlp": "tensor",
    "norm": None,
    "lora_rank": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Any = None,
    *,
    slice_axis: str = "data",
) -> Mesh:
    """A mesh with the axes `data, fsdp, tensor`; one of them may be -1 and takes what is left.

    Args:
        data: copies of the parameters.
        fsdp: ways in which their width is split.
        tensor: ways in which heads, the SwiGLU and the vocabulary are split.
        devices: all where None.
        slice_axis: the axis that goes over the slower network, where the devices lie on several
            slices (TPU slices, or nodes of GPUs).

    Raises:
        ValueError: if the sizes do not multiply to the number of devices, or the slices do not
            divide their axis.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh sizes are at least 1, and one may be -1; got {dict(zip(MESH_AXES, sizes))}"
        )
    known = functools.reduce(lambda a, b: a * b, [size for size in sizes if size != -1], 1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
        known = functools.reduce(lambda a, b: a * b, sizes, 1)
    if known != len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes))} needs {known} devices; there are {len(devices)}. "
            "Set one axis to -1 to take what is left."
        )
    # Auto: with the default, Explicit, an embedding lookup with both batch and embed on `fsdp` is
    # rejected.
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        array = _over_slices(sizes, slices, slice_axis, devices)
        return Mesh(array, MESH_AXES, axis_types=axis_types)
    # An axis may take a part of a side of a TPU's torus: `jax.make_mesh` does not split them.
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=axis_types)


def _over_slices(sizes: list[int], slices: int, axis: str, devices: Any) -> np.ndarray:
    """Devices by mesh axes, so that only `axis` connects one slice with another."""
    if axis not in MESH_AXES:
        raise ValueError(f"mesh.slice_axis must be one of {', '.join(MESH_AXES)}; got {axis!r}")
    at = MESH_AXES.index(axis)
    if sizes[at] % slices:
        raise ValueError(
            f"the devices lie on {slices} slices, which do not divide mesh.{axis}={sizes[at]}: set "
            f"it to a multiple of {slices}, or mesh.slice_axis to another axis"
        )
    within, across = list(sizes), [1] * len(sizes)
    within[at], across[at] = sizes[at] // slices, slices
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


@functools.cache
def _log_replicated(name: str, size: int, ways: int) -> None:
    logger.warning(
        "axis %r of size %d is replicated: %d devices do not divide it", name, size, ways
    )


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Any
) -> PartitionSpec:
    """The placement of an array whose axes have these names.

    A dimension that its mesh axes do not divide is replicated, which is logged once.

    Args:
        axes: a name in `RULES` (or None) for each dimension.
        shape: the array's shape.
        mesh_shape: mesh axis -> size.

    Raises:
        ValueError: for a name that `RULES` does not hold.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"axes {tuple(axes)} name {len(axes)} dimensions; the array has shape {tuple(shape)}"
        )
    spec = []
    for name, size in zip(axes, shape):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown axis name {name!r}; known: {', '.join(RULES)}")
        rule = None if name is None else RULES[name]
        mesh_axes = (rule,) if isinstance(rule, str) else (rule or ())
        ways = functools.reduce(lambda a, b: a * b, [mesh_shape[axis] for axis in mesh_axes], 1)
        if size % ways:
            _log_replicated(name, size, ways)
            rule = None
        spec.append(rule)
    return PartitionSpec(*spec)


def param_shardings(logical_axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every parameter.

    Args:
        logical_axes: pytree of tuples of names, as a policy carries it.
        shapes: the same pytree of arrays or `ShapeDtypeStruct`s.
        mesh: from `make_mesh`.
    """
    return jax.tree.map(
        lambda x, axes: NamedSharding(mesh, partition_spec(axes, x.shape, mesh.shape)),
        shapes,
        logical_axes,
    )


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu".

    That of the devices of the mesh that is set, which may be of a machine that is not here; without
    one, JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Places an activation by the names of its axes where a mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "tensor" not in mesh.shape:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))
