"""What online losses share: data that no gradient goes through, and means over candidates.

Frozen policies, judges and samplers give data. In an exact game, and wherever the live policy is
its own opponent, those data are computed from the very parameters that are differentiated; the
methods all mean them as constants.

>>> jax.grad(lambda s: jnp.sum(ratios_to(s, s)))(jnp.array([-1.0, -2.0]))
Array([1., 1.], dtype=float32)
"""

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.pairwise import log_ratios
from paxo.numerics import Array, at_least_float32, masked, safe_divide


def given(x: Array, where: Array | None = None) -> Array:
    """`x` in at least float32, 0 where masked, without gradient."""
    return jax.lax.stop_gradient(masked(at_least_float32(x), where))


def ratios_to(policy_logps: Array, fixed_logps: Array, where: Array | None = None) -> Array:
    """`[..., K]` log-ratios of the policy to a frozen one, 0 where masked."""
    return log_ratios(policy_logps, jax.lax.stop_gradient(fixed_logps), where)


def candidate_mean(x: Array, where: Array | None = None) -> Array:
    """`[..., K] -> [...]` mean over the candidates that are there, 0 without any."""
    there = jnp.ones(x.shape, bool) if where is None else where
    return safe_divide(jnp.sum(masked(x, there), axis=-1), jnp.sum(there, axis=-1))


def centred(x: Array, where: Array | None = None) -> Array:
    """`[..., K]` minus the mean over the candidates that are there; 0 where masked."""
    return masked(x - candidate_mean(x, where)[..., None], where)


def check_lists(*arrays: Array | None) -> None:
    """All those that are there have one shape `[..., K]`."""
    chex.assert_equal_shape([x for x in arrays if x is not None])


def check_pairs(*arrays: Array | None) -> None:
    """All those that are there have one shape `[..., 2]`."""
    check_lists(*arrays)
    chex.assert_axis_dimension(arrays[0], -1, 2)


def tokens_there(token_mask: Array, where: Array | None, *arrays: Array) -> Array:
    """`[..., K, T]` True on the scored tokens of the candidates that are there."""
    chex.assert_equal_shape([token_mask, *arrays])
    if where is None:
        return token_mask.astype(bool)
    chex.assert_shape(where, token_mask.shape[:-1])
    return token_mask.astype(bool) & where[..., None]
