"""Masks, means and stable logarithms: the one place where padding is dealt with.

A mask is applied to the *inputs* of a formula, not to its result: `where(valid, f(x), 0)` still
differentiates `f` at the padding, and a NaN there reaches the gradient. So: mask, compute, mask
again.

>>> import jax.numpy as jnp
>>> total = Mean(jnp.array(6.0), jnp.array(3.0)) + Mean(jnp.array(2.0), jnp.array(1.0))
>>> float(total.value)
2.0
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array
LOG_2 = 0.6931471805599453


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """An average that is still a total and a count.

    Means of unequal parts (microbatches, devices, hosts) cannot be averaged; totals and counts can
    be added. The quotient is taken once, when the figure is written.

    Attributes:
        total: `[...]` sum of the values.
        count: `[...]` number (or weight) of the values; it follows from masks alone and carries no
            gradient.
    """

    total: Array
    count: Array

    @classmethod
    def over(cls, values: Array, where: Array | None = None) -> "Mean":
        """The mean of the `values` at which `where` is True, as a total and a count."""
        if where is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        return cls(jnp.sum(masked(values, where)), jnp.sum(where, dtype=values.dtype))

    @property
    def value(self) -> Array:
        """Total over count, and 0 where nothing was counted."""
        empty = self.count == 0
        return jnp.where(empty, 0, self.total / jnp.where(empty, 1, self.count))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)


def at_least_float32(x: Array) -> Array:
    """`x` as float32, or float64 if it is that: losses compute in no less, exact games in that."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked(x: Array, where: Array | None, fill: float = 0.0) -> Array:
    """`x` with `fill` where `where` is False; no gradient sees what stood there."""
    return x if where is None else jnp.where(where, x, jnp.asarray(fill, x.dtype))


def valid_rows(where: Array) -> Array:
    """`[..., K] -> [...]` True where every candidate is there: what a pairwise loss needs."""
    return jnp.all(where, axis=-1)


def masked_rows(x: Array, where: Array | None) -> Array:
    """`[...]` values with 0 for groups in which a candidate is missing (`where [..., K]`)."""
    return x if where is None else masked(x, valid_rows(where))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """`numerator / max(denominator, 1)`: per-token means of empty completions are 0, not NaN."""
    return numerator / jnp.maximum(jnp.asarray(denominator, numerator.dtype), 1)


def log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x < 0, exact near 0 and for very negative x; x above -1e-7 is taken as
    -1e-7.

    >>> import math
    >>> math.isclose(log1mexp(jnp.array(-1e-3)), math.log(-math.expm1(-1e-3)), rel_tol=1e-6)
    True
    """
    x = jnp.minimum(x, -1e-7)
    near_zero = x > -LOG_2
    # Both branches see an argument at which they are finite: the untaken one is differentiated too.
    near = jnp.log(-jnp.expm1(jnp.where(near_zero, x, -LOG_2)))
    far = jnp.log1p(-jnp.exp(jnp.where(near_zero, -LOG_2, x)))
    return jnp.where(near_zero, near, far)


def logsumexp(x: Array, axis: int = -1, where: Array | None = None) -> Array:
    """log Σ e^x over the entries where `where` is True; the lowest float where there is none."""
    if where is None:
        return jax.nn.logsumexp(x, axis=axis)
    some = jnp.any(where, axis=axis)
    lowest = jnp.finfo(x.dtype).min
    peak = jax.lax.stop_gradient(jnp.max(masked(x, where, lowest), axis=axis, keepdims=True))
    total = jnp.sum(masked(jnp.exp(masked(x - peak, where)), where), axis=axis)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + jnp.squeeze(peak, axis), lowest)
