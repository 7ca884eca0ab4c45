r"""Pieces of losses over lists: candidates on the last axis, ragged by `where`, graded by `labels`.

The best candidate has the highest grade. Equal grades are ties: no pair is formed of them, and
where a rank is needed they keep their places.

>>> better_pairs(jnp.array([2.0, 1.0, 1.0]), jnp.ones(3, bool)).astype(int)
Array([[0, 1, 1],
       [0, 0, 0],
       [0, 0, 0]], dtype=int32)
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.numerics import Array, at_least_float32, masked

Ties = Literal["skip", "order", "random"]


def list_inputs(where: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """`where` (all True for None) and the arrays `[..., K]`: at least float32, 0 where masked."""
    if where is None:
        where = jnp.ones(arrays[0].shape, bool)
    chex.assert_equal_shape([*arrays, where])
    return (where, *(masked(at_least_float32(x), where) for x in arrays))


def differences(x: Array) -> Array:
    """`[..., K] -> [..., K, K]`: entry i, j is `x[i] - x[j]`."""
    return x[..., :, None] - x[..., None, :]


def better_pairs(labels: Array, where: Array) -> Array:
    """`[..., K] -> [..., K, K]` True at i, j where both are there and i has the higher grade."""
    both = where[..., :, None] & where[..., None, :]
    return both & (labels[..., :, None] > labels[..., None, :])


def descending_order(x: Array, where: Array) -> Array:
    """`[..., K]` indices that sort from high to low; ties keep their places, masked go last."""
    return jnp.argsort(jnp.where(where, -x, jnp.inf), axis=-1, stable=True)


def ranks(x: Array, where: Array) -> Array:
    """`[..., K]` place of each candidate from 1 (highest) to K, in the type of `x`."""
    return (1 + jnp.argsort(descending_order(x, where), axis=-1)).astype(x.dtype)


def best_candidate(labels: Array, where: Array) -> Array:
    """`[..., K]` True at the first of the candidates with the highest grade, if there is one."""
    best = jnp.argmax(jnp.where(where, labels, -jnp.inf), axis=-1, keepdims=True)
    return where & (jnp.arange(labels.shape[-1]) == best)


def gains(labels: Array) -> Array:
    """`2^grade - 1`, computed as expm1: small grades keep their digits."""
    return jnp.expm1(labels * jnp.log(jnp.asarray(2, labels.dtype)))


def discounts(rank: Array) -> Array:
    """`1 / log2(1 + rank)` for ranks from 1."""
    return 1 / jnp.log2(1 + rank)


def ideal_dcg(worth: Array, where: Array, topn: int = 0) -> Array:
    """`[..., K] -> [...]` discounted cumulative gain of the list sorted by its gains.

    Ranks beyond `topn` count nothing, unless it is 0.

    >>> ideal_dcg(gains(jnp.array([0.0, 1.0])), jnp.ones(2, bool))
    Array(1., dtype=float32)
    """
    place = ranks(worth, where)
    counted = where & (place <= topn) if topn else where
    return jnp.sum(masked(worth * discounts(place), counted), axis=-1)


def plackett_luce_nll(
    scores: Array, labels: Array, where: Array, ties: Ties = "skip", key: Array | None = None
) -> Array:
    r"""`[..., K] -> [...]` minus the log-likelihood of the order of the grades: O(K log K).

    $\sum_r \log(1 + e^{t_r - s_r})$, where $t_r$ is the log-sum-exp of the scores below place r:
    all later ones where `ties` is "order" (ties stand as they came) or "random" (drawn with
    `key`), and those of a strictly lower grade where it is "skip". With "skip" a partial ranking is
    a list whose unranked rest has one grade below all others.

    >>> plackett_luce_nll(jnp.zeros(3), jnp.array([3.0, 2.0, 1.0]), jnp.ones(3, bool))
    Array(1.791759, dtype=float32)
    """
    lowest = jnp.finfo(scores.dtype).min
    if ties == "random":
        if key is None:
            raise ValueError("ties='random' needs a key; pass key=jax.random.key(...)")
        by_grade = jnp.where(where, -labels, jnp.inf)
        order = jnp.lexsort((jax.random.uniform(key, labels.shape), by_grade), axis=-1)
    else:
        order = descending_order(labels, where)
    ordered = jnp.take_along_axis(masked(scores, where, lowest), order, axis=-1)
    last_axis = scores.ndim - 1
    suffix = jax.lax.cumlogsumexp(ordered, axis=last_axis, reverse=True)
    pad = [(0, 0)] * last_axis
    suffix = jnp.pad(suffix, [*pad, (0, 1)], constant_values=lowest)
    if ties == "skip":
        grades = jnp.where(where, labels, -jnp.inf)
        sorted_grades = jnp.take_along_axis(grades, order, axis=-1)
        ends = sorted_grades[..., :-1] != sorted_grades[..., 1:]
        size = scores.shape[-1]
        following = jnp.where(jnp.pad(ends, [*pad, (0, 1)]), jnp.arange(1, size + 1), size)
        following = jax.lax.cummin(following, axis=last_axis, reverse=True)
        below = jnp.take_along_axis(suffix, following, axis=-1)
    else:
        below = suffix[..., 1:]
    here = jnp.take_along_axis(where, order, axis=-1)
    return jnp.sum(masked(jax.nn.softplus(below - masked(ordered, here)), here), axis=-1)
