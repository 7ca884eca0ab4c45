r"""Pairwise losses in which the pairs of a batch depend on one another.

Their leading axes are the whole global batch. Two remember it: they take `state` and return
`(loss, new_state)`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import (
    FlipRate,
    Positive,
    Probability,
    Real,
    stateful,
    whole_batch,
)
from paxo.losses.noisy import smoothed
from paxo.losses.pairwise import check_candidates, margin, pair_log_ratios
from paxo.numerics import Array, Mean, at_least_float32, masked, valid_rows

State = dict[str, Any]


@whole_batch
def aot_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
    where: Array | None = None,
) -> Array:
    r"""Alignment via optimal transport, paired: the policy's margins against the reference's.

    $-\log\sigma(\beta(A_{(i)} - R_{(i)}))$, where $A = s_w - s_l$ and $R = q_w - q_l$ are sorted
    over the batch, each by itself: the *distribution* of margins shall dominate the reference's.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0; the default is of a figure's caption, says
            TRL.
        label_smoothing: ε of conservative DPO, in [0, 0.5).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats: at each pair its policy margin against the reference margin of the same rank.
        log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> policy, reference = jnp.array([[-4., -6.], [-1., -1.]]), jnp.array([[-5., -5.], [-2., -4.]])
    >>> aot_loss(policy, reference, beta=0.5)  # margins 2 and 0 are the reference's 0 and 2
    Array([0.6931472, 0.6931472], dtype=float32)

    Melnyk et al. 2024, arXiv:2406.05882, as IBM contributed it to TRL. TRL `aot` computes the same,
    but sorts each device's batch apart.
    """
    check_candidates(policy_logps, reference_logps, where)
    policy = margin(masked(at_least_float32(policy_logps), where))
    reference = margin(masked(at_least_float32(reference_logps), where))
    valid = _valid(policy_logps, where)
    z = beta * (masked(policy, valid) - _of_same_rank(policy, reference, valid))
    return masked(smoothed(z, label_smoothing), valid)


@whole_batch
def aot_unpaired_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.01,
    label_smoothing: FlipRate = 0.0,
    where: Array | None = None,
) -> Array:
    r"""Alignment via optimal transport, unpaired: chosen log-ratios against rejected ones.

    $-\log\sigma(\beta(r_{w,(i)} - r_{l,(i)}))$ with both sorted over the batch: which chosen
    completion belongs to which rejected one does not matter.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0; the default is of a figure's caption, says
            TRL.
        label_smoothing: ε of conservative DPO, in [0, 0.5).
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats: at each pair its chosen log-ratio against the rejected one of the same rank.
        log 2 where policy and reference agree, 0 where a candidate is masked.

    >>> policy, reference = jnp.array([[-4., -6.], [-1., -4.]]), jnp.array([[-5., -5.], [-4., -1.]])
    >>> aot_unpaired_loss(policy, reference, beta=0.25)  # 1 against -3, 3 against -1
    Array([0.3132617, 0.3132617], dtype=float32)

    Melnyk et al. 2024, arXiv:2406.05882, as IBM contributed it to TRL. TRL `aot_unpaired` (until
    early 2026, and in EasyDeL still, `aot_pair`) computes the same, on each device apart.
    """
    ratios = pair_log_ratios(policy_logps, reference_logps, where)
    chosen, rejected = ratios[..., 0], ratios[..., 1]
    valid = _valid(policy_logps, where)
    z = beta * (masked(chosen, valid) - _of_same_rank(chosen, rejected, valid))
    return masked(smoothed(z, label_smoothing), valid)


def _first_moments() -> State:
    return {"mean": jnp.zeros(()), "std": jnp.zeros(())}


@stateful(_first_moments)
def beta_dpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    a: Real = 0.6,
    rho: Probability = 0.2,
    gamma: Probability = 0.9,
    beta_min: Positive = 1e-3,
    key: Array,
    state: State,
    where: Array | None = None,
) -> tuple[Mean, State]:
    r"""β-DPO: DPO on the pairs whose margin is usual, with a beta that follows the batch.

    With $D = r_w - r_l$ and running moments M, S of it: the share 1 - ρ of the pairs is drawn
    without replacement, with probability $\propto e^{-(D-M)^2/2S^2}$, and $\beta' = \max(\beta(1 +
    a(\bar D - M)), \beta_{min})$ is used for all of them, D̄ their mean margin. No gradient flows
    through the draw or β'.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: the beta of a batch of usual margins, > 0.
        a: how strongly beta follows, per nat; 0 keeps it.
        rho: share of the pairs that is left out, in [0, 1]; at least one pair is kept.
        gamma: decay of the running moments, in [0, 1].
        beta_min: smallest beta, > 0.
        key: random key of the draw.
        state: running `mean` and `std` of D; both start at 0 and are moved before they are used.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the pairs drawn, in nats, and the new state.

    >>> policy, reference = jnp.array([[-4., -6.], [-1., -3.]]), jnp.array([[-5., -5.], [-2., -2.]])
    >>> first, key = _first_moments(), jax.random.key(0)
    >>> loss, state = beta_dpo_loss(
    ...     policy, reference, beta=0.5, a=0.0, rho=0.5, key=key, state=first
    ... )
    >>> float(loss.value), float(loss.count), float(state["mean"])
    (0.3132617, 1.0, 0.2)

    Wu et al. 2024, arXiv:2407.08639, as in the authors' code, which takes D without beta (the paper
    with it, from memory: its `a` is another) and moves the moments on evaluation batches too. TRL,
    EasyDeL and HALOs do not have it.
    """
    margins = margin(pair_log_ratios(policy_logps, reference_logps, where))
    fixed, valid = jax.lax.stop_gradient(margins), _valid(policy_logps, where)
    count = jnp.sum(valid, dtype=margins.dtype)
    mean = Mean.over(fixed, valid).value
    variance = jnp.sum(masked(jnp.square(fixed - mean), valid)) / jnp.maximum(count - 1, 1)
    moments = {"mean": mean, "std": jnp.sqrt(variance)}
    state = {
        name: jnp.where(count > 0, gamma * old + (1 - gamma) * moments[name], old).astype(old.dtype)
        for name, old in state.items()
    }
    # 1e-4: (1 - rho) * count may fall a rounding error short of a whole number.
    wanted = jnp.maximum(jnp.floor((1 - rho) * count + 1e-4), jnp.minimum(count, 1))
    distance = (fixed - state["mean"]) / jnp.maximum(state["std"], 1e-6)
    drawn = _drawn(key, -0.5 * jnp.square(distance), valid, wanted)
    shift = Mean.over(fixed, drawn).value - state["mean"]
    scale = jnp.maximum(beta * (1 + a * shift), beta_min)
    return Mean(jnp.sum(masked(jax.nn.softplus(-scale * margins), drawn)), wanted), state


def _first_mean() -> State:
    return {"mean": jnp.zeros(()), "count": jnp.zeros(())}


@stateful(_first_mean)
def bco_pair_loss(
    policy_logps: Array,
    reference_logps: Array,
    *,
    beta: Positive = 0.1,
    shift: Literal["running_mean", "none"] = "running_mean",
    state: State,
    where: Array | None = None,
) -> tuple[Array, State]:
    r"""Binary classifier optimisation on pairs: $-\log\sigma(u - \delta) - \log\sigma(\delta - v)$.

    $u = \beta r_w$ and $v = \beta r_l$ are classified apart; δ, the mean of all rewards so far,
    chosen and rejected, with this batch's, is where the classes meet. No gradient through δ.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, chosen first.
        reference_logps: `[..., 2]` the same under the reference policy.
        beta: strength of the KL regularisation, > 0.
        shift: what δ is; "none" keeps it at 0.
        state: `mean` of the rewards so far in nats and their `count`.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats, 2 log 2 where policy and reference agree and always have, 0 where a candidate
        is masked; and the new state.

    >>> loss, state = bco_pair_loss(
    ...     jnp.array([-4., -7.]), jnp.array([-5., -5.]), beta=1.0, state=_first_mean()
    ... )
    >>> float(loss), float(state["mean"])  # rewards 1 and -2
    (0.4028265, -0.5)

    Jung et al. 2024, arXiv:2404.04656, the pairwise form as in TRL's `bco_pair` up to 0.28, where
    every batch weighs alike in the mean. Since then TRL has no shift (`shift="none"`, which is also
    NCA's `biasedNCA`); EasyDeL takes the batch's mean and lets the gradient through it;
    LLaMA-Factory keeps the running mean.
    """
    rewards = beta * pair_log_ratios(policy_logps, reference_logps, where)
    valid = _valid(policy_logps, where)
    batch = Mean.over(
        jax.lax.stop_gradient(rewards), jnp.broadcast_to(valid[..., None], rewards.shape)
    )
    count = state["count"] + batch.count
    weight = batch.count / jnp.maximum(count, 1)
    new = {"mean": state["mean"] + weight * (batch.value - state["mean"]), "count": count}
    new = {name: new[name].astype(old.dtype) for name, old in state.items()}
    delta = new["mean"] if shift == "running_mean" else 0.0
    loss = jax.nn.softplus(delta - rewards[..., 0]) + jax.nn.softplus(rewards[..., 1] - delta)
    return masked(loss, valid), new


def _valid(logps: Array, where: Array | None) -> Array:
    """`[...]` True on the pairs that are whole."""
    return jnp.ones(logps.shape[:-1], bool) if where is None else valid_rows(where)


def _of_same_rank(own: Array, others: Array, valid: Array) -> Array:
    """`[...]` at each valid place the element of `others` that has the rank of the `own` there."""
    last = lambda x: masked(x, valid, jnp.inf).ravel()  # noqa: E731  masked pairs rank last
    partner = jnp.argsort(last(others), stable=True)[_ranks(last(own))]
    return masked(others.ravel()[partner].reshape(own.shape), valid)


def _drawn(key: Array, log_weights: Array, valid: Array, wanted: Array) -> Array:
    """`[...]` bool: `wanted` of the valid places, drawn without replacement (Gumbel top-k)."""
    noisy = log_weights + jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    ranks = _ranks(-masked(noisy, valid, -jnp.inf).ravel())
    return valid & (ranks.reshape(valid.shape) < wanted)


def _ranks(x: Array) -> Array:
    """`[N]` place of each element in the sorted array; equal ones in their own order."""
    order = jnp.argsort(x, stable=True)
    # The inverse of a permutation: a scatter is cheaper than the second sort.
    return jnp.zeros_like(order).at[order].set(jnp.arange(x.size), unique_indices=True)
