"""Log-probs of packed rows: the one shift, the one mask, and no array over positions × vocabulary.

The trunk runs once over the rows; only the hidden states that predict a scored token meet the
head, in chunks whose logits are dropped at once and computed again in the backward pass.

A scorer is the same for a policy that stays fixed: it fills `batch.fixed_logps[role]` before the
training step, which therefore never holds a reference model.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from paxo.chunked_head import QUANTITIES, head_scores
from paxo.data.packing import sequence_tokens
from paxo.logp_store import LogpStore
from paxo.models.sharding import constrain, platform
from paxo.numerics import at_least_float32
from paxo.rows import own_rows, place_rows
from paxo.types import (
    Array,
    Params,
    Policy,
    PreferenceBatch,
    Scorer,
    pytree,
    static_field,
)
from paxo.vocabulary_head import vocabulary_logps

# Logits held at a time: at least so many tokens, which keeps the products efficient, and no more
# than so many entries where the vocabulary is small.
MIN_CHUNK_TOKENS = {"cpu": 128, "gpu": 1024, "tpu": 1024}
CHUNK_ENTRIES = 2**22
# The same where log-probs alone are wanted, of which a chunk of the vocabulary is made at a time.
MIN_CHUNK_VOCABULARY, VOCABULARY_ENTRIES = 1024, 2**22
# A head `[D, V]` that logits are made with: put together along the width once, not in every chunk.
WHOLE_WIDTH = (None, "activation_vocab")


def token_logps(policy: Policy, params: Params, batch: PreferenceBatch) -> Array:
    """`[R, S]` float32 log-prob of each scored token in nats, 0 on padding."""
    return token_scores(policy, params, batch)["logps"]


def sequence_logps(policy: Policy, params: Params, batch: PreferenceBatch) -> Array:
    """`[R, G, K]` float32 summed log-probs of the candidates in nats, 0 where there is none."""
    return slot_sums(token_logps(policy, params, batch), batch)


def token_scores(
    policy: Policy,
    params: Params,
    batch: PreferenceBatch,
    quantities: Sequence[str] = ("logps",),
    *,
    hidden: Array | None = None,
    reference_head: Array | None = None,
    chunk: int | None = None,
) -> dict[str, Array]:
    """Figures of the next-token distribution at every scored token.

    Args:
        policy: the model.
        params: its parameters.
        batch: packed rows.
        quantities: any of "logps" (log-prob of the token, nats), "entropies" (nats), "collisions"
            (log Σ p², nats) and "kls" (KL from the reference's to the policy's distribution, nats;
            needs `batch.fixed_hidden["reference"]` and `reference_head`).
        hidden: `[R, S, D]` from `scored_hidden`, where it has been computed already.
        reference_head: `[D, V]`, frozen.
        chunk: scored tokens of a row that meet the head at a time; by default so many that the
            logits of all rows stay small.

    Returns:
        quantity -> `[R, S]` float32, 0 on padding.

    Raises:
        ValueError: for an unknown quantity, or "kls" without what it needs.
    """
    if hidden is None:
        hidden = scored_hidden(policy, params, batch)
    return figures(
        hidden, head_of(policy, params), batch, quantities,
        reference_head=reference_head, chunk=chunk,
    )  # fmt: skip


def figures(
    hidden: Array,
    head: "Head",
    batch: PreferenceBatch,
    quantities: Sequence[str] = ("logps",),
    *,
    reference_head: Array | None = None,
    chunk: int | None = None,
    keep_logits: bool = False,
) -> dict[str, Array]:
    """What `token_scores` gives, from hidden states and a head.

    Args:
        hidden: `[R, S, D]` from `scored_hidden`.
        head: from `head_of`.
        batch: packed rows.
        quantities: see `token_scores`.
        reference_head: `[D, V]`, frozen.
        chunk: see `token_scores`.
        keep_logits: make the logits of all these rows at once, and keep them for the gradient.
    """
    unknown = sorted(set(quantities) - set(QUANTITIES))
    if unknown:
        raise ValueError(f"unknown quantities {unknown}; known: {', '.join(QUANTITIES)}")
    reference = None
    if "kls" in quantities:
        if reference_head is None or "reference" not in batch.fixed_hidden:
            raise ValueError(
                "'kls' needs the reference's hidden states and head: attach them with "
                "paxo.attach_logps(batch, 'reference', scorer, hidden=True) and pass reference_head"
            )
        fixed = batch.fixed_hidden["reference"]
        reference = fixed, constrain(reference_head.astype(fixed.dtype), *WHOLE_WIDTH)
    by_token = head.by_token
    axes = WHOLE_WIDTH[::-1] if by_token else WHOLE_WIDTH
    matrix = constrain(head.matrix.astype(hidden.dtype), *axes)
    if chunk is None and not keep_logits and set(quantities) == {"logps"} and _devices() == 1:
        part = vocabulary_chunk(batch.score_token.size)
        logps = vocabulary_logps(part, hidden, matrix, batch.score_token, by_token=by_token)
        scores = {"logps": logps}
    else:
        if chunk is None and not keep_logits:
            chunk = default_chunk(hidden.shape[0], head.vocabulary)
        scores = head_scores(
            tuple(quantities), chunk, hidden, matrix, batch.score_token, reference,
            by_token=by_token,
        )  # fmt: skip
    scored = batch.score_slot < _num_slots(batch)
    return {name: jnp.where(scored, x, 0.0) for name, x in scores.items()}


@pytree
class Head:
    """The matrix of a policy's head as its parameters lie.

    Attributes:
        matrix: `[D, V]`, or `[V, D]` if `by_token`.
        by_token: static; whether it is the transposed matrix, as of tied embeddings.
    """

    matrix: Array
    by_token: bool = static_field(default=False)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.matrix.shape[0 if self.by_token else 1]


def head_of(policy: Policy, params: Params) -> Head:
    """The policy's head; of tied embeddings the table itself, which nothing has to transpose."""
    if policy.unembed_by_token is not None:
        return Head(policy.unembed_by_token(params), by_token=True)
    return Head(policy.unembed(params))


