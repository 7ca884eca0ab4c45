r"""Process reward models and regret: losses over the steps or the states of a trajectory."""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import Positive
from paxo.losses.pairwise import margin
from paxo.numerics import Array, Mean, at_least_float32, masked, masked_rows, safe_divide


def prm_loss(
    step_scores: Array,
    step_labels: Array,
    step_mask: Array,
    *,
    last_step_only: bool = False,
    where: Array | None = None,
) -> Mean:
    r"""Process reward model: $-p\log\sigma(v) - (1 - p)\log\sigma(-v)$ at the end of each step.

    Args:
        step_scores: `[..., K, T]` logits that the steps so far are right, from a head that is read
            at each token itself.
        step_labels: `[..., K, T]` p in [0, 1], read at the ends of steps: whether the step is
            right, or the share of correct solutions among rollouts from it.
        step_mask: `[..., K, T]` nonzero on the last token of each step.
        last_step_only: train on each solution's last step alone, an outcome reward model.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` in nats over the steps of the batch.

    >>> loss = prm_loss(jnp.zeros((1, 4)), jnp.ones((1, 4)), jnp.array([[0, 1, 0, 1]]))
    >>> float(loss.value), float(loss.count)
    (0.6931472, 2.0)

    Lightman et al. 2023, arXiv:2305.20050; labels from rollouts: Wang et al. 2023, arXiv:2312.08935
    (from memory). TRL's PRM trainer (up to 1.13), and OpenRLHF's `PRMLoss` with the logits of two
    reward tokens, compute the same with `step_scores` the difference of the two logits.
    """
    chex.assert_equal_shape([step_scores, step_labels, step_mask])
    if where is None:
        where = jnp.ones(step_scores.shape[:-1], bool)
    ends = (step_mask != 0) & where[..., None]
    if last_step_only:
        later = jnp.cumsum(ends[..., ::-1], axis=-1)[..., ::-1]
        ends = ends & (later == 1)
    x = masked(at_least_float32(step_scores), ends)
    p = masked(at_least_float32(step_labels), ends)
    return Mean.over(jax.nn.softplus(-x) + (1 - p) * x, ends)


def aggregate_steps(
    step_probabilities: Array,
    step_mask: Array,
    how: Literal["min", "product", "last", "mean"] = "min",
) -> Array:
    """`[..., T] -> [...]` one score of a solution from those of its steps; 0 without steps.

    Args:
        step_probabilities: `[..., T]` in [0, 1].
        step_mask: `[..., T]` nonzero on the last token of each step.
        how: "min" is the usual choice.

    >>> p, ends = jnp.array([0.5, 0.9, 0.1, 0.8]), jnp.array([1, 1, 0, 1])
    >>> [round(float(aggregate_steps(p, ends, how)), 2) for how in ("min", "product", "last")]
    [0.5, 0.36, 0.8]
    """
    ends = step_mask != 0
    p = masked(at_least_float32(step_probabilities), ends)
    number = jnp.sum(ends, axis=-1)
    if how == "mean":
        return safe_divide(jnp.sum(p, axis=-1), number)
    if how == "last":
        return jnp.sum(masked(p, ends & (jnp.cumsum(ends, axis=-1) == number[..., None])), axis=-1)
    p = jnp.where(ends, p, 1)
    return masked(jnp.min(p, axis=-1) if how == "min" else jnp.prod(p, axis=-1), number > 0)


def regret_preference_loss(
    scores: Array,
    start_values: Array,
    end_values: Array,
    *,
    temperature: Positive = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Regret preference model: $-\log\sigma((\mathrm{regret}_l - \mathrm{regret}_w)/\tau)$.

    The regret of a segment, $V^*(s_0) - (R + V^*(s_L))$ where the dynamics are deterministic, is
    what acting optimally from its start would have gained over it. Unlike the return R alone it
    tells where the segment leads, and no potential added to the reward changes it. Experimental:
    from memory, the paper was not at hand.

    Args:
        scores: `[..., 2]` returns R of the two segments under the reward that is learnt, chosen
            first.
        start_values: `[..., 2]` optimal values of the first states, under the same reward.
        end_values: `[..., 2]` of the states reached.
        temperature: tau (our parameter; the paper has 1).
        where: `[..., 2]` bool, False on segments to ignore.

    Returns:
        `[...]` nats; the return model's, `bradley_terry_loss`, where all values are equal.

    >>> returns, zeros = jnp.array([1.0, 1.0]), jnp.zeros(2)
    >>> regret_preference_loss(returns, zeros, jnp.array([1.0, 0.0]))
    Array(0.3132617, dtype=float32)

    Knox et al. 2022, arXiv:2206.02231. With A* = beta log(pi*/ref) minus the regret is the implicit
    reward: DPO and CPL are regret models of a KL-regularised problem.
    TRL, EasyDeL and HALOs do not have it.
    """
    chex.assert_equal_shape([scores, start_values, end_values])
    chex.assert_axis_dimension(scores, -1, 2)
    given = lambda x: masked(at_least_float32(x), where)  # noqa: E731
    found = segment_regret(given(scores), given(start_values), given(end_values))
    return masked_rows(jax.nn.softplus(margin(found) / temperature), where)


def segment_regret(returns: Array, start_values: Array, end_values: Array) -> Array:
    """Of a segment in a deterministic problem: `[...]`, at least 0 for optimal values.

    In general it is minus the sum of the optimal advantages of the actions taken.

    >>> segment_regret(jnp.array([1.0]), jnp.array([3.0]), jnp.array([1.5]))
    Array([0.5], dtype=float32)
    """
    return start_values - (returns + end_values)
