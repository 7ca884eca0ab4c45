r"""Losses of self-play in rounds: the completions come from a frozen snapshot, `previous`.

In a round the snapshot $\pi_t$ answers, a judge compares the answers, and the loss is minimised;
its minimiser is the next snapshot. Written with $g = \log\pi - \log\pi_t$ and the win rates
$w(y) = E_{y'\sim\pi_t} P(y\succ y')$, every one of them fits a step of mirror descent
$\pi_{t+1} \propto \pi_t e^{\eta w}$ (INPO's towards a reference as well).

The papers' letters differ: the step on win rates is $\eta$ for ONPO and SPPO, $1/\eta$ for INPO and
DNO, $1/\beta$ for GPO (there on scores instead of win rates).

>>> previous = jnp.array([-2.0, -2.0])
>>> win_rates = jnp.array([0.75, 0.25])
>>> fitted = previous + 4.0 * (win_rates - 0.5)
>>> float(sppo_loss(fitted, previous, win_rates, eta=4.0))
0.0
"""

from typing import Literal

import jax
import jax.numpy as jnp

from paxo.lazy import chex
from paxo.losses.contract import NonNegative, Positive
from paxo.losses.given import candidate_mean, check_lists, check_pairs, given, ratios_to
from paxo.losses.pairwise import dpo_loss, margin
from paxo.numerics import Array, masked, masked_rows, safe_divide


def inpo_loss(
    policy_logps: Array,
    reference_logps: Array,
    previous_logps: Array,
    win_rates: Array | None = None,
    *,
    eta: Positive = 0.005,
    tau: NonNegative = 0.005 / 3,
    target: Literal["label", "win_rate"] = "label",
    where: Array | None = None,
) -> Array:
    r"""INPO, one round of iterative Nash policy optimisation: $(h_t - 1/(2\eta))^2$.

    $h_t = (s_w-s_l) - \frac\tau\eta(q_w-q_l) - (1-\frac\tau\eta)(u_w-u_l)$ with policy $s$,
    reference $q$ and snapshot $u$. Over pairs of the snapshot's own answers, each labelled as the
    judge says, the minimiser is $q^{\tau/\eta}\pi_t^{1-\tau/\eta}\exp(w/\eta)$, normalised: the
    step of `online_ipo_v1` of length $1/\eta$. tau = eta is IPO against the reference, tau = 0
    plain mirror descent. tau = eta/3 can cycle where tau is small (below about 0.14 at worst).

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, winner first.
        reference_logps: `[..., 2]` the same under the reference policy.
        previous_logps: `[..., 2]` the same under the snapshot that answered.
        win_rates: `[..., 2]` in [0, 1] against the snapshot; for `target="win_rate"` only.
        eta: KL weight to the snapshot, the inverse of the step, > 0; at least `tau`.
        tau: KL weight of the game, >= 0; the paper sets eta/3.
        target: "label" regresses on $1/(2\eta)$, "win_rate" on $(w(y) - w(y'))/\eta$, which needs
            no winner and has less noise; in the mean they differ by a constant.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> s, q, u = jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([-5.0, -6.0])
    >>> inpo_loss(s, q, u, eta=0.5, tau=0.25)           # h = 2 - 0 - 1/2
    Array(0.25, dtype=float32)

    Zhang et al. 2024, arXiv:2407.00617. COMAL's `nash_loss` equals it (Liu et al. 2024,
    arXiv:2410.23223, with a moving reference); TRL, EasyDeL and HALOs have none.
    """
    check_pairs(policy_logps, reference_logps, previous_logps, where)
    to_reference = ratios_to(policy_logps, reference_logps, where)
    to_previous = ratios_to(policy_logps, previous_logps, where)
    # The two log-ratios and not the three sums: those would cancel the digits of long completions.
    mixed = tau / eta * to_reference + (1 - tau / eta) * to_previous
    goal = 1 / (2 * eta)
    if target == "win_rate":
        if win_rates is None:
            raise ValueError('inpo: target="win_rate" needs the extra `win_rates [..., 2]`')
        goal = margin(given(win_rates, where)) / eta
    return masked_rows(jnp.square(margin(mixed) - goal), where)


