"""What random draws and beam search share: stops, policies side by side, prompts and their checks.

Axes in shape comments are those of `paxo.types`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from paxo.rows import own_rows, place_rows, row_share
from paxo.types import Array, Finish, Params, Policy, PromptBatch

ROLES = ("policy", "reference")
# Stands in a row's last tokens before its first.
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends a completion.

    Attributes:
        ids: tokens of which each ends it.
        sequences: runs of tokens of which each ends it with its last token; only tokens of the
            completion count. A text may be cut into tokens in more than one way: each is one.

    Raises:
        ValueError: if there is neither, or a sequence is empty or a text.

    >>> Stops((2,), ((5, 6),)).finish(jnp.array([[1, 2], [5, 6], [6, 5]])).tolist()
    [1, 2, 0]
    """

    ids: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        object.__setattr__(self, "sequences", token_runs(self.sequences))
        if not self.ids and not self.sequences:
            raise ValueError("stop_ids is empty: name the tokens that end a completion")
        if not all(self.sequences):
            raise ValueError(f"stop_sequences holds an empty sequence: {self.sequences}")

    @property
    def longest(self) -> int:
        """Tokens to be remembered: those of the longest sequence."""
        return max(map(len, self.sequences), default=1)

    def check(self, vocabulary: int) -> None:
        """Raises `ValueError` for a token that the vocabulary does not hold."""
        used = {*self.ids, *(token for sequence in self.sequences for token in sequence)}
        if outside := sorted(i for i in used if not 0 <= i < vocabulary):
            raise ValueError(f"stop tokens {outside} lie outside of the {vocabulary} tokens")

    def blocked(self, logits: Array) -> Array:
        """Logits with -inf at the stop tokens.

        Raises:
            ValueError: if there is no other token.
        """
        if not self.ids:
            return logits
        if len({*self.ids}) >= logits.shape[-1]:
            raise ValueError(
                f"min_new_tokens forbids all {logits.shape[-1]} tokens, as each is a stop token"
            )
        return logits.at[..., jnp.array(self.ids)].set(-jnp.inf)

    def finish(self, recent: Array) -> Array:
        """`[..., longest]` last tokens, `NO_TOKEN` before the first, to `[...]` int32 `Finish`."""
        found = jnp.full(recent.shape[:-1], Finish.LENGTH, jnp.int32)
        for sequence in self.sequences:
            same = recent[..., -len(sequence) :] == jnp.array(sequence, jnp.int32)
            found = jnp.where(jnp.all(same, -1), Finish.STOP_SEQUENCE, found)
        if self.ids:
            stops = jnp.isin(recent[..., -1], jnp.array(self.ids, jnp.int32))
            found = jnp.where(stops, Finish.STOP_TOKEN, found)
        return found


