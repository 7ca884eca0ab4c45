r"""The methods on games: updates for `solve`, made of the losses that train language models.

A *move* changes parameters by one step, given the opponent; a method is a rule for when to move
against whom. Gradient methods:

    online_ipo_v1    a step against the live policy: mirror descent
    online_ipo_v2    a step on pairs of the live policy: the policy-gradient geometry of the same
    nash_md          a step against a mixture of the live policy and the reference
    nash_md_pg       the same by policy gradient
    egpo             the step of online_ipo_v1 twice from the same parameters, the second time
                     against where the first one led

Methods in rounds, each the minimiser of a loss on the snapshot's own pairs: inpo, onpo, sppo, dno,
and iterated DPO or IPO.
Where the minimiser has a closed form, `mirror_descent` and `optimistic_mirror_descent` are it.
`games.rows` makes updates of the rows of `paxo.online` from these.

`eta` is everywhere the step on win rates: a tabular gradient step at rate `eta beta N / 4` is a
mirror step of `eta`. It may be a function of the iteration.

>>> from paxo.games.builders import cyclic
>>> from paxo.games.exact import duality_gap
>>> from paxo.games.solve import solve
>>> game = cyclic(3, beta=0.1, reference_logits=jnp.array([1.0, 0.0, 0.0]))
>>> played = solve(game, egpo(eta=0.3), 300, at=(300,))
>>> bool(duality_gap(game, played.logits[-1]) < 1e-5)
True
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paxo.games import exact
from paxo.games.expected import Loss, expected_loss, sampled_loss
from paxo.games.policies import TABULAR, GamePolicy
from paxo.games.preference_game import PreferenceGame
from paxo.games.solve import Update
from paxo.numerics import Array
from paxo.objectives import LOSSES, Objective
from paxo.types import Params

# (params, game, t, key, opponent's logits) -> params
Move = Callable[[Params, PreferenceGame, Array, Array, Array], Params]
Size = float | Callable[[Array], Array]
LossOf = Objective | Callable[[PreferenceGame, Array], Loss]


def gradient_move(
    loss: LossOf,
    *,
    eta: Size | None = None,
    rate: Size | None = None,
    on_policy: bool = False,
    policy: GamePolicy = TABULAR,
    num_samples: int | None = None,
) -> Move:
    """A step of plain gradient descent on a loss, summed over the games.

    Args:
        loss: an objective, or `(game, t) -> loss` where its numbers depend on them.
        eta: step on win rates of a tabular policy; the rate is `eta * beta * N / 4`.
        rate: learning rate, instead of `eta`.
        on_policy: draw the actions from the live policy; from the uniform one otherwise.
        policy: how parameters become logits.
        num_samples: groups drawn for an update; None takes the exact expectation.
    """
    if (eta is None) == (rate is None):
        raise ValueError(f"give either eta or rate; got eta={eta!r} and rate={rate!r}")
    _check_positive(eta=eta, rate=rate)

    def move(params: Params, game: PreferenceGame, t: Array, key: Array, opponent: Array) -> Params:
        sampler = policy.logits(params) if on_policy else None
        bound = _bound(loss, game, t)

        def total(params: Params) -> Array:
            logits = policy.logits(params)
            if num_samples is None:
                losses = expected_loss(bound, game, logits, sampler=sampler, opponent=opponent)
            else:
                losses = sampled_loss(
                    bound, game, logits, key,
                    num_samples=num_samples, sampler=sampler, opponent=opponent,
                )  # fmt: skip
            return jnp.sum(losses)

        size = _at(rate, t) if eta is None else _at(eta, t) * game.beta * game.num_actions / 4
        return jax.tree.map(lambda x, g: x - size * g, params, jax.grad(total)(params))

    return move


def play(
    move: Move,
    *,
    mix: Size | Callable[[PreferenceGame, Array], Array] = 0.0,
    policy: GamePolicy = TABULAR,
) -> Update:
    """One move an iteration against the live policy, or its mixture with the reference.

    Args:
        move: the step.
        mix: weight of the reference in the geometric mixture that is the opponent, a number or
            `(game, t) -> weight`; 0 is self-play.
        policy: how parameters become logits.
    """
    if isinstance(mix, int | float) and not 0 <= mix <= 1:
        raise ValueError(f"mix must be a weight, in [0, 1]; got {mix}")

    def step(params, game, t, key, memory):
        opponent = policy.logits(params)
        weight = mix(game, t) if callable(mix) else mix
        if callable(mix) or mix:
            opponent = exact.mixture(opponent, game.reference_logps, weight)
        return move(params, game, t, key, opponent), memory

    return Update(step)


def extragradient(move: Move, *, policy: GamePolicy = TABULAR) -> Update:
    """The move twice from the same parameters; the second time against the first one's result."""

    def step(params, game, t, key, memory):
        first, second = jax.random.split(key)
        half = move(params, game, t, first, policy.logits(params))
        return move(params, game, t, second, policy.logits(half)), memory

    return Update(step)


