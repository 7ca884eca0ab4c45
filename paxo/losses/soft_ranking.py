r"""Differentiable NDCG by a soft sorting network: DRPO's loss, with and without its moving margins.

An odd–even transposition network of K layers sorts the scores; each comparator swaps by a smooth
amount, so that the network is a doubly stochastic matrix: weight of each candidate at each rank.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from paxo.losses.contract import NonNegative, Positive, Probability, stateful
from paxo.losses.pairwise import log_ratios
from paxo.losses.ranking import gains, list_inputs, ranks
from paxo.numerics import Array, Mean, masked, safe_divide

MAX_RANKS = 64
Discount = Literal["log", "sqrt", "linear", "square", "fourth", "eighth"]
_POWERS = {"sqrt": 0.5, "linear": 1, "square": 2, "fourth": 4, "eighth": 8}


def diff_ndcg_loss(
    policy_logps: Array,
    reference_logps: Array,
    labels: Array,
    *,
    beta: Positive = 0.1,
    steepness: Positive = 10.0,
    discount: Discount = "log",
    where: Array | None = None,
) -> Mean:
    r"""Differentiable NDCG of the implicit rewards: $1 - \sum_r (X^\top G)_r D(r) / \mathrm{IDCG}$.

    X is `soft_permutation` of $s = \beta(\log\pi - \log\pi_{ref})$, $G = 2^\psi - 1$ and $D(r) =
    1/\log_2(1 + r)$. As the steepness grows it becomes 1 - NDCG.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        reference_logps: `[..., K]` the same under the reference policy.
        labels: `[..., K]` grades, at least 0; lower ones are taken as 0.
        beta: scale of the implicit reward, > 0.
        steepness: of the comparators, per nat.
        discount: D(r): "log" as above, or a power of 1/r.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of scalars over the lists with a grade above 0; without unit, in [0, 1].

    >>> policy, reference = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0])
    >>> loss = diff_ndcg_loss(policy, reference, jnp.array([1.0, 0.0]), beta=1.0)
    >>> float(loss.value)  # (1/2 - arctan(20)/pi) (1 - 1/log2(3))
    0.005869

    Zhou et al. 2024, arXiv:2410.18127 (the abstract was read), and the code drpo-align, whose score
    `dpo` it is; the steepness of its recipes is not known.
    """
    where, labels, _ = list_inputs(where, labels, policy_logps)
    scores = beta * log_ratios(policy_logps, reference_logps, where)
    return _one_minus_ndcg(scores, labels, where, steepness, discount)


def _no_averages():
    return {"average": jnp.zeros(MAX_RANKS), "count": jnp.zeros(MAX_RANKS)}


@stateful(_no_averages)
def drpo_rank_loss(
    policy_logps: Array,
    lengths: Array,
    labels: Array,
    *,
    state: dict[str, Array],
    rank_margin: NonNegative = 0.2,
    ada_coef: NonNegative = 1.0,
    decay: Probability = 0.9999,
    bias_correction: bool = False,
    spread_limit: NonNegative = 0.0,
    steepness: Positive = 10.0,
    discount: Discount = "log",
    where: Array | None = None,
) -> tuple[Mean, dict[str, Array]]:
    r"""DRPO: differentiable NDCG of mean log-probs with a margin per rank, fixed and learnt.

    $s_i = \log\pi(y_i)/n_i + c\,\rho_i - a\,e[\rho_i]$ with $\rho_i$ the rank by grade, from 0: a
    worse candidate gets a head start, so that the better one must win by c a rank. $e[\rho]$ is the
    running average of the first two terms at that rank, $e \leftarrow g e + (1 - g) \bar s_\rho$,
    without gradient and used before its update. Experimental: the abstract and the code were read,
    not the paper.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats, over the whole batch.
        lengths: `[..., K]` scored tokens of each completion.
        labels: `[..., K]` grades, at least 0; lower ones are taken as 0.
        state: "average" and "count" `[64]`: e, and the updates that each rank has had.
        rank_margin: c, nats per token and rank.
        ada_coef: a, weight of the averages.
        decay: g, of the averages.
        bias_correction: divide e by 1 - g^count; without, as in the code, the averages are near
            zero for the first thousand steps.
        spread_limit: t above 0 shrinks the margins e of the batch to a standard deviation of at
            most K t / 6 (the code's `adam2`, with 0.1); 0 leaves them as they are.
        steepness: of the comparators.
        discount: as in `diff_ndcg_loss`.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        A `Mean` of scalars over the lists with a grade above 0, and the new state.

    >>> logps, state = jnp.array([[-4.0, -6.0]]), drpo_rank_loss.init_state()
    >>> grades = jnp.array([[1.0, 0.0]])
    >>> loss, state = drpo_rank_loss(logps, jnp.full((1, 2), 4.0), grades, state=state)
    >>> state["count"][:3]
    Array([1., 1., 0.], dtype=float32)

    Zhou et al. 2024, arXiv:2410.18127, and the code drpo-align, whose averages are neither saved
    nor shared by devices.
    """
    where, labels, lengths, logps = list_inputs(where, labels, lengths, policy_logps)
    if labels.shape[-1] > MAX_RANKS:
        raise ValueError(f"drpo_rank takes lists of at most {MAX_RANKS}; got {labels.shape[-1]}")
    place = ranks(labels, where) - 1
    scores = safe_divide(logps, lengths) + rank_margin * place
    margins = state["average"]
    if bias_correction:
        margins = margins / jnp.where(state["count"] > 0, 1 - decay ** state["count"], 1)
    margins = margins[place.astype(jnp.int32)].astype(scores.dtype)
    if spread_limit:
        limit = labels.shape[-1] * spread_limit / 6
        mean = Mean.over(margins, where).value
        spread = jnp.sqrt(Mean.over(jnp.square(margins - mean), where).value)
        margins = margins * jnp.minimum(1, limit / jnp.where(spread > 0, spread, limit))
    loss = _one_minus_ndcg(scores - ada_coef * margins, labels, where, steepness, discount)
    return loss, _updated(state, jax.lax.stop_gradient(scores), place, where, decay)


def soft_permutation(scores: Array, where: Array, steepness: float) -> Array:
    """`[..., K] -> [..., K, K]` weight of candidate i at place r; rows and columns sum to 1.

    Masked candidates take the last places. The comparator of neighbours a, b keeps them in place by
    `1/2 + arctan(steepness * (a - b)) / pi` and swaps them by the rest.

    >>> soft_permutation(jnp.array([0.0, 3.0]), jnp.ones(2, bool), 1e6).round()
    Array([[0., 1.],
           [1., 0.]], dtype=float32)
    """
    size = scores.shape[-1]
    order = jnp.argsort(~where, axis=-1, stable=True)
    there = jnp.take_along_axis(where, order, axis=-1)
    values = jnp.take_along_axis(masked(scores, where), order, axis=-1)
    weights = (jnp.arange(size)[:, None] == order[..., None, :]).astype(scores.dtype)
    for layer in range(size):
        partner, sign = _neighbours(size, layer)
        other = values[..., partner]
        keep = 0.5 + jnp.arctan(steepness * sign * (values - other)) / jnp.pi
        keep = jnp.where((sign != 0) & there & there[..., partner], keep, 1)
        values = keep * values + (1 - keep) * other
        weights = keep[..., None, :] * weights + (1 - keep[..., None, :]) * weights[..., partner]
    return weights


def _neighbours(size: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each place: whom it is compared with, and 1 for the upper, -1 the lower, 0 if alone."""
    place = np.arange(size)
    sign = np.where((place - layer) % 2 == 0, 1, -1)
    sign[(place + sign < 0) | (place + sign >= size)] = 0
    return place + sign, sign


def _one_minus_ndcg(
    scores: Array, labels: Array, where: Array, steepness: float, discount: Discount
) -> Mean:
    worth = masked(gains(jnp.maximum(labels, 0)), where)
    place = jnp.arange(1, scores.shape[-1] + 1).astype(scores.dtype)
    factor = 1 / (jnp.log2(1 + place) if discount == "log" else place ** _POWERS[discount])
    ideal = jnp.sum(-jnp.sort(-worth, axis=-1) * factor, axis=-1)
    some = ideal > 0
    soft = soft_permutation(scores, where, steepness)
    found = jnp.einsum("...ir,...i,r->...", soft, worth, factor)
    return Mean.over(1 - found / jnp.where(some, ideal, 1), some)


def _updated(
    state: dict[str, Array], scores: Array, place: Array, where: Array, decay: float
) -> dict[str, Array]:
    """The averages with this batch's mean score at each rank; a rank without candidates stays."""
    at_rank = (place[..., None] == jnp.arange(MAX_RANKS)) & where[..., None]
    axes = tuple(range(at_rank.ndim - 1))
    number = jnp.sum(at_rank, axis=axes, dtype=scores.dtype)
    mean = safe_divide(jnp.sum(masked(scores[..., None], at_rank), axis=axes), number)
    average = jnp.where(number > 0, decay * state["average"] + (1 - decay) * mean, state["average"])
    count = state["count"] + (number > 0)
    return {"average": average.astype(state["average"].dtype), "count": count.astype(jnp.float32)}
