"""Batched sampling with a key-value cache that holds each prompt once for its K candidates.

The draw of a token depends on the key, its prompt's id, the candidate and the position, never on
its neighbours, so the same key gives the same tokens whatever the batch size, padding, K or mesh.
Logits differ in their last bits, so a draw that near to a boundary may flip: of a 260K-parameter
model's texts, drawn again in 11 other ways on up to eight devices, 0 of 8,640 did.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paxo.sampling.decoding import (
    NO_TOKEN,
    Models,
    Stops,
    check_prompts,
    check_whole,
    fetched,
    placed,
    remember,
    token_runs,
)
from paxo.sampling.distribution import draw, filtered, greedy, log_prob, uniforms
from paxo.types import Array, Completions, Finish, Params, Policy, PromptBatch, Sampler

# Settings of `filtered`.
SHAPE = ("temperature", "top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
        max_new_tokens: T, the longest completion, stop token included.
        num_candidates: K completions a prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only so many most likely tokens; 0 takes all.
        top_p: only the most likely tokens that together reach this probability; 1 takes all.
        min_p: only tokens with this share of the most likely one's probability; 0 takes all.
        min_new_tokens: so many tokens are drawn before one that may end the completion: until then
            no stop token is drawn, and no stop sequence is heeded.
        stop_sequences: runs of token ids that end a completion too; they stay part of it.

    Raises:
        ValueError: for values out of range.
    """

    max_new_tokens: int
    num_candidates: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        least = {"max_new_tokens": 1, "num_candidates": 1}
        for name in (*least, "temperature", "top_k", "min_new_tokens"):
            low = least.get(name, 0)
            if not getattr(self, name) >= low:
                raise ValueError(
                    f"sampling.{name} must be at least {low}; got {getattr(self, name)}"
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p must lie in [0, 1]; got {self.min_p}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                "sampling.min_new_tokens must not exceed max_new_tokens; got "
                f"{self.min_new_tokens} and {self.max_new_tokens}"
            )
        check_whole(self, "sampling", (*least, "top_k", "min_new_tokens"))
        # Lists come from settings files; the record is a static argument and has to be hashable.
        object.__setattr__(self, "stop_sequences", token_runs(self.stop_sequences))


def make_sampler(
    policy: Policy, config: SamplingConfig, stop_ids: tuple[int, ...], *, mesh: Mesh | None = None
) -> Sampler:
    """A compiled `sampler(params, prompts, key) -> Completions`.

    Samplers of the same policy, settings and stops share their programs, and one that has run
    compiles nothing for prompts of the same shape. With a temperature of 0 the key is not used.

    Args:
        policy: the model.
        config: how completions are drawn.
        stop_ids: tokens that end a completion; the one drawn is part of it.
        mesh: devices over which the prompts are spread, as the parameters are by
            `param_shardings`; None leaves that to JAX. With several processes each of them gives
            its own prompts, at least one and as many as it likes, the same key, and gets their
            completions back as host arrays.

    Raises:
        ValueError: without any stop token or sequence: nothing would ever be finished. The sampler
            raises it for prompts that are empty or, with `max_new_tokens`, longer than the model's
            positions.

    >>> from paxo.models.config import ModelConfig
    >>> from paxo.models.policy import make_policy
    >>> policy = make_policy(ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, intermediate_size=16, max_positions=32))
    >>> prompts = PromptBatch(jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([3, 1]), jnp.arange(2))
    >>> sampler = make_sampler(policy, SamplingConfig(max_new_tokens=4, num_candidates=3), (2,))
    >>> params = jax.eval_shape(policy.init, jax.random.key(0))  # shapes alone
    >>> jax.eval_shape(sampler, params, prompts, jax.random.key(1)).tokens.shape
    (2, 3, 4)
    """
    stops = Stops(stop_ids, config.stop_sequences)
    run = functools.partial(_run, Models((policy,)), config, stops, mesh)

    def sampler(params: Params, prompts: PromptBatch, key: Array) -> Completions:
        return run((params,), jnp.ones(1), prompts, key)

    return sampler


