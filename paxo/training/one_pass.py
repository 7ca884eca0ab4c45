"""Head, loss and gradient of a few rows at a time, in one pass that computes nothing twice.

A loss that does not couple groups needs no more than the rows that hold them: what a row's tokens
weigh in the loss follows from the row's own log-probs. So the logits of a few rows are made, their
loss is taken and sent back through them at once, and only then come the next rows. The head's part
of the gradient adds up; the hidden states' parts, put together, go back through the trunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paxo import scoring
from paxo.types import Array, Params, Policy, PreferenceBatch

# Entries of the float32 logits that may exist at a time on a device, about twice in the backward
# pass; as many as the head's own gradient has are allowed anyway.
MOST_LOGITS = 2**25

# `(hidden [r, L, D], head, heads, rows) -> loss, means`: what some rows add to both.
RowsLoss = Callable[..., tuple[Array, Any]]


def parts(policy: Policy, params: Params, batch: PreferenceBatch, devices: int) -> int | None:
    """In how many parts the rows meet the head; None where a row a device is too much.

    Args:
        policy: the model.
        params: its parameters, or their shapes.
        batch: packed rows, or their shapes.
        devices: over which the rows are split.
    """
    rows, slots = batch.score_token.shape
    if rows % devices:
        return None
    head = jax.eval_shape(lambda params: scoring.head_of(policy, params), params)
    most = max(MOST_LOGITS, head.matrix.size // devices)
    if slots * head.vocabulary > most:
        return None
    own = rows // devices
    if devices > 1:
        # Each part would add up the head's gradient over the devices: one part, or another way.
        return 1 if own * slots * head.vocabulary <= most else None
    wanted = min(-(-scoring.chunk_tokens(head.vocabulary) // slots), own)
    while own % wanted or wanted * slots * head.vocabulary > most:
        wanted -= 1
    return own // wanted


def value_and_gradient(
    policy: Policy,
    params: Params,
    batch: PreferenceBatch,
    loss_of: RowsLoss,
    split: Callable[[Any], Any],
    *,
    join: Callable[[Params], Params] = lambda params: params,
) -> tuple[tuple[Array, Any], Params]:
    """`(loss, means), gradient` of all rows.

    Args:
        policy: the model.
        params: its trained parameters.
        batch: packed rows.
        loss_of: loss and means of some rows, which add up over rows.
        split: puts `[R, ...]` arrays into `[parts, R / parts, ...]`.
        join: adds to the trained parameters those that are frozen.
    """

    def states_and_head(params: Params) -> tuple:
        params = join(params)
        hidden = scoring.all_hidden(policy, params, batch)
        return hidden, scoring.head_of(policy, params), params.get("heads", {})

    (hidden, *head), back = jax.vjp(states_and_head, params)
    of_rows = jax.value_and_grad(loss_of, (0, 1, 2), has_aux=True)

    def add(totals: tuple, rows: tuple) -> tuple:
        d_head, value = totals
        own_hidden, own_batch = rows
        own_value, (d_hidden, *own_d_head) = of_rows(own_hidden, *head, own_batch)
        own_d_head = _by_width(*own_d_head)
        return jax.tree.map(_added, (d_head, value), (own_d_head, own_value)), d_hidden

    split_rows = split((hidden, batch))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), split_rows)
    shapes = jax.eval_shape(lambda rows: of_rows(rows[0], *head, rows[1])[0], one)
    zeros = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree
    )
    start = zeros(jax.eval_shape(_by_width, *head)), zeros(shapes)
    ((d_matrix, d_heads), value), d_hidden = jax.lax.scan(add, start, split_rows)
    d_hidden = jnp.swapaxes(d_hidden, 0, 1).reshape(hidden.shape)
    by_token = head[0].by_token
    d_head = [scoring.Head(d_matrix.T if by_token else d_matrix, by_token), d_heads]
    d_head = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, head)
    return value, back((d_hidden, *d_head))[0]


def _by_width(head: scoring.Head, heads: Any) -> tuple[Array, Any]:
    """The head as `[D, V]`, as its gradient is added up: turned once, behind the last rows."""
    return head.matrix.T if head.by_token else head.matrix, heads


def _added(total: Array, x: Array) -> Array:
    return total + x.astype(total.dtype)
