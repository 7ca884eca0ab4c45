r"""What is known exactly about a game: values, best responses, distances to the Nash policy.

The game is symmetric and $V(\pi,\pi) = 1/2$, so that the duality gap of a policy is twice what a
best response to it wins beyond 1/2. All functions take logits `[..., N]` and are differentiable
and traceable.

>>> import paxo.games.builders as builders
>>> game = builders.rock_paper_scissors(beta=0.1)
>>> nash = nash_policy(game)
>>> [round(float(p), 3) for p in jnp.exp(nash)]
[0.333, 0.333, 0.333]
>>> float(duality_gap(game, nash)) < 1e-9
True
"""

import jax
import jax.numpy as jnp

from paxo.games.preference_game import PreferenceGame
from paxo.numerics import Array

NEWTON_STEPS = 12  # at each KL weight of the path to the Nash policy
PATH_RATIO = 0.7  # between two KL weights of that path
PATH_START = 4.0  # a KL weight at which the reference itself is near enough


@jax.jit
def kl_divergence(first: Array, second: Array) -> Array:
    """`[...]` KL(first|second) in nats of logits `[..., N]`.

    Exact in relative terms even where the policies nearly agree: the terms p(e^d - 1 - d), d the
    log-ratio, are all positive, and their sum is the KL because both policies sum to 1.

    >>> float(kl_divergence(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1])))) > 0.5
    True
    """
    log_p, log_q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    p, d = jnp.exp(log_p), log_q - log_p
    some = jnp.isfinite(log_p)  # an action without probability adds q alone
    d = jnp.where(some, d, 0)
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    terms = jnp.where(near & some, p * (jnp.expm1(small) - small), jnp.exp(log_q) - p - p * d)
    return jnp.sum(terms, -1)


@jax.jit
def payoff(game: PreferenceGame, first: Array, second: Array) -> Array:
    r"""`[...]` V(first, second): the first one's win rate, with both KL terms.

    >>> from paxo.games.builders import bradley_terry
    >>> game = bradley_terry(jnp.array([1.0, 0.0]), beta=0.0)
    >>> round(float(payoff(game, jnp.array([40.0, 0.0]), jnp.array([0.0, 40.0]))), 4)
    0.7311
    """
    first, second = game.checked("first", first), game.checked("second", second)
    wins = jnp.sum(jax.nn.softmax(first) * game.win_rates(second), -1)
    to_reference = lambda x: kl_divergence(x, game.reference_logps)  # noqa: E731
    return wins - game.beta * (to_reference(first) - to_reference(second))


@jax.jit
def best_response(game: PreferenceGame, opponent: Array) -> Array:
    r"""`[..., N]` log-probs of the policy that maximises V(., opponent).

    $\pi \propto \mathrm{ref}\,e^{w/\beta}$ with the win rates $w$ against the opponent; for beta =
    0 all on the first action with the highest win rate.
    """
    rates = game.win_rates(opponent)
    soft = jax.nn.log_softmax(game.reference_logps + rates / jnp.where(game.beta > 0, game.beta, 1))
    best = jnp.argmax(rates, -1, keepdims=True) == jnp.arange(game.num_actions)
    return jnp.where(game.beta > 0, soft, jnp.where(best, 0.0, -jnp.inf))


@jax.jit
def duality_gap(game: PreferenceGame, logits: Array) -> Array:
    r"""`[...]` max V(., policy) - min V(policy, .), in win probability; 0 at the Nash policy only.

    Twice $\beta\,KL(\pi|\pi_{br})$, $\pi_{br}$ the best response to the policy, which keeps all
    digits where the gap is small; without regularisation twice the best win rate beyond 1/2. Games
    broadcast against leading axes of `logits`: a trajectory `[M, ..., N]` has gaps `[M, ...]`.

    Zhou et al. 2025, arXiv:2503.08942, and Munos et al. 2023, arXiv:2312.00886.
    """
    logits = game.checked("logits", logits)
    rates = game.win_rates(logits)
    beta = jnp.where(game.beta > 0, game.beta, 1)
    regularised = beta * kl_divergence(logits, game.reference_logps + rates / beta)
    return 2 * jnp.where(game.beta > 0, regularised, jnp.max(rates, -1) - 0.5)


