"""Other layouts of the same training: which are possible, which fit, which are fastest.

What is learnt stays: the tokens of a step are those of the settings. Free are the mesh, the number
of microbatches, what the backward pass computes again, and the length of rows.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from paxo.experiment import Experiment
from paxo.models.config import ModelConfig
from paxo.plan.estimate import SPARE, Estimate, estimate
from paxo.plan.layout import Layout, abstract_mesh, first_layout
from paxo.plan.memory import Held, held_bytes
from paxo.plan.shapes import Run, make_run, relaid
from paxo.plan.topology import Topology, slices

REMATS = ("none", "dots", "full")
# Microbatches of fewer tokens than this a device keep no accelerator busy.
MIN_TOKENS = 512
# Shares of a device's memory by which an estimate may be too high.
SLACK = 0.05


def layouts(run: Run, topology: Topology) -> Iterator[Layout]:
    """Possible layouts of as many tokens a step as the run has; its own comes first.

    Rows are as long, half or twice as long; a row still holds the longest group.
    """
    first, settings, config = run.layout, run.settings, run.config
    shortest = run.lengths.max_prompt + run.row.candidates * run.lengths.max_completion
    row_lengths = [first.row_length]
    if settings.data.slots is None:
        row_lengths += [first.row_length // 2, first.row_length * 2]
    tokens = first.rows * first.row_length
    own = [role for role in run.references if getattr(settings, role).mesh is not None]
    frozen = [run.layout_of(role) for role in own]
    seen = {first}
    yield first
    for length, (data, fsdp, tensor) in itertools.product(
        row_lengths, _meshes(config, topology.num_devices)
    ):
        rows, over = divmod(tokens, length)
        if over or length < shortest or rows % (data * fsdp):
            continue
        if any(rows % (each.data * each.fsdp) for each in frozen):
            continue
        for parts, remat in itertools.product(_divisors(rows // (data * fsdp)), REMATS):
            if parts > 1 and rows // (data * fsdp * parts) * length < MIN_TOKENS:
                continue
            layout = Layout(data, fsdp, tensor, rows, length, parts, remat)
            if layout not in seen:
                seen.add(layout)
                yield layout


def estimates(run: Run, topology: Topology) -> list[Estimate]:
    """Estimates of all layouts, the fastest first; of equal ones that which needs less memory.

    Ranked by `Seconds.ranked` of step and scoring.

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
        seconds = found.step.ranked + found.references * found.scorer.ranked
        return round(seconds, 6), found.memory.peak()

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
    settings: Experiment, config: ModelConfig, kind: str
) -> Iterator[tuple[Topology, list[Layout]]]:
    """The slices that may hold a run, from small to large, each with the layouts to be compiled.

    Those are the fastest that fits and the one that leaves most memory; that alone where it misses
    by no more than estimates are off.

    Args:
        settings: of the experiment; its mesh and microbatches do not count.
        config: of the model.
        kind: of TPU, such as "v5p".
    """
    for topology in slices(kind):
        first = free_layout(settings, config, topology.num_devices)
        if first is None:
            continue
        found = estimates(make_run(settings, config, first), topology)
        roomiest = max(found, key=lambda e: e.spare(topology))
        if roomiest.spare(topology) >= SPARE - SLACK:
            fastest = next(iter(fitting(found, topology)), roomiest)
            yield topology, list(dict.fromkeys([fastest.layout, roomiest.layout]))


def free_layout(settings: Experiment, config: ModelConfig, devices: int) -> Layout | None:
    """A layout from which a search may start, whatever mesh the settings name; None without one."""
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, microbatches=1)
    )
    for data, fsdp, tensor in _meshes(config, devices):
        if data == 1 and settings.train.rows_per_batch % fsdp == 0:
            mesh = dataclasses.replace(settings.mesh, data=1, fsdp=fsdp, tensor=tensor)
            return first_layout(dataclasses.replace(settings, mesh=mesh), config, devices)
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
