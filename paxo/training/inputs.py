"""Whether a batch holds what an objective names, asked before the first step."""

from collections.abc import Collection

from paxo.losses.contract import FROM_STEP
from paxo.objectives import FROM_BATCH, HIDDEN_ROLE, Objective
from paxo.types import PreferenceBatch

TOKEN_QUANTITIES = {
    "policy_token_logps": "logps",
    "token_entropies": "entropies",
    "token_collisions": "collisions",
    "token_kls": "kls",
}


def check_batch(
    objective: Objective,
    batch: PreferenceBatch,
    heads: Collection[str] = (),
    frozen: Collection[str] = (),
) -> None:
    """Raises unless every array that the objective cannot do without is there.

    Args:
        objective: names the arrays; those with a default may be absent.
        batch: with what was attached to it.
        heads: of the policy.
        frozen: names in `TrainState.frozen`.

    Raises:
        ValueError: naming the call or the setting that adds what is missing.
    """
    for role in objective.roles:
        if role not in batch.fixed_logps:
            raise ValueError(
                f"objective {objective.name!r} needs log-probs of role {role!r}; this batch "
                f"carries {sorted(batch.fixed_logps)}. Attach them with "
                f"paxo.attach_logps(batch, {role!r}, scorer)."
            )
    for role in objective.token_roles:
        if role not in batch.fixed_token_logps:
            raise ValueError(
                f"objective {objective.name!r} needs token log-probs of role {role!r}; attach them "
                f"with paxo.attach_logps(batch, {role!r}, scorer, tokens=True)."
            )
    if objective.arrays.get("token_kls", False) and not has_kls(batch, frozen):
        raise ValueError(
            f"objective {objective.name!r} needs token_kls: attach the reference's hidden states "
            f"with paxo.attach_logps(batch, {HIDDEN_ROLE!r}, scorer, hidden=True) and give its "
            'head to init_state(..., frozen={"reference_head": policy.unembed(params)}).'
        )
    provided = {"policy_logps", "lengths", "token_mask", *FROM_BATCH, *FROM_STEP, *TOKEN_QUANTITIES}
    provided |= {f"{role}_logps" for role in batch.fixed_logps}
    provided |= {f"{role}_token_logps" for role in batch.fixed_token_logps}
    provided |= set(batch.extras) | set(heads)
    missing = sorted(
        n for n, required in objective.arrays.items() if required and n not in provided
    )
    if missing:
        raise ValueError(
            f"objective {objective.name!r} needs {', '.join(missing)}, which nobody provides; the "
            f"batch's extras are {sorted(batch.extras)}. Name the columns that hold them with "
            f"data.extras=({', '.join(map(repr, missing))},)."
        )


def has_kls(batch: PreferenceBatch, frozen: Collection[str]) -> bool:
    """Whether divergences from the reference's distributions can be computed."""
    return HIDDEN_ROLE in batch.fixed_hidden and "reference_head" in frozen
