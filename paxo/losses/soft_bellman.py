r"""OREO: policy and value function held to the soft Bellman equation, on offline trajectories.

With a reward R at the end alone, the best KL-regularised policy and its value obey $V(s_t) = R -
\beta\sum_{i \ge t}\log(\pi/q)(y_i)$ along every completion, whoever wrote it. Each loss is the mean
square by which a trajectory misses that. The policy is corrected at one action at a time: the
log-ratios behind it are data, and so is the value; the critic takes all log-ratios as data.

>>> policy, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]])
>>> values, mask, rewards = jnp.array([[0.5, 1.0]]), jnp.ones((1, 2), bool), jnp.array([1.0])
>>> inputs = (policy, reference, values, mask, rewards)       # log-ratios 1 and 0, beta 1/2
>>> [float(loss(*inputs, beta=0.5).value) for loss in (oreo_value_loss, oreo_policy_loss)]
[0.0, 0.0018394]
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import given, ratios_to, tokens_there
from paxo.losses.policy_gradient import bounded_exp
from paxo.numerics import Array, Mean, at_least_float32, masked, safe_divide

Level = Literal["token", "step", "response"]


def oreo_value_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    values: Array,
    token_mask: Array,
    rewards: Array,
    step_mask: Array | None = None,
    *,
    beta: Positive = 0.03,
    level: Level = "token",
    where: Array | None = None,
) -> Mean:
    r"""OREO's critic: $(V(s_t) - R + \beta\sum_{i\ge t}\mathrm{sg}[\log(\pi/q)(y_i)])^2$.

    Only the values have a gradient. Adding a number to rewards and values changes nothing.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats; data here.
        reference_token_logps: `[..., K, T]` the same under the reference policy.
        values: `[..., K, T]` the value of the state before each token, from a head.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        rewards: `[..., K]` of the whole completions.
        step_mask: `[..., K, T]` nonzero on the last token of each step, for `level="step"`.
        beta: strength of the KL regularisation, > 0.
        level: the states: before each "token", before each "step", or of the prompt alone
            ("response").
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the completions that have a token, each the mean over its states, in squared
        units of the reward.

    >>> logps, ones, mask = jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool)
    >>> float(oreo_value_loss(logps, logps, jnp.array([[0.0, 1.0]]), mask, ones).value)
    0.5

    Wang et al. 2024, arXiv:2412.16145, and the authors' code, whose flags turn R into 2R - 1 unless
    a script sets them back; give the rewards as they are meant. No preference trainer has it.
    """
    keep, starts, to_go, _ = _paths(
        policy_token_logps,
        reference_token_logps,
        values,
        token_mask,
        rewards,
        step_mask,
        level,
        where,
    )
    gaps = masked(at_least_float32(values), keep) - given(rewards, where)[..., None]
    gaps = gaps + beta * jax.lax.stop_gradient(to_go)
    return _over_completions(jnp.square(gaps), starts, keep)


def oreo_policy_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    values: Array,
    token_mask: Array,
    rewards: Array,
    step_mask: Array | None = None,
    *,
    beta: Positive = 0.03,
    alpha: NonNegative = 0.01,
    level: Level = "token",
    where: Array | None = None,
) -> Mean:
    r"""OREO's actor: $(V(s_t) - R + \beta l_t + \mathrm{sg}[\beta\sum_{i>t} l_i])^2$, plus a KL.

    $l = \log(\pi/q)$ of a token, V without gradient; the KL to the reference is estimated by
    $e^{-l} + l - 1$ on the tokens of the data. With `level="step"` $l_t$ is the sum over a step,
    with "response" over the completion.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        reference_token_logps: `[..., K, T]` the same under the reference policy.
        values: `[..., K, T]` the value of the state before each token; data here.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        rewards: `[..., K]` of the whole completions.
        step_mask: `[..., K, T]` nonzero on the last token of each step, for `level="step"`.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the KL term, >= 0; the authors have 0.01 by token, 0.1 by step, 0.3 by
            response.
        level: the actions: "token", "step" or "response".
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the completions that have a token, each the mean over its states, in squared
        units of the reward.

    >>> logps, ones, mask = jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool)
    >>> run = lambda s: oreo_policy_loss(s, logps, logps, mask, ones, beta=0.5).value
    >>> jax.grad(run)(logps)
    Array([[-0.5, -0.5]], dtype=float32)

    Wang et al. 2024, arXiv:2412.16145, and the authors' code, whose `--unbiased_kl` takes the KL
    over the whole vocabulary instead.
    """
    keep, starts, to_go, own = _paths(
        policy_token_logps,
        reference_token_logps,
        values,
        token_mask,
        rewards,
        step_mask,
        level,
        where,
    )
    gaps = given(values, keep) - given(rewards, where)[..., None]
    # The value is that of all log-ratios to come; the gradient goes through the action's own.
    gaps = gaps + beta * (jax.lax.stop_gradient(to_go - own) + own)
    against = -ratios_to(policy_token_logps, reference_token_logps, keep)
    kl = _over_completions(bounded_exp(against) - against - 1, keep, keep)
    bellman = _over_completions(jnp.square(gaps), starts, keep)
    return Mean(bellman.total + alpha * kl.total, bellman.count)


def oreo_loss(
    policy_token_logps: Array,
    reference_token_logps: Array,
    values: Array,
    token_mask: Array,
    rewards: Array,
    step_mask: Array | None = None,
    *,
    beta: Positive = 0.03,
    alpha: NonNegative = 0.01,
    value_weight: NonNegative = 1.0,
    level: Level = "token",
    where: Array | None = None,
) -> Mean:
    r"""OREO: actor and critic together, `oreo_policy` plus `value_weight` times `oreo_value`.

    For a policy with a value head. Where both share a trunk, the critic's gradient moves it too;
    the authors train two models.

    Args:
        policy_token_logps: `[..., K, T]` log-probs of the tokens in nats.
        reference_token_logps: `[..., K, T]` the same under the reference policy.
        values: `[..., K, T]` the value of the state before each token, from a head.
        token_mask: `[..., K, T]` bool, True on scored tokens.
        rewards: `[..., K]` of the whole completions, such as 1 for a right answer and 0 else.
        step_mask: `[..., K, T]` nonzero on the last token of each step, for `level="step"`.
        beta: strength of the KL regularisation, > 0.
        alpha: weight of the KL term, >= 0.
        value_weight: weight of the critic, >= 0.
        level: states and actions: "token", "step" or "response".
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the completions that have a token, in squared units of the reward.

    >>> logps, ones, mask = jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool)
    >>> float(oreo_loss(logps, logps, jnp.array([[0.0, 1.0]]), mask, ones).value)
    1.0

    Wang et al. 2024, arXiv:2412.16145, and the authors' code. No preference trainer has it.
    """
    inputs = (
        policy_token_logps,
        reference_token_logps,
        values,
        token_mask,
        rewards,
        step_mask,
    )
    settings = {"beta": beta, "level": level, "where": where}
    actor = oreo_policy_loss(*inputs, alpha=alpha, **settings)
    critic = oreo_value_loss(*inputs, **settings)
    return Mean(actor.total + value_weight * critic.total, actor.count)


def _paths(policy, reference, values, token_mask, rewards, step_mask, level, where):
    """`[..., K, T]` tokens there, those that open a state, and log-ratios: to come, of the action.

    The sums of an action stand at all of its tokens; they are read where it starts.
    """
    keep = tokens_there(token_mask, where, policy, reference, values)
    chex.assert_shape(rewards, keep.shape[:-1])
    ratios = ratios_to(policy, reference, keep)
    to_go = jnp.cumsum(ratios[..., ::-1], axis=-1)[..., ::-1]
    if level == "token":
        return keep, keep, to_go, ratios
    first = keep & (jnp.cumsum(keep, axis=-1) == 1)
    if level == "response":
        return keep, first, to_go, to_go
    if step_mask is None:
        raise ValueError('oreo: level="step" needs the extra `step_mask [..., K, T]`')
    chex.assert_equal_shape([keep, step_mask])
    ends = keep & (step_mask != 0)
    # A step's number is the number of steps that ended before the token.
    step = jnp.cumsum(ends, axis=-1) - ends
    opens = first | (keep & (jnp.diff(step, axis=-1, prepend=0) > 0))
    size = step.shape[-1]
    rows = jnp.arange(step.size // size).reshape(*step.shape[:-1], 1) * size
    sums = jax.ops.segment_sum(ratios.reshape(-1), (rows + step).reshape(-1), step.size)
    return keep, opens, to_go, jnp.take_along_axis(sums.reshape(step.shape), step, axis=-1)


def _over_completions(x: Array, states: Array, keep: Array) -> Mean:
    """Mean over completions of the means over their states."""
    there = jnp.any(keep, axis=-1)
    return Mean.over(safe_divide(jnp.sum(masked(x, states), -1), jnp.sum(states, -1)), there)
