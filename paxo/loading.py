"""Settings made real: a model on its mesh, and data as packed rows."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paxo.data.batching import Batches, epoch_batches
from paxo.data.limits import TokenLimits
from paxo.data.packing import choose_shape
from paxo.data.records import Skipped, TokenGroup
from paxo.data.row_shape import RowShape
from paxo.data.sources import check_any, open_source, read_range
from paxo.data.tokenise import TextTokenizer, load_tokenizer, tokenise_part
from paxo.data.tokenised import TokenisedPart, TokenisedSet, joined
from paxo.data.unpaired import Mismatch, signed
from paxo.experiment import DataSettings, ModelSettings, TrainSettings
from paxo.models.config import LoraSettings, ModelConfig
from paxo.models.heads import init_heads, with_heads
from paxo.models.lora import init_lora, with_lora
from paxo.models.policy import make_policy, param_shapes
from paxo.models.pretrained import load_params, read_config, resolve_model
from paxo.models.sharding import param_shardings
from paxo.objectives import Objective
from paxo.overrides import SettingsError
from paxo.rows import RowShare, from_each, row_share
from paxo.types import Params, Policy, PreferenceBatch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy with its first parameters on a mesh, and what they were made from.

    Attributes:
        policy: the model.
        config: its shape.
        params: its parameters.
        tokenizer: its tokenizer.
        folder: where weights or tokenizer came from, for the export.
        lora: set where only adapters are trained; the other parameters are then frozen.
    """

    policy: Policy
    config: ModelConfig
    params: Params
    tokenizer: TextTokenizer
    folder: pathlib.Path
    lora: LoraSettings | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenised groups as rows will hold them.

    Attributes:
        groups: to train on.
        heldout: those set apart.
        shape: of the rows.
        mismatch: set where the groups to train on are given mismatched completions.
    """

    groups: Sequence[TokenGroup]
    heldout: Sequence[TokenGroup]
    shape: RowShape
    mismatch: Mismatch | None = None


def load_model(
    settings: ModelSettings, mesh: Mesh, seed: int = 0, heads: Sequence[str] = ()
) -> Model:
    """A pretrained model from its folder, or one from scratch, on a mesh.

    Args:
        settings: which model.
        mesh: where its parameters shall lie.
        seed: of random parameters.
        heads: extra outputs, see `models.heads`; they always start at random.

    Raises:
        SettingsError: if the settings name neither, or no tokenizer, or adapters of a model from
            scratch.
    """
    names = ("param_dtype", "compute_dtype", "remat", "unroll", "attention")
    changes = {name: getattr(settings, name) for name in names}
    if settings.path is None and settings.config is None:
        raise SettingsError(
            "model.path is not set: name a folder or a hub model, --set model.path=..."
        )
    lora, dtype = settings.lora, settings.param_dtype
    if lora is not None:
        dtype = lora.base_dtype
        if settings.path is None:
            raise SettingsError(
                "model.lora trains adapters of a pretrained model: name it, --set model.path=..., "
                "or set model.lora=none"
            )
    source = settings.tokenizer or settings.path
    if source is None:
        raise SettingsError("model.tokenizer is not set: a model from scratch needs one")
    folder = resolve_model(source)
    tokenizer = load_tokenizer(folder, chat_template=settings.chat_template)
    if settings.path is not None:
        weights = resolve_model(settings.path)
        config = dataclasses.replace(read_config(weights), **changes)
        policy = make_policy(config)
        placed = param_shardings(policy.logical_axes, param_shapes(config), mesh)
        params = load_params(weights, config, dtype=dtype, shardings=placed)
    else:
        config = dataclasses.replace(settings.config, **changes)
        policy = make_policy(config)
        params = init_params(policy, config, mesh, jax.random.key(seed))
    if lora is not None:
        policy = with_lora(policy, config, lora)
        make = functools.partial(init_lora, config=config, lora=lora)
        key = jax.random.key(seed)
        placed = param_shardings(policy.logical_axes["lora"], jax.eval_shape(make, key), mesh)
        params = params | {"lora": jax.jit(make, out_shardings=placed)(key)}
    if heads:
        policy = with_heads(policy, config.hidden_size, heads)
        extra = init_heads(jax.random.key(seed), config.hidden_size, heads)
        params = params | {"heads": jax.device_put(extra, NamedSharding(mesh, PartitionSpec()))}
    return Model(policy, config, params, tokenizer, folder, lora)


def init_params(policy: Policy, config: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """Random parameters, made where they will lie."""
    placed = param_shardings(policy.logical_axes, param_shapes(config), mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Runs once: XLA's default level takes 6 s over the random numbers, this one 1.3, for the same
    # bits in the same time.
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    return jax.jit(policy.init, out_shardings=placed, compiler_options=options)(key)


def load_data(settings: DataSettings, model: Model, objective: Objective | None = None) -> Data:
    """Reads, tokenises and splits the records, and chooses the shape of the rows.

    Args:
        settings: which data.
        model: its tokenizer, positions and vocabulary count.
        objective: makes signs of the labels and asks for mismatched completions, if it needs them.
    """
    groups = read_data(settings, model.tokenizer, model.config).groups
    if settings.heldout_path is not None:
        other = dataclasses.replace(settings, path=settings.heldout_path)
        heldout = read_data(other, model.tokenizer, model.config).groups
    else:
        heldout = [g for g in groups if _share(g) < settings.heldout]
        groups = [g for g in groups if _share(g) >= settings.heldout]
    if not groups:
        raise SettingsError(f"data.heldout={settings.heldout} leaves no record to train on")
    if objective is not None and objective.unpaired:
        groups, heldout = signed(groups), signed(heldout)
    mismatch = mismatch_of(objective, settings, model.config)
    shape = row_shape([*groups, *heldout], settings, model.config, mismatch)
    return Data(groups, heldout, shape, mismatch)


def mismatch_of(
    objective: Objective | None, settings: DataSettings, config: ModelConfig
) -> Mismatch | None:
    """What the packer is asked for where the objective wants mismatched completions."""
    if objective is None or not objective.mismatched:
        return None
    return Mismatch(token_limits(settings, config).max_sequence)


def read_data(
    settings: DataSettings, tokenizer: TextTokenizer, config: ModelConfig
) -> TokenisedSet:
    """The tokens of `settings.path`, within the model's positions and vocabulary.

    Each process parses and tokenises a range of the rows of its own, and gets the tokens of the
    others: each of them must call this, and all have the same set.

    Raises:
        DataError: as of `load_records` and `tokenise`, on all processes what the first one found.
    """
    if settings.path is None:
        raise SettingsError("data.path is not set: name a data set, --set data.path=...")
    limits, on_error = token_limits(settings, config), settings.on_error

    def own() -> tuple[str, int, Skipped, TokenisedPart]:
        source = open_source(settings.path)
        total = len(source) if settings.max_records is None else settings.max_records
        total = min(total, len(source))
        index, count = jax.process_index(), jax.process_count()
        rows = range(index * total // count, (index + 1) * total // count)
        records, skipped = read_range(source, rows, on_error=on_error, extras=settings.extras)
        part = tokenise_part(records, tokenizer, limits, on_error=on_error)
        return source.name, total, skipped, part

    names, totals, skipped, parts = zip(*from_each(own))
    records = sum(part.records for part in parts)
    check_any(names[0], records, totals[0], Skipped.joined(skipped))
    return joined(parts, limits)


def token_limits(settings: DataSettings, config: ModelConfig) -> TokenLimits:
    """The limits of the settings, no longer than the model's positions and a given row."""
    limits = settings.limits
    longest = min(limits.max_sequence or config.max_positions, config.max_positions)
    group = limits.max_group if settings.row_length is None else settings.row_length
    return dataclasses.replace(
        limits, max_sequence=longest, max_group=group, vocab_size=config.vocab_size
    )


