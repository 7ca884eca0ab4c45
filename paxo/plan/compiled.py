"""A run's own programs compiled ahead of time, and what the compiler says of them."""

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paxo.models.sharding import make_mesh
from paxo.plan.chips import GIB
from paxo.plan.collectives import collective_bytes
from paxo.plan.memory import batch_bytes
from paxo.plan.rounds import Drawing
from paxo.plan.shapes import Run, bytes_per_device, on_mesh_of, placement, with_shardings
from paxo.plan.topology import Topology
from paxo.sampling import sampler
from paxo.scoring import make_scorer
from paxo.training.step import compile_step, make_train_step

logger = logging.getLogger(__name__)

HALF_STEP = "half step"
# As XLA says that a program does not fit: by all that it uses, or by what lies between alone.
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_WITHIN = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \([^)]*\)")
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compiled program; bytes are of one device.

    Attributes:
        seconds: of compilation.
        arguments: bytes of its inputs.
        temporaries: bytes of everything between, at most.
        outputs: bytes of its outputs that lie in no input's place.
        beside: bytes of what else lies on the device while it runs.
        flops: operations of a device that the compiler counts; of a loop it counts one turn.
        received: mesh axis -> bytes that collectives bring to a device; empty where it cannot be
            read.
        failure: what the compiler says, where it does not fit; bytes are then its own count.
    """

    seconds: float
    arguments: float
    temporaries: float
    outputs: float
    beside: float
    flops: float
    received: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: str | None = None

    @property
    def peak(self) -> float:
        """Bytes on a device while it runs."""
        return self.arguments + self.temporaries + self.outputs + self.beside


def compile_programs(
    run: Run, topology: Topology, names: tuple[str, ...] | None = None
) -> dict[str, Compiled]:
    """The run's own programs compiled for a topology, by name.

    They are its "step" (of an extragradient round also the "half step", which keeps the state that
    it starts from), its "scorer" and its "sampler" (also that of the "opponents", if that differs).

    Args:
        run: its shapes.
        topology: a TPU's, or "cpu".
        names: of the programs; all where None. A scorer is left out where no frozen policy is
            scored.
    """
    mesh = make_mesh(**run.layout.mesh_shape, devices=topology.devices())
    placed, plays = placement(run, mesh), run.round
    state = bytes_per_device(run.state, placed.state)
    trained = bytes_per_device(run.state.params, placed.state.params)
    params = bytes_per_device(run.params, placed.params)
    references = {
        role: bytes_per_device(run.references[role], placed.references[role])
        for role in run.references
    }
    held = state + sum(references[role] for role in run.copies) + len(plays.anchors) * trained
    rows = (plays.batches - 1) * batch_bytes(run)
    # Opponents of an extragradient round are drawn from where its half step led.
    half = trained if plays.turns > 1 else 0
    # Each program, what it is given of what lies there, and what else there is.
    given = {"step": (lower_step, state, rows)}
    if plays.turns > 1:
        given[HALF_STEP] = (functools.partial(lower_step, donate=False), state, rows)
    if references:
        given["scorer"] = (lower_scorer, next(iter(references.values())), rows)
    for name, drawing in plays.programs.items():
        lower = functools.partial(lower_sampler, drawing=drawing)
        given[name] = (lower, drawing.policies * params, half)
    found = {}
    for name, (lower, inputs, more) in given.items():
        if names is not None and name not in names:
            continue
        make = functools.partial(lower, run, mesh)
        on = on_mesh_of(run.scoring.layout, mesh) if name == "scorer" else mesh
        # Adapters' base is given twice where two policies are, and lies there once.
        beside = max(held + more - inputs, 0)
        found[name] = _compiled(name, make, inputs, beside, dict(on.shape))
    return found


def lower_step(run: Run, mesh: Mesh, *, donate: bool = True) -> Any:
    """The training step, as `paxo run` compiles it; a half step does not donate its state."""
    placed = placement(run, mesh)
    body = make_train_step(
        run.policy,
        run.kind.objective,
        run.optimizer,
        microbatches=run.layout.microbatches,
    )
    return compile_step(body, mesh, placed.state, donate=donate).lower(run.state, run.batch)


def lower_scorer(run: Run, mesh: Mesh) -> Any:
    """The log-probs of a batch under the first frozen policy, on the mesh of that one."""
    run = run.scoring
    mesh = on_mesh_of(run.layout, mesh)
    placed = placement(run, mesh)
    role = next(iter(run.references))
    params = with_shardings(run.references[role], placed.references[role])
    scorer = make_scorer(run.kind.frozen_policy(run.policy, run.config), params, mesh=mesh)
    return scorer.lower(with_shardings(run.batch, placed.batch))


def lower_sampler(run: Run, mesh: Mesh, drawing: Drawing | None = None) -> Any:
    """Completions of a batch of a round's prompts; without `drawing` the candidates'."""
    drawing = next(iter(run.round.programs.values())) if drawing is None else drawing
    placed = placement(run, mesh)
    params = with_shardings(run.params, placed.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return sampler.lower_sampler(
        run.policy,
        drawing.config,
        (0,),
        params,
        with_shardings(run.prompts, placed.batch),
        with_shardings(key, NamedSharding(mesh, PartitionSpec())),
        mesh=mesh,
        reference_params=params if drawing.policies == 2 else None,
    )


def _compiled(
    name: str,
    lower: Callable[[], Any],
    inputs: float,
    beside: float,
    mesh_shape: Mapping[str, int],
) -> Compiled:
    """A program compiled; `inputs` are bytes that it is given, `beside` those that it is not."""
    start = time.perf_counter()
    lowered = lower()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, within = _USED.search(str(error)), _WITHIN.search(str(error))
        found = used or within
        if found is None:
            raise
        return Compiled(
            seconds=time.perf_counter() - start,
            arguments=0.0 if used else inputs,
            temporaries=float(found[1]) * _UNITS[found[2]],
            outputs=0.0,
            beside=beside,
            flops=float("nan"),
            failure=found[0],
        )
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    made = Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        beside=beside,
        flops=cost.get("flops", float("nan")),
        received=_received(program, mesh_shape),
    )
    logger.info("%s compiled in %.0f s: %.2f GiB a device", name, seconds, made.peak / GIB)
    return made


def _received(program: Any, mesh_shape: Mapping[str, int]) -> dict[str, float]:
    """What its collectives bring to a device; nothing where JAX cannot read libtpu's program."""
    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("the program's collectives cannot be read: %s", str(error)[:200])
        return {}
    return collective_bytes(text, mesh_shape)
