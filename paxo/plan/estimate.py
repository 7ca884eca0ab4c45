"""What a run takes at least: the slowest of its products, its memory traffic and its network.

These are bounds. They let everything overlap that can, and every peak be reached.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxo.models.attention import SIZES, SIZES_ELSEWHERE
from paxo.models.config import ModelConfig
from paxo.plan.flops import (
    BLOCK,
    Work,
    layer_params,
    mean_keys,
    scorer_flops,
    step_flops,
    useful_flops,
)
from paxo.plan.layout import Layout, abstract_mesh
from paxo.plan.memory import Held, Memory, cache_bytes, memory_of
from paxo.plan.network import AXES, Traffic, axis_bandwidths, pass_traffic, traffic_of
from paxo.plan.rounds import Drawing, Round
from paxo.plan.shapes import Run
from paxo.plan.topology import Topology
from paxo.scoring import default_chunk

# What shall be left of a device's memory: programs fragment it, and the compiler's plans move.
SPARE = 0.1
# Of two layouts with the same bound the one is faster that leaves less to overlap.
EXPOSED = 0.2


class Seconds(NamedTuple):
    """A program's bounds: of products, of memory traffic, of the network's slowest axis."""

    compute: float
    memory: float
    network: float

    def times(self, number: float) -> "Seconds":
        """Those of so many of it, one behind another."""
        return Seconds(*(number * x for x in self))

    @property
    def bound(self) -> float:
        """The largest."""
        return max(self)

    @property
    def ranked(self) -> float:
        """The bound and a share of what would have to be hidden behind it."""
        return self.bound + EXPOSED * (sum(self) - self.bound)

    @property
    def limited_by(self) -> str:
        """Its name."""
        return self._fields[self.index(max(self))]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The analytic figures of a run on a topology.

    Attributes:
        layout: how it lies there.
        memory: bytes a device by category.
        traffic: bytes that a device receives, by program and mesh axis.
        flops: operations of a step over all devices, as computed.
        useful_flops: those that it cannot do without.
        step: bounds of a training step.
        scorer: of scoring a batch under one frozen policy, on the mesh of the first one.
        sampler: of drawing all candidates of an online round, one at a time for each token.
        opponents: the same of those that they are judged against.
        tokens: positions of a step.
        references: passes of a scorer over a step's rows, one or two for each frozen policy.
        round: what an online round is made of.
    """

    layout: Layout
    memory: Memory
    traffic: Traffic
    flops: float
    useful_flops: float
    step: Seconds
    scorer: Seconds
    sampler: Seconds
    opponents: Seconds
    tokens: int
    references: int
    round: Round

    @property
    def scored_step(self) -> float:
        """Seconds of a step with the log-probs of the frozen policies that it needs."""
        return self.step.bound + self.references * self.scorer.bound

    @property
    def tokens_per_second(self) -> float:
        """Positions a second, scoring included."""
        return self.tokens / self.scored_step

    @property
    def steps(self) -> int:
        """Times that a round takes its step, those that it takes twice counted so."""
        return self.round.turns * self.round.steps

    @property
    def round_seconds(self) -> float:
        """An online round: completions drawn, scored and trained on."""
        return self.sampler.bound + self.opponents.bound + self.steps * self.scored_step

    @property
    def ranked(self) -> float:
        """By what layouts are ranked: seconds of a round, or of a step where none is played."""
        step = self.step.ranked + self.references * self.scorer.ranked
        if not self.round.number:
            return step
        return self.sampler.ranked + self.opponents.ranked + self.steps * step

    def mfu(self, topology: Topology) -> float:
        """The most of the peak that useful operations of a step can reach."""
        peak = topology.num_devices * topology.chip.peak_flops
        return self.useful_flops / (self.step.bound * peak)

    def spare(self, topology: Topology) -> float:
        """The share of a device's memory that is left; negative where the run does not fit."""
        return 1 - self.memory.needed() / topology.chip.hbm_bytes