def row_shape(
    groups: Sequence[TokenGroup],
    settings: DataSettings,
    config: ModelConfig,
    mismatch: Mismatch | None = None,
) -> RowShape:
    """The shape of rows for these groups, the same on every machine: a run may go on elsewhere."""
    layers = sum(x.size for x in jax.tree.leaves(param_shapes(config)["layers"]))
    return choose_shape(
        groups,
        row_length=settings.row_length,
        slots=settings.slots,
        window=settings.window,
        slot_weight=config.hidden_size * config.vocab_size / layers,
        width=config.hidden_size if config.attention in ("dense", "cudnn") else None,
        mismatch=mismatch,
    )


def batches(
    data: Data, settings: DataSettings, train_settings: TrainSettings, mesh: Mesh | None = None
) -> Batches:
    """The endless batches of a run, this process's rows of them.

    Args:
        data: the groups and the shape of rows.
        settings: how they are shuffled.
        train_settings: rows of a batch, and the seed.
        mesh: says which rows lie on this process's devices; one process can do without.
    """
    share = _row_share(mesh)
    return Batches(
        data.groups,
        data.shape,
        train_settings.rows_per_batch,
        seed=train_settings.seed,
        shuffle=settings.shuffle,
        window=settings.window,
        process_index=share.index,
        process_count=share.count,
        mismatch=data.mismatch,
    )


def heldout_batches(
    data: Data, rows_per_batch: int, mesh: Mesh | None = None
) -> Iterator[PreferenceBatch]:
    """The held-out groups once, in batches of host arrays; of them, the rows as in `batches`."""
    index, count = _row_share(mesh)
    here = {"process_index": index, "process_count": count}
    return (batch for batch, _ in epoch_batches(data.heldout, data.shape, rows_per_batch, **here))


def _row_share(mesh: Mesh | None) -> RowShare:
    if mesh is not None:
        return row_share(mesh)
    if jax.process_count() > 1:
        raise ValueError("with several processes, give the mesh: it says whose rows are whose")
    return RowShare(0, 1)


def _share(group: TokenGroup) -> float:
    """A number in [0, 1) that follows from the prompt alone (or from the text, if it has none)."""
    content = group.prompt if len(group.prompt) > 1 else group.completions[0]
    digest = hashlib.blake2b(content.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
