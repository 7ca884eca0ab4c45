"""Names of axes become placements by one table."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from paxo.models import sharding
from paxo.models.policy import make_policy, param_shapes
from paxo.models.sharding import constrain, make_mesh, param_shardings, partition_spec
from tests.made import TINY

WAYS = {"data": 2, "fsdp": 2, "tensor": 2}


def test_rows_split_over_data_and_fsdp_and_kernels_over_fsdp_and_tensor():
    activation = partition_spec(("batch", "length", "activation_embed"), (8, 5, 6), WAYS)
    assert activation == PartitionSpec(("data", "fsdp"), None, None)
    assert partition_spec(("embed", "gate_up", "mlp"), (6, 2, 4), WAYS) == PartitionSpec(
        "fsdp", None, "tensor"
    )
    assert partition_spec((None, "vocab"), (3, 4), WAYS) == PartitionSpec(None, "tensor")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown axis name 'widht'; known: layer, vocab"):
        partition_spec(("widht",), (4,), WAYS)


def test_names_must_be_as_many_as_dimensions():
    with pytest.raises(ValueError, match=r"name 1 dimensions; the array has shape \(4, 4\)"):
        partition_spec(("embed",), (4, 4), WAYS)


def test_a_dimension_that_does_not_divide_is_replicated_with_one_log_line(caplog):
    sharding._log_replicated.cache_clear()
    with caplog.at_level(logging.WARNING, sharding.__name__):
        for _ in range(3):
            spec = partition_spec(("batch", "kv_heads"), (6, 3), WAYS)
            assert spec == PartitionSpec(None, None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "axis 'batch' of size 6 is replicated: 4 devices do not divide it",
        "axis 'kv_heads' of size 3 is replicated: 2 devices do not divide it",
    ]


def test_every_parameter_has_a_placement_and_the_large_ones_are_split():
    mesh = make_mesh(2, 2, 2)
    policy = make_policy(TINY)
    shapes = param_shapes(TINY)
    placed = param_shardings(policy.logical_axes, shapes, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes)
    for shape, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed)):
        shard = place.shard_shape(shape.shape)
        # Kernels are split over both fsdp and tensor; scales are kept whole.
        assert shape.size // jnp.prod(jnp.array(shard)) == (1 if shape.size <= 32 else 4), shape


def test_one_size_of_a_mesh_may_be_what_is_left():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match=r"needs \d+ devices; there are 8"):
        make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_mesh_sizes_are_positive_and_at_most_one_is_left_open(sizes):
    with pytest.raises(ValueError, match="at least 1, and one may be -1"):
        make_mesh(*sizes)


class Device:
    """Stands for a device on one of several slices."""

    platform, device_kind, process_index = "gpu", "made", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


@pytest.mark.parametrize(
    ("sizes", "axis", "shape"),
    [
        ((-1, 2, 1), "data", (4, 2, 1)),
        ((2, 2, 2), "data", (2, 2, 2)),
        ((1, 8, 1), "fsdp", (1, 8, 1)),
        ((2, 4, 1), "fsdp", (2, 4, 1)),
    ],
)
def test_only_one_axis_of_a_mesh_goes_from_slice_to_slice(sizes, axis, shape):
    devices = [Device(number, number % 2) for number in range(8)]
    mesh = make_mesh(*sizes, devices=devices, slice_axis=axis)
    assert mesh.devices.shape == shape
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for number, name in enumerate(sharding.MESH_AXES):
        along = np.ptp(slices, axis=number).max()
        assert along == (1 if name == axis else 0)
    # One step in so many along the axis changes the slice.
    assert (
        np.abs(np.diff(slices, axis=sharding.MESH_AXES.index(axis)))
        .sum(sharding.MESH_AXES.index(axis))
        .max()
        == 1
    )


def test_slices_that_do_not_divide_their_axis_are_refused_with_the_way_out():
    devices = [Device(number, number // 4) for number in range(8)]
    with pytest.raises(ValueError, match=r"2 slices, which do not divide mesh.data=1.*slice_axis"):
        make_mesh(1, 8, 1, devices=devices)
    with pytest.raises(ValueError, match="must be one of data, fsdp, tensor; got 'rows'"):
        make_mesh(devices=devices, slice_axis="rows")


def test_constrain_places_where_a_mesh_is_set_and_does_nothing_elsewhere():
    x = jnp.zeros((8, 4))
    assert constrain(x, "no such name", None) is x
    with jax.set_mesh(make_mesh(2, 2, 2)):
        placed = jax.jit(lambda x: constrain(x, "batch", "activation_mlp"))(x)
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
