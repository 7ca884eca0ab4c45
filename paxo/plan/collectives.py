"""Bytes that a compiled program's collectives bring to a device, read from its instructions.

Every collective counts as often as its loops turn, and a device receives what it does in a ring: of
an all-gather the shares of the others, of a reduce-scatter as many partial sums, of an all-reduce
both.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_OPERATIONS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_OPERATIONS})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r" compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{} ]*)\}\}")
_ON_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        operation: such as "all-gather".
        nbytes: of its result on one device; of a reduce-scatter of what goes in.
        groups: `[groups, n]` partitions that exchange with one another; of a collective-permute
            pairs.
        times: how often it runs.
    """

    operation: str
    nbytes: float
    groups: np.ndarray
    times: int

    def received(self) -> float:
        """Bytes that a device receives in all."""
        if self.operation == "collective-permute":
            return self.times * self.nbytes
        others = 1 - 1 / self.groups.shape[1]
        ways = 2 if self.operation == "all-reduce" else 1
        return self.times * ways * others * self.nbytes


def collective_bytes(text: str, mesh_shape: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device receives over each mesh axis in one call of a program.

    Args:
        text: the compiled program, `compiled.as_text()`.
        mesh_shape: axis -> size, in the order in which the mesh numbers its devices.

    Returns:
        Axis -> bytes; collectives over several axes at once stand under both names, "data+fsdp".
        Axes over which nothing is sent are left out.

    >>> text = "ENTRY main (x: f32[4]) -> f32[8] {\\n  %y = f32[8]{0} all-gather(%x), " \\
    ...     "replica_groups={{0,1},{2,3}}, dimensions={0}\\n}"
    >>> collective_bytes(text, {"data": 2, "fsdp": 2})
    {'fsdp': 16.0}
    """
    found: dict[str, float] = {}
    for collective in collectives(text, math.prod(mesh_shape.values())):
        if axes := _axes(collective.groups, mesh_shape):
            found[axes] = found.get(axes, 0.0) + collective.received()
    return found


def collectives(text: str, partitions: int) -> list[Collective]:
    """All collectives of a compiled program of so many partitions, each once."""
    bodies, entry = _computations(text)
    found: dict[tuple, Collective] = {}
    for name, times, fused in _reached(bodies, entry, 1, False):
        for number, line in enumerate(bodies[name]):
            if (match := _COLLECTIVE.search(line)) is None:
                continue
            made = _collective(name, match, line, times, partitions)
            channel = _CHANNEL.search(line)
            # A TPU overlaps one with products in several fusions, each of which names it again.
            place = (channel[1], match[2], made.nbytes) if fused and channel else (name, number)
            if place not in found or found[place].times < times:
                found[place] = made
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> instructions, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = bodies.setdefault(match[1], [])
            if line.startswith("ENTRY"):
                entry = match[1]
        elif line.startswith("  ") and bodies:
            body.append(line)
    return bodies, entry


def _reached(
    bodies: Mapping[str, list[str]], name: str, times: int, fused: bool
) -> Iterator[tuple[str, int, bool]]:
    """Computations that run, how often, and whether within a fusion."""
    yield name, times, fused
    for line in bodies[name]:
        if loop := _WHILE.search(line):
            yield from _reached(bodies, loop[2], times * _turns(line, bodies[loop[1]]), fused)
            continue
        if "-done(" in line or "-update(" in line:  # their start has called it already
            continue
        within = fused or " fusion(" in line
        for one, several in _CALLED.findall(line):
            for called in [one] if one else re.findall(r"[\w.\-]+", several):
                if called in bodies:
                    yield from _reached(bodies, called, times, within)


def _turns(line: str, condition: list[str]) -> int:
    """How often a loop turns: as the compiler says, or up to what it compares with; else 1."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = dict(match.groups() for x in condition if (match := _CONSTANT.search(x)))
    bounds = [match[1] for x in condition if (match := _BOUND.search(x))]
    return int(constants[bounds[0]]) if len(bounds) == 1 and bounds[0] in constants else 1


def _collective(
    computation: str, match: re.Match, line: str, times: int, partitions: int
) -> Collective:
    result, operation, started = match.groups()
    sizes = [_nbytes(x) for x in _ARRAY.finditer(result)]
    # A start gives what goes in beside what comes out, of which it is never the larger part.
    if started and operation == "all-gather":
        size = sum(sorted(sizes)[len(sizes) // 2 :])
    elif started and operation != "all-reduce":
        size = max(sizes)
    else:
        size = sum(sizes)
    groups = _groups(line, partitions)
    if operation == "reduce-scatter":
        size *= groups.shape[1]
    elif operation == "all-reduce" and computation.startswith("all-reduce-scatter"):
        operation = "reduce-scatter"  # as a TPU writes it: a fusion that keeps its own part
    return Collective(operation, size, groups, times)


def _nbytes(array: re.Match) -> float:
    kind, bits, sizes = array.groups()
    width = 1 if kind == "pred" else int(bits or 0) / 8
    return width * math.prod(int(size) for size in sizes.split(",") if size)


def _groups(line: str, partitions: int) -> np.ndarray:
    """`[groups, n]` partitions, from any of the ways in which they are written."""
    if match := _IOTA.search(line):
        shape, *order = (_ints(x) for x in match.groups())
        return _ordered(*order).reshape(shape)
    if match := _ON_MESH.search(line):
        mesh, sizes, turned, listed, over = match.groups()
        shape = {name: int(size) for name, size in _AXIS.findall(mesh)}
        axes = [list(shape).index(name) for name, _ in _AXIS.findall(over)]
        numbers = np.array(_ints(listed)) if listed else _ordered(
            _ints(sizes) or list(shape.values()), _ints(turned)
        )  # fmt: skip
        last = np.moveaxis(numbers.reshape(list(shape.values())), axes, range(-len(axes), 0))
        return last.reshape(-1, math.prod(list(shape.values())[i] for i in axes))
    if match := _LISTED.search(line):
        return np.array([_ints(group) for group in match[1].split("},{")])
    return np.arange(partitions)[None]


def _ordered(sizes: list[int], turned: list[int]) -> np.ndarray:
    """The numbers of as many partitions, in the order of their axes `turned`."""
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(turned or range(len(sizes))).ravel()


def _ints(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """The axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), -1)
    differ = (places != places[:, :1]).any((0, 1))
    return "+".join(name for name, yes in zip(mesh_shape, differ) if yes)
