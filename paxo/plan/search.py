"""Other layouts of the same training: which are possible, which fit, which are fastest.

What is learnt stays: the tokens of a step are those of the settings, or in self-play the groups of
a step, whose rows are padded as the layout needs it. Free are the mesh, the number of microbatches,
what the backward pass computes again, and the length of rows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from paxo.models.config import ModelConfig
from paxo.overrides import SettingsError
from paxo.plan.estimate import SPARE, Estimate, estimate
from paxo.plan.kinds import first_layout, kind_of
from paxo.plan.layout import Layout, abstract_mesh
from paxo.plan.memory import Held, held_bytes
from paxo.plan.shapes import Run, make_run, relaid
from paxo.plan.topology import Topology, slices

REMATS = ("none", "dots", "full")
# Microbatches of fewer tokens than this a device keep no accelerator busy.
MIN_TOKENS = 512
# Shares of a device's memory by which an estimate may be too high.
SLACK = 0.05


def layouts(run: Run, topology: Topology) -> Iterator[Layout]:
    """Possible layouts of as much in a step as the run has; its own comes first.

    Rows are as long, half or twice as long; a row still holds the longest group.
    """
    first, kind, config = run.layout, run.kind, run.config
    rows_of = functools.partial(kind.rows, run.tokens, run.lengths)
    shortest = run.lengths.max_prompt + run.row.candidates * run.lengths.max_completion
    row_lengths = [first.row_length]
    if not kind.fixed_rows:
        row_lengths += [first.row_length // 2, first.row_length * 2]
    own = [role for role in run.references if kind.mesh_of(role) is not None]
    frozen = [run.layout_of(role) for role in own]
    seen = {first}
    yield first
    for length, (data, fsdp, tensor) in itertools.product(
        row_lengths, _meshes(config, topology.num_devices)
    ):
        ways = data * fsdp
        whole = rows_of(length, ways, 1) if length >= shortest else None
        if whole is None:
            continue
        for parts, remat in itertools.product(_divisors(whole // ways), REMATS):
            rows = rows_of(length, ways, parts)
            if any(rows % (each.data * each.fsdp) for each in frozen):
                continue
            if parts > 1 and rows // (data * fsdp * parts) * length < MIN_TOKENS:
                continue
            layout = Layout(data, fsdp, tensor, rows, length, parts, remat)
            if layout not in seen:
                seen.add(layout)
                yield layout


def estimates(run: Run, topology: Topology) -> list[Estimate]:
    """Estimates of all layouts, the fastest first; of equal ones that which needs less memory.

    Ranked by `Estimate.ranked`.

    Args:
        run: what the settings ask for.
        topology: where it shall run.
    """
    held: dict[tuple, Held] = {}

    def of(layout: Layout) -> Estimate:
        other, sizes = relaid(run, layout), tuple(layout.mesh_shape.values())
        if sizes not in held:
            held[sizes] = held_bytes(other, abstract_mesh(layout, topology.platform))
        return estimate(other, topology, held[sizes])

    def key(found: Estimate) -> tuple[float, int]:
        return round(found.ranked, 6), found.memory.needed()

    return sorted(map(of, layouts(run, topology)), key=key)


def fitting(found: list[Estimate], topology: Topology) -> list[Estimate]:
    """Those of the estimates that fit with `SPARE` to spare."""
    return [e for e in found if e.spare(topology) >= SPARE]


def fastest_sampler(found: list[Estimate], topology: Topology) -> Estimate | None:
    """The one that draws completions fastest, of those in which that fits; None without one.

    Weights that are split over `fsdp` are gathered again for every token.
    """
    room = (1 - SPARE) * topology.chip.hbm_bytes
    fits = [e for e in found if e.memory.sampling_peak() <= room]
    return min(fits, key=lambda e: e.sampler.bound, default=None)


def smallest(
    settings: Any, config: ModelConfig, kind: str
) -> Iterator[tuple[Topology, list[Layout]]]:
    """The slices that may hold a run, from small to large, each with the layouts to be compiled.

    Those are the fastest that fits and the one that leaves most memory; that alone where it misses
    by no more than estimates are off.

    Args:
        settings: an `Experiment` or a `SelfPlay`; its mesh and microbatches do not count.
        config: of the model.
        kind: of TPU, such as "v5p".
    """
    for topology in slices(kind):
        first = free_layout(settings, config, topology.num_devices)
        if first is None:
            continue
        run = make_run(settings, config, first, topology.num_processes)
        found = estimates(run, topology)
        roomiest = max(found, key=lambda e: e.spare(topology))
        if roomiest.spare(topology) >= SPARE - SLACK:
            fastest = next(iter(fitting(found, topology)), roomiest)
            yield topology, list(dict.fromkeys([fastest.layout, roomiest.layout]))


def free_layout(settings: Any, config: ModelConfig, devices: int) -> Layout | None:
    """A layout from which a search may start, whatever mesh the settings name; None without one."""
    kind = kind_of(settings)
    kind.row_length(kind.lengths(config))  # what is wrong on every mesh is raised
    for data, fsdp, tensor in _meshes(config, devices):
        if data > 1:
            continue
        mesh = dataclasses.replace(settings.mesh, data=1, fsdp=fsdp, tensor=tensor)
        try:
            return first_layout(kind.anywhere(mesh), config, devices)
        except SettingsError:
            continue  # its rows cannot be split so
    return None


def _meshes(config: ModelConfig, devices: int) -> Iterator[tuple[int, int, int]]:
    """Sizes of data, fsdp and tensor; heads and width are split evenly."""
    for tensor in _divisors(devices):
        if config.num_kv_heads % tensor or config.vocab_size % tensor:
            continue
        for fsdp in _divisors(devices // tensor):
            if config.hidden_size % fsdp == 0:
                yield devices // tensor // fsdp, fsdp, tensor


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
