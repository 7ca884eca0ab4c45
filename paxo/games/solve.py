"""Playing a game: an update applied again and again, all of it in one compiled loop.

The update is an argument, any function of the game and of what it changes, so that a method need
not be known here to run here.

>>> from paxo.games.builders import rock_paper_scissors
>>> from paxo.games.exact import duality_gap, mirror_step
>>> game = rock_paper_scissors(beta=0.5, reference_logits=jnp.array([1.0, 0.0, 0.0]))
>>> step = lambda logits, game, t, key, memory: (mirror_step(game, logits, eta=0.3), memory)
>>> played = solve(game, Update(step), 100, at=(0, 10, 100))
>>> gaps = duality_gap(game, played.logits)
>>> bool(gaps[0] > gaps[1] > gaps[2])
True
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxo.games.policies import TABULAR, GamePolicy
from paxo.games.preference_game import PreferenceGame
from paxo.numerics import Array
from paxo.types import Params


def _no_memory(params: Params, game: PreferenceGame) -> tuple[()]:
    return ()


class Update(NamedTuple):
    """One iteration of a method.

    Attributes:
        step: `(params, game, t, key, memory) -> (params, memory)` with the iteration's number t,
            from 0, and a random key of its own.
        init: `(params, game) -> memory`: what the method keeps beside its parameters (anchors,
            earlier win rates, a moving reference).
    """

    step: Callable[..., tuple[Params, Any]]
    init: Callable[[Params, PreferenceGame], Any] = _no_memory


class Trajectory(NamedTuple):
    """What was seen at M iterations of a run.

    Attributes:
        iterations: `[M]` number of updates made.
        logits: `[M, ..., N]` the policies then.
        average: `[M, ..., N]` log of the mean of the policies before them (at 0 the first policy).
        params: the last parameters.
        memory: the method's last memory.
    """

    iterations: np.ndarray
    logits: Array
    average: Array
    params: Params
    memory: Any


def solve(
    game: PreferenceGame,
    update: Update,
    num_steps: int,
    *,
    params: Params = None,
    memory: Any = None,
    policy: GamePolicy = TABULAR,
    at: Sequence[int] | None = None,
    key: Array | None = None,
) -> Trajectory:
    """Runs `num_steps` updates, compiled as one loop.

    Args:
        game: one or several that are played side by side.
        update: any method; those of `paxo.games.updates` are some. Nothing about it is known here.
        num_steps: updates.
        params: to start from; the policy's own first ones where None.
        memory: of the method at the start; what its `init` makes where None.
        policy: how parameters become logits; must be the one that the update trains.
        at: iterations, rising, that are kept; all of 0..num_steps where None.
        key: random key of first parameters and drawn actions; iteration t uses `fold_in(key, t)`.

    Raises:
        TypeError: for anything but an `Update` whose step gives parameters and memory.
        ValueError: for iterations that do not rise within 0..num_steps, parameters that do not
            fit the game, and a run that ends up in NaN.
    """
    if not isinstance(update, Update):
        raise TypeError(
            f"update must be an Update, as egpo(eta=0.3) or Update(step); got {update!r}"
        )
    if not isinstance(num_steps, int | np.integer) or num_steps < 0:
        raise ValueError(f"num_steps must be an integer of at least 0; got {num_steps!r}")
    kept = np.arange(num_steps + 1) if at is None else np.asarray(at, np.int64)
    if kept.ndim != 1 or not kept.size or np.any(np.diff(kept) <= 0):
        raise ValueError(f"at must be rising iterations; got {at!r}")
    if kept[0] < 0 or kept[-1] > num_steps:
        raise ValueError(
            f"at must lie in 0..num_steps = {num_steps}; got {kept[0]}..{kept[-1]}: raise num_steps"
        )
    key = jax.random.key(0) if key is None else key
    if params is None:
        params = policy.init(jax.random.fold_in(key, 2**31 - 1), game)
    elif policy is TABULAR:
        rows = game.reference_logps.shape
        params = jnp.asarray(params, game.reference_logps.dtype)
        if params.shape[max(params.ndim - len(rows), 0) :] != rows:
            raise ValueError(
                f"params must have shape {list(rows)}, a row of logits a game, or more leading "
                f"axes, of several policies; got {list(params.shape)}"
            )
    if memory is None:
        memory = update.init(params, game)
    stops = jnp.asarray(kept, jnp.int32)
    params, memory, seen = _run(update, policy, game, params, memory, key, stops, num_steps)
    _refuse_nan(kept, seen[0])
    return Trajectory(kept, *seen, params, memory)


def _refuse_nan(kept: np.ndarray, logits: Array) -> None:
    if isinstance(logits, jax.core.Tracer):
        return
    lost = np.isnan(np.asarray(logits)).reshape(len(kept), -1).any(-1)
    if lost.any():
        raise ValueError(
            f"the policy is NaN at iteration {kept[lost.argmax()]}: a step that is too large, or a "
            "method that divides by the game's beta = 0, for which mirror_descent, sppo, dno, onpo "
            "and comal are made"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(update, policy, game, params, memory, key, stops, num_steps):
    def one(loop):
        t, params, memory, total = loop
        total = total + jax.nn.softmax(policy.logits(params))
        params, memory = update.step(params, game, t, jax.random.fold_in(key, t), memory)
        return t + 1, params, memory, total

    def until(loop, stop):
        loop = jax.lax.while_loop(lambda loop: loop[0] < stop, one, loop)
        t, params, _, total = loop
        logits = policy.logits(params)
        mean = jnp.where(t > 0, total / jnp.maximum(t, 1), jax.nn.softmax(logits))
        return loop, (logits, jnp.log(mean))

    # The rest of the run is a last segment of which nothing is kept: one loop to compile.
    first = (jnp.zeros((), jnp.int32), params, memory, jnp.zeros_like(policy.logits(params)))
    segments = jnp.append(stops, jnp.asarray(num_steps, stops.dtype))
    (_, params, memory, _), seen = jax.lax.scan(until, first, segments)
    return params, memory, jax.tree.map(lambda x: x[:-1], seen)