def scored_hidden(policy: Policy, params: Params, batch: PreferenceBatch) -> Array:
    """`[R, S, D]` hidden states that predict the scored tokens."""
    return predicting(all_hidden(policy, params, batch), batch)


def predicting(hidden: Array, batch: PreferenceBatch) -> Array:
    """`[R, L, ...] -> [R, S, ...]` of the tokens before the scored ones: the only shift by one."""
    return jnp.take_along_axis(hidden, batch.score_from[..., None], axis=1)


def all_hidden(policy: Policy, params: Params, batch: PreferenceBatch) -> Array:
    """`[R, L, D]` hidden states of every token."""
    return policy.trunk(params, batch.tokens, batch.positions, batch.group, batch.branch)


def slot_sums(values: Array, batch: PreferenceBatch) -> Array:
    """`[R, S] -> [R, G, K]` sums over the scored tokens of each candidate, in at least float32."""
    mine = batch.score_slot[:, :, None] == jnp.arange(_num_slots(batch))
    # A masked sum rather than a scatter-add: the same bits on every run, on GPUs too.
    sums = jnp.sum(jnp.where(mine, at_least_float32(values)[:, :, None], 0), axis=1)
    return sums.reshape(batch.where.shape)


def slot_lengths(batch: PreferenceBatch) -> Array:
    """`[R, G, K]` float32 number of scored tokens of each candidate."""
    return slot_sums(jnp.ones(batch.score_slot.shape, jnp.float32), batch)


def by_candidate(values: Array, batch: PreferenceBatch) -> Array:
    """`[R, S] -> [R, G, K, T]` token-level values, each candidate's from 0 on, 0 behind its end."""
    slots, length = _num_slots(batch), batch.max_completion
    index = jnp.arange(batch.score_slot.shape[1])
    mine = batch.score_slot[:, :, None] == jnp.arange(slots + 1)
    first = jnp.min(jnp.where(mine, index[:, None], index.size), axis=1)
    rank = index - jnp.take_along_axis(first, batch.score_slot, axis=1)

    def scatter(slot: Array, rank: Array, row: Array) -> Array:
        return jnp.zeros((slots, length), row.dtype).at[slot, rank].set(row, mode="drop")

    laid_out = jax.vmap(scatter)(batch.score_slot, rank, values)
    return laid_out.reshape(*batch.where.shape, length)