@jax.jit
def unregularised_gap(game: PreferenceGame, logits: Array) -> Array:
    """`[...]` the duality gap of the same preferences without a KL term."""
    return 2 * (jnp.max(game.win_rates(game.checked("logits", logits)), -1) - 0.5)


@jax.jit
def mirror_step(
    game: PreferenceGame,
    logits: Array,
    *,
    eta: float | Array,
    opponent: Array | None = None,
) -> Array:
    r"""`[..., N]` log-probs after a step of mirror descent on V(., opponent).

    $\pi^{+} \propto \pi^{1-\eta\beta}\,\mathrm{ref}^{\eta\beta}\,e^{\eta w}$: gradient descent on
    `online_ipo_v1` over uniform pairs at rate $\eta\beta N/4$, or the minimiser of `inpo` with
    its letter eta equal to $1/\eta$. For beta = 0 it is the multiplicative-weights update.

    Args:
        game: one or several.
        logits: `[..., N]` of the policy.
        eta: step on win rates, in nats per win; 1/beta goes all the way to the best response.
        opponent: `[..., N]` logits; the policy itself where None.
    """
    logits = game.checked("logits", logits)
    rates = game.win_rates(logits if opponent is None else opponent)
    pull = eta * game.beta
    logps = jax.nn.log_softmax(logits)
    return jax.nn.log_softmax((1 - pull) * logps + pull * game.reference_logps + eta * rates)


@jax.jit
def mixture(first: Array, second: Array, weight: float | Array) -> Array:
    """`[..., N]` log-probs of first^(1 - weight) second^weight, normalised: Nash-MD's opponent."""
    first, second = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jax.nn.log_softmax((1 - weight) * first + weight * second)


def nash_policy(game: PreferenceGame) -> Array:
    r"""`[..., N]` log-probs of the regularised Nash policy, to the last digits of the dtype.

    Newton's method on $\theta = \theta_{ref} + P\pi_\theta/\beta$ up to a constant, along a path of
    KL weights from where the solution is near the reference down to the game's. Its Jacobian,
    $1 - PJ/\beta$ with $J = \mathrm{diag}\,\pi - \pi\pi^T$, is never singular: the preferences'
    part is antisymmetric.

    Raises:
        ValueError: for beta = 0, where there may be many.
    """
    if not isinstance(game.beta, jax.core.Tracer) and not game.beta > 0:
        raise ValueError(
            "nash_policy needs beta > 0; got 0. Take a small beta, or the average of "
            "multiplicative weights, whose unregularised gap goes to 0."
        )
    return _nash_policy(game)


@jax.jit
def _nash_policy(game: PreferenceGame) -> Array:
    beta = game.beta
    stages = jnp.ceil(jnp.log(jnp.maximum(PATH_START / beta, 1)) / -jnp.log(PATH_RATIO))
    stages = stages.astype(jnp.int32)

    def stage(i, logits):
        at = beta * jnp.asarray(PATH_RATIO, beta.dtype) ** (i - stages)

        def step(_, logits):
            return _newton_step(game, at, logits)

        return jax.lax.fori_loop(0, NEWTON_STEPS, step, logits)

    logits = jax.lax.fori_loop(0, stages + 1, stage, _centred(game.reference_logps))
    return jax.nn.log_softmax(logits)