def online_ipo_v1(**settings: Any) -> Update:
    """Online mirror descent: `online_ipo_v1` against the live policy.

    Zhou et al. 2025, arXiv:2503.08942. It converges for steps below `exact.stability_limit`.

    Args:
        **settings: of `gradient_move`: `eta` or `rate`, `policy`, `num_samples`.
    """
    move = gradient_move(_with_beta("online_ipo_v1"), **settings)
    return play(move, policy=settings.get("policy", TABULAR))


def online_ipo_v2(**settings: Any) -> Update:
    """Self-play regression on the live policy's pairs. Zhou et al. 2025, arXiv:2503.08942.

    Args:
        **settings: of `gradient_move`.
    """
    move = gradient_move(_with_beta("online_ipo_v2"), on_policy=True, **settings)
    return play(move, policy=settings.get("policy", TABULAR))


def egpo(**settings: Any) -> Update:
    """EGPO: the step of `online_ipo_v1` as an extragradient step, two gradients an iteration.

    Zhou et al. 2025, arXiv:2503.08942; steps up to 1 / (beta + 3) are proved to converge.

    Args:
        **settings: of `gradient_move`.
    """
    move = gradient_move(_with_beta("online_ipo_v1"), **settings)
    return extragradient(move, policy=settings.get("policy", TABULAR))


def nash_md(*, mix: Size | None = None, **settings: Any) -> Update:
    """Nash-MD: `nash_md` against the mixture of live policy and reference.

    Munos et al. 2023, arXiv:2312.00886. With a constant mixture the mixture, not the policy, solves
    a game, that of KL weight beta / (1 - mix).

    Args:
        mix: weight of the reference; eta * beta where None, as in the exact mirror step.
        **settings: of `gradient_move`.
    """
    move = gradient_move(_with_beta("nash_md"), **settings)
    return play(move, mix=_mix(mix, settings), policy=settings.get("policy", TABULAR))


def nash_md_pg(*, mix: Size | None = None, **settings: Any) -> Update:
    """Nash-MD by policy gradient on the live policy's actions.

    Args:
        mix: weight of the reference; eta * beta where None.
        **settings: of `gradient_move`.
    """
    loss = lambda game, t: functools.partial(LOSSES["nash_md_pg"], tau=game.beta)  # noqa: E731
    move = gradient_move(loss, on_policy=True, **settings)
    return play(move, mix=_mix(mix, settings), policy=settings.get("policy", TABULAR))


def mirror_descent(*, eta: Size, mix: bool = False) -> Update:
    """The closed form of an `online_ipo_v1` step, an INPO round with letter 1/eta, or a DNO round.

    Args:
        eta: step; multiplicative weights where the game's beta is 0.
        mix: play against the mixture of weight eta * beta: Nash-MD.
    """
    _check_positive(eta=eta)

    def step(logits, game, t, key, memory):
        size = _at(eta, t)
        against = logits
        if mix:
            against = exact.mixture(logits, game.reference_logps, size * game.beta)
        return exact.mirror_step(game, logits, eta=size, opponent=against), memory

    return Update(step)


def optimistic_mirror_descent(*, eta: Size) -> Update:
    r"""The closed form of ONPO: $\pi_{t+1} \propto \pi_t e^{\eta(2 w_t - w_{t-1})}$.

    Zhang et al. 2025, arXiv:2502.16852. The memory holds the last win rates; at first 1/2 each.
    """
    _check_positive(eta=eta)

    def step(logits, game, t, key, before):
        rates = game.win_rates(logits)
        return jax.nn.log_softmax(logits + _at(eta, t) * (2 * rates - before)), rates

    return Update(step, lambda logits, game: jnp.full_like(game.reference_logps, 0.5))


def best_response_iteration() -> Update:
    """The best response to the last policy: mirror descent of step 1 / beta. It cycles."""
    return Update(lambda logits, game, t, key, memory: (exact.best_response(game, logits), memory))


