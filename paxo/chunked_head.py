"""Figures of next-token distributions without an array over positions × vocabulary.

The logits of a chunk of positions are made, read and dropped; the backward pass makes them again.
`dz`, the gradient with respect to a chunk's logits, is written down in closed form for each figure,
with p the softmax, H the entropy and C the log collision probability:

    log p_y            1[y] - p
    H = -Σ p log p     -p (log p + H)
    C = log Σ p²       2 (p² / Σ p² - p)
    KL(q || p)         p - q
"""

import functools

import jax
import jax.numpy as jnp

from paxo.models.sharding import constrain

Array = jax.Array
QUANTITIES = ("logps", "entropies", "collisions", "kls")


def head_scores(
    quantities: tuple[str, ...],
    chunk: int,
    hidden: Array,
    head: Array,
    tokens: Array,
    reference: tuple[Array, Array] | None = None,
) -> dict[str, Array]:
    """Figures of `softmax(hidden @ head)` at every position.

    Args:
        quantities: of `QUANTITIES`; "kls" needs `reference`.
        chunk: positions of a row whose logits exist at a time.
        hidden: `[R, S, D]`.
        head: `[D, V]`.
        tokens: `[R, S]` int32, whose log-probs are wanted.
        reference: hidden states `[R, S, D]` and head `[D, V]` of a frozen policy: no gradient.

    Returns:
        quantity -> `[R, S]` float32 in nats. Differentiable in `hidden` and `head`.

    >>> hidden, head = jnp.eye(2)[None], jnp.zeros((2, 4))
    >>> head_scores(("logps",), 1, hidden, head, jnp.array([[3, 1]]))["logps"]
    Array([[-1.3862944, -1.3862944]], dtype=float32)
    """
    chunk = min(chunk, hidden.shape[1])
    length = hidden.shape[1]
    hidden, tokens, reference = _pad(chunk, hidden, tokens, reference)
    scores = _scores(tuple(quantities), chunk, hidden, head, tokens, reference)
    return {name: x[:, :length] for name, x in scores.items()}


def _pad(chunk, hidden, tokens, reference):
    """Pads the axis of positions to a multiple of the chunk."""
    extra = -hidden.shape[1] % chunk
    if not extra:
        return hidden, tokens, reference
    wide = ((0, 0), (0, extra), (0, 0))
    if reference is not None:
        reference = jnp.pad(reference[0], wide), reference[1]
    return jnp.pad(hidden, wide), jnp.pad(tokens, wide[:2]), reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(quantities, chunk, hidden, head, tokens, reference):
    return _scores_forward(quantities, chunk, hidden, head, tokens, reference)[0]


def _chunks(x: Array, chunk: int) -> Array:
    """`[R, S, ...] -> [S / chunk, R, chunk, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _chunked_inputs(chunk, hidden, tokens, reference):
    fixed = None if reference is None else _chunks(reference[0], chunk)
    return _chunks(hidden, chunk), _chunks(tokens, chunk), fixed


def _reference_log_probs(fixed_hidden, reference):
    logits = _logits(fixed_hidden, reference[1].astype(fixed_hidden.dtype))
    return jax.nn.log_softmax(logits, -1)


def _scores_forward(quantities, chunk, hidden, head, tokens, reference):
    def one(inputs):
        states, targets, fixed = inputs
        logits = _logits(states, head)
        lse = jax.nn.logsumexp(logits, -1)
        # A comparison instead of a gather: it stays local where the vocabulary is sharded.
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        out = {"lse": lse, "logps": jnp.sum(jnp.where(hit, logits, 0), -1) - lse}
        if "entropies" in quantities:
            out["entropies"] = lse - jnp.sum(jnp.exp(logits - lse[..., None]) * logits, -1)
        if "collisions" in quantities:
            out["collisions"] = jax.nn.logsumexp(2 * logits, -1) - 2 * lse
        if "kls" in quantities:
            log_q = _reference_log_probs(fixed, reference)
            log_p = logits - lse[..., None]
            out["kls"] = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
        return out

    out = jax.lax.map(one, _chunked_inputs(chunk, hidden, tokens, reference))
    kept = {name: _unchunk(x) for name, x in out.items()}
    return {q: kept[q] for q in quantities}, (hidden, head, tokens, reference, kept)


def _scores_backward(quantities, chunk, residuals, cotangents):
    hidden, head, tokens, reference, kept = residuals
    small = {name: _chunks(x, chunk) for name, x in kept.items()}
    given = {name: _chunks(x, chunk)[..., None] for name, x in cotangents.items()}

    def one(head_gradient, inputs):
        (states, targets, fixed), out, g = inputs
        logits = _logits(states, head)
        log_p = logits - out["lse"][..., None]
        p = jnp.exp(log_p)
        d = jnp.zeros_like(logits)
        if "logps" in quantities:
            d += g["logps"] * ((targets[..., None] == jnp.arange(logits.shape[-1])) - p)
        if "entropies" in quantities:
            d -= g["entropies"] * p * (log_p + out["entropies"][..., None])
        if "collisions" in quantities:
            squared = jnp.exp(2 * log_p - out["collisions"][..., None])
            d += g["collisions"] * 2 * (squared - p)
        if "kls" in quantities:
            d += g["kls"] * (p - jnp.exp(_reference_log_probs(fixed, reference)))
        d = d.astype(states.dtype)
        to_states = jnp.matmul(d, head.T)
        parts = (x.reshape(ways, -1, *x.shape[1:]) for x in (states, d))
        to_head = jnp.einsum("wrcd,wrcv->wdv", *parts, preferred_element_type=jnp.float32)
        return constrain(head_gradient + to_head, "batch", None, "activation_vocab"), to_states

    # Devices add up the gradients of their own rows, and add theirs to one another's once, behind
    # the last chunk.
    ways = _row_ways(hidden.shape[0])
    start = jnp.zeros((ways, *head.shape), jnp.float32)
    inputs = (_chunked_inputs(chunk, hidden, tokens, reference), small, given)
    to_head, to_hidden = jax.lax.scan(one, start, inputs)
    return _unchunk(to_hidden), jnp.sum(to_head, 0).astype(head.dtype), None, None


def _row_ways(rows: int) -> int:
    """Ways in which the mesh splits the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape:
        return 1
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % ways else ways


_scores.defvjp(_scores_forward, _scores_backward)
