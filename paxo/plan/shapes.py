"""A run as shapes alone: its model, state, batch and prompts, of which nothing is allocated."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from paxo.data.row_shape import RowShape
from paxo.experiment import Experiment
from paxo.frozen import HEAD, frozen_shardings
from paxo.models.config import ModelConfig
from paxo.models.heads import HEADS, init_heads, with_heads
from paxo.models.lora import init_lora, with_lora
from paxo.models.policy import make_policy, param_shapes
from paxo.models.sharding import MESH_AXES, make_mesh, param_shardings, partition_spec
from paxo.objectives import HIDDEN_ROLE
from paxo.plan.layout import (
    Layout,
    Lengths,
    assumed_lengths,
    frozen_layout,
    num_candidates,
)
from paxo.training.state import TrainState, init_state, state_shardings
from paxo.types import Params, Policy, PreferenceBatch, PromptBatch


@dataclasses.dataclass(frozen=True)
class Run:
    """One run in one layout; every array is a `ShapeDtypeStruct`.

    Attributes:
        settings: of the experiment.
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
    """

    settings: Experiment
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
        """Prompts of an online round: as many as a step's rows have groups."""
        ways = self.layout.data * self.layout.fsdp
        count = math.ceil(self.groups * self.layout.rows / ways) * ways
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        return PromptBatch(ints((count, self.lengths.max_prompt)), ints((count,)), ints((count,)))

    @property
    def scoring(self) -> "Run":
        """The run as the first of its frozen policies sees it: on that one's mesh."""
        role = next(iter(self.references), None)
        return self if role is None else dataclasses.replace(self, layout=self.layout_of(role))

    def layout_of(self, role: str) -> Layout:
        """How a frozen policy lies."""
        return frozen_layout(self.settings, role, self.layout)


class Placement(NamedTuple):
    """Shardings of everything that programs take."""

    state: TrainState
    params: Params
    batch: NamedSharding
    references: dict[str, Params]


def make_run(settings: Experiment, config: ModelConfig, layout: Layout) -> Run:
    """The shapes of a run in a layout.

    Args:
        settings: of the experiment.
        config: of the model, see `model_config`.
        layout: how it lies on the devices.
    """
    config = dataclasses.replace(config, remat=layout.remat)
    policy = _policy(settings, config)
    optimizer = settings.optimizer.build(settings.train.num_steps)
    references, copies = _references(settings, config)
    state = _state(settings, config, policy, optimizer)
    if settings.objective.reads_hidden(HIDDEN_ROLE) and HIDDEN_ROLE in references:
        head = jax.eval_shape(policy.unembed, references[HIDDEN_ROLE])
        state = state.replace(frozen={**state.frozen, HEAD: head})
    lengths = assumed_lengths(settings, config, num_candidates(settings))
    row, groups = _row(settings, layout, lengths)
    batch = _batch(settings, config, layout.rows, row, references)
    return Run(
        settings, layout, config, policy, optimizer, state, batch, references, copies, lengths, row,
        groups,
    )  # fmt: skip


