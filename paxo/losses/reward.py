r"""Losses of reward and preference models: what a head says of the candidates.

`scores [..., K]` come from a head on each completion's last token, `embeddings [..., K, 2n]` from
the head of a general preference model. Pairs hold the chosen candidate first.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import FlipRate, NonNegative, Positive
from paxo.losses.pairwise import margin
from paxo.losses.ranking import Ties, list_inputs, plackett_luce_nll
from paxo.numerics import Array, at_least_float32, logsumexp, masked, masked_rows, valid_rows

Link = Literal["logistic", "regression"]


def bradley_terry_loss(
    scores: Array,
    margins: Array | None = None,
    preference_probabilities: Array | None = None,
    *,
    label_smoothing: FlipRate = 0.0,
    temperature: Positive = 1.0,
    centering: NonNegative = 0.0,
    link: Link = "logistic",
    where: Array | None = None,
) -> Array:
    r"""Bradley–Terry reward model: $-\log\sigma((r_w - r_l - m) / \tau)$.

    With a soft label p the loss is $-p\log\sigma(d) - (1 - p)\log\sigma(-d)$, d being the argument
    above; label smoothing $\epsilon$ moves p to $p(1 - \epsilon) + (1 - p)\epsilon$. Centering adds
    $c (r_w + r_l)^2$, against scores that drift. "regression" is $\frac{1}{2}((r_w - r_l)/\tau -
    t)^2$ with the target t 10, or $5\sigma(m)$ with margins.

    Args:
        scores: `[..., 2]` rewards, chosen first.
        margins: `[...]` m, how much better the chosen one is: annotated strength, or the mean
            difference of an ensemble (`preference_strength`). No gradient is taken.
        preference_probabilities: `[...]` p, that the chosen one is better; 1 if left out.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); "logistic" only, as p.
        temperature: tau; the code of general preference models uses 0.1.
        centering: c; 0.01 is usual (from memory).
        link: "logistic" or "regression".
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where the scores are equal and there is no margin.

    >>> bradley_terry_loss(jnp.array([2.0, 1.0]), jnp.array(1.0))
    Array(0.6931472, dtype=float32)

    Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; margins: Llama 2, arXiv:2307.09288, and inside the
    sigmoid where arXiv:2401.06080, Eq. 6, prints them outside, a misprint: they would have no
    gradient. TRL's reward trainer and OpenRLHF compute the same (OpenRLHF's `LogExpLoss` overflows
    and ignores margins; MOSS's log(sigmoid + 1e-5) learns nothing from pairs that are far wrong).
    """
    _check_pairs(scores, where)
    scores = masked(at_least_float32(scores), where)
    gaps = margin(scores)
    if margins is not None:
        margins = _of_groups(margins, where)
    drift = centering * jnp.square(scores[..., 0] + scores[..., 1])
    if link == "regression":
        return masked_rows(_regression(gaps / temperature, margins) + drift, where)
    z = (gaps if margins is None else gaps - margins) / temperature
    flipped = label_smoothing
    if preference_probabilities is not None:
        p = _of_groups(preference_probabilities, where)
        flipped = p * label_smoothing + (1 - p) * (1 - label_smoothing)
    return masked_rows(jax.nn.softplus(-z) + flipped * z + drift, where)


def plackett_luce_reward_loss(
    scores: Array,
    labels: Array,
    *,
    ties: Ties = "skip",
    key: Array | None = None,
    where: Array | None = None,
) -> Array:
    r"""Plackett–Luce reward model: $\sum_r \log\sum_{q \ge r} e^{r_q} - r_r$ in order of grade.

    Args:
        scores: `[..., K]` rewards.
        labels: `[..., K]` grades; only their order counts.
        ties: "skip", "random" or "order", as in `plackett_luce_loss`.
        key: random key, for `ties="random"` alone.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; Bradley–Terry's for K = 2.

    >>> plackett_luce_reward_loss(jnp.array([0.0, 1.0]), jnp.array([1.0, 2.0]))
    Array(0.3132617, dtype=float32)

    Rafailov et al. 2023, arXiv:2305.18290, Appendix (from memory), on rewards.
    TRL, EasyDeL and HALOs do not have it.
    """
    where, labels, scores = list_inputs(where, labels, scores)
    return plackett_luce_nll(scores, labels, where, ties, key)


def general_preference_loss(
    embeddings: Array,
    margins: Array | None = None,
    scales: Array | None = None,
    *,
    temperature: Positive = 0.1,
    link: Link = "logistic",
    where: Array | None = None,
) -> Array:
    r"""General preference model: $-\log\sigma((\langle R v_w, v_l\rangle - m)/\tau)$, R a rotation.

    The score of a pair is skew-symmetric in the two embeddings, so that preferences may run in
    circles, which no reward can express. Blocks of two coordinates may be scaled by the prompt.

    Args:
        embeddings: `[..., 2, 2n]` chosen first.
        margins: `[...]` m; no gradient is taken.
        scales: `[..., n]` weight of each block, at least 0; 1 if left out.
        temperature: tau; 1 in the authors' class for n = 1, 0.1 in all their scripts.
        link: "logistic", or "regression" as in `bradley_terry_loss`.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 for equal embeddings.

    >>> general_preference_loss(jnp.array([[1.0, 0.0], [0.0, 1.0]]), temperature=1.0)
    Array(0.3132617, dtype=float32)

    Zhang et al. 2024, arXiv:2410.02197, and the authors' code, whose embeddings are not normalised
    either; there "regression" with margins beyond two dimensions is ((score - m) / tau)^2 / 2.
    """
    if where is None:
        where = jnp.ones(embeddings.shape[:-1], bool)
    chex.assert_axis_dimension(embeddings, -2, 2)
    chex.assert_shape(where, embeddings.shape[:-1])
    embeddings = masked(at_least_float32(embeddings), where[..., None])
    if scales is not None:
        scales = masked(at_least_float32(scales), valid_rows(where)[..., None])
    found = general_preference_scores(embeddings, scales)[..., 0, 1]
    margins = None if margins is None else _of_groups(margins, where)
    if link == "regression":
        return masked_rows(_regression(found / temperature, margins), where)
    z = (found if margins is None else found - margins) / temperature
    return masked_rows(jax.nn.softplus(-z), where)


def general_preference_scores(embeddings: Array, scales: Array | None = None) -> Array:
    r"""`[..., K, 2n] -> [..., K, K]` skew-symmetric scores $\langle R v_i, v_j \rangle$.

    `sigmoid(score / temperature)` is the probability that i beats j: K forward passes for K^2
    comparisons.

    Args:
        embeddings: `[..., K, 2n]`.
        scales: `[..., n]` optional weight of each block of two coordinates.

    >>> turned = jnp.array([0.0, 2.0, 4.0]) * jnp.pi / 3  # three at 120 degrees: a circle
    >>> vectors = jnp.stack([jnp.cos(turned), jnp.sin(turned)], -1)
    >>> general_preference_scores(vectors)[0].round(3) + 0.0
    Array([ 0.   ,  0.866, -0.866], dtype=float32)

    Zhang et al. 2024, arXiv:2410.02197.
    """
    even, odd = embeddings[..., 0::2], embeddings[..., 1::2]
    scaled = (even, odd)
    if scales is not None:
        scaled = (even * scales[..., None, :], odd * scales[..., None, :])
    first = jnp.einsum("...in,...jn->...ij", scaled[0], odd)
    return first - jnp.einsum("...in,...jn->...ij", scaled[1], even)


def pair_preference_loss(
    scores: Array,
    labels: Array,
    *,
    ties: Literal["soft", "ignore"] = "soft",
    where: Array | None = None,
) -> Array:
    r"""Pairwise preference model: cross-entropy of its two verdicts, $-\sum_k p_k\log q_k$.

    The model reads both responses at once; `scores` are its logits of "the first is better" and
    "the second is better" (two answer tokens, or PairRM's two heads), q their softmax. Each pair
    should be seen in both orders; `order_corrected` averages them.

    Args:
        scores: `[..., 2]` logits of the two verdicts.
        labels: `[..., 2]` grades of the two responses in the order shown; p is (1, 0), (0, 1), or
            one half each at a tie.
        ties: "soft" pulls the logits of a tie together; "ignore" gives it the constant log 2
            without gradient, as PairRM does.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where the logits are equal.

    >>> pair_preference_loss(jnp.array([0.0, 1.0]), jnp.array([2.0, 5.0]))
    Array(0.3132617, dtype=float32)

    Dong et al. 2024, arXiv:2405.07863 (RLHFlow); PairRM: Jiang et al. 2023, arXiv:2306.02561.
    TRL, EasyDeL and HALOs do not have it.
    """
    _check_pairs(scores, where)
    chex.assert_equal_shape([scores, labels])
    z = margin(masked(at_least_float32(scores), where))
    sign = jnp.sign(margin(masked(at_least_float32(labels), where)))
    if ties == "ignore":
        return masked_rows(jax.nn.softplus(-sign * z), where)
    return masked_rows(jax.nn.softplus(-z) + (1 - sign) / 2 * z, where)


def order_corrected(first_shown: Array, second_shown: Array) -> Array:
    """P(a beats b) from both orders: the mean of P_ab and 1 - P_ba.

    Args:
        first_shown: `[...]` P_ab, that a is better where a is shown first.
        second_shown: `[...]` P_ba, that b is better where b is shown first.

    >>> order_corrected(jnp.array([0.9]), jnp.array([0.5]))  # inconsistent by |0.9 + 0.5 - 1|
    Array([0.7], dtype=float32)
    """
    return (first_shown + 1 - second_shown) / 2


def contrastive_reward_loss(
    features: Array, other_features: Array, *, temperature: Positive = 0.05
) -> Array:
    r"""SimCSE term of a reward model: each feature must find its other view among the batch's.

    $-\log(e^{\cos(h_s, h_s^+)/t} / \sum_j e^{\cos(h_s, h_j^+)/t})$; two dropout masks give two
    views. Experimental: the paper's weight and temperature were not found; 0.05 is SimCSE's own,
    from memory.

    Args:
        features: `[N, D]` of N sequences (or differences of chosen and rejected).
        other_features: `[N, D]` their other views.
        temperature: t.

    Returns:
        `[N]` nats.

    >>> contrastive_reward_loss(jnp.eye(2), jnp.eye(2), temperature=1.0)
    Array([0.3132617, 0.3132617], dtype=float32)

    Wang et al. 2024, arXiv:2401.06080, Eq. 9.
    """
    chex.assert_equal_shape([features, other_features])
    logits = _unit(features) @ _unit(other_features).T / temperature
    return logsumexp(logits) - jnp.diagonal(logits)


def _unit(x: Array) -> Array:
    x = at_least_float32(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def _regression(z: Array, margins: Array | None) -> Array:
    target = 10 if margins is None else 5 * jax.nn.sigmoid(margins)
    return jnp.square(z - target) / 2


def _of_groups(x: Array, where: Array | None) -> Array:
    """A given number per group `[...]`: at least float32, no gradient, 0 where masked."""
    return jax.lax.stop_gradient(masked_rows(at_least_float32(x), where))


def _check_pairs(scores: Array, where: Array | None) -> None:
    chex.assert_axis_dimension(scores, -1, 2)
    if where is not None:
        chex.assert_equal_shape([scores, where])
