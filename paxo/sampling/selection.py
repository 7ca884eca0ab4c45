"""Choosing among samples by their rewards: best of n, statistical rejection sampling; counting.

Pure functions of what a sampler drew and of rewards `[B, K]`, from whatever judge.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.numerics import Mean
from paxo.types import Array, Completions, Finish


class Accepted(NamedTuple):
    """Candidates that rejection sampling has kept, in the order of acceptance.

    Attributes:
        indices: `[B, n]` int32, 0 where fewer were accepted.
        where: `[B, n]` bool, False there: the pool held fewer than n candidates.
        tried: `[B]` int32 acceptance tests made in the first pass over the pool.
        first_pass: `[B]` int32 of which so many accepted.
    """

    indices: Array
    where: Array
    tried: Array
    first_pass: Array


def best_of_n(rewards: Array, where: Array | None = None, num: int = 1) -> Array:
    """The candidates of highest reward, best first; of equals the first.

    Args:
        rewards: `[..., K]`; may hold anything where `where` is False. A NaN is not chosen either.
        where: `[..., K]` bool, the candidates to choose from (finished ones, say).
        num: n chosen ones, at most K.

    Returns:
        `[..., n]` int32 indices; those of candidates to be left out come last.

    >>> best_of_n(jnp.array([0.1, 0.7, 0.9, 0.7]), jnp.array([True, True, False, True]), num=2)
    Array([1, 3], dtype=int32)
    """
    rewards = jnp.asarray(rewards)
    candidates = rewards.shape[-1]
    if not 1 <= num <= candidates:
        raise ValueError(f"num must lie in 1..{candidates}, the number of candidates; got {num}")
    where = _judged(rewards, where)
    # A candidate may have a reward of -inf and still comes before those left out.
    order = jnp.lexsort((-jnp.where(where, rewards, 0), ~where), axis=-1)
    return order[..., :num].astype(jnp.int32)


def rejection_sample(
    key: Array, rewards: Array, ids: Array, *, num: int, beta: float, where: Array | None = None
) -> Accepted:
    r"""Statistical rejection sampling: n of K samples, as if drawn from the tilted policy.

    The target is $\pi(y) \propto \pi_{sft}(y) \exp(r(y) / \beta)$. Passes over the pool accept a
    candidate where $u < \exp((r(y) - r_{max}) / \beta)$, u uniform in [0, 1) and $r_{max}$ the
    highest reward in the pool at the beginning of the pass; what is accepted leaves the pool after
    the pass, and nothing more is accepted once there are n. One test against the true maximum has
    exactly the target's law; with a finite pool it is approximate. β → ∞ takes the first n, β → 0
    the n of highest reward. Only differences of rewards count.

    Args:
        key: random key; a prompt's draws depend on it and the prompt's id.
        rewards: `[B, K]`; anything may stand where `where` is False, and a NaN leaves the pool.
        ids: `[B]` int32 of the prompts.
        num: n, 8 of 64 in the paper.
        beta: temperature of the target, in the unit of the rewards; the paper's is 0.5.
        where: `[B, K]` bool, the pool: `distinct(completions)` lets duplicates count once, as the
            paper does.

    Raises:
        ValueError: if `beta` is not above 0 or `num` not above 0.

    >>> rewards = jnp.array([[0.0, 9.0, 1.0]])
    >>> rejection_sample(jax.random.key(0), rewards, jnp.arange(1), num=2, beta=0.01).indices
    Array([[1, 2]], dtype=int32)

    RSO, "Statistical Rejection Sampling Improves Preference Optimization", arXiv:2309.06657,
    Algorithm 1.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}")
    if num < 1:
        raise ValueError(f"num must be at least 1; got {num}")
    where = _judged(rewards, where)
    chex.assert_shape(ids, rewards.shape[:1])
    return _of_all_prompts(key, rewards, ids, where, num, beta)


@functools.partial(jax.jit, static_argnums=4)  # outside of a program a loop compiles at every call
def _of_all_prompts(key, rewards, ids, where, num: int, beta) -> Accepted:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    of_prompt = lambda key, r, pool: _rejection_sample(key, r, pool, num, beta)  # noqa: E731
    return jax.vmap(of_prompt)(keys, rewards, where)


