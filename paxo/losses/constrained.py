r"""Constrained RLHF: each reward model counts until its threshold, by a Lagrange multiplier.

A reward model stops telling good from bad beyond some reward (its proxy point). The multipliers
$\lambda_i$ of n reward models weigh their advantages beside that of the KL term, and follow
whether the mean rewards lie below or above the thresholds.

>>> multipliers(jnp.zeros(2), "sigmoid"), multipliers(jnp.zeros(2), "tanh")
(Array([0.5, 0.5], dtype=float32), Array([0., 0.], dtype=float32))
"""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive, Range, Real, stateful
from paxo.losses.given import centred, check_lists, given, ratios_to
from paxo.losses.policy_gradient import bounded_exp, clipped_surrogate
from paxo.numerics import Array, Mean, safe_divide

MAX_CONSTRAINTS = 16
Squash = Literal["sigmoid", "tanh"]
Momentum = Annotated[float, Range(0, 1, low_open=False)]


def multipliers(nu: Array, squash: Squash = "sigmoid") -> Array:
    """`[n] -> [n]` Lagrange multipliers: in (0, 1) by "sigmoid", in (-1, 1) by "tanh".

    "sigmoid" only ever takes weight away from a reward above its threshold; "tanh" pushes it back.
    """
    return jax.nn.sigmoid(nu) if squash == "sigmoid" else jnp.tanh(nu)


def mixed_advantage(
    kl_advantages: Array, advantages: Array, nu: Array, *, squash: Squash = "sigmoid"
) -> Array:
    r"""`[..., n] -> [...]` $(n - \sum_i\lambda_i) A_{KL} + \sum_i\lambda_i A_i$, without gradient.

    What PPO's actor takes in place of the advantage of one reward model. The weights always add up
    to n, so that the step stays of one size as the multipliers move.

    Args:
        kl_advantages: `[...]` advantages of the KL reward, minus the log-ratio to the reference.
        advantages: `[..., n]` advantages of the n reward models.
        nu: `[n]` the multipliers before they are squashed.
        squash: "sigmoid" (mu-PPO in the paper) or "tanh" (xi-PPO).

    >>> mixed_advantage(jnp.array(-1.0), jnp.array([2.0, 4.0]), jnp.zeros(2))
    Array(2., dtype=float32)

    Moskovitz et al. 2023, arXiv:2310.04373, and the authors' code, whose branch without squashing
    drops the first multiplier; there is none here.
    """
    chex.assert_shape(nu, (advantages.shape[-1],))
    chex.assert_shape(advantages, (*kl_advantages.shape, None))
    kl_advantages, advantages, nu = given(kl_advantages), given(advantages), given(nu)
    weights = multipliers(nu, squash).astype(advantages.dtype)
    free = weights.size - jnp.sum(weights)
    return free * kl_advantages + jnp.sum(weights * advantages, axis=-1)


def first_multipliers(number: int = MAX_CONSTRAINTS) -> dict[str, Array]:
    """The state of `multiplier_step`: `nu` and its `velocity`, all 0."""
    return {"nu": jnp.zeros(number), "velocity": jnp.zeros(number)}


def multiplier_step(
    state: dict[str, Array],
    excess: Array,
    *,
    squash: Squash = "sigmoid",
    dual_rate: float = 0.01,
    momentum: float = 0.1,
) -> dict[str, Array]:
    r"""One step of descent on $\sum_i\lambda_i(\bar r_i - \theta_i)$ in nu.

    A multiplier rises while the mean reward is below its threshold, and falls above it.

    Args:
        state: `nu` and `velocity` `[n]`, from `first_multipliers` or the last step.
        excess: `[n]` mean rewards minus thresholds.
        squash: as in `mixed_advantage`.
        dual_rate: step size.
        momentum: share of the last step that is kept.

    >>> state = multiplier_step(first_multipliers(2), jnp.array([1.0, -1.0]))
    >>> state["nu"]
    Array([-0.0025,  0.0025], dtype=float32)

    Moskovitz et al. 2023, arXiv:2310.04373; SGD, its rate and momentum are the authors' code's.
    """
    total = lambda nu: jnp.sum(multipliers(nu, squash) * jax.lax.stop_gradient(excess))  # noqa: E731
    velocity = momentum * state["velocity"] + jax.grad(total)(state["nu"])
    new = {"nu": state["nu"] - dual_rate * velocity, "velocity": velocity}
    return {name: new[name].astype(old.dtype) for name, old in state.items()}


