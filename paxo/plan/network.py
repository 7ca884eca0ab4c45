"""Bytes that devices send one another in a step, by mesh axis, and how fast an axis is."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxo.models.config import ModelConfig
from paxo.plan.flops import layer_params
from paxo.plan.layout import Layout
from paxo.plan.shapes import Run
from paxo.plan.topology import Topology

AXES = ("data", "fsdp", "tensor")


class Traffic(NamedTuple):
    """Mesh axis -> bytes that one device receives, in a program."""

    step: dict[str, float]
    scorer: dict[str, float]


def traffic_of(run: Run) -> Traffic:
    """What a run's programs send.

    A step gathers each layer's weights where they are used, forward and backward, and reduces their
    gradients to the devices that hold them; copies add gradients up; where heads are split, the
    outputs of attention and SwiGLU are.

    A compiler may send more. libtpu 0.0.52 adds gradients up whole on all devices, twice the bytes,
    where fsdp takes all of v5e:8x8, v5e:16x16, v6e:16x16, v5p:4x4x4 or v5p:4x4x8, under any of its
    options for reduce-scatters; not on v5e:8x16, nor where data is 2 and fsdp half of a slice.
    """
    config, layout = run.config, run.layout
    size = jnp.dtype(config.compute_dtype).itemsize
    layers = size * config.num_layers * layer_params(config) / layout.tensor
    matrix = config.hidden_size * config.vocab_size / layout.tensor
    own = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(run.state.params))
    part = layout.microbatches
    gathered = _gathered(run)
    # Layers' gradients travel in the dtype of the products, others in float32. A frozen base has
    # none: adapters alone do.
    gradients = own / layout.tensor if run.policy.frozen else layers + 4 * matrix
    tokens = layout.rows_per_device * layout.row_length * part
    narrower = jnp.dtype(config.param_dtype).itemsize - size
    stacked = config.num_layers * layer_params(config)
    copied = own if run.policy.frozen else own - narrower * stacked
    return Traffic(
        step={
            "data": 2 * _others(layout.data) * copied / (layout.fsdp * layout.tensor),
            "fsdp": part * (2 * gathered + _others(layout.fsdp) * gradients),
            "tensor": _tensor(config, layout, tokens, passes=3 if config.remat == "full" else 2),
        },
        scorer=pass_traffic(run, tokens),
    )


def pass_traffic(run: Run, tokens: float) -> dict[str, float]:
    """What a pass without gradients over so many tokens of each device sends, by mesh axis."""
    return {
        "data": 0.0,
        "fsdp": _gathered(run),
        "tensor": _tensor(run.config, run.layout, tokens, passes=1),
    }


def axis_bandwidths(layout: Layout, topology: Topology) -> dict[str, float]:
    """Bytes a second that a device receives over each mesh axis, when it is alone.

    On a torus an axis of n devices takes as many sides as hold n; a side that is a ring is used
    both ways. `tensor` lies innermost. On GPUs an axis that leaves the node has its network.
    """
    chip = topology.chip
    if not topology.sides:
        inner = {"tensor": layout.tensor, "fsdp": layout.tensor * layout.fsdp}
        inner["data"] = inner["fsdp"] * layout.data
        node = chip.node or topology.num_devices
        fast, slow = chip.link_bytes_per_second, chip.network_bytes_per_second
        return {axis: fast if inner[axis] <= node else slow for axis in AXES}
    left = sorted(topology.sides)
    bandwidths = {}
    for axis in reversed(AXES):
        ways, used = layout.mesh_shape[axis] / chip.devices_per_chip, []
        while left and math.prod(used) < ways:
            used.append(left.pop(0) if math.prod(used) * left[0] >= ways else left.pop())
        # A side that another axis shares still carries this one.
        sides = used or [max(topology.sides)]
        links = sum(2 if _is_ring(side, topology) else 1 for side in sides)
        bandwidths[axis] = links * chip.link_bytes_per_second
    return bandwidths


def _is_ring(side: int, topology: Topology) -> bool:
    sides = topology.sides if topology.chip.dims == 3 else (side,)
    return all(each % topology.chip.wraps_at == 0 for each in sides)


def _others(ways: int) -> float:
    """The share of an array that lies on the other devices of an axis."""
    return (ways - 1) / ways


def _tensor(config: ModelConfig, layout: Layout, tokens: float, passes: int) -> float:
    """Sums of the outputs of attention and SwiGLU over the devices that share a layer."""
    size = jnp.dtype(config.compute_dtype).itemsize
    once = 2 * config.num_layers * tokens * config.hidden_size * size
    return passes * 2 * _others(layout.tensor) * once


def _gathered(run: Run) -> float:
    """Weights that a pass brings from the other devices of fsdp."""
    config, layout = run.config, run.layout
    weights = config.num_layers * layer_params(config) + config.hidden_size * config.vocab_size
    size = jnp.dtype(config.compute_dtype).itemsize
    return _others(layout.fsdp) * size * weights / layout.tensor
