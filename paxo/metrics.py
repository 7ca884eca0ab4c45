"""What is reported of a training step: pure functions of the loss's inputs, as totals and counts.

The names are those of the field's dashboards (TRL's).
"""

from collections.abc import Mapping

import jax.numpy as jnp

from paxo.numerics import Array, Mean, masked, safe_divide


def implicit_rewards(
    inputs: Mapping[str, Array], scale: float, *, per_token: bool = False
) -> Array:
    """`[..., K]` scale * log-ratio in nats to the reference, without one to the previous policy.

    Without either it is the policy's own log-prob.

    Args:
        inputs: arrays of the loss by name: `policy_logps`, perhaps `reference_logps` or
            `previous_logps`, `lengths`.
        scale: beta of the objective.
        per_token: divide by `lengths`, as SimPO's reward does.
    """
    base = inputs.get("reference_logps", inputs.get("previous_logps", 0.0))
    rewards = inputs["policy_logps"] - base
    return scale * (safe_divide(rewards, inputs["lengths"]) if per_token else rewards)


def accuracies(chosen: Array, rejected: Array) -> Array:
    """`[...]` 1 where chosen is above rejected, 1/2 where they tie, else 0."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def best_and_worst(labels: Array, where: Array) -> tuple[Array, Array, Array]:
    """Indices `[...]` of the highest and the lowest label, and whether they differ.

    >>> labels, where = jnp.array([1.0, 3.0, 2.0]), jnp.array([True, True, False])
    >>> best, worst, differ = best_and_worst(labels, where)
    >>> int(best), int(worst), bool(differ)
    (1, 0, True)
    """
    high, low = masked(labels, where, -jnp.inf), masked(labels, where, jnp.inf)
    best, worst = jnp.argmax(high, -1), jnp.argmin(low, -1)
    return best, worst, jnp.max(high, -1) > jnp.min(low, -1)


def preference_metrics(
    inputs: Mapping[str, Array],
    *,
    scale: float = 1.0,
    per_token: bool = False,
    unpaired: bool = False,
) -> dict[str, Mean]:
    """Rewards, log-probs and lengths of the best and the worst candidate of each group.

    Groups with one candidate, or with equal labels, have no rejected one: only their best counts.
    For `unpaired` objectives all candidates with a label above 0 are chosen, those with one below
    rejected and the others left out; a reward is accurate if it has the sign of its label, and
    there are no margins.

    Returns:
        `rewards/{chosen,rejected,margins,accuracies}`, `logps/{chosen,rejected}` in nats and
        `length/{chosen,rejected}` in tokens.
    """
    where, labels = inputs["where"], inputs["labels"]
    rewards = implicit_rewards(inputs, scale, per_token=per_token)
    if unpaired:
        return _sign_metrics(inputs, rewards, masked(labels, where))
    best, worst, differ = best_and_worst(labels, where)
    some = jnp.any(where, -1)

    def pick(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(masked(x, where), index[..., None], -1)[..., 0]

    chosen, rejected = pick(rewards, best), pick(rewards, worst)
    values = {
        "rewards/chosen": (chosen, some),
        "rewards/rejected": (rejected, differ),
        "rewards/margins": (chosen - rejected, differ),
        "rewards/accuracies": (accuracies(chosen, rejected), differ),
        "logps/chosen": (pick(inputs["policy_logps"], best), some),
        "logps/rejected": (pick(inputs["policy_logps"], worst), differ),
        "length/chosen": (pick(inputs["lengths"], best), some),
        "length/rejected": (pick(inputs["lengths"], worst), differ),
    }
    if where.shape[-1] == 1:  # supervised examples have no rejected candidate
        values = {name: v for name, v in values.items() if name.endswith("chosen")}
    return {name: Mean.over(value, valid) for name, (value, valid) in values.items()}


def _sign_metrics(inputs: Mapping[str, Array], rewards: Array, labels: Array) -> dict[str, Mean]:
    """Metrics of completions that are desirable or not; `labels` are 0 where there is none."""
    kinds = {"rewards": rewards, "logps": inputs["policy_logps"], "length": inputs["lengths"]}
    found = {}
    for name, x in kinds.items():
        found[f"{name}/chosen"] = Mean.over(x, labels > 0)
        found[f"{name}/rejected"] = Mean.over(x, labels < 0)
    right = accuracies(jnp.sign(labels) * rewards, 0.0)
    return found | {"rewards/accuracies": Mean.over(right, labels != 0)}
