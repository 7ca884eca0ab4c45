"""Self-play on games as one-token language models: small, fast, and the answer is known."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paxo.data.packing import pack_groups, pad_rows
from paxo.data.records import TokenGroup
from paxo.data.row_shape import RowShape
from paxo.games.as_policy import stop_ids, table_policy
from paxo.games.preference_game import PreferenceGame
from paxo.judges import CheckedJudge, MatrixJudge
from paxo.models.heads import init_heads, with_heads
from paxo.models.sharding import make_mesh, param_shardings
from paxo.online import Drawer, Drawn, Prompt, RoundSettings, play
from paxo.online.collect import Judges
from paxo.online.drawing import padded_size
from paxo.sampling import SamplingConfig


@functools.cache  # one game, one policy: all tests share the programs of its sampler and scorer
def a_game():
    """Three actions that beat one another, and a fourth that loses and that the reference likes."""
    a = 0.9
    table = [[0.5, a, 1 - a, a], [1 - a, 0.5, a, a], [a, 1 - a, 0.5, a], [1 - a, 1 - a, 1 - a, 0.5]]
    return PreferenceGame(jnp.array(table), jnp.array([0.3, 0.0, -0.3, 1.2]), 0.5)


@functools.cache
def policy_of(game):
    """The table of a game's logits with a value head, and its first parameters."""
    policy = with_heads(table_policy(game), 1, ["values"])
    params = policy.init(jax.random.key(0))
    return policy, params | {"heads": init_heads(jax.random.key(1), 1, ["values"])}


def judge_of(game):
    """Reads the action of a completion."""
    matrix = np.asarray(game.preferences, np.float64)
    judge = MatrixJudge(matrix, lambda prompt, completion: completion[0])
    return CheckedJudge(judge, missing="keep")


def reward_of(game):
    """A reward of each action."""
    values = np.asarray(game.preferences).mean(1)
    return lambda prompts, rows: np.array([[values[c[0]] for c in row] for row in rows])


def judges_of(game, **changes):
    """All that any method asks for."""
    reward = reward_of(game)
    low, high = np.quantile(np.asarray(game.preferences).mean(1), [0, 1])
    rewards = {
        "reward": reward,
        "points": lambda p, rows: 6 * (reward(p, rows) - low) / (high - low),
        "passed": lambda p, rows: (reward(p, rows) > (low + high) / 2).astype(float),
        "constraints": lambda p, rows: np.stack([reward(p, rows), 0.2 + 0 * reward(p, rows)], -1),
    }
    return Judges(**{"judge": judge_of(game), "rewards": rewards} | changes)


def prompts_for(game, num, completions=0):
    """The same prompt under many numbers, with actions as completions of a data set."""
    rng = np.random.default_rng(0)
    ids = np.zeros(1, np.int32)
    answers = lambda: tuple(rng.integers(0, game.num_actions, (completions, 1)).astype("i4"))  # noqa: E731
    return [Prompt(ids, i, None, answers(), (True,) * completions) for i in range(num)]


def packer(size, length=64, rows=1):
    """Groups of one-token completions in rows of one length, their number a multiple of `rows`."""
    shape = RowShape(length, length, length // (size + 1), size, 4)

    def pack(groups):
        fields = [TokenGroup(**vars(group)) for group in groups]
        batch, _ = pack_groups(fields, shape)
        return pad_rows(batch, padded_size(len(batch.tokens), rows))

    return pack


def play_game(game, method, workdir, *, rounds=2, prompts=16, optimizer=None, **given):
    """Plays, with all judges and rewards that any method asks for; drawn by `TableDrawer`."""
    policy, params = policy_of(game)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    judges = given.pop("judges", None) or judges_of(game)
    settings = given.pop("settings", None) or RoundSettings(rounds, prompts_per_round=prompts)
    drawer = given.pop("draw", None) or TableDrawer()
    return play(
        policy,
        params,
        method,
        optax.sgd(0.1) if optimizer is None else optimizer,
        given.pop("asked", None) or prompts_for(game, settings.prompts_per_round, 2),
        settings,
        draw=drawer,
        judges=judges,
        pack=given.pop("pack", None) or packer(method.group_size),
        mesh=mesh,
        param_shardings=param_shardings(policy.logical_axes, params, mesh),
        workdir=pathlib.Path(workdir),
        **given,
    )


def sampler_of(game, batch_size):
    """The sampler of language models."""
    return Drawer(policy_of(game)[0], SamplingConfig(1), stop_ids(game), batch_size=batch_size)


def logits_of(result):
    """`[N]` of the policy after the last round, with mean 0."""
    logits = np.asarray(result.state.params["logits"], np.float64)[0]
    return logits - logits.mean()


def probabilities(logits):
    """Softmax."""
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def rows_of(workdir, name):
    """What a round was trained on, as it lies in its file."""
    lines = (pathlib.Path(workdir) / "rounds" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class TableDrawer:
    """Draws from a game's logits by numpy: what the sampler does, without compiling anything."""

    max_prompt = None

    def check(self, prompts):
        """There is always room."""

    def __call__(self, draw, policies, prompts, key, *, mix=0.0):
        name = "policy" if draw.source == "mixture" else draw.source
        logits = np.asarray(policies[name]["logits"][0], np.float64)
        if draw.source == "mixture":
            logits = (1 - mix) * logits + mix * np.asarray(policies["reference"]["logits"][0])
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        p = probabilities(logits / (draw.temperature or 1.0))
        actions = rng.choice(len(p), (len(prompts), draw.count), p=p)
        tokens = [[np.array([a], np.int32) for a in row] for row in actions]
        logps = np.log(probabilities(logits))[actions].astype(np.float32)
        return Drawn(tokens, np.ones(actions.shape, bool), logps)


class Snapshots:
    """An `evaluate` that keeps each round's logits before and after it."""

    def __init__(self):
        self.before, self.after = [], []

    def __call__(self, params, last, number):
        self.before.append(np.array(last["logits"][0], np.float64))
        self.after.append(np.array(params["logits"][0], np.float64))
        return {}