def default_chunk(rows: int, vocabulary: int) -> int:
    """Scored tokens of each row that meet the head at a time, on the devices of this mesh."""
    return max(1, chunk_tokens(vocabulary) * _devices() // rows)


def vocabulary_chunk(positions: int) -> int:
    """Tokens of the vocabulary that meet all positions at a time."""
    return max(MIN_CHUNK_VOCABULARY, VOCABULARY_ENTRIES // positions)


def chunk_tokens(vocabulary: int) -> int:
    """Scored tokens whose logits exist at a time on one device."""
    return max(MIN_CHUNK_TOKENS.get(platform(), 1024), CHUNK_ENTRIES // vocabulary)


def _devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


@dataclasses.dataclass(frozen=True)
class FixedScorer:
    """Scores batches with parameters that do not change; compiled once for a shape.

    Attributes:
        policy: the model.
        params: its parameters, on the devices.
        mesh: where batches of host arrays are placed; None leaves that to JAX.
    """

    policy: Policy
    params: Params
    mesh: Mesh | None = None

    def __call__(self, batch: PreferenceBatch) -> Array:
        """`[R, G, K]` float32 summed log-probs in nats."""
        return self._run(sequence_logps, batch)

    def token_logps(self, batch: PreferenceBatch) -> Array:
        """`[R, S]` float32 log-probs of the scored tokens in nats."""
        return self._run(token_logps, batch)

    def hidden(self, batch: PreferenceBatch) -> Array:
        """`[R, S, D]` hidden states that predict the scored tokens."""
        return self._run(scored_hidden, batch)

    def fingerprint(self) -> str:
        """A hash of the parameters' content and dtypes."""
        return params_fingerprint(self.params)

    def lower(self, batch: PreferenceBatch) -> Any:
        """The lowered program of a call; parameters and batch may be placed shapes alone."""
        with jax.set_mesh(self.mesh):
            return _jitted(sequence_logps).lower(self.policy, self.params, _rows_alone(batch))

    def _run(self, function: Callable, batch: PreferenceBatch) -> Array:
        batch = _rows_alone(batch)
        if self.mesh is None:
            return _jitted(function)(self.policy, self.params, batch)
        if isinstance(batch.tokens, np.ndarray):
            batch = place_rows(batch, self.mesh)
        with jax.set_mesh(self.mesh):
            return _jitted(function)(self.policy, self.params, batch)


def _rows_alone(batch: PreferenceBatch) -> PreferenceBatch:
    """Without what a scorer does not read: other arrays there would compile it anew."""
    return batch.replace(fixed_logps={}, fixed_token_logps={}, fixed_hidden={}, extras={})


def make_scorer(policy: Policy, params: Params, *, mesh: Mesh | None = None) -> FixedScorer:
    """A scorer for `policy` at fixed `params`.

    Args:
        policy: the model.
        params: parameters, on the devices they shall run on. A training step that donates its
            state deletes the arrays it was given: pass `paxo.snapshot(params)` where they are
            shared.
        mesh: where batches of host arrays are placed.
    """
    return FixedScorer(policy, params, mesh)


@dataclasses.dataclass(frozen=True)
class StoredScorer:
    """Looks each sequence up on disk and scores a batch only where one is missing.

    A value that was stored is always the one that is used, so a run that is resumed, or another
    one with the same frozen policy, sees the same bits. Takes batches of host arrays.

    Attributes:
        scorer: computes what the store does not hold.
        store: opened with a fingerprint of all that the values depend on.
    """

    scorer: FixedScorer
    store: LogpStore

    def __call__(self, batch: PreferenceBatch) -> np.ndarray:
        """`[R, G, K]` float32 summed log-probs in nats, of this process's rows."""
        found = np.zeros(batch.where.shape, np.float32)
        missing = self._look_up("logps", batch, found, lambda place: place)
        if _anywhere(missing):
            self._fill("logps", missing, found, self._local(self.scorer(batch)))
        return found

    def token_logps(self, batch: PreferenceBatch) -> np.ndarray:
        """`[R, S]` float32 log-probs of the scored tokens in nats, of this process's rows."""
        found = np.zeros(batch.score_slot.shape, np.float32)
        candidates = batch.where.shape[-1]

        def at(place: tuple[int, int, int]) -> tuple[int, np.ndarray]:
            row, g, k = place
            return row, np.flatnonzero(batch.score_slot[row] == g * candidates + k)

        missing = self._look_up("token_logps", batch, found, at)
        if _anywhere(missing):
            scored = self._local(self.scorer.token_logps(batch))
            self._fill("token_logps", missing, found, scored)
        return found

    def hidden(self, batch: PreferenceBatch) -> Array:
        """`[R, S, D]`; hidden states are never stored: they are a thousand times larger."""
        return self.scorer.hidden(batch)

    def _look_up(
        self, kind: str, batch: PreferenceBatch, found: np.ndarray, at: Callable
    ) -> list[tuple]:
        """Fills in what is stored; of what is not: (index into `found`, prompt, completion)."""
        missing = []
        for row, g, k, prompt, completion in sequence_tokens(batch):
            value = self.store.get(kind, prompt, completion)
            if value is None:
                missing.append((at((row, g, k)), prompt, completion))
            else:
                found[at((row, g, k))] = value
        return missing

    def _fill(self, kind: str, missing: list[tuple], found: np.ndarray, scored: np.ndarray) -> None:
        """Fills in what was scored, and stores it.

        A batch that runs over the end of an epoch may hold a sequence twice, in rows that differ,
        with other last bits. The store keeps one value, and a run resumed from it must find what
        was used: the first counts for both.
        """
        first: dict[tuple[bytes, bytes], np.ndarray] = {}
        for index, prompt, completion in missing:
            key = prompt.tobytes(), completion.tobytes()
            found[index] = first.setdefault(key, scored[index])
        self.store.put_many((kind, p, c, found[index]) for index, p, c in missing)

    def _local(self, x: Array) -> np.ndarray:
        return own_rows(x, self.scorer.mesh)


def _anywhere(missing: list) -> bool:
    """Whether any process misses a sequence: the forward pass is one program of all of them."""
    if jax.process_count() == 1:
        return bool(missing)
    return bool(np.any(multihost_utils.process_allgather(np.array(bool(missing)))))


def attach_logps(
    batch: PreferenceBatch, role: str, scorer: Scorer, *, tokens: bool = False, hidden: bool = False
) -> PreferenceBatch:
    """The batch with the log-probs of a frozen policy under a role name.

    Args:
        batch: packed rows.
        role: "reference", "previous", ... as the losses name it (`<role>_logps`).
        scorer: the frozen policy's.
        tokens: also attach log-probs token by token.
        hidden: also attach the hidden states that predict the scored tokens. They are computed
            for every batch, whatever the scorer stores.
    """
    batch = batch.replace(fixed_logps={**batch.fixed_logps, role: scorer(batch)})
    if tokens:
        by_token = {**batch.fixed_token_logps, role: scorer.token_logps(batch)}
        batch = batch.replace(fixed_token_logps=by_token)
    if hidden:
        batch = batch.replace(fixed_hidden={**batch.fixed_hidden, role: scorer.hidden(batch)})
    return batch


def params_fingerprint(params: Params) -> str:
    """A hash of names, dtypes, shapes and every bit of the parameters, computed where they lie.

    >>> first, same, other = jnp.arange(3.0), jnp.arange(3.0), -jnp.arange(3.0)
    >>> fingerprint = params_fingerprint({"w": first})
    >>> [params_fingerprint({"w": x}) == fingerprint for x in (same, other)]
    [True, False]
    """
    digest = hashlib.blake2b(digest_size=16)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, leaf), sums in zip(leaves, _all_bit_sums([leaf for _, leaf in leaves])):
        sums = np.asarray(sums)
        digest.update(
            f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {sums.tolist()}".encode()
        )
    return digest.hexdigest()


@jax.jit
def _all_bit_sums(leaves: list[Array]) -> list[Array]:
    """One program: to compile one for each shape took seconds."""
    return [_bit_sums(leaf) for leaf in leaves]


def _bit_sums(x: Array) -> Array:
    """Two sums of the bits, by position, modulo 2^32: integers add up alike in any order."""
    # 64 bits become two numbers on an axis of their own.
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

    def mixed(seed: int) -> Array:
        y = (bits + jnp.uint32(seed)) * jnp.uint32(0x9E3779B1) ^ (index * jnp.uint32(0x85EBCA6B))
        y = (y ^ (y >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(y ^ (y >> 13), dtype=jnp.uint32)

    return jnp.stack([mixed(1), mixed(0x51ED270B)])


@functools.cache
def _jitted(function: Callable) -> Callable:
    return jax.jit(function, static_argnums=0)


def _num_slots(batch: PreferenceBatch) -> int:
    return batch.where.shape[-2] * batch.where.shape[-1]
