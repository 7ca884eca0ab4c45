"""What a policy's extra heads say of packed rows: of groups, candidates or scored tokens."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from paxo.scoring import by_candidate, predicting
from paxo.types import Array, Params, Policy, PreferenceBatch

# Heads that are read once a candidate, once a group, or at each scored token itself; all others are
# read where the scored tokens are predicted.
AT_CANDIDATES, AT_GROUPS, AT_TOKENS = ("scores", "embeddings"), ("degree_logits",), ("step_scores",)


def head_outputs(
    policy: Policy, params: Params, batch: PreferenceBatch, names: Sequence[str], hidden: Array
) -> dict[str, Array]:
    """What the policy's extra heads say, by name.

    Args:
        policy: has those heads.
        params: its parameters.
        batch: packed rows.
        names: of `policy.heads`.
        hidden: `[R, L, D]` from `all_hidden`.

    Returns:
        "scores" `[R, G, K]` and "embeddings" `[R, G, K, N]`, read at each candidate's last token;
        "degree_logits" `[R, G, N]` at that of a group's last candidate; "step_scores"
        `[R, G, K, T]` at each scored token; the others `[R, G, K, T]` where those are predicted.
    """
    out = {}
    for name in names:
        head = functools.partial(policy.heads[name], params)
        if name in AT_CANDIDATES:
            out[name] = head(_states_at(_last_tokens(batch), hidden))
        elif name in AT_GROUPS:
            out[name] = head(_states_at(jnp.max(_last_tokens(batch), -1), hidden))
        elif name in AT_TOKENS:
            out[name] = by_candidate(head(_states_at(_own_tokens(batch), hidden)), batch)
        else:
            out[name] = by_candidate(head(predicting(hidden, batch)), batch)
    return out


def _states_at(index: Array, hidden: Array) -> Array:
    """`[R, ...]` indices in the row, `[R, L, D]` -> `[R, ..., D]`."""
    flat = jnp.take_along_axis(hidden, index.reshape(len(index), -1, 1), axis=1)
    return flat.reshape(*index.shape, -1)


def _last_tokens(batch: PreferenceBatch) -> Array:
    """`[R, G, K]` index in the row of each candidate's last token, 0 where there is none."""
    groups, candidates = batch.where.shape[-2:]
    index = jnp.arange(batch.tokens.shape[1])
    slot = (batch.group - 1) * candidates + batch.branch - 1
    slot = jnp.where(batch.branch == 0, -1, slot)
    mine = slot[:, :, None] == jnp.arange(groups * candidates)
    return jnp.max(jnp.where(mine, index[:, None], 0), axis=1).reshape(batch.where.shape)


def _own_tokens(batch: PreferenceBatch) -> Array:
    """`[R, S]` index in the row of each scored token; any index on padding."""
    # A token of a completion predicts the next, so the next slot's `score_from` is where it lies.
    following = jnp.roll(batch.score_from, -1, axis=1)
    continues = batch.score_slot == jnp.pad(batch.score_slot, ((0, 0), (0, 1)), mode="edge")[:, 1:]
    last_slot = jnp.arange(batch.score_slot.shape[1]) == batch.score_slot.shape[1] - 1
    ends = jnp.pad(_last_tokens(batch).reshape(len(batch.tokens), -1), ((0, 0), (0, 1)))
    end = jnp.take_along_axis(ends, batch.score_slot, axis=1)
    return jnp.where(continues & ~last_slot, following, end)
