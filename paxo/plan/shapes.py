"""A run as shapes alone: its model, state, batch and prompts, of which nothing is allocated."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from paxo.data.row_shape import RowShape
from paxo.frozen import HEAD, frozen_shardings
from paxo.models.config import ModelConfig
from paxo.models.heads import HEADS, init_heads, with_heads
from paxo.models.lora import init_lora, with_lora
from paxo.models.policy import make_policy, param_shapes
from paxo.models.sharding import MESH_AXES, make_mesh, param_shardings, partition_spec
from paxo.objectives import HIDDEN_ROLE
from paxo.plan.kinds import Kind, kind_of
from paxo.plan.layout import Layout, Lengths, frozen_layout
from paxo.plan.rounds import Round
from paxo.training.state import TrainState, init_state, state_shardings
from paxo.types import Params, Policy, PreferenceBatch, PromptBatch


@dataclasses.dataclass(frozen=True)
class Run:
    """One run in one layout; every array is a `ShapeDtypeStruct`.

    Attributes:
        kind: the settings, as plans ask for them.
        layout: how it lies on the devices.
        config: of the model.
        policy: the model as functions.
        optimizer: the Optax transformation.
        state: the training state.
        batch: rows with all that the objective reads.
        references: role -> parameters of that frozen policy.
        copies: those of its roles that have weights of their own; beside adapters others share the
            frozen base.
        lengths: what is assumed about the data.
        row: sizes of a row.
        groups: groups that a row holds on average.
        processes: that share the devices.
    """

    kind: Kind
    layout: Layout
    config: ModelConfig
    policy: Policy
    optimizer: Any
    state: TrainState
    batch: PreferenceBatch
    references: dict[str, Params]
    copies: tuple[str, ...]
    lengths: Lengths
    row: RowShape
    groups: float
    processes: int = 1

    @property
    def settings(self) -> Any:
        """Those of the run."""
        return self.kind.settings

    @property
    def params(self) -> Params:
        """Trained and frozen parameters of the policy together."""
        return self.policy.join(self.state.params, self.state.frozen)

    @property
    def tokens(self) -> int:
        """Positions of a step over all devices."""
        return self.layout.rows * self.layout.row_length

    @property
    def prompts(self) -> PromptBatch:
        """What a sampler is given at a time."""
        count = self.round.batch
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        return PromptBatch(ints((count, self.round.width)), ints((count,)), ints((count,)))

    @property
    def round(self) -> Round:
        """What is done between one drawing of completions and the next."""
        given = self.config, self.lengths, self.layout, self.groups, self.processes
        return self.kind.round(*given)

    @property
    def scoring(self) -> "Run":
        """The run as the first of its frozen policies sees it: on that one's mesh."""
        role = next(iter(self.references), None)
        return self if role is None else dataclasses.replace(self, layout=self.layout_of(role))

    def layout_of(self, role: str) -> Layout:
        """How a frozen policy lies."""
        return frozen_layout(self.kind.mesh_of(role), role, self.layout)


class Placement(NamedTuple):
    """Shardings of everything that programs take."""

    state: TrainState
    params: Params
    batch: NamedSharding
    references: dict[str, Params]


def make_run(settings: Any, config: ModelConfig, layout: Layout, processes: int = 1) -> Run:
    """The shapes of a run in a layout.

    Args:
        settings: an `Experiment` or a `SelfPlay`.
        config: of the model, see `model_config`.
        layout: how it lies on the devices.
        processes: that share these devices.
    """
    kind, config = kind_of(settings), dataclasses.replace(config, remat=layout.remat)
    policy = _policy(kind, config)
    optimizer = settings.optimizer.build(kind.num_steps)
    state = _state(kind, config, policy, optimizer)
    params = policy.join(state.params, state.frozen)
    references, copies = kind.references(_base(kind, config), params)
    if kind.objective.reads_hidden(HIDDEN_ROLE) and HIDDEN_ROLE in references:
        head = jax.eval_shape(policy.unembed, references[HIDDEN_ROLE])
        state = state.replace(frozen={**state.frozen, HEAD: head})
    lengths = kind.lengths(config)
    row = kind.row(lengths, layout.row_length)
    return Run(
        kind,
        layout,
        config,
        policy,
        optimizer,
        state,
        kind.batch(config, policy, params, layout.rows, row, references),
        references,
        copies,
        lengths,
        row,
        kind.groups(lengths, layout.row_length, layout.rows),
        processes,
    )


