"""Bytes of a run on one device by category, from shapes and placement.

What is kept from step to step is exact. What lives within a program is an estimate, which the
compiler's own figures stand beside on a plan's page.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxo.models.config import ModelConfig
from paxo.plan.flops import layer_params
from paxo.plan.layout import Layout, abstract_mesh
from paxo.plan.rounds import Drawing
from paxo.plan.shapes import Run, bytes_per_device, placement
from paxo.scoring import default_chunk

CATEGORIES = (
    "parameters",
    "frozen",
    "gradients",
    "moments",
    "reference",
    "anchors",
    "activations",
    "logits",
    "cache",
    "collectives",
)
# Arrays of a layer's widths that its backward pass holds at a time: inputs, outputs, cotangents.
LIVE = 2


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        resident: category -> what lies there between programs.
        head: category -> what a training step adds while the head's gradient is made.
        layers: the same while the layers' are.
        scorer: the same of a frozen policy's log-probs.
        sampler: the same of drawing completions, of the sampler that takes most.
        draws: whether the run draws completions itself.
    """

    resident: dict[str, int]
    head: dict[str, int]
    layers: dict[str, int]
    scorer: dict[str, int]
    sampler: dict[str, int]
    draws: bool = False

    def peak(self) -> int:
        """The most that lies there at a time while a run trains and scores."""
        return sum(self.resident.values()) + max(map(_sum, (self.head, self.layers, self.scorer)))

    def sampling_peak(self) -> int:
        """The most while completions are drawn."""
        return sum(self.resident.values()) + _sum(self.sampler)

    def needed(self) -> int:
        """The most in all that the run does."""
        return max(self.peak(), self.sampling_peak()) if self.draws else self.peak()

    def second_state(self) -> int:
        """Bytes of the state that an extragradient half step leaves beside its own; 0 without."""
        return self.head.get("parameters", 0) + self.head.get("moments", 0)

    def by_category(self) -> dict[str, int]:
        """What each category takes at its most in training, and the cache in sampling.

        Not all of them do at the same time: `peak` is less than their sum.
        """
        parts = (self.head, self.layers, self.scorer, {"cache": self.sampler.get("cache", 0)})
        return {
            name: self.resident.get(name, 0) + max(part.get(name, 0) for part in parts)
            for name in CATEGORIES
        }


class Held(NamedTuple):
    """Exact bytes of whole trees on one device, which the sizes of a mesh alone decide."""

    params: int
    frozen: int
    moments: int
    references: int
    prepared: int


def held_bytes(run: Run, mesh: jax.sharding.AbstractMesh) -> Held:
    """What a run keeps on a device; `prepared` are the weights in the dtype of the products."""
    of, placed = bytes_per_device, placement(run, mesh)
    dtype = jnp.dtype(run.config.compute_dtype)
    prepared = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), run.params)
    return Held(
        of(run.state.params, placed.state.params),
        of(run.state.frozen, placed.state.frozen),
        of(run.state.opt_state, placed.state.opt_state),
        sum(of(run.references[r], placed.references[r]) for r in run.copies),
        of(prepared, placed.params),
    )


def memory_of(run: Run, platform: str, held: Held | None = None) -> Memory:
    """The memory of a run on devices of a platform.

    Args:
        run: its shapes.
        platform: "tpu", "gpu" or "cpu".
        held: of this run on this mesh, where it is known already.
    """
    layout, mesh = run.layout, abstract_mesh(run.layout, platform)
    held = held_bytes(run, mesh) if held is None else held
    trained = held.params
    plays = run.round
    resident = {
        "parameters": held.params,
        "frozen": held.frozen,
        "moments": held.moments,
        "reference": held.references,
        "anchors": len(plays.anchors) * trained,
    }
    scored = logit_bytes(run, mesh)
    summed = trained if layout.microbatches > 1 else 0
    kept = kept_bytes(run.config, layout) + plays.batches * batch_bytes(run)
    layers, head = gathered_bytes(run)
    trains_all = not run.policy.frozen
    # The half step of an extragradient round keeps the state that it starts from.
    second = {"parameters": trained, "moments": held.moments} if plays.turns > 1 else {}
    return Memory(
        resident=resident,
        # Logits once more and their gradient; the head's own gradient in float32.
        head={
            **second,
            "gradients": summed,
            "activations": kept,
            "logits": scored + scored // 2,
            "collectives": head * (3 if trains_all else 1),
        },
        # What lies between a layer's products; its weights and their gradients, whole.
        layers={
            **second,
            "gradients": summed + trained,
            "activations": kept + LIVE * _widest(run.config, layout),
            "collectives": layers * (2 if trains_all else 1),
        },
        scorer=_scorer(run.scoring, platform),
        sampler=max(
            (_sampler(run, drawing, held) for drawing in plays.programs.values()),
            key=_sum,
            default={},
        ),
        draws=plays.number > 0,
    )


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())