def lower_sampler(
    policy: Policy,
    config: SamplingConfig,
    stop_ids: tuple[int, ...],
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    mesh: Mesh,
    reference_params: Params | None = None,
) -> Any:
    """The lowered program of a sampler, to be compiled and looked at.

    The first three arguments and `mesh` are those of `make_sampler`, the others those of its
    sampler; of these shapes with their shardings are enough. With `reference_params` it is the
    sampler of `make_mixture_sampler`, of two policies of this model.
    """
    both = (params,) if reference_params is None else (params, reference_params)
    models, stops = Models((policy,) * len(both)), Stops(stop_ids, config.stop_sequences)
    weights = jax.ShapeDtypeStruct((len(both),), jnp.float32)
    with jax.set_mesh(mesh):
        return _sample.lower(models, config, stops, both, weights, prompts, key)


def make_mixture_sampler(
    policy: Policy,
    config: SamplingConfig,
    stop_ids: tuple[int, ...],
    *,
    reference: Policy | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Completions]:
    r"""A sampler of the geometric mixture of two policies, token by token.

    $$\log \pi'(y_t) = (1 - \alpha) \log \pi(y_t) + \alpha \log \pi_{ref}(y_t) - \log Z_t$$

    as Nash-MD (arXiv:2312.00886) and IPO-MD (arXiv:2403.08635) draw from; temperature and
    truncation then apply to the mixture.

    Args:
        policy: the model.
        config: how completions are drawn.
        stop_ids: tokens that end a completion.
        reference: the other model, if it is of another architecture; of the same vocabulary.
        mesh: devices over which the prompts are spread.

    Returns:
        `sampler(params, prompts, key, *, reference_params, mix) -> Completions` whose `logps` are
        the mixture's and whose `token_logps` hold those of "policy" and "reference". `mix`, α, is
        the reference's weight in [0, 1]. Neither compiles anew when it changes; bound by
        `functools.partial` they leave a `Sampler`.
    """
    stops = Stops(stop_ids, config.stop_sequences)
    models = Models((policy, policy if reference is None else reference))
    run = functools.partial(_run, models, config, stops, mesh)

    def sampler(
        params: Params, prompts: PromptBatch, key: Array, *, reference_params: Params, mix: Any
    ) -> Completions:
        if not isinstance(mix, jax.Array) and not 0 <= mix <= 1:
            raise ValueError(f"mix is the reference's weight and lies in [0, 1]; got {mix}")
        weights = jnp.stack([1.0 - mix, jnp.asarray(mix, jnp.float32)])
        return run((params, reference_params), weights, prompts, key)

    return sampler


def _run(models, config, stops, mesh, params, weights, prompts, key) -> Completions:
    check_prompts(models.policies, prompts, config.max_new_tokens)
    batch = len(prompts.tokens)
    prompts, context = placed(prompts, mesh)
    with context:
        drawn = _sample(models, config, stops, params, weights, prompts, key)
    return fetched(drawn, batch, mesh)