def relaid(run: Run, layout: Layout) -> Run:
    """The same run in another layout."""
    kind, config = run.kind, dataclasses.replace(run.config, remat=layout.remat)
    policy, row = _policy(kind, config), kind.row(run.lengths, layout.row_length)
    return dataclasses.replace(
        run,
        layout=layout,
        config=config,
        policy=policy,
        batch=kind.batch(config, policy, run.params, layout.rows, row, run.references),
        row=row,
        groups=kind.groups(run.lengths, layout.row_length, layout.rows),
    )


def placement(run: Run, mesh: Any) -> Placement:
    """Where everything lies, as `paxo run` places it.

    Args:
        run: the shapes.
        mesh: a mesh of devices, or an abstract one.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = _params_placed(run.policy, run.params, mesh, everywhere)
    trained, frozen = run.policy.split(placed)
    frozen = frozen | frozen_shardings(run.state.frozen, mesh)
    state = state_shardings(run.state, trained, run.optimizer, frozen)
    references = {
        role: _frozen_placed(run, role, on_mesh_of(run.layout_of(role), mesh))
        for role in run.references
    }
    rows = partition_spec(("batch",), (run.layout.rows,), mesh.shape)
    return Placement(state, placed, NamedSharding(mesh, rows), references)


def on_mesh_of(layout: Layout, mesh: Any) -> Any:
    """The devices of a mesh as the mesh of a layout."""
    sizes = layout.mesh_shape
    if dict(mesh.shape) == sizes:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(
            tuple(sizes.values()),
            MESH_AXES,
            axis_types=mesh.axis_types,
            abstract_device=mesh.abstract_device,
        )
    return make_mesh(**sizes, devices=list(mesh.devices.flat))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where they lie; one sharding stands for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Bytes of a pytree on one device."""
    placed = jax.tree.leaves(with_shardings(shapes, shardings))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x.dtype) for x in placed)


def _itemsize(dtype: Any) -> int:
    # A typed random key is two words.
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _params_placed(policy: Policy, params: Params, mesh: Any, everywhere: NamedSharding) -> Any:
    """Shardings of parameters; extra heads lie everywhere."""
    named = {name: x for name, x in params.items() if name in policy.logical_axes}
    axes = {name: policy.logical_axes[name] for name in named}
    placed = param_shardings(axes, named, mesh)
    rest = {name: x for name, x in params.items() if name not in named}
    return placed | jax.tree.map(lambda _: everywhere, rest)


def _frozen_placed(run: Run, role: str, mesh: Any) -> Any:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return _params_placed(run.policy, run.references[role], mesh, everywhere)


def _heads(kind: Kind) -> tuple[str, ...]:
    needed = [name for name in HEADS if kind.objective.arrays.get(name, False)]
    return (*needed, *kind.model.heads)


def _policy(kind: Kind, config: ModelConfig) -> Policy:
    policy, heads, lora = make_policy(config), _heads(kind), kind.model.lora
    if lora is not None:
        policy = with_lora(policy, config, lora)
    return with_heads(policy, config.hidden_size, heads) if heads else policy


def _state(kind: Kind, config: ModelConfig, policy: Policy, optimizer: Any) -> TrainState:
    key = jax.eval_shape(lambda: jax.random.key(0))
    heads, lora = _heads(kind), kind.model.lora
    params = param_shapes(_base(kind, config))
    if lora is not None:
        make = functools.partial(init_lora, config=config, lora=lora)
        params = params | {"lora": jax.eval_shape(make, key)}
    if heads:
        extra = jax.eval_shape(lambda key: init_heads(key, config.hidden_size, heads), key)
        params = params | {"heads": extra}
    trained, frozen = policy.split(params)

    def begin(params: Params, key: Any, frozen: Params) -> TrainState:
        return init_state(params, kind.objective, optimizer, key, frozen=frozen)

    return jax.eval_shape(begin, trained, key, frozen)


def _base(kind: Kind, config: ModelConfig) -> ModelConfig:
    """The decoder with its weights as they are kept: frozen ones beside adapters are narrower."""
    lora = kind.model.lora
    return config if lora is None else dataclasses.replace(config, param_dtype=lora.base_dtype)