def relaid(run: Run, layout: Layout) -> Run:
    """The same run in another layout."""
    config = dataclasses.replace(run.config, remat=layout.remat)
    row, groups = _row(run.settings, layout, run.lengths)
    return dataclasses.replace(
        run,
        layout=layout,
        config=config,
        policy=_policy(run.settings, config),
        batch=_batch(run.settings, config, layout.rows, row, run.references),
        row=row,
        groups=groups,
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


def _heads(settings: Experiment) -> tuple[str, ...]:
    needed = [name for name in HEADS if settings.objective.arrays.get(name, False)]
    return (*needed, *settings.model.heads)


def _policy(settings: Experiment, config: ModelConfig) -> Policy:
    policy, heads, lora = make_policy(config), _heads(settings), settings.model.lora
    if lora is not None:
        policy = with_lora(policy, config, lora)
    return with_heads(policy, config.hidden_size, heads) if heads else policy


def _state(settings: Experiment, config: ModelConfig, policy: Policy, optimizer: Any) -> TrainState:
    key = jax.eval_shape(lambda: jax.random.key(0))
    heads, lora = _heads(settings), settings.model.lora
    params = param_shapes(_base(settings, config))
    if lora is not None:
        make = functools.partial(init_lora, config=config, lora=lora)
        params = params | {"lora": jax.eval_shape(make, key)}
    if heads:
        extra = jax.eval_shape(lambda key: init_heads(key, config.hidden_size, heads), key)
        params = params | {"heads": extra}
    trained, frozen = policy.split(params)

    def begin(params: Params, key: Any, frozen: Params) -> TrainState:
        return init_state(params, settings.objective, optimizer, key, frozen=frozen)

    return jax.eval_shape(begin, trained, key, frozen)


def _references(
    settings: Experiment, config: ModelConfig
) -> tuple[dict[str, Params], tuple[str, ...]]:
    """Role -> shapes, and the roles with weights of their own.

    Roles whose settings are the same share one policy and stand once.
    """
    given = {"reference": settings.reference, "previous": settings.previous}
    roles = [
        role
        for role, chosen in given.items()
        if role in settings.objective.frozen_roles
        or (role in settings.objective.optional_roles and chosen.attach)
    ]
    first: dict[Any, str] = {}
    for role in roles:
        first.setdefault(given[role], role)
    base, full = _base(settings, config), settings.model.lora is None

    def shapes(role: str) -> Params:
        dtype = given[role].dtype or base.param_dtype
        return param_shapes(dataclasses.replace(base, param_dtype=dtype))

    def is_copy(role: str) -> bool:
        own = given[role].path, given[role].dtype, given[role].mesh
        return full or any(x is not None for x in own)

    return {role: shapes(role) for role in first.values()}, tuple(filter(is_copy, first.values()))


def _base(settings: Experiment, config: ModelConfig) -> ModelConfig:
    """The decoder with its weights as they are kept: frozen ones beside adapters are narrower."""
    lora = settings.model.lora
    return config if lora is None else dataclasses.replace(config, param_dtype=lora.base_dtype)


def _row(settings: Experiment, layout: Layout, lengths: Lengths) -> tuple[RowShape, float]:
    """Sizes of a row, and the groups that it holds on average."""
    candidates = num_candidates(settings)
    tokens = lengths.prompt + candidates * lengths.completion
    scored = candidates * lengths.completion / tokens * layout.row_length
    slots = settings.data.slots or math.ceil(1.1 * scored / 64) * 64
    groups = max(layout.row_length / tokens, 1.0)
    shape = RowShape(
        length=layout.row_length,
        slots=min(slots, layout.row_length),
        groups=math.ceil((groups + 1) / 4) * 4,
        candidates=candidates,
        max_completion=min(lengths.max_completion, layout.row_length),
    )
    return shape, groups


def _batch(
    settings: Experiment, config: ModelConfig, rows: int, row: RowShape, references: dict
) -> PreferenceBatch:
    objective = settings.objective
    axes = {"K": row.candidates, "T": row.max_completion, "D": config.hidden_size}

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    ints = functools.partial(array, dtype=jnp.int32)
    per_token, per_slot = ints(row.length), ints(row.slots)
    groups = row.groups, row.candidates
    # Where the name tells no axes, the records do: a number for each completion is the usual.
    told = [extra.partition(":") for extra in settings.data.extras]
    extras = {
        name: array(row.groups, *(axes[axis] for axis in letters or "K"))
        for name, _, letters in told
    }
    roles = [r for r in ("reference", "previous") if r in objective.frozen_roles or r in references]
    return PreferenceBatch(
        tokens=per_token,
        positions=per_token,
        group=per_token,
        branch=per_token,
        score_from=per_slot,
        score_token=per_slot,
        score_slot=per_slot,
        labels=array(*groups),
        where=array(*groups, dtype=bool),
        fixed_logps={role: array(*groups) for role in roles},
        fixed_token_logps={r: array(row.slots) for r in roles if objective.reads_tokens(r)},
        fixed_hidden={
            r: array(row.slots, config.hidden_size, dtype=jnp.dtype(config.compute_dtype))
            for r in roles
            if objective.reads_hidden(r)
        },
        extras=extras,
        max_completion=row.max_completion,
    )