def _newton_step(game: PreferenceGame, beta: Array, logits: Array) -> Array:
    """The best of a full and shorter Newton steps towards the fixed point at this KL weight."""
    residual = _residual(game, beta, logits)
    eye = jnp.eye(game.num_actions, dtype=logits.dtype)
    tilt = _centred(game.preferences @ _covariance(logits), axis=-2) / beta
    step = jnp.linalg.solve(eye - tilt, residual[..., None])[..., 0]
    sizes = jnp.array([1.0, 0.5, 0.2, 0.05, 0.01, 0.0], logits.dtype)
    tried = logits - sizes.reshape(-1, *(1,) * logits.ndim) * step
    errors = jnp.max(jnp.abs(_residual(game, beta, tried)), -1)
    best = jnp.argmin(errors, 0)[None, ..., None]
    return jnp.take_along_axis(tried, best, 0)[0]


def _residual(game: PreferenceGame, beta: Array, logits: Array) -> Array:
    return _centred(logits - game.reference_logps - game.win_rates(logits) / beta)


def _centred(x: Array, axis: int = -1) -> Array:
    return x - jnp.mean(x, axis, keepdims=True)


def _covariance(logits: Array) -> Array:
    """`[..., N, N]` diag p - p p^T, the Jacobian of the softmax."""
    p = jax.nn.softmax(logits)
    return p[..., None] * jnp.eye(p.shape[-1], dtype=p.dtype) - p[..., :, None] * p[..., None, :]


@jax.jit
def rotation_rate(game: PreferenceGame, logits: Array) -> Array:
    r"""`[...]` $\omega$: how fast play near the policy turns instead of approaching.

    The spectral radius of $(P - 1/2)(\mathrm{diag}\,\pi - \pi\pi^T)$, whose eigenvalues are
    $\pm i\omega$ and 0. At most 1/2; 0 for preferences that one reward explains there to first
    order.
    """
    root = jnp.sqrt(jax.nn.softmax(game.checked("logits", logits)))
    skew = root[..., :, None] * (game.preferences - 0.5) * root[..., None, :]
    # S = diag(root) (1 - root root^T) has S S^T = diag p - p p^T: S^T (P - 1/2) S has the same
    # eigenvalues and is antisymmetric, so that its largest singular value is their radius.
    eye = jnp.eye(root.shape[-1], dtype=root.dtype)
    project = eye - root[..., :, None] * root[..., None, :]
    return jnp.linalg.norm(project @ skew @ project, ord=2, axis=(-2, -1))


def stability_limit(game: PreferenceGame, nash: Array | None = None) -> Array:
    r"""`[...]` step of plain mirror descent beyond which it leaves the Nash policy: cycles.

    $2\beta/(\beta^2+\omega^2)$. It holds for `online_ipo_v1` and for INPO, whose step is 1/eta;
    EGPO goes on converging well beyond.

    Args:
        game: one or several, beta > 0.
        nash: `[..., N]` its Nash policy, where it is at hand.

    >>> from paxo.games.builders import rock_paper_scissors
    >>> round(float(stability_limit(rock_paper_scissors(beta=0.1))), 2)   # omega = cot(30°) / 6
    2.14
    """
    omega = rotation_rate(game, nash_policy(game) if nash is None else nash)
    return 2 * game.beta / (game.beta**2 + omega**2)


def egpo_step_size(beta: float | Array) -> float | Array:
    """The largest step for which EGPO's linear rate is proved, 1 / (beta + 3)."""
    return 1 / (beta + 3)


def egpo_bound(first_kl: Array, iteration: Array, *, eta: float, beta: float) -> Array:
    r"""Bound on KL(nash|policy) of EGPO after t iterations: $(1-\eta\beta)^t$ times the first.

    The true rate is its square. Zhou et al. 2025, arXiv:2503.08942, for eta of `egpo_step_size`
    (constants from a secondary source; they hold on every game that the tests try).
    """
    return first_kl * (1 - eta * beta) ** iteration


def decaying_step_bound(iteration: Array, *, beta: float) -> Array:
    r"""Bound on KL(nash|policy) with steps $\eta_t = 2/(\beta(t+2))$: $8/(\beta^2(t+1))$.

    For Nash-MD, Munos et al. 2023, arXiv:2312.00886, and INPO up to a constant.
    """
    return 8 / (beta**2 * (jnp.asarray(iteration) + 1))