def onpo_loss(
    policy_logps: Array,
    previous_logps: Array,
    *,
    eta: Positive = 0.125,
    where: Array | None = None,
) -> Array:
    r"""ONPO, optimistic online mirror descent: $(g_w - g_l - \eta/2)^2$ from an anchor.

    A round fits twice on the pairs of $\pi_t$: the next anchor $\pi'_{t+1}$ from $\pi'_t$, and
    $\pi_{t+1}$ from $\pi'_{t+1}$. Together: $\pi_{t+1} \propto \pi_t e^{\eta(2w_t - w_{t-1})}$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, winner first.
        previous_logps: `[..., 2]` the same under the anchor $\pi'$ (not the policy that answered).
        eta: step on win rates, > 0; the theory wants at most 1/8 for its last iterate.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared. 0 where either candidate is masked.

    >>> onpo_loss(jnp.array([-4.0, -6.0]), jnp.array([-5.0, -6.0]), eta=2.0)
    Array(0., dtype=float32)

    Zhang et al. 2025, arXiv:2502.16852. No code was published and no library has it.
    """
    check_pairs(policy_logps, previous_logps, where)
    ratios = ratios_to(policy_logps, previous_logps, where)
    return masked_rows(jnp.square(margin(ratios) - eta / 2), where)


def sppo_loss(
    policy_logps: Array,
    previous_logps: Array,
    win_rates: Array,
    *,
    eta: Positive = 1e3,
    where: Array | None = None,
) -> Array:
    r"""SPPO: each log-ratio to its win rate, mean of $(g(y) - \eta(w(y) - 1/2))^2$.

    Unlike a loss of margins it also says where the chosen one's log-prob should be. $\eta/2$ stands
    for the logarithm of the normaliser: near the truth for a small $\eta$ only, so that at the
    paper's 1e3 the minimiser is not the exact step.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        previous_logps: `[..., K]` the same under the snapshot that answered.
        win_rates: `[..., K]` in [0, 1] against the snapshot's answers. The authors compare K = 5 of
            them, an answer with itself included as 1/2, and train on the best and the worst; `(p,
            1 - p)` of the pair itself is their `sppo_single`.
        eta: step on win rates, > 0; the authors' code has beta = 1/eta.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared, mean over the candidates; 0 without any.

    >>> sppo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([1., 0.]), eta=4.0)
    Array(1., dtype=float32)

    Wu et al. 2024, arXiv:2405.00675; for K = 2 the authors' code, 1/2 of the sum. TRL's
    `sppo_hard` is twice this at win rates (1, 0).
    """
    check_lists(policy_logps, previous_logps, win_rates, where)
    return _squares(policy_logps, previous_logps, eta * (given(win_rates, where) - 0.5), where)


def gpo_loss(
    policy_logps: Array,
    previous_logps: Array,
    preference_scores: Array,
    *,
    beta: Positive = 0.001,
    where: Array | None = None,
) -> Array:
    r"""GPO: `sppo` on the scores of a general preference model, mean of $(g(y)-\bar s(y)/\beta)^2$.

    $\bar s(y)$ is the mean of the antisymmetric scores $s(y\succ y_k)$ against the snapshot's
    answers, zero on the whole, so that the log of the normaliser is taken as 0.

    Args:
        policy_logps: `[..., K]` summed completion log-probs in nats.
        previous_logps: `[..., K]` the same under the snapshot that answered.
        preference_scores: `[..., K]` mean score against the snapshot's answers, in logits.
        beta: the inverse of the step, > 0 (`b` of the authors' scripts).
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats squared, mean over the candidates; 0 without any.

    >>> gpo_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), jnp.array([0.5, -0.5]), beta=0.5)
    Array(0., dtype=float32)

    Zhang et al. 2024, arXiv:2410.02197. The authors' trainer file is not public; their tables
    double the score. TRL, EasyDeL and HALOs do not have it.
    """
    check_lists(policy_logps, previous_logps, preference_scores, where)
    return _squares(policy_logps, previous_logps, given(preference_scores, where) / beta, where)


