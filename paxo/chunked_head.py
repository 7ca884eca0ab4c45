"""Figures of next-token distributions without an array over all positions × vocabulary.

The logits of a chunk of positions are made, read and dropped; the backward pass makes them again.
Where the caller hands over few positions (`chunk=None`) their logits are kept for it instead.
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
    chunk: int | None,
    hidden: Array,
    head: Array,
    tokens: Array,
    reference: tuple[Array, Array] | None = None,
    *,
    by_token: bool = False,
) -> dict[str, Array]:
    """Figures of `softmax(hidden @ head)` at every position.

    Args:
        quantities: of `QUANTITIES`; "kls" needs `reference`.
        chunk: positions of a row whose logits exist at a time; None makes those of all positions
            once and keeps them for the backward pass.
        hidden: `[R, S, D]`.
        head: `[D, V]`, or `[V, D]` if `by_token`, as the embeddings lie.
        tokens: `[R, S]` int32, whose log-probs are wanted.
        reference: hidden states `[R, S, D]` and head `[D, V]` of a frozen policy: no gradient.
        by_token: how `head` lies: a product with the transposed matrix needs no copy of it.

    Returns:
        quantity -> `[R, S]` float32 in nats. Differentiable in `hidden` and `head`.

    >>> hidden, head = jnp.eye(2)[None], jnp.zeros((2, 4))
    >>> head_scores(("logps",), 1, hidden, head, jnp.array([[3, 1]]))["logps"]
    Array([[-1.3862944, -1.3862944]], dtype=float32)
    """
    quantities = tuple(quantities)
    if chunk is None:
        return _kept_scores(quantities, by_token, hidden, head, tokens, reference)
    chunk = min(chunk, hidden.shape[1])
    length = hidden.shape[1]
    hidden, tokens, reference = _pad(chunk, hidden, tokens, reference)
    scores = _scores(quantities, chunk, by_token, hidden, head, tokens, reference)
    return {name: x[:, :length] for name, x in scores.items()}


# --- a chunk's figures and the gradients of its logits, states and head ------------------------


def logits_of(states: Array, head: Array, by_token: bool) -> Array:
    """`[..., D]` and the head -> `[..., V]` float32."""
    over = (states.ndim - 1,), (int(by_token),)
    return jax.lax.dot_general(states, head, (over, ((), ())), preferred_element_type=jnp.float32)


def to_states(d_logits: Array, head: Array, by_token: bool) -> Array:
    """`[..., V]` and the head -> `[..., D]`."""
    over = (d_logits.ndim - 1,), (1 - int(by_token),)
    return jax.lax.dot_general(d_logits, head, (over, ((), ())))


def to_head(states: Array, d_logits: Array, by_token: bool) -> Array:
    """The gradient of the head, float32, summed over all positions."""
    positions = tuple(range(states.ndim - 1))
    over = (positions, positions), ((), ())
    # XLA on CPU transposes the first operand, and the states are narrower than the logits. In
    # bfloat16 it has no product whose float32 result is turned and added up.
    turned = by_token and states.dtype == jnp.float32
    pair = (d_logits, states) if by_token and not turned else (states, d_logits)
    gradient = jax.lax.dot_general(*pair, over, preferred_element_type=jnp.float32)
    return gradient.T if turned else gradient


def _hit(targets: Array, vocabulary: int) -> Array:
    return targets[..., None] == jnp.arange(vocabulary)


def _own(logits: Array, targets: Array) -> Array:
    """The logit of each target."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    # A comparison instead of a gather: it stays local where the vocabulary is sharded.
    return jnp.sum(jnp.where(_hit(targets, logits.shape[-1]), logits, 0), -1)


def _figures(quantities, logits, targets, log_q) -> dict[str, Array]:
    """The quantities, the log-probs, and `lse`, which the backward pass needs."""
    lse = jax.nn.logsumexp(logits, -1)
    out = {"lse": lse, "logps": _own(logits, targets) - lse}
    if "entropies" in quantities:
        out["entropies"] = lse - jnp.sum(jnp.exp(logits - lse[..., None]) * logits, -1)
    if "collisions" in quantities:
        out["collisions"] = jax.nn.logsumexp(2 * logits, -1) - 2 * lse
    if "kls" in quantities:
        log_p = logits - lse[..., None]
        out["kls"] = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
    return out


def _d_logits(quantities, logits, targets, log_q, out, g) -> Array:
    """The gradient of the logits `[..., V]` from those of the figures, `g` `[..., 1]` each."""
    log_p = logits - out["lse"][..., None]
    p = jnp.exp(log_p)
    d = jnp.zeros_like(logits)
    if "logps" in quantities:
        d += g["logps"] * (_hit(targets, logits.shape[-1]) - p)
    if "entropies" in quantities:
        d -= g["entropies"] * p * (log_p + out["entropies"][..., None])
    if "collisions" in quantities:
        squared = jnp.exp(2 * log_p - out["collisions"][..., None])
        d += g["collisions"] * 2 * (squared - p)
    if "kls" in quantities:
        d += g["kls"] * (p - jnp.exp(log_q))
    return d


