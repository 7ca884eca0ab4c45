r"""A game as a language model: the prompt names the game, the completion is one token, the action.

What samples, judges and trains language models then runs on games, whose answers are known. The
vocabulary is the actions; prompt token g stands for game g, every token ends a completion, and the
parameters are the table of logits.

>>> from paxo.games.builders import rock_paper_scissors
>>> game = rock_paper_scissors(beta=0.1)
>>> policy = table_policy(game)
>>> params = policy.init(jax.random.key(0))
>>> ones = jnp.ones((1, 1), jnp.int32)
>>> hidden = policy.trunk(params, ones * 0, ones * 0, ones, ones * 0)
>>> policy.head(params, hidden).shape
(1, 1, 3)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxo.games.preference_game import PreferenceGame
from paxo.numerics import Array
from paxo.types import Completions, Decode, Params, Policy, PreferenceBatch, PromptBatch


def table_policy(game: PreferenceGame) -> Policy:
    """A `Policy` whose parameters are `{"logits": [G, N]}`, one row for each of G games.

    It starts from the reference. Hidden states are one-hot: the game of the first prompt token on
    prompt tokens, nothing after the action.

    Args:
        game: one, or several along one leading axis.
    """
    table = _rows(game.reference_logps, game)
    games = table.shape[0]

    def trunk(params: Params, tokens: Array, positions: Array, group: Array, branch: Array):
        of_prompt = jax.nn.one_hot(tokens, games, dtype=params["logits"].dtype)
        return jnp.where((branch == 0)[..., None], of_prompt, 0)

    def prefill(params, tokens, lengths, num_candidates, max_new):
        last = jnp.take_along_axis(tokens, (lengths - 1)[:, None], axis=1)[:, 0]
        return (), jax.nn.one_hot(last, games, dtype=params["logits"].dtype)

    def step(params, cache, tokens, index):
        return cache, jnp.zeros((*tokens.shape, games), params["logits"].dtype)

    return Policy(
        init=lambda key: {"logits": table},
        trunk=trunk,
        # Samplers and scorers keep log-probs in float32, where a game computes in float64 too.
        head=lambda params, hidden: (hidden @ params["logits"]).astype(jnp.float32),
        unembed=lambda params: params["logits"],
        logical_axes={"logits": ("embed", "vocab")},
        decode=Decode(prefill, step),
    )


def stop_ids(game: PreferenceGame) -> tuple[int, ...]:
    """Every action ends a completion: for `make_sampler`."""
    return tuple(range(game.num_actions))


def prompts_of(game: PreferenceGame, repeats: int = 1) -> PromptBatch:
    """Each game's prompt, `repeats` times, with ids of their own."""
    games = _rows(game.reference_logps, game).shape[0]
    tokens = jnp.tile(jnp.arange(games, dtype=jnp.int32), repeats)
    ids = jnp.arange(games * repeats, dtype=jnp.int32)
    return PromptBatch(tokens[:, None], jnp.ones_like(tokens), ids)


@dataclasses.dataclass(frozen=True, eq=False)
class GameJudge:
    """A `Judge` that knows the game.

    Attributes:
        game: one, or several along one leading axis.
    """

    game: PreferenceGame

    def __call__(
        self, prompts: PromptBatch, completions: Completions, wanted: Any = None
    ) -> np.ndarray:
        """`[B, K, K]` P(i beats j); all are looked up, as that costs nothing."""
        del wanted
        table = np.asarray(_rows(self.game.preferences, self.game))
        games = np.asarray(prompts.tokens)[:, 0]
        actions = np.asarray(completions.tokens)[:, :, 0]
        return table[games[:, None, None], actions[:, :, None], actions[:, None, :]]


def pair_batch(
    game: PreferenceGame,
    actions: Array | None = None,
    *,
    opponent: Array | None = None,
    **extras: Array,
) -> PreferenceBatch:
    """Groups of actions as packed rows, judged exactly: labels, win rates and log-probs attached.

    A row is one group: its game's prompt token, then K actions of one token each. `labels` are how
    often each beats the others, `extras["win_rates"]` are against `opponent`, and the role
    "reference" holds the game's reference.

    Args:
        game: one, or several along one leading axis.
        actions: `[G, M, K]` int32, M groups of each game; all ordered pairs where None.
        opponent: `[..., N]` logits; the reference where None.
        **extras: name -> `[..., N]` of each action, further arrays that an objective names.
    """
    n = game.num_actions
    by_game = lambda x: _rows(jnp.asarray(x), game)  # noqa: E731
    games = by_game(game.reference_logps).shape[0]
    if actions is None:
        every = jnp.stack(jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"), -1)
        actions = jnp.broadcast_to(every.reshape(1, -1, 2), (games, n * n, 2))
    actions = jnp.asarray(actions, jnp.int32)
    if actions.ndim != 3 or actions.shape[0] != games:
        raise ValueError(
            f"actions must have shape [{games}, M, K], M groups of each game; got "
            f"{list(actions.shape)}"
        )
    groups, k = actions.shape[1:]
    rows = games * groups
    prompt = jnp.repeat(jnp.arange(games, dtype=jnp.int32), groups)
    flat = actions.reshape(rows, k)

    def pick(x: Array) -> Array:
        return by_game(x)[prompt[:, None], flat][:, None]

    judged = by_game(game.preferences)[prompt[:, None, None], flat[:, :, None], flat[:, None, :]]
    others = jnp.where(jnp.eye(k, dtype=bool), 0, judged).sum(-1) / max(k - 1, 1)
    rates = game.win_rates(game.reference_logps if opponent is None else opponent)
    across = lambda values: jnp.broadcast_to(jnp.asarray(values, jnp.int32), (rows, len(values)))  # noqa: E731
    return PreferenceBatch(
        tokens=jnp.concatenate([prompt[:, None], flat], 1),
        positions=across([0] + [1] * k),
        group=across([1] * (k + 1)),
        branch=across(range(k + 1)),
        score_from=across([0] * k),
        score_token=flat,
        score_slot=across(range(k)),
        labels=others[:, None].astype(jnp.float32),
        where=jnp.ones((rows, 1, k), bool),
        fixed_logps={"reference": pick(game.reference_logps)},
        extras={"win_rates": pick(rates), **{name: pick(x) for name, x in extras.items()}},
        max_completion=1,
    )


def _rows(x: Array, game: PreferenceGame) -> Array:
    """`x` with exactly one leading axis of games."""
    if len(game.batch_shape) > 1:
        raise ValueError(
            f"games as a language model lie along one axis; got {list(game.batch_shape)}. Reshape "
            "the arrays of the game."
        )
    return x if game.batch_shape else x[None]