def token_runs(sequences: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Stop sequences as tuples, which may be static arguments; raises ValueError for a text."""
    for sequence in sequences:
        if isinstance(sequence, str) or any(isinstance(i, str) for i in sequence):
            raise ValueError(
                f"stop_sequences holds runs of token ids; got the text {sequence!r}: tokenise it"
            )
    return tuple(tuple(int(i) for i in sequence) for sequence in sequences)


def check_whole(record: Any, prefix: str, names: Sequence[str]) -> None:
    """Raises ValueError for a field that must be a whole number and is none."""
    for name in names:
        if not isinstance(value := getattr(record, name), int | np.integer):
            raise ValueError(f"{prefix}.{name} must be a whole number; got {value!r}")


def remember(recent: Array, token: Array) -> Array:
    """The last tokens `[..., M]` with one more."""
    return jnp.concatenate([recent[..., 1:], token[..., None]], -1)


@dataclasses.dataclass(frozen=True)
class Models:
    """One policy, or two side by side that read the same tokens."""

    policies: tuple[Policy, ...]

    def prepare(self, params: Sequence[Params]) -> tuple[Params, ...]:
        """Parameters as the functions below want them."""
        return tuple(p.decode.prepare(x) for p, x in zip(self.policies, params))

    def prefill(self, params, prompts: PromptBatch, candidates: int, length: int):
        """Caches, and the hidden states `[B, K, D]` that predict the first new token."""
        caches, hidden = [], []
        for policy, own in zip(self.policies, params):
            args = (prompts.tokens, prompts.lengths, candidates, length)
            cache, last = policy.decode.prefill(own, *args)
            caches.append(cache)
            hidden.append(jnp.broadcast_to(last[:, None], (len(last), candidates, last.shape[-1])))
        return tuple(caches), tuple(hidden)

    def step(self, params, caches, token: Array, index: Array):
        """Caches and hidden states after the index-th new token `[B, K]`."""
        both = zip(self.policies, params, caches)
        out = [p.decode.step(own, cache, token, index) for p, own, cache in both]
        return tuple(cache for cache, _ in out), tuple(hidden for _, hidden in out)

    def select(self, caches, candidates: Array):
        """Caches in which candidate j goes on from `candidates[b, j]`."""
        return tuple(p.decode.select(c, candidates) for p, c in zip(self.policies, caches))

    def logits(self, params, hidden) -> tuple[Array, ...]:
        """`[B, K, V]` of each policy.

        Raises:
            ValueError: if their vocabularies differ.
        """
        out = tuple(p.head(own, h) for p, own, h in zip(self.policies, params, hidden))
        if len({x.shape[-1] for x in out}) > 1:
            sizes = " and ".join(str(x.shape[-1]) for x in out)
            raise ValueError(f"policy and reference have different vocabularies: {sizes} tokens")
        return out

    def roles(self, values: Sequence[Any]) -> dict[str, Any]:
        """One value for each policy under its role."""
        return dict(zip(ROLES, values))


def check_prompts(policies: Sequence[Policy], prompts: PromptBatch, max_new_tokens: int) -> None:
    """Raises `ValueError` for prompts that do not fit their arrays or the policies' positions.

    Under a trace nothing is known about lengths, and only shapes are checked.
    """
    tokens, lengths, ids = prompts.tokens, prompts.lengths, prompts.ids
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or ids.shape != lengths.shape:
        raise ValueError(
            "prompts need tokens [B, P], lengths [B] and ids [B]; got shapes "
            f"{tokens.shape}, {lengths.shape} and {ids.shape}"
        )
    if 0 in tokens.shape:
        raise ValueError(f"prompts are empty: tokens have shape {tokens.shape}")
    if isinstance(lengths, jax.core.Tracer):
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > tokens.shape[1]:
        raise ValueError(
            f"prompts.lengths must lie in 1..{tokens.shape[1]}, the width of prompts.tokens; they "
            f"lie in {shortest}..{longest}"
        )
    for policy in policies:
        limit = policy.max_positions
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the "
                f"model's {limit} positions: lower max_new_tokens or cut the prompt"
            )


def placed(prompts: PromptBatch, mesh: Mesh | None) -> tuple[PromptBatch, Any]:
    """Prompts over the devices of a mesh, and the context in which they are decoded.

    The last prompt is repeated until the devices divide the batch: `fetched` cuts the results. With
    several processes each gives its own prompts, and the widest batch of them sets the shape.
    """
    if mesh is None:
        return prompts, contextlib.nullcontext()
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch, width = prompts.tokens.shape
    if jax.process_count() > 1:
        ways //= row_share(mesh).count
        shapes = multihost_utils.process_allgather(np.array([batch, width]))
        batch, width = (int(size) for size in shapes.max(axis=0))
    short, narrow = batch + -batch % ways - len(prompts.tokens), width - prompts.tokens.shape[1]
    if short or narrow:
        tokens, lengths, ids = map(np.asarray, (prompts.tokens, prompts.lengths, prompts.ids))
        repeat = functools.partial(np.pad, pad_width=(0, short), mode="edge")
        tokens = np.pad(np.pad(tokens, ((0, 0), (0, narrow))), ((0, short), (0, 0)), "edge")
        prompts = PromptBatch(tokens, repeat(lengths), repeat(ids))
    return place_rows(prompts, mesh), jax.set_mesh(mesh)


def fetched(found: Any, batch: int, mesh: Mesh | None) -> Any:
    """What was found for the first `batch` prompts: with several processes this one's, on the host.

    Arrays lead with the prompts.
    """
    if mesh is not None and jax.process_count() > 1:
        found = own_rows(found, mesh)
    if len(jax.tree.leaves(found)[0]) == batch:
        return found
    return jax.tree.map(lambda x: x[:batch], found)
