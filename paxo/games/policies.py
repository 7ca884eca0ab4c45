"""What is trained on a game: a table of logits, or a small network that they come out of.

>>> from paxo.games.builders import rock_paper_scissors
>>> game = rock_paper_scissors(beta=0.1)
>>> TABULAR.logits(TABULAR.init(jax.random.key(0), game)).shape
(3,)
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paxo.games.preference_game import PreferenceGame
from paxo.numerics import Array
from paxo.types import Params


class GamePolicy(NamedTuple):
    """A parametrisation of policies over actions.

    Attributes:
        init: `(key, game) -> params`.
        logits: `(params) -> [..., N]`, one row for each game.
    """

    init: Callable[[Array, PreferenceGame], Params]
    logits: Callable[[Params], Array]


def _table(params: Params) -> Array:
    if not hasattr(params, "shape"):
        raise TypeError(
            "a tabular policy's parameters are one array of logits; got a "
            f"{type(params).__name__}: give `solve` and the update the same `policy`"
        )
    return params


# The logits themselves, starting from the reference.
TABULAR = GamePolicy(init=lambda key, game: game.reference_logps, logits=_table)


def neural_policy(width: int = 10, num_hidden: int = 2) -> GamePolicy:
    """A ReLU network whose layers all games share, each with a trained input of its own.

    The shape of EGPO's simulations: inputs of 10 numbers, two hidden layers of 10, Xavier-normal
    weights and zero biases. Its first policy is not the game's reference: play against it with
    `game_around`.

    Args:
        width: of the inputs and hidden layers.
        num_hidden: hidden layers.
    """

    def init(key: Array, game: PreferenceGame) -> Params:
        sizes = [width] * (num_hidden + 1) + [game.num_actions]
        keys = jax.random.split(key, len(sizes))
        dtype = game.preferences.dtype
        xavier = jax.nn.initializers.glorot_normal()
        return {
            "inputs": jax.random.normal(keys[-1], (*game.batch_shape, width), dtype),
            "layers": [
                {"kernel": xavier(k, shape, dtype), "bias": jnp.zeros(shape[1], dtype)}
                for k, shape in zip(keys, itertools.pairwise(sizes))
            ],
        }

    def logits(params: Params) -> Array:
        x = params["inputs"]
        *hidden, last = params["layers"]
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    return GamePolicy(init, logits)


def game_around(game: PreferenceGame, policy: GamePolicy, params: Any) -> PreferenceGame:
    """The game whose reference is this policy, so that training starts from the reference."""
    return game.replace(reference_logps=policy.logits(params))