@stateful(first_multipliers)
def constrained_rlhf_loss(
    policy_logps: Array,
    previous_logps: Array,
    reference_logps: Array,
    constraint_rewards: Array,
    *,
    threshold: Real = 0.0,
    squash: Squash = "sigmoid",
    dual_rate: Positive = 0.01,
    momentum: Momentum = 0.1,
    beta: NonNegative = 1.0,
    epsilon: Positive = 0.2,
    state: dict[str, Any],
    where: Array | None = None,
) -> tuple[Mean, dict[str, Any]]:
    r"""Constrained RLHF: $-\min(\rho A, \mathrm{clip}(\rho, 1\pm\epsilon) A)$ of a mixed advantage.

    $A = (n - \sum_i\lambda_i) A_{KL} + \sum_i\lambda_i A_i$ over n reward models, and one step of
    their multipliers, $\lambda_i$ rising while the batch's mean reward i is below its threshold.
    The advantages are those of `rloo`: whole completions, against the mean of the group's others.
    Token by token, with a critic per reward, it is `ppo_policy` with `mixed_advantage` and
    `multiplier_step`.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        previous_logps: `[..., K]` the same under the policy that sampled them.
        reference_logps: `[..., K]` the same under the reference policy.
        constraint_rewards: `[..., K]` of one reward model, or `[..., K, n]` of n <= 16.
        threshold: $\theta$, one for all: subtract each model's own from its rewards.
        squash: lambda in (0, 1) by "sigmoid", a cap beyond which a reward no longer counts; or in
            (-1, 1) by "tanh", which holds it at the threshold.
        dual_rate: step size of the multipliers, > 0.
        momentum: share of their last step that is kept, in [0, 1).
        beta: reward per nat of the KL term, >= 0 (our parameter; the paper has 1).
        epsilon: half-width of the clip interval, > 0.
        state: `nu` and `velocity` `[16]`, of which the first n are used.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over completions, in units of the reward, and the new state. The loss has the
        multipliers that came in.

    >>> old, rewards = jnp.array([[-4.0, -6.0]]), jnp.array([[3.0, 1.0]])
    >>> loss, state = constrained_rlhf_loss(
    ...     old, old, old, rewards, state=first_multipliers(), threshold=3.0
    ... )
    >>> float(state["nu"][0])                                  # mean reward 2: one below
    0.0025

    Moskovitz et al. 2023, arXiv:2310.04373, and the authors' code. The paper finds the thresholds
    by a search without derivatives (from memory). No trainer has it.
    """
    check_lists(policy_logps, previous_logps, reference_logps, where)
    if constraint_rewards.ndim == policy_logps.ndim:
        constraint_rewards = constraint_rewards[..., None]
    chex.assert_shape(constraint_rewards, (*policy_logps.shape, None))
    number = constraint_rewards.shape[-1]
    if number > MAX_CONSTRAINTS:
        raise ValueError(
            f"constrained_rlhf takes at most {MAX_CONSTRAINTS} reward models; got {number}"
        )
    there = jnp.ones(policy_logps.shape, bool) if where is None else where
    rewards = given(constraint_rewards, there[..., None])
    drift = given(previous_logps, there) - given(reference_logps, there)
    by_model = _leave_one_out(jnp.moveaxis(rewards, -1, 0), there)
    advantages = mixed_advantage(
        _leave_one_out(-beta * drift, there),
        jnp.moveaxis(by_model, 0, -1),
        state["nu"][:number],
        squash=squash,
    )
    ratios = bounded_exp(ratios_to(policy_logps, previous_logps, there))
    loss = Mean.over(clipped_surrogate(ratios, advantages, epsilon, epsilon), there)
    total = jnp.sum(rewards, axis=tuple(range(rewards.ndim - 1)))
    count = jnp.sum(there)
    excess = jnp.where(count > 0, safe_divide(total, count) - threshold, 0)
    excess = jnp.pad(excess, (0, MAX_CONSTRAINTS - number)).astype(state["nu"].dtype)
    stepped = multiplier_step(state, excess, squash=squash, dual_rate=dual_rate, momentum=momentum)
    return loss, stepped


def _leave_one_out(x: Array, where: Array) -> Array:
    """`[..., K]` minus the mean of the group's others; 0 for one that is alone."""
    where = jnp.broadcast_to(where, x.shape)
    number = jnp.sum(where, axis=-1, keepdims=True)
    return safe_divide(number * centred(x, where), number - 1)
