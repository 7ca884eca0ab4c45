"""`paxo plan`: the figures of a run on a topology, as one record that JSON can hold."""

import dataclasses
import logging
import math
from typing import Any

import jax

from paxo.models.config import ModelConfig
from paxo.overrides import SettingsError
from paxo.plan.chips import TPUS
from paxo.plan.compiled import HALF_STEP, Compiled, compile_programs
from paxo.plan.estimate import SPARE, Estimate, estimate
from paxo.plan.kinds import first_layout, kind_of
from paxo.plan.layout import Layout, model_config
from paxo.plan.rounds import Drawing
from paxo.plan.search import estimates, fastest_sampler, fitting, smallest
from paxo.plan.shapes import Run, make_run, relaid
from paxo.plan.topology import Topology, parse_topology

logger = logging.getLogger(__name__)

# So many times a device's memory, by the estimate: to compile it would only cost minutes.
HOPELESS = 1.5
# Layouts of the search that are shown.
BEST = 3
TRAINING = ("step", HALF_STEP, "scorer")
LEFT_OUT = (
    "Judges, evaluation, what targets compute on packed rows (values and advantages) and what the "
    "hosts do between programs are left out of a round's time"
)


def plan(
    settings: Any, topology: str, *, model: str | None = None, compiled: int = 3
) -> dict[str, Any]:
    """What a run needs and takes on a topology.

    Args:
        settings: an `Experiment`, or a `SelfPlay` of `paxo.rounds`.
        topology: such as "v5e:16x16", or a kind of TPU alone: its smallest slice that holds the
            run is then found.
        model: name of a known shape that replaces the settings' model.
        compiled: layouts of the search that are compiled beside the run's own, of the best 3; with
            0 nothing is, and all figures are analytic.

    Returns:
        Nested dicts of names, numbers, texts and None, as plan.json holds them. Bytes are of one
        device, seconds of a program; see `paxo.plan.page` for what they mean.

    Raises:
        SettingsError: for a topology, model or mesh that cannot be, for other settings, and for a
            method of self-play of which no round is like the next.
    """
    kind_of(settings)
    config = model_config(settings, model)
    if topology in TPUS:
        return _smallest(settings, config, topology, model, compiled)
    place = parse_topology(topology)
    layout = first_layout(settings, config, place.num_devices)
    run = make_run(settings, config, layout, place.num_processes)
    return _planned(run, place, model, compiled)


def _smallest(
    settings: Any, config: ModelConfig, kind: str, model: str | None, compiled: int
) -> dict[str, Any]:
    """The plan of the smallest slice that holds the run, by the compiler if it is asked.

    No mesh of the settings counts: which are possible depends on the slice.
    """
    settings, too_small = kind_of(settings).anywhere(settings.mesh), []
    for topology, found in smallest(settings, config, kind):
        for layout in found:
            run = make_run(settings, config, layout, topology.num_processes)
            made = _planned(run, topology, model, compiled)
            if made["fits"]:
                return made | {"smallest": {"of": kind, "too_small": too_small}}
        too_small.append(topology.name)
    raise SettingsError(
        f"no slice of {kind} holds this run; fewer rows (train.rows_per_batch) or a smaller "
        "optimiser (optimizer.moments_dtype=bfloat16) need less"
    )


def _planned(run: Run, topology: Topology, model: str | None, compiled: int) -> dict[str, Any]:
    own = estimate(run, topology)
    programs = _compiled(run, own, topology) if compiled else {}
    others = estimates(run, topology)
    best = fitting(others, topology)[:BEST]
    searched = [
        _searched(run, found, topology, programs, number < compiled)
        for number, found in enumerate(best)
    ]
    spare = _spare(own, programs, topology)
    plays = own.round
    seconds = plays.number * own.round_seconds or run.kind.num_steps * own.scored_step
    hours = seconds / 3600
    return {
        "topology": _topology(topology),
        "model": {
            "name": model or run.kind.model.path or "the model of the settings",
            "parameters": _count(run.params),
            "trained": _count(run.state.params),
            "shape": dataclasses.asdict(run.config),
        },
        "objective": run.kind.objective.name,
        "layout": _layout(run, run.layout),
        "meshes": _meshes(run),
        "assumptions": _assumptions(run),
        "memory": {
            "bytes": own.memory.by_category(),
            "peak": own.memory.peak(),
            "sampling_peak": own.memory.sampling_peak(),
            "anchors": list(plays.anchors),
            "second_state": own.memory.second_state(),
            "spare": own.spare(topology),
        },
        "compiled": {name: _program(program) for name, program in programs.items()},
        "compiled_because": _why(programs, compiled, topology),
        "fits": spare >= SPARE,
        "spare": spare,
        "flops": {
            "step": own.flops,
            "useful": own.useful_flops,
            "step_per_device": own.flops / topology.num_devices,
        },
        "collective_bytes": {name: dict(getattr(own.traffic, name)) for name in ("step", "scorer")},
        "time": {
            "step": own.step._asdict() | {"bound": own.step.bound},
            "scorer": own.scorer._asdict() | {"bound": own.scorer.bound},
            "limited_by": own.step.limited_by,
            "scored_step": own.scored_step,
            "mfu_bound": own.mfu(topology),
            "tokens_per_second": own.tokens_per_second,
            "steps": run.kind.num_steps,
            "run_seconds": seconds,
            "chip_hours": hours * topology.num_chips,
        },
        "round": {
            "number": plays.number,
            "prompts": plays.prompts,
            "candidates": _completions(plays.draws),
            "against": _completions(plays.opponents),
            "drawn": plays.drawn,
            "steps": own.steps,
            "sampling": own.sampler.bound,
            "opponents": own.opponents.bound,
            "scoring": own.steps * own.references * own.scorer.bound,
            "step": own.steps * own.step.bound,
            "seconds": own.round_seconds,
            "chip_hours": own.round_seconds / 3600 * topology.num_chips,
            "fastest_sampling": None if plays.number else _fastest_sampling(others, topology),
            "left_out": LEFT_OUT if plays.number else None,
        },
        "search": searched,
    }


