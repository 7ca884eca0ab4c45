"""A run as shapes alone: its model, state, batch and prompts, of which nothing is allocated."""

import dataclasses
import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from paxo.data.row_shape import RowShape
from paxo.experiment import Experiment
from paxo.models.config import ModelConfig
from paxo.models.heads import HEADS, init_heads, with_heads
from paxo.models.known import known_config
from paxo.models.lora import init_lora, with_lora
from paxo.models.policy import make_policy, param_shapes
from paxo.models.pretrained import read_config, resolve_model
from paxo.models.sharding import MESH_AXES, param_shardings, partition_spec
from paxo.objectives import HIDDEN_ROLE
from paxo.overrides import SettingsError
from paxo.training.state import TrainState, init_state, state_shardings
from paxo.types import Params, Policy, PreferenceBatch, PromptBatch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a search may change without changing what is learnt from how many tokens.

    Attributes:
        data: copies of the parameters.
        fsdp: ways in which they are split along their width.
        tensor: ways in which heads, the SwiGLU and the vocabulary are split.
        rows: R, rows a step over all devices.
        row_length: L, tokens of a row.
        microbatches: parts in which a step's rows are run.
        remat: what the backward pass computes again.
    """

    data: int
    fsdp: int
    tensor: int
    rows: int
    row_length: int
    microbatches: int
    remat: str

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Mesh axis -> devices."""
        return dict(zip(MESH_AXES, (self.data, self.fsdp, self.tensor)))

    @property
    def rows_per_device(self) -> int:
        """Rows of one microbatch that lie on a device."""
        return self.rows // (self.data * self.fsdp * self.microbatches)

    def flags(self) -> str:
        """The settings that choose it, as `--set` takes them."""
        return (
            f"mesh.data={self.data} mesh.fsdp={self.fsdp} mesh.tensor={self.tensor} "
            f"train.rows_per_batch={self.rows} train.microbatches={self.microbatches} "
            f"data.row_length={self.row_length} model.remat={self.remat}"
        )


class Lengths(NamedTuple):
    """Mean tokens of a prompt and of a completion, and the longest of each."""

    prompt: float
    completion: float
    max_prompt: int
    max_completion: int


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


class Placement(NamedTuple):
    """Shardings of everything that programs take."""

    state: TrainState
    params: Params
    batch: NamedSharding
    references: dict[str, Params]


def model_config(settings: Experiment, model: str | None) -> ModelConfig:
    """The shape of the model: the named one's, or that of the settings.

    Raises:
        SettingsError: for an unknown name, or where the settings name none.
    """
    chosen = settings.model
    names = ("param_dtype", "compute_dtype", "remat", "unroll", "attention")
    changes = {name: getattr(chosen, name) for name in names}
    if model is not None:
        try:
            config = known_config(model)
        except ValueError as error:
            raise SettingsError(f"--model: {error}") from error
    elif chosen.path is not None:
        config = read_config(resolve_model(chosen.path))
    elif chosen.config is not None:
        config = chosen.config
    else:
        raise SettingsError("model.path is not set: name a model, or its shape with --model")
    return dataclasses.replace(config, **changes)


def assumed_lengths(settings: Experiment, config: ModelConfig, candidates: int) -> Lengths:
    """Lengths half of the limits on average; without limits a row is a third prompt."""
    limits, row = settings.data.limits, settings.data.row_length
    longest = min(limits.max_sequence or config.max_positions, config.max_positions)
    group = min(row or limits.max_group or 2048, 2048, longest * candidates)
    prompt = limits.max_prompt or max(group // 3, 1)
    completion = limits.max_completion or max((group - prompt) // candidates, 1)
    prompt, completion = min(prompt, longest - 1), min(completion, longest - 1)
    return Lengths(prompt / 2, completion / 2, prompt, completion)


def first_layout(settings: Experiment, config: ModelConfig, devices: int) -> Layout:
    """The layout that the settings ask for, on so many devices.

    Raises:
        SettingsError: if mesh, rows and microbatches do not fit one another.
    """
    mesh = settings.mesh
    sizes = {name: getattr(mesh, name) for name in MESH_AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise SettingsError(f"mesh sizes are at least 1, and one may be -1; got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(devices // known, 1)
    if math.prod(sizes.values()) != devices:
        raise SettingsError(
            f"mesh {sizes} is of {math.prod(sizes.values())} devices, the topology of {devices}: "
            "set one axis to -1 to take what is left, as in --set mesh.fsdp=-1 mesh.data=1"
        )
    train, ways = settings.train, sizes["data"] * sizes["fsdp"]
    if train.rows_per_batch % (ways * train.microbatches):
        raise SettingsError(
            f"train.rows_per_batch={train.rows_per_batch} must be a multiple of the {ways} ways in "
            f"which the mesh splits rows times train.microbatches={train.microbatches}; "
            f"--set train.rows_per_batch={ways * train.microbatches}, or a larger mesh.tensor"
        )
    lengths = assumed_lengths(settings, config, num_candidates(settings))
    longest = lengths.max_prompt + num_candidates(settings) * lengths.max_completion
    length = settings.data.row_length or max(1024, math.ceil(longest / 128) * 128)
    return Layout(
        **sizes,
        rows=train.rows_per_batch,
        row_length=length,
        microbatches=train.microbatches,
        remat=config.remat,
    )


def num_candidates(settings: Experiment) -> int:
    """K: 1 for demonstrations and signs, else a pair; one more where a mismatched one is added."""
    objective = settings.objective
    demonstrations = {term.name for term in objective.terms} == {"nll"}
    return (1 if demonstrations or objective.unpaired else 2) + objective.mismatched


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
        state = state.replace(frozen={**state.frozen, "reference_head": head})
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
    state = state_shardings(run.state, trained, run.optimizer, frozen)
    references = {
        role: _params_placed(run.policy, params, mesh, everywhere)
        for role, params in run.references.items()
    }
    rows = partition_spec(("batch",), (run.layout.rows,), mesh.shape)
    return Placement(state, placed, NamedSharding(mesh, rows), references)


def abstract_mesh(layout: Layout, platform: str) -> AbstractMesh:
    """A layout's mesh without devices, under which programs are traced as for that platform."""
    return AbstractMesh(
        tuple(layout.mesh_shape.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        abstract_device=AbstractDevice(device_kind=platform, num_cores=None, platform=platform),
    )


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
        if given[role].mesh is not None:
            logger.warning("%s.mesh is not planned for: it is taken to lie as the run does", role)
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