def kept_bytes(config: ModelConfig, layout: Layout) -> int:
    """What the forward pass of a microbatch keeps for the backward pass."""
    tokens = layout.rows_per_device * layout.row_length
    width = config.hidden_size
    heads = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    narrow = (heads + 2 * config.intermediate_size) / layout.tensor
    kept = {
        # The input of each layer; the products' outputs; these and what lies between them.
        "full": width,
        "dots": 3 * width + narrow,
        "none": 7 * width + 2 * narrow + config.num_heads * config.head_dim / layout.tensor,
    }[config.remat]
    return int(tokens * _itemsize(config) * kept * config.num_layers)


def logit_bytes(run: Run, mesh: jax.sharding.AbstractMesh) -> int:
    """One float32 array over a chunk of positions and the vocabulary."""
    layout, vocabulary = run.layout, run.config.vocab_size
    with jax.sharding.use_abstract_mesh(mesh):
        chunk = default_chunk(layout.rows // layout.microbatches, vocabulary)
    tokens = layout.rows_per_device * min(chunk, run.row.slots)
    return 4 * tokens * _share(vocabulary, layout.tensor)


def gathered_bytes(run: Run) -> tuple[int, int]:
    """Weights of two layers, and of the head, as a device holds them while it uses them."""
    config, layout = run.config, run.layout
    if layout.fsdp == 1:
        return 0, 0
    layer = layer_params(config) // layout.tensor
    matrix = config.hidden_size * _share(config.vocab_size, layout.tensor)
    return 2 * _itemsize(config) * layer, _itemsize(config) * matrix


def cache_bytes(run: Run, drawing: Drawing) -> int:
    """Keys and values of a sampler's prompts and completions."""
    config, layout, sampled = run.config, run.layout, drawing.config
    prompts = run.round.batch // (layout.data * layout.fsdp)
    tokens = run.round.width + sampled.num_candidates * sampled.max_new_tokens
    heads = _share(config.num_kv_heads, layout.tensor) * config.head_dim * config.num_layers
    return drawing.policies * 2 * _itemsize(config) * prompts * tokens * heads


def batch_bytes(run: Run) -> int:
    """A step's rows on one device."""
    leaves = jax.tree.leaves(run.batch)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return whole // (run.layout.data * run.layout.fsdp)


def _scorer(run: Run, platform: str) -> dict[str, int]:
    """A scorer runs all rows at once; frozen weights have no gradients."""
    whole = dataclasses.replace(run.layout, microbatches=1)
    rows = run.round.batches * batch_bytes(run)
    return {
        "activations": LIVE * _widest(run.config, whole) + rows,
        "logits": logit_bytes(run, abstract_mesh(run.layout, platform)),
        "collectives": max(gathered_bytes(run)),
    }


def _sampler(run: Run, drawing: Drawing, held: Held) -> dict[str, int]:
    config, layout, plays = run.config, run.layout, run.round
    prompts = plays.batch // (layout.data * layout.fsdp)
    logits = 4 * prompts * drawing.config.num_candidates * config.vocab_size
    width = max(config.hidden_size, 2 * config.intermediate_size // layout.tensor)
    prefill = LIVE * prompts * plays.width * width
    # Opponents of an extragradient round are drawn from where its half step led.
    half = held.params if plays.turns > 1 else 0
    return {
        # Decoding casts the weights once, before its first token.
        "parameters": drawing.policies * held.prepared + half,
        "activations": prefill * _itemsize(config),
        "logits": (2 + drawing.policies) * logits,
        "cache": cache_bytes(run, drawing),
        "collectives": max(gathered_bytes(run)),
    }


def _widest(config: ModelConfig, layout: Layout) -> int:
    """Bytes of the largest arrays of a layer over a microbatch's tokens, cotangents in float32."""
    tokens = layout.rows_per_device * layout.row_length
    return tokens * (2 * config.intermediate_size // layout.tensor) * (_itemsize(config) + 4) // 2


def _share(number: int, ways: int) -> int:
    """Of an axis that is replicated where the ways do not divide it."""
    return number if number % ways else number // ways


def _itemsize(config: ModelConfig) -> int:
    return jnp.dtype(config.compute_dtype).itemsize