def _rejection_sample(key: Array, rewards: Array, pool: Array, num: int, beta: float) -> Accepted:
    rewards = jnp.where(pool, rewards, -jnp.inf)

    def one_pass(carry):
        number, pool, count, place, first = carry
        in_pool = jnp.where(pool, rewards, -jnp.inf)
        highest = jnp.max(in_pool)
        # Equal rewards are accepted with certainty, infinite ones too.
        below = jnp.where(in_pool == highest, 0.0, in_pool - highest)
        uniform = jax.random.uniform(jax.random.fold_in(key, number), rewards.shape)
        passed = pool & (uniform < jnp.exp(below / beta))
        order = count + jnp.cumsum(passed)  # 1 for the first accepted of all
        accepted = passed & (order <= num)
        return (
            number + 1,
            pool & ~accepted,
            count + jnp.sum(accepted),
            jnp.where(accepted, order - 1, place),
            jnp.where(number == 0, jnp.sum(passed), first),
        )

    def going(carry):
        _, pool, count, _, _ = carry
        return (count < num) & jnp.any(pool)

    zero = jnp.zeros((), jnp.int32)
    start = (zero, pool, zero, jnp.full(rewards.shape, num), zero)
    _, _, count, place, first = jax.lax.while_loop(going, one_pass, start)
    # `place` is where a candidate stands among the accepted, `num` for the others.
    indices = (
        jnp.zeros(num, jnp.int32)
        .at[place]
        .set(jnp.arange(len(rewards), dtype=jnp.int32), mode="drop")
    )
    return Accepted(indices, jnp.arange(num) < count, jnp.sum(pool, dtype=jnp.int32), first)


def _judged(rewards: Array, where: Array | None) -> Array:
    """Where there is a candidate with a reward: NaN is none."""
    if where is None:
        return ~jnp.isnan(rewards)
    chex.assert_equal_shape([rewards, where])
    return where & ~jnp.isnan(rewards)


def take_candidates(completions: Completions, indices: Array) -> Completions:
    """Chosen candidates `[B, n]` of each prompt, as from `best_of_n` or `rejection_sample`.

    >>> tokens = jnp.array([[[5, 2], [6, 2]]])
    >>> ones = jnp.ones_like(tokens)
    >>> drawn = Completions(tokens, ones == 1, ones * 0.0, ones[..., 0])
    >>> take_candidates(drawn, jnp.array([[1]])).tokens.tolist()
    [[[6, 2]]]
    """

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, indices.reshape(indices.shape + (1,) * (x.ndim - 2)), 1)

    return jax.tree.map(take, completions)


def distinct(completions: Completions) -> Array:
    """`[B, K]` bool, False for a candidate that repeats the tokens of an earlier one.

    >>> tokens = jnp.array([[[5, 2], [5, 2], [6, 2]]])
    >>> ones = jnp.ones_like(tokens)
    >>> distinct(Completions(tokens, ones == 1, ones * 0.0, ones[..., 0])).tolist()
    [[True, False, True]]
    """
    tokens, mask = completions.tokens, completions.mask
    unpadded = jnp.where(mask, tokens, -1)
    earlier = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool), -1)
    same = jnp.all(unpadded[:, :, None] == unpadded[:, None], -1)
    return ~jnp.any(same & earlier, -1)


def finish_shares(completions: Completions) -> dict[str, Mean]:
    """How completions ended, as totals and counts that add up over batches.

    Returns:
        "stop_token", "stop_sequence", "length": share of the completions that ended so.
        "none_finished": share of the prompts without any finished candidate.
        "tokens": tokens a completion.
    """
    means = {
        reason.name.lower(): Mean.over((completions.finish == reason).astype(jnp.float32))
        for reason in Finish
    }
    unfinished = ~jnp.any(completions.finished, -1)
    means["none_finished"] = Mean.over(unfinished.astype(jnp.float32))
    means["tokens"] = Mean.over(jnp.sum(completions.mask, -1).astype(jnp.float32))
    return means
