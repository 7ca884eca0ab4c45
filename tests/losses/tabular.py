"""Exact preference games for tests: a softmax policy over N actions, all pairs, in float64.

Use inside `jax.enable_x64(True)`; the fixture `float64` of this module does that for a whole file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def float64():
    """Every test of a file that imports this runs in float64."""
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Game:
    """P `[N, N]` probability that a row's action beats a column's; log-probs of the reference."""

    preferences: np.ndarray
    reference: np.ndarray
    beta: float

    @property
    def size(self):
        """N."""
        return len(self.reference)

    def win_rates(self, opponent):
        """`[N]` against an opponent's probabilities."""
        return self.preferences @ opponent

    def mirror_step(self, logits, eta, opponent=None):
        """Log-probs after one step of mirror descent on win rate and KL to the reference."""
        opponent = softmax(logits) if opponent is None else opponent
        moved = (1 - eta * self.beta) * logits + eta * self.beta * self.reference
        return log_softmax(moved + eta * self.win_rates(opponent))

    def nash(self, beta=None):
        """Log-probs of the regularised Nash policy, by extragradient to float64's last digits."""
        game = dataclasses.replace(self, beta=self.beta if beta is None else beta)
        logits, eta = game.reference, 1 / (game.beta + 3)
        for _ in range(int(45 / (eta * game.beta))):
            half = game.mirror_step(logits, eta)
            logits = game.mirror_step(logits, eta, softmax(half))
        return logits


def made_game(seed=0, size=5, beta=0.3):
    """Preferences uniform and antisymmetric, a normal reference: EGPO's construction."""
    rng = np.random.default_rng(seed)
    below = np.tril(rng.uniform(size=(size, size)), -1)
    above = np.triu(1 - below.T, 1)
    return Game(
        below + above + np.eye(size) / 2, log_softmax(rng.standard_normal(size)), float(beta)
    )


def made_logits(seed, size=5):
    """Log-probs of some policy."""
    return log_softmax(np.random.default_rng(100 + seed).standard_normal(size))


def softmax(x):
    return np.exp(log_softmax(x))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    peak = x.max(-1, keepdims=True)
    return x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))


def pairs(x):
    """`[N] -> [N, N, 2]` the values of both actions of every ordered pair."""
    x = jnp.asarray(x)
    return jnp.stack(jnp.broadcast_arrays(x[:, None], x[None, :]), axis=-1)


def judged(game):
    """`[N, N, 2]` how often each action of a pair beats the other."""
    return jnp.stack([game.preferences, game.preferences.T], axis=-1)


def expected(losses, *weights):
    """Sum of the losses of all pairs `[N, N]`, weighed with the product of weights that fit it."""
    total = losses
    for weight in weights:
        total = total * weight
    return jnp.sum(total)


def product(first, second):
    """`[N, N]` probability of a pair whose actions are drawn independently."""
    return np.outer(first, second)


def uniform(game):
    """Every ordered pair alike, an action with itself included."""
    return np.full((game.size, game.size), game.size**-2.0)


def gradient(loss, logits):
    """Of `loss(log-probs [N])` with respect to the logits of a softmax policy."""
    return np.asarray(jax.grad(lambda x: loss(jax.nn.log_softmax(x)))(jnp.asarray(logits)))


def minimise(loss, start, steps=30):
    """Log-probs that minimise a convex `loss(log-probs)`, by Newton's method on the logits.

    The softmax leaves one direction flat; the pseudo-inverse of the Hessian steps across it.
    """
    run = lambda x: loss(jax.nn.log_softmax(x))  # noqa: E731
    step = jax.jit(
        lambda x: x - jnp.linalg.pinv(jax.hessian(run)(x), rtol=1e-10) @ jax.grad(run)(x)
    )
    logits = jnp.asarray(start)
    for _ in range(steps):
        logits = step(logits)
    found = log_softmax(logits)
    assert np.abs(gradient(loss, found)).max() < 1e-9, "Newton's method has not converged"
    return found


def tilted(logits, rewards, scale=1.0):
    """Log-probs of the policy times exp(scale * rewards), normalised."""
    return log_softmax(np.asarray(logits) + scale * np.asarray(rewards))


def kl(p, q):
    """KL(p|q) of log-probs, in nats."""
    return float(np.sum(np.exp(p) * (p - q)))


def assert_close(found, wanted, atol=1e-12):
    """Equality to nearly all digits of float64."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class Tree:
    """All completions of `depth` tokens out of `vocab`, under a policy of free logits.

    Logits are `[1 + vocab, vocab]`: of the first token, then of the second after each first one.
    """

    vocab: int = 3

    @property
    def completions(self):
        """`[vocab², 2]` token ids."""
        return np.stack(np.divmod(np.arange(self.vocab**2), self.vocab), axis=-1)

    def logits(self, seed):
        """Of some policy."""
        return np.random.default_rng(seed).standard_normal((1 + self.vocab, self.vocab))

    def token_logps(self, logits):
        """`[vocab², 2]` log-probs of the tokens of every completion."""
        table = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
        first, second = self.completions.T
        return jnp.stack([table[0, first], table[1 + first, second]], axis=-1)

    def logps(self, logits):
        """`[vocab²]` log-probs of the completions."""
        return self.token_logps(logits).sum(-1)
