r"""Reward models with a head per attribute: regression on annotated scores, and a learnt mixture.

`attribute_scores [..., K, M]` are the M heads of a completion (helpfulness, verbosity, ...). A
reward is a mixture of them: by a direction that the user chooses (DPA), or by a gate that reads the
prompt (ArmoRM).

>>> gated_scores(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2))
Array([0.5, 1. ], dtype=float32)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import Positive
from paxo.losses.pairwise import margin
from paxo.numerics import Array, Mean, at_least_float32, masked, masked_rows, valid_rows


def attribute_regression_loss(
    attribute_scores: Array, attribute_targets: Array, *, where: Array | None = None
) -> Mean:
    r"""Multi-attribute reward model (experimental): squared error of the heads that are annotated.

    Args:
        attribute_scores: `[..., K, M]` the heads' outputs.
        attribute_targets: `[..., K, M]` annotated scores on one scale (0 to 100 in DPA, so that
            HelpSteer's 0 to 4 and UltraFeedback's 1 to 10 can be mixed); NaN where an attribute was
            not annotated.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` over annotated attributes, in squared units of the targets.

    >>> targets = jnp.array([[80.0, jnp.nan], [20.0, 50.0]])
    >>> loss = attribute_regression_loss(jnp.array([[70.0, 10.0], [20.0, 50.0]]), targets)
    >>> float(loss.total), float(loss.count)
    (100.0, 3.0)

    Wang et al. 2024, arXiv:2402.18571 (DPA; its README and memory: no training code was released).
    """
    chex.assert_equal_shape([attribute_scores, attribute_targets])
    known = ~jnp.isnan(attribute_targets)
    if where is not None:
        chex.assert_shape(where, known.shape[:-1])
        known = known & where[..., None]
    scores = masked(at_least_float32(attribute_scores), known)
    targets = jax.lax.stop_gradient(masked(at_least_float32(attribute_targets), known))
    return Mean.over(jnp.square(scores - targets), known)


def gated_preference_loss(
    attribute_scores: Array,
    gate_logits: Array,
    *,
    temperature: Positive = 10.0,
    where: Array | None = None,
) -> Array:
    r"""Gate of a mixture of heads: $-\log\sigma(g\cdot(r_w - r_l))$, $g$ a softmax of the prompt's.

    Args:
        attribute_scores: `[..., 2, M]` the heads' outputs, chosen first; frozen in ArmoRM, where
            they are ridge regressions on a frozen model's features.
        gate_logits: `[..., M]` of the network that reads the prompt.
        temperature: of the gate's softmax, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where the mixtures are equal, 0 where a candidate is masked.

    >>> gated_preference_loss(jnp.array([[1.0, 3.0], [0.0, 2.0]]), jnp.array([5.0, -7.0]))
    Array(0.3132617, dtype=float32)

    Wang et al. 2024, arXiv:2406.12845 (ArmoRM), and RLHFlow's code.
    """
    chex.assert_axis_dimension(attribute_scores, -2, 2)
    scores, logits = at_least_float32(attribute_scores), at_least_float32(gate_logits)
    if where is not None:
        chex.assert_shape(where, scores.shape[:-1])
        scores = masked(scores, where[..., None])
        logits = masked(logits, valid_rows(where)[..., None])
    mixed = gated_scores(scores, logits, temperature=temperature)
    return masked_rows(jax.nn.softplus(-margin(mixed)), where)


def gated_scores(
    attribute_scores: Array, gate_logits: Array, *, temperature: float = 10.0
) -> Array:
    """`[..., K, M], [..., M] -> [..., K]` rewards mixed by the softmax of the gate's logits."""
    gate = jax.nn.softmax(gate_logits / temperature, axis=-1)
    return jnp.sum(attribute_scores * gate[..., None, :], axis=-1)


def reward_differences(scores: Array, where: Array | None = None) -> Array:
    r"""MetaRM's objective $\frac2{k^2}\sum_{i<j}\sigma(|r_i - r_j|)$: how far rewards lie apart.

    In [(k-1)/(2k), (k-1)/k) for k candidates. MetaRM takes a step that raises it on samples of the
    policy, and then the preference loss's gradient at that point (`meta_gradient`).

    Args:
        scores: `[..., K]` rewards of samples of the policy.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]`; 0 without candidates.

    >>> reward_differences(jnp.zeros(4))
    Array(0.375, dtype=float32)

    Wang et al. 2024, arXiv:2401.06080, Eqs. 11-14; the public repository does not have it.
    """
    there = jnp.ones(scores.shape, bool) if where is None else where
    scores = masked(at_least_float32(scores), there)
    pairs = there[..., :, None] & there[..., None, :] & ~jnp.eye(scores.shape[-1], dtype=bool)
    apart = jax.nn.sigmoid(jnp.abs(scores[..., :, None] - scores[..., None, :]))
    number = jnp.sum(there, axis=-1).astype(scores.dtype)
    # Each pair stands twice in the sum, hence 1 and not 2 over k².
    return jnp.sum(masked(apart, pairs), axis=(-2, -1)) / jnp.maximum(jnp.square(number), 1)


def meta_gradient(
    loss: Callable[[Any], Array], difference: Callable[[Any], Array], params: Any, *, eta: float
) -> Any:
    r"""MetaRM's gradient: $\nabla L(\theta')$ at $\theta' = \theta + \eta\nabla J(\theta)$.

    First order: the step itself is not differentiated. With eta 0 it is the gradient of `loss`.

    Args:
        loss: `params -> scalar`, the reward model's loss on preferences.
        difference: `params -> scalar`, the mean of `reward_differences` on samples of the policy.
        params: pytree.
        eta: step on `difference`; the paper's is not known.

    Returns:
        A pytree like `params`, for any optimiser.

    >>> meta_gradient(lambda x: x**2, lambda x: 3 * x, jnp.array(1.0), eta=0.5)
    Array(5., dtype=float32, weak_type=True)

    Wang et al. 2024, arXiv:2401.06080, Algorithm 1.
    """
    rise = jax.grad(difference)(params)
    return jax.grad(loss)(jax.tree.map(lambda x, g: x + eta * g, params, rise))
