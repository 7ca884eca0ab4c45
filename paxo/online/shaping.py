"""Targets that need log-probs or values: computed on packed rows, for the whole round at once.

A shape is `(batches, tools) -> batches`. Log-probs of the roles that the method names are attached;
the policy that sampled has the role "previous". Nothing here depends on the policy that is being
trained, so a round that is resumed has the same numbers.

Here are those of PPO (`gae_advantages`), RTO (`rto_advantages`) and of rewards with a KL penalty
(`penalised_rewards`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxo import scoring
from paxo.head_outputs import head_outputs
from paxo.losses.advantages import gae, rto_rewards, whiten
from paxo.numerics import Mean
from paxo.types import Array, Params, Policy, PreferenceBatch


class Tools(NamedTuple):
    """What shapes work with.

    Attributes:
        policy: the model.
        params: of the policy that sampled, heads included.
    """

    policy: Policy
    params: Params


Shape = Callable[[Sequence[PreferenceBatch], Tools], list[PreferenceBatch]]


def penalised_rewards(beta: float, *, extra: str = "rewards") -> Shape:
    r"""Rewards less $\beta \log(\pi_t / q)$ of the whole completion (P3O, REBEL).

    Args:
        beta: reward per nat.
        extra: which array holds the rewards.
    """

    def shape(batches: Sequence[PreferenceBatch], tools: Tools) -> list[PreferenceBatch]:
        del tools
        return [
            _with(b, **{extra: b.extras[extra] - beta * _drift(b.fixed_logps)}) for b in batches
        ]

    return shape


def gae_advantages(
    *,
    kl: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    normalise: bool = False,
    reward_clip: float = 10.0,
    whitened: bool = True,
) -> Shape:
    r"""PPO's arrays: token rewards, values, generalised advantages, returns.

    A token's reward is $-kl \log(\pi_t/q)$, and for the last one the completion's reward beside it.
    Advantages are whitened over the tokens of the whole round; returns are not.

    Args:
        kl: reward per nat.
        gamma: discount.
        lam: see `gae`.
        normalise: subtract the mean of the round's rewards and divide by their standard deviation
            before clipping. PPO-max keeps running figures over all rounds; these are the round's.
        reward_clip: bound on the completion's reward; 0 for none.
        whitened: whether advantages are.

    arXiv:2307.04964.
    """

    def shape(batches: Sequence[PreferenceBatch], tools: Tools) -> list[PreferenceBatch]:
        rewards = _normalised(batches) if normalise else [b.extras["rewards"] for b in batches]
        if reward_clip:
            rewards = [jnp.clip(r, -reward_clip, reward_clip) for r in rewards]
        token_rewards = [_token_rewards(b, r, kl) for b, r in zip(batches, rewards)]
        return _with_advantages(batches, token_rewards, tools, gamma, lam, whitened)

    return shape


def rto_advantages(
    *, b1: float = 0.05, b2: float = 0.01, clip: float = 0.05, gamma: float = 1.0, lam: float = 0.95
) -> Shape:
    """PPO's arrays from RTO's token rewards; the role "dpo" is the policy that DPO trained.

    Args:
        b1: see `rto_rewards`, as for `b2` and `clip`.
        b2: weight of the KL penalty.
        clip: bound on the DPO policy's part.
        gamma: discount.
        lam: see `gae`.

    arXiv:2404.18922.
    """

    def shape(batches: Sequence[PreferenceBatch], tools: Tools) -> list[PreferenceBatch]:
        token_rewards = []
        for batch in batches:
            by_token = [_tokens(batch, role) for role in ("previous", "reference", "dpo")]
            given = (*by_token, _mask(batch), batch.extras["rewards"])
            found = rto_rewards(*given, b1=b1, b2=b2, clip=clip, where=batch.where)
            token_rewards.append(found)
        return _with_advantages(batches, token_rewards, tools, gamma, lam, whitened=True)

    return shape


def _with_advantages(batches, token_rewards, tools, gamma, lam, whitened) -> list[PreferenceBatch]:
    values = [_values(tools.policy, tools.params, b) for b in batches]
    masks = [_mask(b) for b in batches]
    found = [_gae(r, v, m, gamma=gamma, lam=lam) for r, v, m in zip(token_rewards, values, masks)]
    advantages = [a for a, _ in found]
    if whitened:
        flat = whiten(_joined(advantages), _joined(masks))
        parts = jnp.split(flat, np.cumsum([a.size for a in advantages])[:-1])
        advantages = [part.reshape(a.shape) for part, a in zip(parts, advantages)]
    return [
        _with(b, advantages=a, returns=returns, previous_values=v)
        for b, a, (_, returns), v in zip(batches, advantages, found, values)
    ]


def _token_rewards(batch: PreferenceBatch, rewards: Array, kl: float) -> Array:
    mask = _mask(batch)
    penalty = -kl * (_tokens(batch, "previous") - _tokens(batch, "reference"))
    last = mask & (jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] == 1)
    return jnp.where(mask, penalty, 0) + jnp.where(last, rewards[..., None], 0)


def _normalised(batches: Sequence[PreferenceBatch]) -> list[Array]:
    """Rewards with mean 0 and standard deviation 1 over the round."""
    rewards, where = (
        _joined([b.extras["rewards"] for b in batches]),
        _joined([b.where for b in batches]),
    )
    mean = Mean.over(rewards, where).value
    deviation = jnp.sqrt(Mean.over(jnp.square(rewards - mean), where).value)
    return [(b.extras["rewards"] - mean) / jnp.maximum(deviation, 1e-8) for b in batches]


def _drift(fixed_logps) -> Array:
    return fixed_logps["previous"] - fixed_logps["reference"]


def _tokens(batch: PreferenceBatch, role: str) -> Array:
    return scoring.by_candidate(jnp.asarray(batch.fixed_token_logps[role]), batch)


def _mask(batch: PreferenceBatch) -> Array:
    return scoring.by_candidate(jnp.ones(batch.score_slot.shape, bool), batch)


# Compiled once: called as it is, its scan would be compiled every round.
_gae = jax.jit(gae)


@functools.partial(jax.jit, static_argnums=0)
def _values(policy: Policy, params: Params, batch: PreferenceBatch) -> Array:
    hidden = scoring.all_hidden(policy, params, batch)
    return head_outputs(policy, params, batch, ["values"], hidden)["values"]


def _joined(arrays: Sequence[Array]) -> Array:
    return jnp.concatenate([jnp.ravel(x) for x in arrays])


def _with(batch: PreferenceBatch, **extras: Array) -> PreferenceBatch:
    return batch.replace(extras={**batch.extras, **extras})
