"""Every type that crosses a module boundary, in one place.

Axes, used in all shape comments:

    R rows of a batch          L tokens in a row         S scored tokens in a row
    G groups in a row          K candidates of a group   T tokens of a completion
    B prompts                  P tokens of a prompt      V vocabulary      D width of the model

A *group* is one prompt with its K candidate completions; a *row* packs several groups. Log-probs
are in nats.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Params = Any  # a pytree of arrays


def pytree(cls: type) -> type:
    """A frozen dataclass that is a JAX pytree; `static_field`s of it are not leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static_field(**kwargs: Any) -> Any:
    """A field of a `pytree` that is part of the structure (compared when traced), not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@pytree
class PreferenceBatch:
    """Packed rows of prompts with their candidates: the only layout that is trained or scored.

    A token attends to the tokens at or before it in its row that have the same `group` (not 0) and
    a `branch` that is 0 or its own, so a prompt is computed once for all its candidates and groups
    never see one another.

    Every array leads with R: rows shard over devices and hosts.

    Attributes:
        tokens: `[R, L]` int32 token ids, completions with their last token (EOS included); 0 on
            padding.
        positions: `[R, L]` int32 position of a token in its own sequence; a completion goes on
            where its prompt ends.
        group: `[R, L]` int32, 1..G, and 0 on padding.
        branch: `[R, L]` int32, 0 on prompt tokens and 1..K on the tokens of completion k.
        score_from: `[R, S]` int32 index in the row whose hidden state predicts the scored token.
        score_token: `[R, S]` int32 token scored there; the EOS of a finished completion included.
        score_slot: `[R, S]` int32 `g * K + k` with g, k from 0, and `G * K` on padding. The tokens
            of a candidate lie side by side in their order.
        labels: `[R, G, K]` float32 grades: (1, 0) for a hard pair, win rates, ±1 desirability or
            any relevance.
        where: `[R, G, K]` bool, False where there is no candidate.
        fixed_logps: role -> `[R, G, K]` float32 log-probs of a frozen policy, attached by a scorer.
        fixed_token_logps: role -> `[R, S]` float32, the same by token.
        fixed_hidden: role -> `[R, S, D]` hidden states that predict the scored tokens.
        extras: name -> `[R, G, ...]` any other array that a loss names.
        max_completion: static, T of the token-level arrays `[R, G, K, T]`.
    """

    tokens: Array
    positions: Array
    group: Array
    branch: Array
    score_from: Array
    score_token: Array
    score_slot: Array
    labels: Array
    where: Array
    fixed_logps: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    fixed_token_logps: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    fixed_hidden: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    extras: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    max_completion: int = static_field(default=0)

    def replace(self, **changes: Any) -> "PreferenceBatch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@pytree
class PromptBatch:
    """Prompts to be completed, right-padded.

    Attributes:
        tokens: `[B, P]` int32, each prompt from column 0.
        lengths: `[B]` int32 tokens of each prompt, at least 1.
        ids: `[B]` int32 number of the prompt in its data set: the random key of a row is made from
            it.
    """

    tokens: Array
    lengths: Array
    ids: Array


class Finish(enum.IntEnum):
    """Why a completion ends."""

    LENGTH = 0  # it was cut at the longest length
    STOP_TOKEN = 1
    STOP_SEQUENCE = 2


@pytree
class Completions:
    """What a sampler drew for each prompt.

    Attributes:
        tokens: `[B, K, T]` int32, the stop token included, 0 after it.
        mask: `[B, K, T]` bool, True on drawn tokens.
        logps: `[B, K, T]` float32 log-prob of each token under the distribution it was drawn from,
            after temperature, truncation and mixture; 0 where masked, and where nothing was random.
        finish: `[B, K]` int32, the `Finish` that says why the completion ends.
        token_logps: role -> `[B, K, T]` float32 log-prob of each token under that policy itself,
            without temperature or truncation, 0 where masked: "policy", and "reference" where two
            policies took part. What importance ratios, and losses on samples, need.
    """

    tokens: Array
    mask: Array
    logps: Array
    finish: Array
    token_logps: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> Array:
        """`[B, K]` bool, False where the length limit cut the completion."""
        return self.finish != Finish.LENGTH


class Decode(NamedTuple):
    """A policy's cached decoding: the prompt is computed once, its K candidates share it.

    Attributes:
        prefill: `(params, tokens [B, P], lengths [B], num_candidates, max_new) -> (cache, hidden
            [B, D])`, the hidden state that predicts the first new token.
        step: `(params, cache, tokens [B, K], index) -> (cache, hidden [B, K, D])` after the
            index-th new token.
        prepare: `(params) -> params` that prefill, step and the head are called with: what is the
            same for all tokens is done there.
        select: `(cache, candidates [B, K]) -> cache` in which candidate j goes on from the tokens
            of candidate `candidates[b, j]`, as beam search needs; None if there is no such thing.
    """

    prefill: Callable[..., tuple[Any, Array]]
    step: Callable[..., tuple[Any, Array]]
    prepare: Callable[[Params], Params] = lambda params: params
    select: Callable[[Any, Array], Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A language model as pure functions; its parameters are a pytree that travels beside it.

    Compared and hashed by identity, so that it can be a static argument of a jitted function.

    Attributes:
        init: `(key) -> params`.
        trunk: `(params, tokens, positions, group, branch: all [R, L]) -> hidden [R, L, D]`.
        head: `(params, hidden [..., D]) -> logits [..., V]`, at least float32.
        unembed: `(params) -> [D, V]`, the matrix of the head; scoring works on it in chunks.
        logical_axes: a pytree like params with a tuple of axis names for each array.
        decode: prefill and step over a key-value cache.
        unembed_by_token: `(params) -> [V, D]`, the same matrix transposed, where that is how the
            parameters lie (tied embeddings); None elsewhere.
        heads: name -> `(params, hidden [..., D]) -> [...]`, extra trained outputs whose parameters
            lie under `params["heads"][name]`.
        max_positions: longest sequence, tokens; None where there is no limit.
        frozen: names of the entries of params that are not trained; with any, params are a dict.
    """

    init: Callable[[Array], Params]
    trunk: Callable[..., Array]
    head: Callable[[Params, Array], Array]
    unembed: Callable[[Params], Array]
    logical_axes: Any
    decode: Decode
    unembed_by_token: Callable[[Params], Array] | None = None
    heads: Mapping[str, Callable[[Params, Array], Array]] = dataclasses.field(default_factory=dict)
    max_positions: int | None = None
    frozen: tuple[str, ...] = ()

    def split(self, params: Params) -> tuple[Params, Params]:
        """The trained and the frozen entries of params, or of a tree like them."""
        if not self.frozen:
            return params, {}
        trained = {name: x for name, x in params.items() if name not in self.frozen}
        return trained, {name: params[name] for name in self.frozen}

    def join(self, trained: Params, frozen: Params) -> Params:
        """The inverse of `split`; `frozen` may hold more than this policy's entries."""
        return trained | {name: frozen[name] for name in self.frozen} if self.frozen else trained


class Scorer(Protocol):
    """Log-probs of a fixed policy for the candidates of a batch; need not be subclassed."""

    def __call__(self, batch: PreferenceBatch) -> Array:
        """`[R, G, K]` float32 summed log-probs in nats, 0 where there is no candidate."""
        ...


class Sampler(Protocol):
    """Draws completions."""

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Completions:
        """K completions for each prompt; a draw depends on key, prompt id, candidate, position."""
        ...


class Judge(Protocol):
    """Compares completions of the same prompt."""

    def __call__(self, prompts: Any, completions: Any, wanted: Array | None = None) -> Array:
        """`[B, K, K]` probability that i beats j; `wanted [K, K]`: the comparisons read."""
        ...


class Pairing(Protocol):
    """Chooses, from the judged candidates of each prompt, those that are trained on."""

    def __call__(self, preferences: Array, completions: Completions, key: Array) -> Any:
        """Indices and labels of the chosen candidates."""
        ...
