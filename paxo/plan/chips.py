"""What one device of each kind can do, from the makers' data sheets.

Rates are peaks: nothing runs faster. HBM is what a program gets: of a TPU's what libtpu says when a
program is too large.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        name: as in a topology.
        hbm_bytes: memory that programs may use.
        peak_flops: dense bfloat16 operations a second, multiplications and additions.
        hbm_bytes_per_second: of its memory.
        link_bytes_per_second: of one link to a neighbour, in one direction; on GPUs of all its
            links to its own node together.
        dims: dimensions of the torus; 0 for GPUs and CPUs.
        devices_per_chip: devices that share what is rented as a chip.
        wraps_at: a side of the torus of a multiple of this length is a ring; in three dimensions,
            where optical switches close it, only if all sides are.
        node: devices of a node, behind which `network_bytes_per_second` counts; 0 for one network.
        network_bytes_per_second: of a device to other nodes, in one direction.
        figures: where these numbers are from.
    """

    name: str
    hbm_bytes: float
    peak_flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dims: int = 0
    devices_per_chip: int = 1
    wraps_at: int = 0
    node: int = 0
    network_bytes_per_second: float = 0.0
    figures: str = "maker's data sheet"


# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, a chip: bfloat16 197, 459, 918 and 2307
# TFLOP/s; HBM 16, 95, 32 and 192 GiB of 819, 2765, 1638 and 7380 GB/s; links, all of them in both
# directions, 400, 1200, 800 and 1200 GB/s over 4, 6, 4 and 6. The operations are those of JAX's
# pallas/mosaic/tpu_info, the links those of jax-ml/scaling-book, tpus.md.
TPUS = {
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 50e9, dims=2, wraps_at=16),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 100e9, dims=3, wraps_at=4),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 100e9, dims=2, wraps_at=16),
    # Two chiplets a chip, each a device with half of everything but the links between chips.
    "tpu7x": Chip(
        "tpu7x", 94.75 * GIB, 1153e12, 3690e9, 50e9, dims=3, devices_per_chip=2, wraps_at=4
    ),
}
# NVIDIA's data sheets of SXM boards (A100 with 80 GB): dense bfloat16, NVLink in one direction.
GPUS = {
    "a100": Chip("a100", 79 * GIB, 312e12, 2039e9, 300e9, node=8, network_bytes_per_second=25e9),
    "h100": Chip("h100", 79 * GIB, 989e12, 3350e9, 450e9, node=8, network_bytes_per_second=50e9),
    "h200": Chip("h200", 139 * GIB, 989e12, 4800e9, 450e9, node=8, network_bytes_per_second=50e9),
    "b200": Chip("b200", 178 * GIB, 2250e12, 8000e9, 900e9, node=8, network_bytes_per_second=50e9),
}