class _Loop(NamedTuple):
    """What goes from token to token; `token` has been drawn and not yet been read.

    Attributes:
        index: number of the next token.
        caches: of each policy.
        token: `[B, K]` the last one drawn.
        recent: `[B, K, M]` the last tokens, as stop sequences need.
        finish: `[B, K]` why a row has ended, `Finish.LENGTH` while it has not.
        lengths: `[B, K]` tokens drawn.
        tokens: `[B, K, T]`; a row that has ended writes zeros.
        logps: `[B, K, T]`, as drawn.
        role_logps: `[B, K, T]` for each policy.
    """

    index: Array
    caches: Any
    token: Array
    recent: Array
    finish: Array
    lengths: Array
    tokens: Array
    logps: Array
    role_logps: tuple[Array, ...]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(models: Models, config, stops: Stops, params, weights, prompts, key) -> Completions:
    params = models.prepare(params)
    length, rows = config.max_new_tokens, (len(prompts.tokens), config.num_candidates)
    caches, hidden = models.prefill(params, prompts, config.num_candidates, length)

    def add(loop: _Loop, hidden: tuple[Array, ...]) -> _Loop:
        """Draws the next token of every row that has not ended."""
        index = loop.index
        token, logps, role_logps = choose(hidden, index)
        alive = loop.finish == Finish.LENGTH
        token = jnp.where(alive, token, 0)
        recent = remember(loop.recent, token)
        found = jnp.where(index >= config.min_new_tokens, stops.finish(recent), Finish.LENGTH)

        def put(all_tokens: Array, new: Array) -> Array:
            new = jnp.where(alive, new, 0).astype(all_tokens.dtype)
            return jax.lax.dynamic_update_index_in_dim(all_tokens, new, index, 2)

        return loop._replace(
            index=index + 1,
            token=token,
            recent=recent,
            finish=jnp.where(alive, found, loop.finish),
            lengths=loop.lengths + alive,
            tokens=put(loop.tokens, token),
            logps=put(loop.logps, logps),
            role_logps=tuple(map(put, loop.role_logps, role_logps)),
        )

    def choose(hidden: tuple[Array, ...], index: Array) -> tuple[Array, Array, list[Array]]:
        """Tokens `[B, K]`, their log-probs as drawn, and under each policy itself."""
        each = models.logits(params, hidden)
        stops.check(each[0].shape[-1])
        logits = each[0] if len(each) == 1 else _mixture(each, weights)
        if config.min_new_tokens:
            logits = jnp.where(index < config.min_new_tokens, stops.blocked(logits), logits)
        if config.temperature == 0:
            token = greedy(logits)
            logps = jnp.zeros(token.shape, logits.dtype)
        else:
            shape = {name: getattr(config, name) for name in SHAPE}
            logits = filtered(logits, **shape)
            numbers = jax.lax.dynamic_index_in_dim(uniform, index, 2, keepdims=False)
            token, logps = draw(logits, numbers)
            if each[0] is logits:  # nothing was done to the policy's own distribution
                return token, logps, [logps]
        return token, logps, [log_prob(own, token) for own in each]

    def body(loop: _Loop) -> _Loop:
        caches, hidden = models.step(params, loop.caches, loop.token, loop.index - 1)
        return add(loop._replace(caches=caches), hidden)

    def going(loop: _Loop) -> Array:
        return (loop.index < length) & jnp.any(loop.finish == Finish.LENGTH)

    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    dtype = jax.eval_shape(lambda: models.logits(params, hidden)[0]).dtype
    logps = jnp.zeros((*rows, length), dtype)
    uniform = uniforms(key, prompts.ids, config.num_candidates, length, dtype)
    start = _Loop(
        index=zeros(()),
        caches=caches,
        token=zeros(rows),
        recent=jnp.full((*rows, stops.longest), NO_TOKEN, jnp.int32),
        finish=jnp.full(rows, Finish.LENGTH, jnp.int32),
        lengths=zeros(rows),
        tokens=zeros((*rows, length)),
        logps=logps,
        role_logps=(logps,) * len(models.policies),
    )
    # The first token needs no step of the models, the last one none behind it.
    end = jax.lax.while_loop(going, body, add(start, hidden))
    return Completions(
        tokens=end.tokens,
        mask=jnp.arange(length) < end.lengths[..., None],
        logps=end.logps,
        finish=end.finish,
        token_logps=models.roles(end.role_logps),
    )


def _mixture(each: tuple[Array, ...], weights: Array) -> Array:
    """Logits of the geometric mixture; a policy of weight 0 may hold infinities."""
    return sum(jnp.where(w == 0, 0, w * x) for w, x in zip(weights, each))
