"""The distribution that a token is drawn from, and the draw.

All work is a few passes over the logits: no sort of the vocabulary, no noise for each of its
entries, no running sum along it. Measured: benchmarks/NOTES.md.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from paxo.types import Array

# A draw chooses a block of so many tokens first, then one of its tokens.
BLOCK = 128
# Above so many, the k-th largest logit is cheaper to find by bisection than by a partial sort.
SORTED_TOP_K = 256


def filtered(
    logits: Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0
) -> Array:
    """Logits over the temperature, with -inf at the tokens that truncation leaves out.

    The truncations are applied one after the other, each to what the one before it has left.

    Args:
        logits: `[..., V]`.
        temperature: above 0.
        top_k: only the so many most likely tokens; 0 takes all (arXiv:1805.04833).
        top_p: only the smallest set of most likely tokens that together reach this probability; 1
            takes all (arXiv:1904.09751).
        min_p: only tokens with at least this share of the most likely one's probability; 0 takes
            all (arXiv:2407.01082).

    Returns:
        `[..., V]`, not normalised. Tokens that tie with the last one kept are kept too.

    >>> filtered(jnp.log(jnp.array([0.5, 0.3, 0.2])), top_p=0.7)[2]
    Array(-inf, dtype=float32)
    """
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        if top_k <= SORTED_TOP_K:
            # Not the last of them: XLA turns a slice of top_k into a sort of everything.
            kept = logits >= jnp.min(jax.lax.top_k(logits, top_k)[0], -1, keepdims=True)
        else:
            kept = _most_likely(logits, jnp.ones_like(logits), top_k)
        logits = jnp.where(kept, logits, -jnp.inf)
    if top_p < 1:
        weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
        reached = top_p * jnp.sum(weights, -1, keepdims=True)
        logits = jnp.where(_most_likely(logits, weights, reached), logits, -jnp.inf)
    if min_p > 0:
        least = jnp.max(logits, -1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _most_likely(logits: Array, weights: Array, reached: Array | float) -> Array:
    """`[..., V]` bool: the fewest tokens, most likely first, whose weights sum to `reached`.

    The distance from the largest logit at which the set ends is bisected over the bits of the
    number, so the result is exact, ties included: a sort of 32,000 logits costs 24 times as much.
    """
    distance = jnp.abs(logits - jnp.max(logits, -1, keepdims=True))
    width = 8 * distance.dtype.itemsize
    # Floats of one sign are ordered as their bits are.
    order = jax.lax.bitcast_convert_type(distance, jnp.dtype(f"int{width}"))
    infinite = jnp.full(
        (*logits.shape[:-1], 1),
        jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, distance.dtype), order.dtype),
    )

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(order <= middle, weights, 0), -1, keepdims=True) >= reached
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = jnp.zeros_like(infinite), infinite
    return order <= jax.lax.fori_loop(0, width - 1, halve, start)[1]


def greedy(logits: Array) -> Array:
    """`[..., V] -> [...]` int32, the first of the most likely tokens.

    >>> greedy(jnp.array([1.0, 3.0, 3.0]))
    Array(1, dtype=int32)
    """
    # Two passes that vectorise: argmax on CPU costs eight times as much.
    tokens = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = logits == jnp.max(logits, -1, keepdims=True)
    first = jnp.min(jnp.where(best, tokens, logits.shape[-1]), -1)
    # NaN equals nothing.
    return jnp.minimum(first, logits.shape[-1] - 1)


def draw(logits: Array, uniform: Array) -> tuple[Array, Array]:
    """One token a row by the inverse of the distribution function, and its log-prob in nats.

    Two uniform numbers a row, one for a block of tokens and one for a token of the block, stand for
    V Gumbel draws; together they resolve probabilities far below float32's 1e-7.

    Args:
        logits: `[..., V]`, -inf where a token cannot be drawn.
        uniform: `[..., 2]` in [0, 1), from `uniforms`.

    Returns:
        `[...]` int32 and `[...]`.

    >>> token, logp = draw(jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array([0.0, 0.6]))
    >>> int(token), float(jnp.exp(logp))
    (1, 0.25)
    """
    rows, vocabulary = logits.shape[:-1], logits.shape[-1]
    size = min(BLOCK, vocabulary)
    short = [(0, 0)] * len(rows) + [(0, -vocabulary % size)]
    blocks = jnp.pad(logits, short, constant_values=-jnp.inf).reshape(*rows, -1, size)
    peak = jnp.max(logits, -1)
    masses = jnp.sum(jnp.exp(blocks - peak[..., None, None]), -1)
    block = _inverse(masses, uniform[..., 0])
    within = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
    # Again from the peak of the block, so that the tokens of an unlikely one do not vanish.
    token = _inverse(jnp.exp(within - jnp.max(within, -1, keepdims=True)), uniform[..., 1])
    logit = jnp.take_along_axis(within, token[..., None], -1)[..., 0]
    logps = logit - peak - jnp.log(jnp.sum(masses, -1))
    return (block * size + token).astype(jnp.int32), logps


def _inverse(weights: Array, uniform: Array) -> Array:
    """`[..., N], [...] -> [...]` index drawn in proportion to the weights."""
    total = jnp.cumsum(weights, -1)
    index = jnp.sum(total <= uniform[..., None] * total[..., -1:], -1)
    # Rounding may carry the threshold past the last one that has any weight.
    last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[..., ::-1], -1)
    return jnp.minimum(index, last)


def log_prob(logits: Array, token: Array) -> Array:
    """`[..., V], [...] -> [...]` nats: the token's log-prob under softmax of the logits."""
    chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def uniforms(key: Array, ids: Array, candidates: int, length: int, dtype: Any) -> Array:
    """`[B, K, T, 2]` uniform numbers for `draw`.

    Each depends on the key, the prompt's id `[B]`, the candidate and the position alone. All are
    drawn at once: a step of the decoding is then a lookup.
    """

    def of_row(key: Array, prompt: Array, candidate: Array, position: Array) -> Array:
        for number in (prompt, candidate, position):
            key = jax.random.fold_in(key, number)
        return jax.random.uniform(key, (2,), dtype)

    for axis in reversed(range(3)):
        of_row = jax.vmap(of_row, [None] + [0 if axis == i else None for i in range(3)])
    return of_row(key, ids, jnp.arange(candidates), jnp.arange(length))
