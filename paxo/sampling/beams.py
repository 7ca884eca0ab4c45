"""Beam search over the shared prompt's cache."""

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
from paxo.sampling.distribution import filtered
from paxo.types import Array, Completions, Finish, Params, Policy, PromptBatch


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How wide the search is and what it maximises.

    Attributes:
        max_new_tokens: T, the longest completion, stop token included.
        num_beams: W unfinished completions that are followed side by side.
        num_returned: K best completions returned, at most `num_beams`.
        length_penalty: a completion's score is its sum over tokens / length ** length_penalty: 0
            takes the sum, 1 the mean.
        min_new_tokens: so many tokens come before one that may end the completion.
        stop_sequences: runs of token ids that end a completion too; they stay part of it.
        top_k: only so many most likely tokens of the policy may follow; 0 takes all. Without it a
            score against a reference favours tokens that are unlikely under both.

    Raises:
        ValueError: for values out of range.
    """

    max_new_tokens: int
    num_beams: int
    num_returned: int = 1
    length_penalty: float = 0.0
    min_new_tokens: int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    top_k: int = 0

    def __post_init__(self):
        least = {"max_new_tokens": 1, "num_beams": 1, "num_returned": 1}
        for name in (*least, "length_penalty", "min_new_tokens", "top_k"):
            low = least.get(name, 0)
            if not getattr(self, name) >= low:
                raise ValueError(f"beams.{name} must be at least {low}; got {getattr(self, name)}")
        for small, large in (
            ("num_returned", "num_beams"),
            ("min_new_tokens", "max_new_tokens"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"beams.{small} must not exceed {large}; got {getattr(self, small)} and "
                    f"{getattr(self, large)}"
                )
        check_whole(self, "beams", (*least, "min_new_tokens", "top_k"))
        object.__setattr__(self, "stop_sequences", token_runs(self.stop_sequences))


class BeamResult(NamedTuple):
    """What a search found, best first.

    Attributes:
        completions: K a prompt; their `logps` are 0, as nothing was drawn, and `token_logps` are
            those of the policies. The mask is empty where fewer than K were found.
        scores: `[B, K]`, -inf where fewer than K were found.
    """

    completions: Completions
    scores: Array


def make_beam_search(
    policy: Policy,
    config: BeamConfig,
    stop_ids: tuple[int, ...],
    *,
    reference: Policy | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., BeamResult]:
    r"""A compiled `search(params, prompts) -> BeamResult` for the most likely completions.

    For a policy trained by DPO with weight β, $\beta \log \pi(y_t)$ is the advantage of the token
    under the optimal soft Q-function of the reward with its KL term, so a likely completion is one
    of high value ("From r to Q*", arXiv:2404.12358). With `reference_params` the search is on
    $\sum_t \log \pi(y_t) / \pi_{ref}(y_t)$: the reward alone, but for a constant of the prompt.

    In each step the W best continuations that end are set aside, the W best of the others are
    followed. A prompt's search ends when no unfinished beam can overtake the W finished ones.

    Args:
        policy: the model; its `decode` has a `select`.
        config: width and score.
        stop_ids: tokens that end a completion.
        reference: the other model, if it is of another architecture.
        mesh: devices over which the prompts are spread.

    Returns:
        `search(params, prompts, *, reference_params=None) -> BeamResult`.

    Raises:
        ValueError: without a stop, or if a policy cannot reorder its cache. The search raises it
            for prompts that do not fit, as samplers do.
    """
    stops = Stops(stop_ids, config.stop_sequences)
    for model in (policy, policy if reference is None else reference):
        if model.decode.select is None:
            raise ValueError("beam search needs policy.decode.select, which reorders the cache")

    def search(
        params: Params, prompts: PromptBatch, *, reference_params: Params | None = None
    ) -> BeamResult:
        models, both = Models((policy,)), (params,)
        if reference_params is not None:
            models = Models((policy, policy if reference is None else reference))
            both = (params, reference_params)
        check_prompts(models.policies, prompts, config.max_new_tokens)
        batch = len(prompts.tokens)
        prompts, context = placed(prompts, mesh)
        with context:
            found = _search(models, config, stops, both, prompts)
        return fetched(found, batch, mesh)

    return search


class _Beams(NamedTuple):
    """Completions `[B, N, ...]`, best first.

    Attributes:
        scores: `[B, N]` -inf where there is none.
        tokens: `[B, N, T]`.
        recent: `[B, N, M]` last tokens.
        finish: `[B, N]` `Finish`.
        lengths: `[B, N]`.
        role_logps: `[B, N, T]` for each policy.
    """

    scores: Array
    tokens: Array
    recent: Array
    finish: Array
    lengths: Array
    role_logps: tuple[Array, ...]

    def take(self, index: Array) -> "_Beams":
        """Those at `index [B, n]`."""

        def of(x: Array) -> Array:
            shape = index.shape + (1,) * (x.ndim - 2)
            return jnp.take_along_axis(x, index.reshape(shape), 1)

        return jax.tree.map(of, self)

    def best(self, scores: Array, number: int) -> "_Beams":
        """The so many with the highest of these scores."""
        scores, index = jax.lax.top_k(scores, number)
        return self.take(index)._replace(scores=scores)


class _Loop(NamedTuple):
    index: Array
    caches: Any
    running: _Beams  # their scores are sums, not divided by lengths
    finished: _Beams
    open: Array  # [B] bool: an unfinished beam might still be among the best


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(models: Models, config: BeamConfig, stops: Stops, params, prompts) -> BeamResult:
    params = models.prepare(params)
    batch, width, length = len(prompts.tokens), config.num_beams, config.max_new_tokens
    caches, hidden = models.prefill(params, prompts, width, length)

    def extend(loop: _Loop, hidden: tuple[Array, ...]) -> tuple[_Beams, Array]:
        """The best continuations of the beams, and the beams `[B, N]` that they come from."""
        each = [jax.nn.log_softmax(x, -1) for x in models.logits(params, hidden)]
        vocabulary = each[0].shape[-1]
        stops.check(vocabulary)
        allowed = filtered(each[0], top_k=config.top_k)
        if config.min_new_tokens:
            early = loop.index < config.min_new_tokens
            allowed = jnp.where(early, stops.blocked(allowed), allowed)
        gains = each[0] - each[1] if len(each) == 2 else each[0]
        sums = loop.running.scores[..., None] + jnp.where(jnp.isneginf(allowed), -jnp.inf, gains)
        # As many as leave `width` to follow if each beam's stop tokens are all among the best.
        number = min((1 + len(stops.ids)) * width, width * vocabulary)
        scores, chosen = jax.lax.top_k(sums.reshape(batch, -1), number)
        parents, token = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
        new = loop.running.take(parents)

        def put(all_tokens: Array, value: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(all_tokens, value, loop.index, 2)

        of_roles = (x.reshape(batch, -1) for x in each)
        gained = (jnp.take_along_axis(x, chosen, 1) for x in of_roles)
        recent = remember(new.recent, token)
        may_end = loop.index >= config.min_new_tokens
        extended = _Beams(
            scores=scores,
            tokens=put(new.tokens, token),
            recent=recent,
            finish=jnp.where(may_end, stops.finish(recent), Finish.LENGTH),
            lengths=new.lengths + 1,
            role_logps=tuple(map(put, new.role_logps, gained)),
        )
        return extended, parents

    def advance(loop: _Loop, hidden: tuple[Array, ...]) -> tuple[_Loop, Array]:
        """One token more; the loop, and the beams `[B, W]` that those now followed come from."""
        new, parents = extend(loop, hidden)
        ends = (new.finish != Finish.LENGTH) | (loop.index == length - 1)
        among_best = jnp.arange(new.scores.shape[1]) < width
        settled = ends & among_best & loop.open[:, None]
        final = new._replace(scores=new.scores / new.lengths**config.length_penalty)
        merged = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), loop.finished, final)
        ours = jnp.where(settled, final.scores, -jnp.inf)
        finished = merged.best(jnp.concatenate([loop.finished.scores, ours], 1), width)
        scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, new.scores), width)
        running = new.take(kept)._replace(scores=scores)
        loop = loop._replace(index=loop.index + 1, running=running, finished=finished)
        return loop._replace(open=loop.open & _may_win(loop, config, len(models.policies))), (
            jnp.take_along_axis(parents, kept, 1)
        )

    def body(carry: tuple[_Loop, Array]) -> tuple[_Loop, Array]:
        loop, parents = carry
        caches = models.select(loop.caches, parents)
        token = loop.running.recent[..., -1]
        caches, hidden = models.step(params, caches, token, loop.index - 1)
        return advance(loop._replace(caches=caches), hidden)

    def going(carry: tuple[_Loop, Array]) -> Array:
        return (carry[0].index < length) & jnp.any(carry[0].open)

    dtype = jax.eval_shape(lambda: models.logits(params, hidden)[0]).dtype
    none = _no_beams(batch, width, length, stops.longest, dtype, len(models.policies))
    # All beams begin alike: only the first of them counts.
    first = none._replace(scores=jnp.where(jnp.arange(width) == 0, 0.0, none.scores))
    start = _Loop(jnp.zeros((), jnp.int32), caches, first, none, jnp.ones(batch, bool))
    end, _ = jax.lax.while_loop(going, body, advance(start, hidden))
    best = jax.tree.map(lambda x: x[:, : config.num_returned], end.finished)
    return _result(best, length, models)


def _may_win(loop: _Loop, config: BeamConfig, policies: int) -> Array:
    """`[B]` whether an unfinished beam could still come before the last of the W finished ones."""
    best, worst = loop.running.scores[:, 0], loop.finished.scores[:, -1]
    alive = ~jnp.isneginf(best)
    if policies == 2:
        return alive  # a token may add to the score, so there is no bound
    # Log-probs only fall, so the longest completion divides the present sum by most.
    return alive & (best / config.max_new_tokens**config.length_penalty > worst)


def _no_beams(batch, number, length, memory, dtype, policies) -> _Beams:
    whole = jnp.zeros((batch, number), jnp.int32)
    logps = jnp.zeros((batch, number, length), dtype)
    return _Beams(
        scores=jnp.full((batch, number), -jnp.inf, dtype),
        tokens=jnp.zeros((batch, number, length), jnp.int32),
        recent=jnp.full((batch, number, memory), NO_TOKEN, jnp.int32),
        finish=whole,
        lengths=whole,
        role_logps=(logps,) * policies,
    )


def _result(best: _Beams, length: int, models: Models) -> BeamResult:
    found = ~jnp.isneginf(best.scores)
    mask = (jnp.arange(length) < best.lengths[..., None]) & found[..., None]
    logps = [jnp.where(mask, x, 0) for x in best.role_logps]
    completions = Completions(
        tokens=jnp.where(mask, best.tokens, 0),
        mask=mask,
        logps=jnp.zeros_like(logps[0]),
        finish=jnp.where(found, best.finish, Finish.LENGTH),
        token_logps=models.roles(logps),
    )
    return BeamResult(completions, best.scores)
