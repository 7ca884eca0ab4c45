"""Made pairs in float64, and what the tests of pairwise losses do with them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

# Chosen and rejected log-probs under policy and reference, and their lengths.
POLICY = np.array([[-4.0, -6.5], [-9.0, -2.0], [-3.0, -3.5], [-12.5, -14.0]])
REFERENCE = np.array([[-5.0, -5.0], [-7.5, -2.25], [-1.0, -4.0], [-12.0, -11.0]])
LENGTHS = np.array([[4.0, 5.0], [3.0, 8.0], [2.0, 1.0], [7.0, 7.0]])
RATIOS = POLICY - REFERENCE
MARGINS = RATIOS[:, 0] - RATIOS[:, 1]


def softplus(x):
    """log(1 + e^x)."""
    return np.logaddexp(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logit(p):
    return math.log(p / (1 - p))


def pair_at(z, beta):
    """Policy and reference `[..., 2]` whose margin is z / beta, with all of it on the chosen."""
    chosen = np.asarray(z, np.float64) / beta
    policy = np.stack([chosen, np.zeros_like(chosen)], -1)
    return policy, np.zeros_like(policy)


def exact(loss, *arrays, **options):
    """The loss in float64."""
    with jax.enable_x64(True):
        result = loss(*_as_float64(arrays), **options)
        return jax.tree.map(np.asarray, result)


def gradient(loss, *arrays, argnum=0, **options):
    """Gradient in float64 of the sum of the losses with respect to one of the arrays."""
    with jax.enable_x64(True):
        total = lambda *a: jnp.sum(loss(*a, **options))  # noqa: E731
        return np.asarray(jax.grad(total, argnums=argnum)(*_as_float64(arrays)))


def check_gradient(loss, policy, *others, **options):
    """The gradient with respect to the first array is that of finite differences in float64."""
    with jax.enable_x64(True):
        policy, *others = _as_float64((policy, *others))
        check_grads(
            lambda p: loss(p, *others, **options), (policy,), 1, ["rev"], rtol=1e-6, atol=1e-7
        )


def close(found, expected, rtol=1e-12, atol=1e-14):
    """Equality up to float64's last digits."""
    np.testing.assert_allclose(found, expected, rtol, atol)


def _as_float64(arrays):
    # Plain JAX arrays: a numpy float64 would be cut to float32 where it meets one.
    return [jnp.asarray(a) for a in arrays]
