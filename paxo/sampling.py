"""Batched sampling with a key-value cache that holds each prompt once for its K candidates.

The draw of a token depends on the key, its prompt's id, the candidate and the position, never on
its neighbours, so the same key gives the same tokens whatever the batch size, padding, K or mesh
(up to the last bits of the logits).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from paxo.types import Array, Completions, Params, Policy, PromptBatch

Sampler = Callable[[Params, PromptBatch, Array], Completions]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
        max_new_tokens: T, the longest completion, stop token included.
        num_candidates: K completions a prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only so many most likely tokens; 0 takes all.
        top_p: only the most likely tokens that together reach this probability; 1 takes all.
        min_new_tokens: no stop token before so many tokens have been drawn.

    Raises:
        ValueError: for values out of range.
    """

    max_new_tokens: int
    num_candidates: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self):
        least = {"max_new_tokens": 1, "num_candidates": 1}
        for name in (*least, "temperature", "top_k", "min_new_tokens"):
            low = least.get(name, 0)
            if getattr(self, name) < low:
                raise ValueError(
                    f"sampling.{name} must be at least {low}; got {getattr(self, name)}"
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must lie in (0, 1]; got {self.top_p}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                "sampling.min_new_tokens must not exceed max_new_tokens; got "
                f"{self.min_new_tokens} and {self.max_new_tokens}"
            )


def make_sampler(policy: Policy, config: SamplingConfig, stop_ids: tuple[int, ...]) -> Sampler:
    """A compiled `sampler(params, prompts, key) -> Completions`.

    Args:
        policy: the model.
        config: how completions are drawn.
        stop_ids: tokens that end a completion; the one drawn is part of it.

    Raises:
        ValueError: without a stop id: nothing would ever be finished.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty: name the tokens that end a completion")
    return functools.partial(_sample, policy, config, tuple(int(i) for i in stop_ids))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(policy, config, stop_ids, params, prompts, key) -> Completions:
    batch, k, length = prompts.tokens.shape[0], config.num_candidates, config.max_new_tokens
    stops = jnp.array(stop_ids, jnp.int32)
    keys = _row_keys(key, prompts.ids, k)
    cache, hidden = policy.decode.prefill(params, prompts.tokens, prompts.lengths, k, length)
    hidden = jnp.broadcast_to(hidden[:, None], (batch, k, hidden.shape[-1]))

    def choose(hidden: Array, index: Array) -> tuple[Array, Array]:
        logits = policy.head(params, hidden)
        blocked = (index < config.min_new_tokens) & jnp.isin(jnp.arange(logits.shape[-1]), stops)
        return draw(jnp.where(blocked, -jnp.inf, logits), keys, index, config)

    def body(loop):
        index, cache, hidden, tokens, logps, done = loop
        token, logp = choose(hidden, index)
        token, logp = jnp.where(done, 0, token), jnp.where(done, 0.0, logp)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, 2)
        logps = jax.lax.dynamic_update_index_in_dim(logps, logp, index, 2)
        alive = ~done
        done = done | jnp.isin(token, stops) & alive
        cache, hidden = policy.decode.step(params, cache, token, index)
        return index + 1, cache, hidden, tokens, logps, done

    start = (
        jnp.zeros((), jnp.int32),
        cache,
        hidden,
        jnp.zeros((batch, k, length), jnp.int32),
        jnp.zeros((batch, k, length), jnp.float32),
        jnp.zeros((batch, k), bool),
    )
    going = lambda loop: (loop[0] < length) & ~jnp.all(loop[-1])  # noqa: E731
    _, _, _, tokens, logps, finished = jax.lax.while_loop(going, body, start)
    # A row that is done writes zeros, so its last token is where its stop token stands.
    is_stop = jnp.isin(tokens, stops)
    first = jnp.where(finished, jnp.argmax(is_stop, -1), length - 1)
    mask = jnp.arange(length) <= first[..., None]
    return Completions(jnp.where(mask, tokens, 0), mask, jnp.where(mask, logps, 0), finished)


def draw(logits: Array, keys: Array, index: Array, config: SamplingConfig) -> tuple[Array, Array]:
    """One token a row and its log-prob under the distribution it was drawn from.

    Args:
        logits: `[..., V]`.
        keys: `[...]` a random key a row.
        index: position of the new token.
        config: temperature and truncation.
    """
    if config.temperature == 0:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32)
    logits = truncated(logits / config.temperature, config.top_k, config.top_p)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, index)))(keys.reshape(-1))
    # Inverse of the distribution function: one uniform number a row instead of V Gumbel draws.
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    total = jnp.cumsum(weights, -1)
    threshold = uniform.reshape(logits.shape[:-1])[..., None] * total[..., -1:]
    token = jnp.sum(total <= threshold, -1)
    # Rounding may carry the threshold past the last token that has any weight.
    last = logits.shape[-1] - 1 - jnp.argmax((weights > 0)[..., ::-1], -1)
    token = jnp.minimum(token, last).astype(jnp.int32)
    logps = jax.nn.log_softmax(logits, -1)
    return token, jnp.take_along_axis(logps, token[..., None], -1)[..., 0]


def truncated(logits: Array, top_k: int, top_p: float) -> Array:
    """Logits with -inf outside of the `top_k` and of the smallest set that reaches `top_p`.

    >>> truncated(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0, 0.7)[2]
    Array(-inf, dtype=float32)
    """
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        probabilities = jax.nn.softmax(ordered, -1)
        # A token stays while those before it have not reached top_p: the first always does.
        stays = jnp.cumsum(probabilities, -1) - probabilities < top_p
        lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def _row_keys(key: Array, ids: Array, candidates: int) -> Array:
    of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    numbers = jnp.arange(candidates)
    return jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(numbers))(of_prompt)