def estimate(run: Run, topology: Topology, held: Held | None = None) -> Estimate:
    """The analytic figures of a run on a topology; `held` is as for `memory_of`."""
    layout, config, devices = run.layout, run.config, topology.num_devices
    work = work_of(run, topology.platform)
    scoring = run.scoring
    traffic = traffic_of(run)._replace(scorer=traffic_of(scoring).scorer)
    memory = memory_of(run, topology.platform, held)

    def bounds(flops: float, moved: float, sent: dict[str, float], over=layout) -> Seconds:
        speeds = axis_bandwidths(over, topology)
        return Seconds(
            flops / (devices * topology.chip.peak_flops),
            moved / topology.chip.hbm_bytes_per_second,
            max(sent[axis] / speeds[axis] for axis in AXES),
        )

    flops = step_flops(config, work)
    state = sum(memory.resident[name] for name in ("parameters", "moments"))
    passes = 4 if config.remat == "full" else 3
    parts = layout.microbatches
    moved = passes * _step_bytes(run, parts) + 2 * state + 2 * memory.layers["gradients"]

    def drawing(drawings: tuple[Drawing, ...]) -> Seconds:
        each = [_sampling(run, bounds, one) for one in drawings]
        whole = Seconds(*(sum(x) for x in zip(*each))) if each else Seconds(0.0, 0.0, 0.0)
        return whole.times(run.round.turns * run.round.calls)

    return Estimate(
        layout=layout,
        memory=memory,
        traffic=traffic,
        flops=flops,
        useful_flops=useful_flops(config, work),
        step=bounds(flops, moved, traffic.step),
        scorer=bounds(
            scorer_flops(config, work), _step_bytes(scoring, 1), traffic.scorer, scoring.layout
        ),
        sampler=drawing(run.round.draws),
        opponents=drawing(run.round.opponents),
        tokens=run.tokens,
        references=run.kind.scorings(run.references),
        round=run.round,
    )


def work_of(run: Run, platform: str) -> Work:
    """What a step's passes are over on devices of a platform."""
    lengths, row, layout = run.lengths, run.row, run.layout
    group = lengths.prompt + row.candidates * lengths.completion
    adapters = run.state.params.get("lora", {})
    with jax.sharding.use_abstract_mesh(abstract_mesh(layout, platform)):
        rows = layout.rows // layout.microbatches
        chunk = default_chunk(rows, run.config.vocab_size)
    scores = rows * run.config.num_heads * row.length**2
    devices = math.prod(layout.mesh_shape.values())
    in_blocks = scores > devices * SIZES.get(platform, SIZES_ELSEWHERE).dense
    return Work(
        tokens=run.tokens,
        scored=layout.rows * row.slots,
        keys=min(row.length, group / 2 + BLOCK) if in_blocks else row.length,
        needed_keys=mean_keys(lengths.prompt, lengths.completion, row.candidates),
        in_blocks=in_blocks,
        in_chunks=chunk < row.slots,
        adapter_params=sum(math.prod(x.shape) for x in jax.tree.leaves(adapters)),
    )


def _step_bytes(run: Run, parts: int) -> float:
    """Bytes that a pass over a step's rows in so many parts reads and writes on a device."""
    rows = run.layout.rows_per_device * run.layout.microbatches
    return _pass_bytes(run, parts, rows * run.layout.row_length, rows * run.row.slots)


def _pass_bytes(run: Run, parts: int, tokens: float, scored: float) -> float:
    """The same over so many tokens of a device, of which so many meet the head."""
    config, layout = run.config, run.layout
    size = jnp.dtype(config.compute_dtype).itemsize
    layer = config.num_layers * layer_params(config)
    weights = size * (layer + config.hidden_size * config.vocab_size) / layout.tensor
    # Each array of a layer is written once and read once.
    widths = 4 * config.hidden_size + _split_widths(config) / layout.tensor
    arrays = size * tokens * widths * config.num_layers
    logits = 4 * scored * config.vocab_size / layout.tensor
    return parts * weights + 2 * arrays + 2 * logits


def _split_widths(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return heads * config.head_dim + 3 * config.intermediate_size


def _sampling(run: Run, bounds, drawing: Drawing) -> Seconds:
    """Prefill of the prompts, and every token in turn: none of these overlaps the next."""
    config, layout, plays, sampled = run.config, run.layout, run.round, drawing.config
    size, ways = jnp.dtype(config.compute_dtype).itemsize, layout.data * layout.fsdp
    prompts, sequences = plays.batch, plays.batch * sampled.num_candidates
    weights = config.num_layers * layer_params(config) + config.hidden_size * config.vocab_size
    # The cache is half full on average.
    read = size * weights / layout.tensor + cache_bytes(run, drawing) / 2 / drawing.policies
    token = bounds(2.0 * sequences * weights, read, pass_traffic(run, sequences / ways))
    prefill = Work(prompts * plays.width, prompts, plays.width, 0.0)
    moved = _pass_bytes(run, 1, prompts * plays.width / ways, prompts / ways)
    sent = pass_traffic(run, prompts * plays.width / ways)
    first = bounds(scorer_flops(config, prefill), moved, sent)
    one = Seconds(*(a + sampled.max_new_tokens * b for a, b in zip(first, token)))
    return one.times(drawing.policies)
