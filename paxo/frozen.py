"""Frozen policies of a run: the scorer of each role, and what batches and steps keep of it."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from paxo.experiment import Experiment, MeshSettings, ReferenceSettings
from paxo.loading import Model, load_model
from paxo.logp_store import LogpStore
from paxo.models.policy import make_policy
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import HIDDEN_ROLE, Objective
from paxo.overrides import SettingsError
from paxo.rows import row_share
from paxo.scoring import FixedScorer, StoredScorer, attach_logps, make_scorer
from paxo.types import Params, Policy, PreferenceBatch

logger = logging.getLogger(__name__)

HEAD = "reference_head"  # its name in `TrainState.frozen`


@contextlib.contextmanager
def frozen_scorers(
    settings: Experiment, model: Model, mesh: Mesh, workdir: pathlib.Path
) -> Iterator[dict[str, FixedScorer | StoredScorer]]:
    """Role -> the scorer of its frozen policy, for all roles that are attached to batches.

    A role without a path scores with the model's own first parameters: `train` copies them. Stores
    are given back at the end, so that a notebook can run again what it has interrupted.
    """
    with contextlib.ExitStack() as stores:
        yield _scorers(settings, model, mesh, workdir, stores)


def _scorers(
    settings: Experiment,
    model: Model,
    mesh: Mesh,
    workdir: pathlib.Path,
    stores: contextlib.ExitStack,
) -> dict[str, FixedScorer | StoredScorer]:
    objective = settings.objective
    given = {"reference": settings.reference, "previous": settings.previous}
    unknown = sorted(set(objective.frozen_roles) - set(given))
    if unknown:
        raise SettingsError(
            f"objective {objective.name!r} needs the roles {unknown}, but settings give "
            f"{', '.join(given)} only: a file with such policies defines run(settings, workdir) "
            "and attaches them itself"
        )
    asked = {role for role in objective.optional_roles if role in given and given[role].attach}
    for role in sorted({*objective.optional_roles} - asked):
        logger.info(
            "objective %r goes without role %r, which is optional; %s.attach=True gives it",
            objective.name,
            role,
            role,
        )
    made: dict[tuple, FixedScorer | StoredScorer] = {}
    scorers = {}
    for role, chosen in given.items():
        if role not in objective.frozen_roles and role not in asked:
            continue
        same = chosen.path, chosen.store, chosen.dtype, chosen.mesh
        if role == "previous" and chosen.path is None:
            logger.info("role 'previous' is the policy that training starts from")
        if same not in made:
            if chosen.store in {store for _, store, *_ in made} - {None, "off"}:
                raise SettingsError(
                    f"{role}.store={chosen.store} is that of another policy, but a store is "
                    "written by one: name another folder"
                )
            # A store is written by one scorer: those of other policies have folders of their own.
            folder = workdir / "logps" / ("" if not made else role)
            made[same] = _scorer(settings, chosen, model, mesh, folder, stores)
        scorers[role] = made[same]
    return scorers


def _scorer(
    settings: Experiment,
    chosen: ReferenceSettings,
    model: Model,
    mesh: Mesh,
    folder: pathlib.Path,
    stores: contextlib.ExitStack,
) -> FixedScorer | StoredScorer:
    """The scorer of one frozen policy, with its log-probs kept in `folder` or another."""
    lora = model.lora
    dtype = chosen.dtype or (settings.model.param_dtype if lora is None else lora.base_dtype)
    if chosen.mesh is not None:
        mesh = _other_mesh(settings, chosen.mesh, mesh)
    if chosen.path is not None:
        whole = dataclasses.replace(settings.model, path=chosen.path, param_dtype=dtype, lora=None)
        other = load_model(whole, mesh)
        policy, params, config = other.policy, other.params, other.config
    else:
        policy, params, config = model.policy, model.params, model.config
        if lora is not None:  # the base without its adapters: no second copy of the weights
            policy, (_, params) = make_policy(config), model.policy.split(params)
        if (chosen.dtype, chosen.mesh) != (None, None):
            params = _held(params, policy, dtype, mesh)
    scorer = make_scorer(policy, params, mesh=mesh)
    if chosen.store == "off":
        return scorer
    # All that the values depend on besides the token ids.
    fingerprint = (
        f"{scorer.fingerprint()} {model.tokenizer.fingerprint()} {config.compute_dtype} {config}"
    )
    store = LogpStore(chosen.store or folder, fingerprint, process=jax.process_index())
    return StoredScorer(scorer, stores.enter_context(store))


def _held(params: Params, policy: Policy, dtype: str, mesh: Mesh) -> Params:
    """A copy of the parameters in another dtype or on another mesh."""
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))(params)
    return jax.device_put(cast, param_shardings(policy.logical_axes, cast, mesh))


def _other_mesh(settings: Experiment, sizes: MeshSettings, mesh: Mesh) -> Mesh:
    other = make_mesh(**dataclasses.asdict(sizes))
    ways = other.shape["data"] * other.shape["fsdp"]
    if settings.train.rows_per_batch % ways or row_share(other) != row_share(mesh):
        raise SettingsError(
            f"a frozen policy's mesh {dict(other.shape)} must divide the "
            f"{settings.train.rows_per_batch} rows of a batch and leave each process the rows that "
            f"it has on the mesh {dict(mesh.shape)}: choose other sizes of data and fsdp"
        )
    return other


def attached(
    objective: Objective | None, scorers: dict[str, Any], batch: PreferenceBatch
) -> PreferenceBatch:
    """The batch with what the objective reads of each role; with None only the sums."""
    for role, scorer in scorers.items():
        tokens = objective is not None and objective.reads_tokens(role)
        hidden = objective is not None and objective.reads_hidden(role)
        batch = attach_logps(batch, role, scorer, tokens=tokens, hidden=hidden)
    return batch


def frozen_params(objective: Objective, scorers: dict[str, Any]) -> Params:
    """What the step keeps of frozen policies: the head that makes distributions of hidden states.

    The hidden states themselves are a thousand times larger than log-probs and stored nowhere: the
    frozen policy's trunk runs in every step.
    """
    if not objective.reads_hidden(HIDDEN_ROLE) or HIDDEN_ROLE not in scorers:
        return {}
    scorer = scorers[HIDDEN_ROLE]
    fixed = scorer.scorer if isinstance(scorer, StoredScorer) else scorer
    return {HEAD: fixed.policy.unembed(fixed.params)}


def frozen_shardings(frozen: Params, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where what `frozen_params` gave lies on a mesh: split as the policy's own head is.

    Args:
        frozen: arrays, or their shapes, among which a head `[D, V]` may be.
        mesh: of the training step.
    """
    heads = {name: x for name, x in frozen.items() if name == HEAD}
    return param_shardings(dict.fromkeys(heads, ("embed", "vocab")), heads, mesh)
