"""Log-probs of given tokens, a chunk of the vocabulary at a time.

Every chunk of the head is read once, meets all positions, and its gradient is written once, where
chunks of positions would read the whole head and add to its whole gradient for each of them. The
running log Σ e^z needs no more than two numbers a position; the backward pass makes the logits
again (as cut cross-entropy does: Wijmans et al. 2024, arXiv:2411.09009).
"""

import functools

import jax
import jax.numpy as jnp

from paxo.chunked_head import logits_of, to_head, to_states

Array = jax.Array


def vocabulary_logps(
    chunk: int, hidden: Array, head: Array, tokens: Array, *, by_token: bool = False
) -> Array:
    """Log-probs of `tokens` under `softmax(hidden @ head)`.

    Args:
        chunk: tokens of the vocabulary whose logits exist at a time.
        hidden: `[..., D]`.
        head: `[D, V]`, or `[V, D]` if `by_token`, as the embeddings lie.
        tokens: `[...]` int32.
        by_token: how `head` lies.

    Returns:
        `[...]` float32 in nats. Differentiable in `hidden` and `head`.

    >>> vocabulary_logps(3, jnp.eye(2), jnp.zeros((2, 4)), jnp.array([3, 1]))
    Array([-1.3862944, -1.3862944], dtype=float32)
    """
    states = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(chunk, head.shape[0 if by_token else 1])
    return _logps(chunk, by_token, states, head, tokens.ravel()).reshape(tokens.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logps(chunk, by_token, hidden, head, tokens):
    return _forward(chunk, by_token, hidden, head, tokens)[0]


class _Chunks:
    """Slices of the head; the last reaches back over the one before it where V asks for that."""

    def __init__(self, chunk: int, head: Array, by_token: bool):
        self.chunk, self.axis = chunk, 0 if by_token else 1
        self.vocabulary = head.shape[self.axis]
        self.numbers = jnp.arange(-(-self.vocabulary // chunk))

    def start(self, number: Array) -> Array:
        return jnp.minimum(number * self.chunk, self.vocabulary - self.chunk)

    def tokens(self, number: Array) -> Array:
        """`[C]` tokens of a chunk."""
        return self.start(number) + jnp.arange(self.chunk)

    def new(self, number: Array) -> Array:
        """`[C]` False on tokens that the chunk before has had already."""
        return self.tokens(number) >= number * self.chunk

    def of(self, head: Array, number: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(head, self.start(number), self.chunk, self.axis)

    def written(self, head: Array, part: Array, number: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(head, part, self.start(number), self.axis)


def _forward(chunk, by_token, hidden, head, tokens):
    chunks = _Chunks(chunk, head, by_token)

    def add(carry, number):
        most, total, own = carry
        logits = logits_of(hidden, chunks.of(head, number), by_token)
        logits = jnp.where(chunks.new(number), logits, -jnp.inf)
        new = jnp.maximum(most, jnp.max(logits, -1))
        total = total * jnp.exp(most - new) + jnp.sum(jnp.exp(logits - new[:, None]), -1)
        hit = tokens[:, None] == chunks.tokens(number)
        return (new, total, jnp.maximum(own, jnp.max(jnp.where(hit, logits, -jnp.inf), -1))), None

    lowest = jnp.full(tokens.shape, -jnp.inf, jnp.float32)
    start = lowest, jnp.zeros(tokens.shape, jnp.float32), lowest
    (most, total, own), _ = jax.lax.scan(add, start, chunks.numbers)
    lse = most + jnp.log(total)
    return own - lse, (hidden, head, tokens, lse)


def _backward(chunk, by_token, residuals, g):
    hidden, head, tokens, lse = residuals
    chunks = _Chunks(chunk, head, by_token)

    def add(carry, number):
        d_hidden, d_head = carry
        part = chunks.of(head, number)
        p = jnp.exp(logits_of(hidden, part, by_token) - lse[:, None])
        hit = tokens[:, None] == chunks.tokens(number)
        d = (g[:, None] * (hit - p)).astype(hidden.dtype)
        # What two chunks have in common gets the same gradient twice, and is written, not added.
        d_part = to_head(hidden, d, by_token).astype(head.dtype)
        new = chunks.new(number)[:, None] if by_token else chunks.new(number)
        added = to_states(d, jnp.where(new, part, 0), by_token)
        return (d_hidden + added, chunks.written(d_head, d_part, number)), None

    start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head)
    (d_hidden, d_head), _ = jax.lax.scan(add, start, chunks.numbers)
    return d_hidden.astype(hidden.dtype), d_head, None


_logps.defvjp(_forward, _backward)
