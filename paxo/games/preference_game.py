r"""The KL-regularised preference game on N actions, and its loss of every objective's kind.

Two players choose policies $\pi, \pi'$ over N actions (completions of one prompt); a judge prefers
the first one's with probability $P(y\succ y')$:

    V(pi, pi') = E P(y > y') - beta KL(pi|reference) + beta KL(pi'|reference)

Policies are arrays of *logits* `[..., N]`, of which log-probs are a case; leading axes are games
that are played side by side. Inside `jax.enable_x64(True)` everything is computed in float64.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxo.numerics import Array

# P + Pᵀ may differ from 1, and the diagonal from 1/2, by the rounding of float32 numbers.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceGame:
    """Games with the same number of actions and KL weight; a pytree.

    Checked when built: user mistakes are named, and what is within rounding of an antisymmetric
    matrix is made exactly so (the upper triangle is 1 minus the lower one).

    Attributes:
        preferences: `[..., N, N]` probability that the row's action beats the column's.
        reference_logps: `[..., N]` log-probs of the reference in nats; logits are normalised.
        beta: scalar weight of the KL to the reference, >= 0, in units of a win per nat.

    Raises:
        ValueError: for arrays that do not fit, are not finite, or are no preferences, and for a
            negative `beta`. Values that are traced by jax are not looked at.

    >>> game = PreferenceGame(jnp.array([[0.5, 0.9], [0.1, 0.5]]), jnp.zeros(2), 0.1)
    >>> game.num_actions, game.batch_shape
    (2, ())
    >>> PreferenceGame(jnp.array([[0.5, 0.9], [0.2, 0.5]]), jnp.zeros(2), 0.1)
    Traceback (most recent call last):
    ValueError: preferences[0, 1] + preferences[1, 0] must be 1; got 0.9 + 0.2. With a matrix of one
    presentation order each, pass (P + 1 - P.swapaxes(-1, -2)) / 2.
    """

    preferences: Array
    reference_logps: Array
    beta: Array

    def __post_init__(self):
        given = {f.name: _floating(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        # One dtype for all: a float32 reference beside float64 preferences is computed in float64.
        dtype = jnp.promote_types(jnp.result_type(*given.values()), jnp.float32)
        preferences, reference, beta = (x.astype(dtype) for x in given.values())
        _check_shapes(preferences, reference, beta)
        _check_values(preferences, reference, beta)
        object.__setattr__(self, "preferences", mirrored(preferences))
        object.__setattr__(self, "reference_logps", jax.nn.log_softmax(reference))
        object.__setattr__(self, "beta", beta)

    @property
    def num_actions(self) -> int:
        """N."""
        return self.preferences.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes: games side by side."""
        return self.preferences.shape[:-2]

    def win_rates(self, opponent: Array) -> Array:
        """`[..., N]` how often each action beats an opponent's; `opponent [..., N]` logits."""
        opponent = self.checked("opponent", opponent)
        return jnp.einsum("...ij,...j->...i", self.preferences, jax.nn.softmax(opponent))

    def checked(self, name: str, logits: Array) -> Array:
        """Logits `[..., N]` that fit these games: an error names what does not.

        Raises:
            ValueError: for another number of actions, or axes that do not fit those of the games.

        >>> PreferenceGame(jnp.full((2, 2), 0.5), jnp.zeros(2), 0.1).checked("logits", jnp.zeros(3))
        Traceback (most recent call last):
        ValueError: logits must have shape [..., 2], one number an action; got [3]
        """
        logits = jnp.asarray(logits)
        lead = [*self.batch_shape, self.num_actions]
        text = ", ".join(["...", *map(str, lead)])
        if logits.shape[-1:] != (self.num_actions,):
            raise ValueError(
                f"{name} must have shape [{text}], one number an action; got {list(logits.shape)}"
            )
        if any(x not in (1, y) and y != 1 for x, y in zip(logits.shape[::-1], lead[::-1])):
            raise ValueError(
                f"{name} must have shape [{text}], a row for each game (or one for all); got "
                f"{list(logits.shape)}"
            )
        return logits

    def replace(self, **changes: Any) -> "PreferenceGame":
        """A game with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def __getitem__(self, index: Any) -> "PreferenceGame":
        """Some of the games, by what indexes an array of their `batch_shape`; not of their actions.

        >>> games = PreferenceGame(jnp.full((3, 2, 2), 0.5), jnp.zeros((3, 2)), 0.1)
        >>> games[0].batch_shape, [game.batch_shape for game in games]
        ((), [(), (), ()])
        >>> games[3]
        Traceback (most recent call last):
        IndexError: index 3 is out of bounds for axis 0 with size 3
        """
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(index)):
            np.empty(self.batch_shape, bool)[index]  # jax would take the last game for any beyond
        return self.replace(
            preferences=self.preferences[index], reference_logps=self.reference_logps[index]
        )


@jax.jit
def mirrored(lower: Array) -> Array:
    """`[..., N, N]` preferences with this strictly lower triangle: P + Pᵀ is 1 exactly.

    >>> mirrored(jnp.array([[9.0, 9.0], [0.25, 9.0]])).tolist()
    [[0.5, 0.75], [0.25, 0.5]]
    """
    below = jnp.tril(lower, -1)
    above = jnp.triu(1 - jnp.swapaxes(lower, -1, -2), 1)
    return below + above + jnp.eye(lower.shape[-1], dtype=lower.dtype) / 2


def _flatten(game):
    names = ("preferences", "reference_logps", "beta")
    return [(jax.tree_util.GetAttrKey(name), getattr(game, name)) for name in names], None


def _unflatten(_, leaves):
    # jax also rebuilds pytrees around shapes and placeholders: nothing is checked here.
    game = object.__new__(PreferenceGame)
    for name, leaf in zip(("preferences", "reference_logps", "beta"), leaves):
        object.__setattr__(game, name, leaf)
    return game


jax.tree_util.register_pytree_with_keys(PreferenceGame, _flatten, _unflatten)


def _floating(name: str, value: Any) -> Array:
    try:
        found = jnp.asarray(value, None if hasattr(value, "dtype") else float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers; got {value!r}") from error
    if jnp.iscomplexobj(found):
        raise ValueError(f"{name} must be an array of real numbers; got {found.dtype}")
    return found


def _check_shapes(preferences: Array, reference: Array, beta: Array) -> None:
    shape = preferences.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ValueError(f"preferences must have shape [..., N, N]; got {list(shape)}")
    if reference.shape != shape[:-1]:
        raise ValueError(
            f"reference_logps must have shape {list(shape[:-1])}, one log-prob an action as in "
            f"preferences {list(shape)}; got {list(reference.shape)}. Use jnp.broadcast_to where "
            "all games share a reference."
        )
    if beta.shape != ():
        raise ValueError(
            f"beta must be one number for all games; got shape {list(beta.shape)}. Build one game "
            "for each beta, or jax.vmap over it."
        )


def _check_values(preferences: Any, reference: Any, beta: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in (preferences, reference, beta)):
        return
    preferences, reference, beta = (np.asarray(x) for x in (preferences, reference, beta))
    for name, x in (("preferences", preferences), ("reference_logps", reference), ("beta", beta)):
        _refuse(name, ~np.isfinite(x), x, "must be finite")
    outside = (preferences < -ROUNDING) | (preferences > 1 + ROUNDING)
    _refuse("preferences", outside, preferences, "must lie in [0, 1]")
    diagonal = np.diagonal(preferences, axis1=-2, axis2=-1)
    wrong = np.abs(diagonal - 0.5) > ROUNDING
    if wrong.any():
        *lead, i = np.argwhere(wrong)[0]
        raise ValueError(
            f"preferences{_index([*lead, i, i])} must be 1/2, an action against itself; got "
            f"{diagonal[(*lead, i)]:g}"
        )
    transposed = np.swapaxes(preferences, -1, -2)
    wrong = np.abs(preferences + transposed - 1) > ROUNDING
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        turned = (*at[:-2], at[-1], at[-2])
        raise ValueError(
            f"preferences{_index(at)} + preferences{_index(turned)} must be 1; got "
            f"{preferences[at]:g} + {transposed[at]:g}. With a matrix of one presentation order "
            "each, pass (P + 1 - P.swapaxes(-1, -2)) / 2."
        )
    if beta < 0:
        raise ValueError(f"beta must be at least 0; got {beta:g}")


def _refuse(name: str, wrong: np.ndarray, values: np.ndarray, rule: str) -> None:
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise ValueError(f"{name}{_index(at)} {rule}; got {values[at]}")


def _index(at: Any) -> str:
    return f"[{', '.join(str(int(i)) for i in at)}]" if len(at) else ""
