r"""Losses on single completions that are desirable (label above 0) or not (label below 0).

A group may hold any number of candidates. Candidates with label 0 are not judged: for KTO they are
completions of other prompts, which measure the KL divergence; the other losses skip them. Averages
run over the judged candidates, not over groups.

>>> policy, reference = jnp.array([[-4.0], [-6.0]]), jnp.array([[-5.0], [-5.0]])
>>> nca_unpaired_loss(policy, reference, jnp.array([[1.0], [-1.0]]), beta=1.0).count
Array(2., dtype=float32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import (
    NonNegative,
    Positive,
    Probability,
    stateful,
    unpaired,
    wants_mismatched,
    whole_batch,
)
from paxo.losses.pairwise import log_ratios
from paxo.numerics import Array, Mean, at_least_float32, masked


@wants_mismatched
@whole_batch
def kto_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    where: Array | None = None,
) -> Mean:
    r"""Kahneman-Tversky optimisation: $\lambda(1 - \sigma(\pm\beta(r - z_0)))$.

    $r$ is the log-ratio of a completion and $z_0 = sg[\max(0, \overline{r})]$ the reference point,
    with the mean over mismatched completions: a second candidate of the group with label 0, the
    completion of another prompt. It is taken over the whole batch, so it does not depend on
    devices, microbatches or the order of the batch. A prompt paired with its own completion would
    stand still at one half; without any mismatched completion $z_0$ is 0.

    Keep (desirable_weight * number desirable) / (undesirable_weight * number undesirable) between 1
    and 4/3.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` above 0 desirable, below 0 undesirable, 0 mismatched.
        beta: inverse temperature of the value function, > 0.
        desirable_weight: lambda of the desirable, >= 0.
        undesirable_weight: lambda of the undesirable, >= 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the judged completions; half the weight where policy and reference agree.

    >>> logps = jnp.array([[-4., -20.], [-6., -30.]])
    >>> kto_loss(logps, logps, jnp.array([[1., 0.], [-1., 0.]])).value
    Array(0.5, dtype=float32)

    Ethayarajh et al. 2024, arXiv:2402.01306. HALOs and TRL compute the same, given the mismatched
    completions; these they make by a shift of a device's batch by one, HALOs drops ratios that are
    exactly 0, and TRL averages the means of devices. EasyDeL's pairwise "kto" is conservative DPO.
    """
    ratios, sign, judged, mismatched = _split(policy_logps, reference_logps, labels, where)
    baseline = Mean.over(jax.lax.stop_gradient(ratios), mismatched).value
    losses = jax.nn.sigmoid(-sign * beta * (ratios - jax.nn.relu(baseline)))
    weights = jnp.where(sign > 0, desirable_weight, undesirable_weight).astype(losses.dtype)
    return Mean.over(weights * losses, judged)


@unpaired
def apo_zero_unpaired_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    where: Array | None = None,
) -> Mean:
    r"""KTO with the reference point 0: $\lambda(1 - \sigma(\pm\beta r))$.

    Needs no mismatched completions and couples no groups. Over the two halves of a pair the losses
    add up to anchored preference optimisation (`apo_zero`).

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` above 0 desirable, below 0 undesirable, 0 not judged.
        beta: inverse temperature of the value function, > 0.
        desirable_weight: weight of the desirable, >= 0.
        undesirable_weight: weight of the undesirable, >= 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over the judged completions.

    >>> logps = jnp.array([[-4.], [-6.]])
    >>> apo_zero_unpaired_loss(logps, logps, jnp.array([[1.], [-1.]])).value
    Array(0.5, dtype=float32)

    D'Oosterlinck et al. 2024, arXiv:2408.06266; TRL's KTO trainer has it under this name.
    """
    ratios, sign, judged, _ = _split(policy_logps, reference_logps, labels, where)
    losses = jax.nn.sigmoid(-sign * beta * ratios)
    weights = jnp.where(sign > 0, desirable_weight, undesirable_weight).astype(losses.dtype)
    return Mean.over(weights * losses, judged)


@unpaired
def nca_unpaired_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.01,
    where: Array | None = None,
) -> Mean:
    r"""Noise contrastive alignment on binary labels, $u = \beta r$.

    $-\log\sigma(u) - \frac{1}{2}\log\sigma(-u)$ for desirable completions, whose best
    $u$ is log 2, and $-\frac{1}{2}\log\sigma(-u)$ for the others. A pair's two losses add up
    to `nca_pair`.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` above 0 desirable, below 0 undesirable, 0 not judged.
        beta: scale of the implicit reward, > 0.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of nats over the judged completions.

    >>> logps = jnp.array([[-4.], [-6.]])
    >>> nca_unpaired_loss(logps, logps, jnp.array([[1.], [-1.]])).total
    Array(1.3862944, dtype=float32)

    Chen et al. 2024, arXiv:2402.05369, and the authors' code. Of the peers only the paired form.
    """
    ratios, sign, judged, _ = _split(policy_logps, reference_logps, labels, where)
    rewards = beta * ratios
    losses = 0.5 * jax.nn.softplus(rewards)
    losses = losses + jnp.where(sign > 0, jax.nn.softplus(-rewards), 0)
    return Mean.over(losses, judged)


def bco_state() -> dict[str, Array]:
    """Mean reward of the undesirable and the desirable `[2]`, and how much it has seen `[2]`."""
    return {"mean": jnp.zeros(2), "weight": jnp.zeros(2)}


@unpaired
@stateful(bco_state)
def bco_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    density_ratios: Array | None = None,
    *,
    beta: Positive = 0.1,
    delta_mode: Literal["ema", "midpoint", "running_mean"] = "ema",
    ema_decay: Probability = 0.9,
    min_density_ratio: NonNegative = 0.5,
    max_density_ratio: Positive = 10.0,
    where: Array | None = None,
    state: dict[str, Array],
) -> tuple[Mean, dict[str, Array]]:
    r"""Binary classifier optimisation: $-\log\sigma(\pm(\beta r - \delta))$.

    The cross-entropy of a classifier whose logit is the implicit reward, an upper bound of DPO for
    any shift $\delta$ and tightest half-way between the classes. The shift carries no gradient and
    includes the current batch:

    - "ema": midpoint of the two classes' mean rewards, exponentially averaged (the paper);
    - "midpoint": the same of the current batch alone (Eq. 7 without memory);
    - "running_mean": mean of all rewards so far, both classes together (the published code), which
      leans to the larger class.

    A class that the batch lacks keeps its last mean; one never seen is left out.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` above 0 desirable, below 0 undesirable, 0 not judged.
        density_ratios: `[...]` p(desirable | prompt) / p(undesirable | prompt) of each group, from
            a classifier on prompts; weighs the undesirable where the classes' prompts differ. None
            for weights of 1.
        beta: scale of the implicit reward, > 0.
        delta_mode: how the shift is kept.
        ema_decay: share of the old average that is kept; the paper's is not known.
        min_density_ratio: lowest weight of an undesirable completion.
        max_density_ratio: highest weight of an undesirable completion.
        where: `[..., K]` bool, False on candidates to ignore.
        state: what `bco_state` returns, or the last call did.

    Returns:
        A `Mean` of nats over the judged completions (weights are not normalised), and the state.

    >>> policy, reference = jnp.array([[-4.], [-6.]]), jnp.array([[-5.], [-7.]])
    >>> loss, state = bco_loss(policy, reference, jnp.array([[1.], [-1.]]), state=bco_state())
    >>> loss.value, state["mean"]
    (Array(0.6931472, dtype=float32), Array([0.1, 0.1], dtype=float32))

    Jung et al. 2024, arXiv:2404.04656, Eq. 7. TRL's BCO trainer (up to 1.13) is "running_mean"
    with weights as here. HALOs has no BCO; EasyDeL's trainer never moves its running mean, and the
    shift of its paired `bco` carries gradient.
    """
    ratios, sign, judged, _ = _split(policy_logps, reference_logps, labels, where)
    rewards = beta * ratios
    state = _class_means(jax.lax.stop_gradient(rewards), sign, judged, delta_mode, ema_decay, state)
    share = state["weight"] if delta_mode == "running_mean" else jnp.sign(state["weight"])
    delta = Mean(jnp.sum(share * state["mean"]), jnp.sum(share)).value.astype(rewards.dtype)
    losses = jax.nn.softplus(-sign * (rewards - delta))
    if density_ratios is not None:
        chex.assert_shape(density_ratios, ratios.shape[:-1])
        some = masked(at_least_float32(density_ratios), jnp.any(judged, axis=-1))
        weights = jnp.clip(some, min_density_ratio, max_density_ratio)[..., None]
        losses = losses * jnp.where(sign < 0, weights.astype(losses.dtype), 1)
    return Mean.over(losses, judged), state


def density_ratios_from(probability: Array) -> Array:
    """p / (1 - p) of a classifier's p(desirable | prompt): what BCO takes as `density_ratios`.

    >>> density_ratios_from(jnp.array([0.5, 0.75]))
    Array([1., 3.], dtype=float32)
    """
    return probability / (1 - probability + 1e-8)


def _split(
    policy_logps: Array, reference_logps: Array, labels: Array, where: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Log-ratios `[..., K]`, signs of the labels, where there is a judgement, and where label 0."""
    where = jnp.ones(policy_logps.shape, bool) if where is None else where
    chex.assert_equal_shape([policy_logps, reference_logps, labels, where])
    ratios = log_ratios(policy_logps, reference_logps, where)
    sign = jnp.sign(masked(at_least_float32(labels), where)).astype(ratios.dtype)
    return ratios, sign, where & (sign != 0), where & (sign == 0)


def _class_means(
    rewards: Array, sign: Array, judged: Array, mode: str, decay: float, state: dict[str, Array]
) -> dict[str, Array]:
    """Weighted means of the undesirable's and the desirable's rewards, this batch included."""
    classes = [Mean.over(rewards, judged & (sign < 0)), Mean.over(rewards, judged & (sign > 0))]
    mean = jnp.stack([c.value for c in classes]).astype(state["mean"].dtype)
    count = jnp.stack([c.count for c in classes]).astype(state["weight"].dtype)
    # Old weight kept, new weight: an average starts at its first batch, not at 0.
    kept, new = {
        "ema": (decay, 1 - decay),
        "midpoint": (0.0, 1.0),
        "running_mean": (1.0, count),
    }[mode]
    new_weight = kept * state["weight"] + new
    moved = new * (mean - state["mean"]) / jnp.where(new_weight > 0, new_weight, 1)
    seen = count > 0
    return {
        "mean": jnp.where(seen, state["mean"] + moved, state["mean"]),
        "weight": jnp.where(seen, new_weight, state["weight"]),
    }