def fitted(loss: LossOf, *, newton_steps: int = 1) -> Callable[..., Array]:
    """A round: `(snapshot, game, t, previous=snapshot) -> logits` that minimise a loss.

    The loss is over pairs of the snapshot's own actions with win rates against the snapshot;
    tabular policies only. Newton's method is exact in one step for losses that are quadratic in
    margins (inpo, onpo, online_ipo_v1); the flat direction of the softmax is left alone.

    Args:
        loss: an objective, or `(game, t) -> loss`.
        newton_steps: 1 for quadratic losses; 8 or so for others, from a snapshot nearby.
    """

    def fit(snapshot: Array, game: PreferenceGame, t: Array, previous: Array | None = None):
        bound = _bound(loss, game, t)
        anchor = snapshot if previous is None else previous

        def total(logits: Array) -> Array:
            return jnp.sum(
                expected_loss(
                    bound, game, logits, sampler=snapshot, opponent=snapshot, previous=anchor
                )
            )

        # The games do not depend on one another: the products with one basis vector for all of
        # them together are the columns of every game's own Hessian.
        basis = jnp.broadcast_to(
            jnp.eye(game.num_actions, dtype=snapshot.dtype).reshape(
                game.num_actions, *(1,) * len(game.batch_shape), game.num_actions
            ),
            (game.num_actions, *snapshot.shape),
        )

        def newton(logits: Array, _: Any) -> tuple[Array, None]:
            gradient, product = jax.linearize(jax.grad(total), logits)
            hessian = jnp.moveaxis(jax.vmap(product)(basis), 0, -1)
            tiny = 100 * jnp.finfo(logits.dtype).eps
            inverse = jnp.linalg.pinv(hessian, rtol=tiny, hermitian=True)
            moved = logits - jnp.einsum("...ij,...j->...i", inverse, gradient)
            return jax.nn.log_softmax(moved), None

        return jax.lax.scan(newton, jax.nn.log_softmax(anchor), None, length=newton_steps)[0]

    return fit


def inpo(*, eta: Size) -> Update:
    """INPO by its loss: rounds of `mirror_descent` at step 1 / eta, fitted on labelled pairs.

    Zhang et al. 2024, arXiv:2407.00617. Its tau is the game's beta.

    Args:
        eta: the paper's, the *inverse* of the step; tau (t + 2) / 2 in its theorem.
    """
    _check_positive(eta=eta)
    loss = lambda game, t: functools.partial(  # noqa: E731
        LOSSES["inpo"], eta=_at(eta, t), tau=game.beta
    )
    return fit_each_round(loss, 1)


def dno(*, eta: Size, newton_steps: int = 8) -> Update:
    """DNO by its loss. Rosset et al. 2024, arXiv:2404.03715; for games without a KL term.

    Args:
        eta: the paper's, the *inverse* of the step.
        newton_steps: of the fit.
    """
    _check_positive(eta=eta)
    loss = lambda game, t: functools.partial(LOSSES["dno"], eta=_at(eta, t))  # noqa: E731
    return fit_each_round(loss, newton_steps)


def sppo(*, eta: Size, newton_steps: int = 8) -> Update:
    """SPPO by its loss, whose constant 1/2 stands for the normaliser: near multiplicative weights.

    Wu et al. 2024, arXiv:2405.00675.

    Args:
        eta: step on win rates.
        newton_steps: of the fit.
    """
    _check_positive(eta=eta)
    loss = lambda game, t: functools.partial(LOSSES["sppo"], eta=_at(eta, t))  # noqa: E731
    return fit_each_round(loss, newton_steps)


def onpo(*, eta: Size) -> Update:
    """ONPO by its loss: two fits on the pairs of the policy; the memory holds its anchor.

    Zhang et al. 2025, arXiv:2502.16852. Equals `optimistic_mirror_descent`.

    Args:
        eta: step on win rates.
    """
    _check_positive(eta=eta)
    loss = lambda game, t: functools.partial(LOSSES["onpo"], eta=_at(eta, t))  # noqa: E731
    return fit_each_round(loss, 1, optimistic=True)


def iterated(loss: Objective, *, newton_steps: int = 8) -> Update:
    """Iterative DPO, IPO and the like: each round starts from the last policy, its reference too.

    The loss is fitted to pairs of the last policy's own actions. On win rates against that policy
    IPO is then multiplicative weights of step 1 / tau; DPO fits the rewards that explain its pairs
    best. Neither settles where preferences run in a circle.

    Args:
        loss: an objective of pairs, e.g. `objective("dpo", beta=1.0)`.
        newton_steps: of the fit; 1 is exact for IPO.
    """
    return snapshot_reference(fit_each_round(loss, newton_steps))