def _reference_log_probs(fixed_hidden, reference):
    if reference is None:
        return None
    logits = logits_of(fixed_hidden, reference[1].astype(fixed_hidden.dtype), False)
    return jax.nn.log_softmax(logits, -1)


# --- all positions at once ---------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kept_scores(quantities, by_token, hidden, head, tokens, reference):
    return _kept_forward(quantities, by_token, hidden, head, tokens, reference)[0]


def _kept_forward(quantities, by_token, hidden, head, tokens, reference):
    logits = logits_of(hidden, head, by_token)
    log_q = None if reference is None else _reference_log_probs(reference[0], reference)
    out = _figures(quantities, logits, tokens, log_q)
    return {q: out[q] for q in quantities}, (hidden, head, tokens, logits, log_q, out)


def _kept_backward(quantities, by_token, residuals, cotangents):
    hidden, head, tokens, logits, log_q, out = residuals
    given = {name: x[..., None] for name, x in cotangents.items()}
    d = _d_logits(quantities, logits, tokens, log_q, out, given).astype(hidden.dtype)
    d_head = to_head(hidden, d, by_token).astype(head.dtype)
    return to_states(d, head, by_token), d_head, None, None


_kept_scores.defvjp(_kept_forward, _kept_backward)


# --- a chunk of positions at a time ------------------------------------------------------------


def _pad(chunk, hidden, tokens, reference):
    """Pads the axis of positions to a multiple of the chunk."""
    extra = -hidden.shape[1] % chunk
    if not extra:
        return hidden, tokens, reference
    wide = ((0, 0), (0, extra), (0, 0))
    if reference is not None:
        reference = jnp.pad(reference[0], wide), reference[1]
    return jnp.pad(hidden, wide), jnp.pad(tokens, wide[:2]), reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scores(quantities, chunk, by_token, hidden, head, tokens, reference):
    return _scores_forward(quantities, chunk, by_token, hidden, head, tokens, reference)[0]


def _chunks(x: Array, chunk: int) -> Array:
    """`[R, S, ...] -> [S / chunk, R, chunk, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _chunked_inputs(chunk, hidden, tokens, reference):
    fixed = None if reference is None else _chunks(reference[0], chunk)
    return _chunks(hidden, chunk), _chunks(tokens, chunk), fixed


def _scores_forward(quantities, chunk, by_token, hidden, head, tokens, reference):
    def one(inputs):
        states, targets, fixed = inputs
        logits = logits_of(states, head, by_token)
        return _figures(quantities, logits, targets, _reference_log_probs(fixed, reference))

    out = jax.lax.map(one, _chunked_inputs(chunk, hidden, tokens, reference))
    kept = {name: _unchunk(x) for name, x in out.items()}
    return {q: kept[q] for q in quantities}, (hidden, head, tokens, reference, kept)


def _scores_backward(quantities, chunk, by_token, residuals, cotangents):
    hidden, head, tokens, reference, kept = residuals
    small = {name: _chunks(x, chunk) for name, x in kept.items()}
    given = {name: _chunks(x, chunk)[..., None] for name, x in cotangents.items()}

    def one(head_gradient, inputs):
        (states, targets, fixed), out, g = inputs
        logits = logits_of(states, head, by_token)
        log_q = _reference_log_probs(fixed, reference)
        d = _d_logits(quantities, logits, targets, log_q, out, g).astype(states.dtype)
        own = [x.reshape(ways, -1, *x.shape[1:]) for x in (states, d)]
        added = jax.vmap(lambda states, d: to_head(states, d, by_token))(*own)
        return constrain(head_gradient + added, *axes), to_states(d, head, by_token)

    # Devices add up the gradients of their own rows, and add theirs to one another's once, behind
    # the last chunk.
    ways = _row_ways(hidden.shape[0])
    axes = ("batch", *(("activation_vocab", None) if by_token else (None, "activation_vocab")))
    start = jnp.zeros((ways, *head.shape), jnp.float32)
    inputs = (_chunked_inputs(chunk, hidden, tokens, reference), small, given)
    d_head, d_hidden = jax.lax.scan(one, start, inputs)
    return _unchunk(d_hidden), jnp.sum(d_head, 0).astype(head.dtype), None, None


def _row_ways(rows: int) -> int:
    """Ways in which the mesh splits the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.shape:
        return 1
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % ways else ways


_scores.defvjp(_scores_forward, _scores_backward)
