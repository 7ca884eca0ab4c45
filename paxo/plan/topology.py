"""Names of topologies read, and the devices of a TPU that is not here."""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

from paxo.overrides import SettingsError
from paxo.plan.chips import GPUS, TPUS, Chip

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, gpu:h200x8 or cpu"
# Chips of one host of a TPU, as libtpu has them.
HOST_CHIPS = 4
# Slices that are rented, from small to large.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _DEEP, "tpu7x": _DEEP}
# libtpu reads them when it is loaded. No metadata server tells it about a machine, any number of
# processes may load it where no chip is opened, and it writes no log files.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are joined.

    Attributes:
        name: as it was given.
        platform: "tpu", "gpu" or "cpu".
        chip: what one device can do.
        sides: of the torus, in chips; () for GPUs and CPUs.
        num_devices: as JAX counts them.
    """

    name: str
    platform: str
    chip: Chip
    sides: tuple[int, ...]
    num_devices: int

    @property
    def num_chips(self) -> int:
        """What is paid for: on TPU7x a chip holds two devices."""
        return self.num_devices // self.chip.devices_per_chip

    @property
    def num_processes(self) -> int:
        """One for each host of TPUs; of GPUs one in all on one node, else one for each GPU."""
        if self.platform == "tpu":
            return -(-self.num_chips // HOST_CHIPS)
        return self.num_devices if 0 < self.chip.node < self.num_devices else 1

    @property
    def compiles(self) -> bool:
        """Whether programs for it can be compiled here."""
        return self.platform in ("tpu", "cpu")

    def devices(self) -> list[Any]:
        """Devices to compile for; nothing can be run on those of a TPU.

        Raises:
            SettingsError: without libtpu, for a layout that it does not know, and for GPUs.
        """
        if self.platform == "cpu":
            import jax

            return jax.local_devices(backend="cpu")
        if self.platform == "gpu":
            raise SettingsError(f"{self.name}: nothing can be compiled for a GPU that is not here")
        return _tpu_devices(self)


def parse_topology(text: str) -> Topology:
    """The topology that a text names.

    Raises:
        SettingsError: for a kind, a number of sides or a slice that does not exist.

    >>> parse_topology("v5e:4x8").num_devices, parse_topology("gpu:h100x16").num_devices
    (32, 16)
    >>> parse_topology("v5e:3x5")
    Traceback (most recent call last):
    paxo.overrides.SettingsError: topology 'v5e:3x5': there is no such slice; v5e comes as 1x1, ...
    """
    kind, _, layout = text.partition(":")
    if kind == "cpu" and not layout:
        return _local_cpu()
    if kind == "gpu":
        return _gpus(text, layout)
    if kind not in TPUS:
        near = difflib.get_close_matches(kind, (*TPUS, "gpu", "cpu"), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        raise SettingsError(f"topology {text!r}: unknown kind {kind!r}{meant} It is {EXAMPLES}")
    sides = _sides(layout)
    if layout not in SLICES[kind] and not _large_cuboid(kind, sides):
        raise SettingsError(
            f"topology {text!r}: there is no such slice; {kind} comes as {', '.join(SLICES[kind])}"
            + (", or with all sides multiples of 4" if TPUS[kind].dims == 3 else "")
        )
    chip = TPUS[kind]
    return Topology(text, "tpu", chip, sides, math.prod(sides) * chip.devices_per_chip)


def slices(kind: str) -> list[Topology]:
    """The usual slices of a kind of TPU, from small to large."""
    return [parse_topology(f"{kind}:{layout}") for layout in SLICES[kind]]


def _sides(layout: str) -> tuple[int, ...]:
    parts = layout.split("x")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _large_cuboid(kind: str, sides: tuple[int, ...]) -> bool:
    """Whether a three-dimensional slice is made of whole cubes of 4 x 4 x 4, as large ones are."""
    most = math.prod(_sides(SLICES[kind][-1]))
    return (
        TPUS[kind].dims == 3 == len(sides)
        and all(side and side % 4 == 0 for side in sides)
        and math.prod(sides) <= most
    )


def _gpus(text: str, layout: str) -> Topology:
    kind, _, number = layout.rpartition("x")
    if kind not in GPUS or not number.isdecimal() or int(number) < 1:
        raise SettingsError(
            f"topology {text!r}: GPUs are given as gpu:KINDxNUMBER, as in gpu:h200x8; kinds are "
            f"{', '.join(GPUS)}"
        )
    chip, count = GPUS[kind], int(number)
    if count > chip.node and count % chip.node:
        raise SettingsError(
            f"topology {text!r}: more than one node of {chip.node} GPUs comes in whole nodes"
        )
    return Topology(text, "gpu", chip, (), count)


def _local_cpu() -> Topology:
    """This machine's CPU, its memory shared by JAX's CPU devices, its speed measured."""
    import jax

    count = len(jax.local_devices(backend="cpu"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    flops, bandwidth = _measured_cpu()
    chip = Chip(
        "cpu",
        memory,
        flops / count,
        bandwidth / count,
        bandwidth / count,
        figures="measured here: a product of two float32 matrices, and a copy",
    )
    return Topology("cpu", "cpu", chip, (), count)


def _measured_cpu() -> tuple[float, float]:
    """Operations and bytes a second, the best of a few tries."""
    import time

    import jax
    import jax.numpy as jnp

    size = 1024
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        large = jnp.ones(2**24, jnp.float32)
        product, copy = jax.jit(jnp.matmul), jax.jit(lambda y: y + 1)

        def seconds(function, *arguments) -> float:
            function(*arguments).block_until_ready()
            spans = []
            for _ in range(5):
                start = time.perf_counter()
                function(*arguments).block_until_ready()
                spans.append(time.perf_counter() - start)
            return min(spans)

        return 2 * size**3 / seconds(product, x, x), 2 * large.nbytes / seconds(copy, large)


def _tpu_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise SettingsError(
            f"topology {topology.name!r}: compiling for a TPU that is not here needs libtpu; "
            "pip install 'paxo[plan]'"
        )
    import jax
    from jax.experimental import topologies

    with _environment(LIBTPU):
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            raise SettingsError(f"topology {topology.name!r}: libtpu says: {error}") from error
    devices = list(described.devices)
    if len(devices) != topology.num_devices:
        raise SettingsError(
            f"topology {topology.name!r}: libtpu has {len(devices)} devices, the table "
            f"{topology.num_devices}"
        )
    return devices


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that are not set otherwise, for a while."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