def dno_loss(
    policy_logps: Array,
    previous_logps: Array,
    win_rates: Array,
    *,
    eta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""DNO: cross-entropy of $\sigma(\eta(g(y)-g(y')))$ against $\sigma(w(y)-w(y'))$.

    The minimiser is $\pi_t e^{w/\eta}$, normalised, whatever distribution the pairs come from; it
    beats the snapshot with probability at least $1/2 + \eta\,KL(\pi_{t+1}|\pi_t)$.

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats.
        previous_logps: `[..., 2]` the same under the snapshot.
        win_rates: `[..., 2]` in [0, 1] against the snapshot; any reward is regressed alike.
        eta: KL weight to the snapshot, the inverse of the step, > 0.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats, at least the target's entropy; 0 where either candidate is masked.

    >>> dno_loss(jnp.array([-4., -4.]), jnp.array([-5., -5.]), jnp.array([0.5, 0.5]))
    Array(0.6931472, dtype=float32)

    Rosset et al. 2024, arXiv:2404.03715, the theoretical form; its default eta is `dno_prct`'s.
    No code was published and no library has it.
    """
    check_pairs(policy_logps, previous_logps, win_rates, where)
    x = eta * margin(ratios_to(policy_logps, previous_logps, where))
    p = jax.nn.sigmoid(margin(given(win_rates, where)))
    return masked_rows(p * jax.nn.softplus(-x) + (1 - p) * jax.nn.softplus(x), where)


def dno_prct_loss(
    policy_logps: Array,
    previous_logps: Array,
    *,
    eta: Positive = 0.1,
    where: Array | None = None,
) -> Array:
    r"""Practical DNO: DPO against the snapshot, $-\log\sigma(\eta(g_w - g_l))$.

    The pairs make the method: five answers of the snapshot and one of a teacher, scored 0 to 6; a
    winner has 5 or more, a loser is 2 points behind it (1, if the winner is the snapshot's own).

    Args:
        policy_logps: `[..., 2]` summed completion log-probs in nats, winner first.
        previous_logps: `[..., 2]` the same under the snapshot.
        eta: KL weight to the snapshot, > 0; the paper uses 0.1 and 0.05.
        where: `[..., 2]` bool, False on candidates to ignore.

    Returns:
        `[...]` nats; log 2 where policy and snapshot agree, 0 where a candidate is masked.

    >>> dno_prct_loss(jnp.array([-4., -6.]), jnp.array([-5., -5.]), eta=0.5)
    Array(0.3132617, dtype=float32)

    Rosset et al. 2024, arXiv:2404.03715. Equals `dpo` with the snapshot as reference, so also TRL's
    `sigmoid` in an iterative loop.
    """
    return dpo_loss(policy_logps, previous_logps, beta=eta, where=where)


def spo_rewards(preferences: Array, where: Array | None = None) -> Array:
    r"""SPO's rewards, for any policy-gradient loss: $r_i = \frac1{K-1}\sum_{j\ne i} P(i\succ j)$.

    Win rates against the policy's own other answers. They lie in [0, 1] whatever the scale behind
    the preferences, and sum to K/2, so that 1/2 is the natural baseline.

    Args:
        preferences: `[..., K, K]` probability that i beats j; the diagonal is not read.
        where: `[..., K]` bool, False on candidates to ignore.

    Returns:
        `[..., K]` without gradient; 1/2 for a candidate without an opponent, 0 where masked.

    >>> spo_rewards(jnp.array([[0.5, 1.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 0.5]]))
    Array([0.75, 0.25, 0.5 ], dtype=float32)

    Swamy et al. 2024, arXiv:2401.04056 (formula from the abstract and the project page; queue sizes
    are not verified).
    """
    there = jnp.ones(preferences.shape[:-1], bool) if where is None else where
    chex.assert_shape(preferences, (*there.shape, there.shape[-1]))
    others = there[..., None, :] & there[..., :, None] & ~jnp.eye(there.shape[-1], dtype=bool)
    wins, number = jnp.sum(given(preferences, others), -1), jnp.sum(others, -1)
    return masked(jnp.where(number > 0, safe_divide(wins, number), 0.5), there)


def _squares(policy_logps, previous_logps, targets, where):
    """Mean over the candidates of the squared distances of the log-ratios from their targets."""
    ratios = ratios_to(policy_logps, previous_logps, where)
    return candidate_mean(jnp.square(ratios - targets), where)
