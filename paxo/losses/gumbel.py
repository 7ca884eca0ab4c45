r"""Ranking losses averaged over random perturbations of the scores.

>>> policy, reference, grades = jnp.array([-4.0, -6.0]), jnp.full(2, -5.0), jnp.array([1.0, 0.0])
>>> quiet = {"beta": 0.5, "noise": 1e-6, "key": jax.random.key(0)}
>>> round(float(gumbel_loss(policy, reference, grades, **quiet).value), 4)  # dpo's
0.3133
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.losses.contract import Positive, whole_batch
from paxo.losses.learning_to_rank import approx_ndcg_loss, neural_ndcg_loss
from paxo.losses.lipo import lipo_loss
from paxo.losses.pairwise import log_ratios
from paxo.numerics import Array, Mean

GumbelRanking = Literal[
    "list_mle", "softmax", "pair_logistic", "pair_hinge", "approx_ndcg", "neural_ndcg"
]
SAMPLES = 8


# Marked because of the draw, which depends on the place in the batch.
@whole_batch
def gumbel_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    ranking_loss: GumbelRanking = "list_mle",
    beta: Positive = 0.05,
    noise: Positive = 1.0,
    key: Array,
    where: Array | None = None,
) -> Mean:
    r"""A ranking loss at 8 copies of the scores with Gumbel noise: $s_i + \gamma g_i$.

    A stochastic smoothing: lists whose order is nearly tied are seen in several orders.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades in [0, 1].
        ranking_loss: of `lipo_loss`, or "approx_ndcg" or "neural_ndcg".
        beta: scale of the implicit reward, > 0.
        noise: gamma, scale of the noise beside the implicit rewards, > 0.
        key: random key of the noise.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of scalars over the lists that have a term, each counted 8 times.

    >>> lists = jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.tile(jnp.array([1.0, 0.5, 0.0]), (4, 1))
    >>> float(gumbel_loss(*lists, key=jax.random.key(1)).count)
    32.0

    rax `gumbel_t12n`, https://github.com/google/rax, with its 8 samples. LiPO did not examine it.
    """
    ratios = log_ratios(policy_logps, reference_logps, where)
    drawn = jax.random.gumbel(key, (SAMPLES, *ratios.shape), ratios.dtype)
    noisy = ratios + noise / beta * drawn
    copies = lambda x: None if x is None else jnp.broadcast_to(x, noisy.shape)  # noqa: E731
    arrays = (noisy, jnp.zeros_like(noisy), copies(labels))
    settings = {"beta": beta, "where": copies(where)}
    if ranking_loss == "approx_ndcg":
        return approx_ndcg_loss(*arrays, **settings)
    if ranking_loss == "neural_ndcg":
        return neural_ndcg_loss(*arrays, **settings)
    return lipo_loss(*arrays, ranking_loss=ranking_loss, **settings)