def comal(inner: Update, *, tau: float, every: int) -> Update:
    """COMAL: a method for regularised games whose reference moves to the policy now and then.

    Liu et al. 2024, arXiv:2410.23223: it goes to a Nash policy of the game without a KL term.

    Args:
        inner: e.g. `egpo(eta=0.3)` or, as in the paper, `inpo(eta=...)`.
        tau: KL weight of the inner games.
        every: inner steps between moves of the reference.
    """
    _check_positive(tau=tau, every=every)

    moving = moving_reference(inner, every)

    def step(logits, game, t, key, memory):
        at = game.replace(beta=jnp.asarray(tau, game.beta.dtype))
        return moving.step(logits, at, t, key, memory)

    return Update(step, moving.init)


def proximal_point(*, tau: float) -> Update:
    """COMAL with exact inner solutions: the Nash policy of the game around the last one.

    Args:
        tau: KL weight of the inner games.
    """
    _check_positive(tau=tau)

    def step(logits, game, t, key, memory):
        beta = jnp.asarray(tau, game.beta.dtype)
        return exact.nash_policy(game.replace(reference_logps=logits, beta=beta)), memory

    return Update(step)


def fit_each_round(loss: LossOf, newton_steps: int, *, optimistic: bool = False) -> Update:
    """One fit a round; or two, of the anchor from itself and of the policy from the new anchor."""
    fit = fitted(loss, newton_steps=newton_steps)
    if not optimistic:
        return Update(lambda logits, game, t, key, memory: (fit(logits, game, t), memory))

    def step(logits, game, t, key, anchor):
        anchor = fit(logits, game, t, previous=anchor)
        return fit(logits, game, t, previous=anchor), anchor

    return Update(step, lambda logits, game: logits)


def snapshot_reference(inner: Update) -> Update:
    """Each round's reference is the policy that it starts from."""

    def step(logits, game, t, key, memory):
        return inner.step(logits, game.replace(reference_logps=logits), t, key, memory)

    return Update(step, inner.init)


def moving_reference(inner: Update, every: int) -> Update:
    """The reference becomes the policy after every so many rounds."""

    def step(logits, game, t, key, memory):
        reference, kept = memory
        logits, kept = inner.step(logits, game.replace(reference_logps=reference), t, key, kept)
        moves = (t + 1) % every == 0
        return logits, (jnp.where(moves, jax.nn.log_softmax(logits), reference), kept)

    return Update(step, lambda logits, game: (jax.nn.log_softmax(logits), inner.init(logits, game)))


def extrapolated(inner: Update, *, alpha: float) -> Update:
    """Accelerated preference optimisation: momentum on the results of a tabular inner method.

    arXiv:2410.06293. It speeds up transitive games and drives cyclic ones apart.

    Args:
        inner: the method of a round.
        alpha: momentum; 0 is the inner method.
    """

    def step(logits, game, t, key, memory):
        last, kept = memory
        found, kept = inner.step(logits, game, t, key, kept)
        moved = jnp.where(t == 0, found, found + alpha * (found - last))
        return jax.nn.log_softmax(moved), (found, kept)

    return Update(step, lambda logits, game: (logits, inner.init(logits, game)))


def _check_positive(**sizes: Any) -> None:
    """Refuses numbers that no size can be; what is traced or scheduled is not looked at."""
    for name, size in sizes.items():
        if isinstance(size, int | float) and not 0 < size < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0; got {size}")


def _bound(loss: LossOf, game: PreferenceGame, t: Array) -> Loss:
    if isinstance(loss, Objective):
        return loss
    if not callable(loss):
        raise TypeError(f"loss must be an objective or a function of game and t; got {loss!r}")
    return loss(game, t)


def _at(size: Size | None, t: Array) -> Any:
    return size(t) if callable(size) else size


def _with_beta(name: str) -> LossOf:
    """The loss of that name at the game's own KL weight."""
    return lambda game, t: functools.partial(LOSSES[name], beta=game.beta)


def _mix(mix: Size | None, settings: dict[str, Any]) -> Any:
    if mix is not None:
        return (lambda game, t: mix(t)) if callable(mix) else mix
    eta, rate = settings.get("eta"), settings.get("rate")
    if eta is None:
        return lambda game, t: 4 * _at(rate, t) / game.num_actions
    return lambda game, t: _at(eta, t) * game.beta