def _compiled(run: Run, own: Estimate, topology: Topology) -> dict[str, Compiled]:
    if not topology.compiles:
        return {}
    if own.memory.needed() > HOPELESS * topology.chip.hbm_bytes:
        logger.info("not compiled: the estimate alone is %.0f times the memory", own.memory.needed()
                    / topology.chip.hbm_bytes)  # fmt: skip
        return {}
    return compile_programs(run, topology)


def _searched(
    run: Run,
    found: Estimate,
    topology: Topology,
    programs: dict[str, Compiled],
    compiled: bool,
) -> dict[str, Any]:
    """A layout of the search; its step is compiled unless it is the run's own."""
    if found.layout != run.layout:
        other = relaid(run, found.layout)
        make = compiled and topology.compiles
        programs = compile_programs(other, topology, ("step", HALF_STEP)) if make else {}
    spare = _spare(found, programs, topology)
    return {
        "layout": _layout(run, found.layout),
        "scored_step": found.scored_step,
        "round_seconds": found.round_seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu_bound": found.mfu(topology),
        "estimated_spare": found.spare(topology),
        "compiled": {name: _program(program) for name, program in programs.items()},
        "fits": spare >= SPARE,
        "spare": spare,
    }


def _fastest_sampling(found: list[Estimate], topology: Topology) -> dict[str, Any] | None:
    best = fastest_sampler(found, topology)
    return None if best is None else {
        "mesh": best.layout.mesh_shape, "seconds": best.sampler.bound
    }  # fmt: skip


def _spare(own: Estimate, programs: dict[str, Compiled], topology: Topology) -> float:
    """What is left: by the compiler where it was asked, else by the estimate.

    Drawing counts where the run draws, not where the page tells what that would be.
    """
    wanted = programs if own.memory.draws else [name for name in TRAINING if name in programs]
    peaks = [programs[name].peak for name in wanted]
    if peaks and own.memory.draws and not programs.keys() & own.round.programs.keys():
        peaks.append(own.memory.sampling_peak())
    return 1 - max(peaks) / topology.chip.hbm_bytes if peaks else own.spare(topology)


def _why(programs: dict[str, Compiled], compiled: int, topology: Topology) -> str:
    if programs:
        return "Programs were compiled for these devices"
    if not compiled:
        return "Nothing was to be compiled: all figures are analytic"
    if not topology.compiles:
        return "No program can be compiled for a GPU that is not here: all figures are analytic"
    return "Nothing was compiled: by the estimate the run is far from fitting"


def _topology(topology: Topology) -> dict[str, Any]:
    chip = topology.chip
    return {
        "name": topology.name,
        "platform": topology.platform,
        "devices": topology.num_devices,
        "chips": topology.num_chips,
        "hbm_bytes": chip.hbm_bytes,
        "peak_flops": chip.peak_flops,
        "hbm_bytes_per_second": chip.hbm_bytes_per_second,
        "link_bytes_per_second": chip.link_bytes_per_second,
        "figures": chip.figures,
    }


def _layout(run: Run, layout: Layout) -> dict[str, Any]:
    return dataclasses.asdict(layout) | {"flags": run.kind.flags(layout)}


def _completions(drawings: tuple[Drawing, ...]) -> int:
    """Those of each prompt."""
    return sum(drawing.config.num_candidates for drawing in drawings)


def _meshes(run: Run) -> dict[str, dict[str, int]]:
    """Role -> sizes of mesh axes of the frozen policies that lie differently from the run."""
    found = {role: run.layout_of(role).mesh_shape for role in run.references}
    return {role: sizes for role, sizes in found.items() if sizes != run.layout.mesh_shape}


def _assumptions(run: Run) -> dict[str, float]:
    return run.lengths._asdict() | {
        "candidates": run.row.candidates,
        "scored_slots": run.row.slots,
        "groups_per_row": run.groups,
    }


def _program(program: Compiled) -> dict[str, Any]:
    values = dataclasses.asdict(program) | {"peak": program.peak}
    # JSON has no nan: what the compiler does not count is null.
    return {
        name: None if isinstance(x, float) and math.isnan(x) else x for name, x in values.items()
    }


def _count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
