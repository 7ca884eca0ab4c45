"""Frozen policies of a run: the scorer of each role, and what batches and steps keep of it."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from paxo.experiment import Experiment, ReferenceSettings
from paxo.loading import Model, load_model
from paxo.logp_store import LogpStore
from paxo.models.policy import make_policy
from paxo.objectives import HIDDEN_ROLE, Objective
from paxo.overrides import SettingsError
from paxo.scoring import FixedScorer, StoredScorer, attach_logps, make_scorer
from paxo.types import Params, PreferenceBatch

logger = logging.getLogger(__name__)


def frozen_scorers(
    settings: Experiment, model: Model, mesh: Mesh, workdir: pathlib.Path
) -> dict[str, FixedScorer | StoredScorer]:
    """Role -> the scorer of its frozen policy, for all roles that are attached to batches.

    A role without a path scores with the model's own first parameters: `train` copies them.
    """
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
        same = chosen.path, chosen.store
        if role == "previous" and chosen.path is None:
            logger.info("role 'previous' is the policy that training starts from")
        if same not in made:
            if chosen.store in {store for _, store in made} - {None, "off"}:
                raise SettingsError(
                    f"{role}.store={chosen.store} is that of another policy, but a store is "
                    "written by one: name another folder"
                )
            # A store is written by one scorer: those of other policies have folders of their own.
            folder = workdir / "logps" / ("" if not made else role)
            made[same] = _scorer(settings, chosen, model, mesh, folder)
        scorers[role] = made[same]
    return scorers


def _scorer(
    settings: Experiment,
    chosen: ReferenceSettings,
    model: Model,
    mesh: Mesh,
    folder: pathlib.Path,
) -> FixedScorer | StoredScorer:
    """The scorer of one frozen policy, with its log-probs kept in `folder` or another."""
    lora = model.lora
    if chosen.path is not None:
        whole = dataclasses.replace(settings.model, path=chosen.path, lora=None)
        if lora is not None:
            whole = dataclasses.replace(whole, param_dtype=lora.base_dtype)
        other = load_model(whole, mesh)
        policy, params, config = other.policy, other.params, other.config
    elif lora is not None:  # the base without its adapters: no second copy of the weights
        policy, config = make_policy(model.config), model.config
        _, params = model.policy.split(model.params)
    else:
        policy, params, config = model.policy, model.params, model.config
    scorer = make_scorer(policy, params, mesh=mesh)
    if chosen.store == "off":
        return scorer
    # All that the values depend on besides the token ids.
    fingerprint = (
        f"{scorer.fingerprint()} {model.tokenizer.fingerprint()} {config.compute_dtype} {config}"
    )
    store = LogpStore(chosen.store or folder, fingerprint, process=jax.process_index())
    return StoredScorer(scorer, store)


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
    return {"reference_head": fixed.policy.unembed(fixed.params)}
