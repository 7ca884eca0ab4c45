"""Games with known answers: transitive, cyclic, random, and those that papers published.

>>> game = rock_paper_scissors(beta=0.1)
>>> game.preferences[0].tolist()
[0.5, 0.0, 1.0]
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxo.games.exact import kl_divergence
from paxo.games.preference_game import PreferenceGame, mirrored
from paxo.numerics import Array

EGPO_SEED = 2018011309


def bradley_terry(
    rewards: Array, *, beta: float, reference_logits: Array | None = None
) -> PreferenceGame:
    """Preferences that one reward explains: P(i beats j) = sigmoid(r_i - r_j).

    Args:
        rewards: `[..., N]`.
        beta: KL weight.
        reference_logits: `[..., N]`; uniform where None.
    """
    rewards = jnp.asarray(rewards, float)
    if not rewards.ndim:
        raise ValueError(
            f"rewards must have shape [..., N], one an action; got the number {rewards}"
        )
    differences = rewards[..., :, None] - rewards[..., None, :]
    return _game(jax.nn.sigmoid(differences), reference_logits, beta)


def cyclic(
    num_actions: int, *, beta: float, win: float = 1.0, reference_logits: Array | None = None
) -> PreferenceGame:
    """Each action beats those that follow it on the shorter way round; opposites tie.

    The uniform policy is the Nash policy for a uniform reference, and any scalar reward ranks at
    least one edge of the cycle wrongly.

    Args:
        num_actions: N, at least 3.
        beta: KL weight.
        win: probability with which an action beats the next ones, in [0, 1].
        reference_logits: `[N]`; uniform where None.
    """
    if not isinstance(num_actions, int) or num_actions < 3:
        raise ValueError(
            f"num_actions of a cycle must be an integer of at least 3; got {num_actions}"
        )
    if not isinstance(win, jax.core.Tracer) and not 0 <= win <= 1:
        raise ValueError(f"win must be a probability, in [0, 1]; got {win}")
    ahead = (jnp.arange(num_actions) - jnp.arange(num_actions)[:, None]) % num_actions
    first = (ahead > 0) & (2 * ahead < num_actions)
    opposite = (ahead == 0) | (2 * ahead == num_actions)
    preferences = jnp.where(opposite, 0.5, jnp.where(first, win, 1.0 - win))
    return _game(preferences, reference_logits, beta)


def rock_paper_scissors(*, beta: float, reference_logits: Array | None = None) -> PreferenceGame:
    """Rock, paper, scissors: each beats the one before it, always."""
    preferences = jnp.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
    return _game(preferences, reference_logits, beta)


def random_game(
    key: Array, num_actions: int, *, beta: float, batch_shape: tuple[int, ...] = ()
) -> PreferenceGame:
    """EGPO's construction: uniform preferences below the diagonal, normal reference logits.

    Args:
        key: random key.
        num_actions: N.
        beta: KL weight.
        batch_shape: games side by side.
    """
    for_preferences, for_reference = jax.random.split(key)
    shape = (*batch_shape, num_actions, num_actions)
    drawn = jax.random.uniform(for_preferences, shape, dtype=float)
    return _game(mirrored(drawn), jax.random.normal(for_reference, shape[:-1], dtype=float), beta)


def numpy_game(
    seed: int, num_actions: int = 10, *, beta: float, num_games: int = 10
) -> PreferenceGame:
    """The same construction from `numpy.random.default_rng(seed)`, first references, then all P."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((num_games, num_actions))
    drawn = rng.random((num_games, num_actions, num_actions))
    return _game(mirrored(jnp.asarray(drawn)), jnp.asarray(reference), beta)


def egpo_golden(
    *, beta: float, num_actions: int = 10, num_games: int = 10, seed: int = EGPO_SEED
) -> PreferenceGame:
    """The games of EGPO's simulations, as its authors' torch code draws them on a CPU.

    Zhou et al. 2025, arXiv:2503.08942: ten games at once, ten actions (a hundred for the neural
    policy), this seed. torch's generator is emulated in numpy: preferences agree bit for bit with
    torch 2.13, reference logits to 6e-7. On a CUDA machine the authors' code draws other games.

    Args:
        beta: KL weight; the paper plots 0.001, 0.01 and 0.1.
        num_actions: N; at least 16 reference logits must be drawn in all.
        num_games: games side by side.
        seed: the authors also list 42, 142857, 2225393 and 20000308.

    >>> with jax.enable_x64(True):
    ...     game = egpo_golden(beta=0.1)
    >>> round(float(game.preferences[0, 1, 0]), 8)
    0.74345791
    """
    stream = _TorchStream(seed)
    reference = stream.normals(num_games * num_actions).reshape(num_games, num_actions)
    drawn = stream.uniforms(num_games * num_actions**2)
    drawn = drawn.reshape(num_games, num_actions, num_actions)
    return _game(mirrored(jnp.asarray(drawn)), jnp.asarray(reference), beta)


def comal_3x3(*, beta: float, reference_logits: Array | None = None) -> PreferenceGame:
    """COMAL's cycle of three: P(b beats a) = P(c beats b) = 0.9, P(a beats c) = 0.8.

    Its unregularised Nash policy is (4, 3, 4) / 11. Liu et al. 2024, arXiv:2410.23223.
    """
    preferences = jnp.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])
    return _game(preferences, reference_logits, beta)


class Bandit(NamedTuple):
    """Actions with rewards instead of preferences.

    Attributes:
        rewards: `[..., N]`.
        reference_logps: `[N]` log-probs of the reference.
        beta: weight of the KL to the reference; 0 for none.
        offline_logps: `[2, N]` log-probs of the policies that gave each side of the offline pairs,
            or None.
    """

    rewards: Array
    reference_logps: Array
    beta: Array
    offline_logps: Array | None = None

    @property
    def best_policy(self) -> Array:
        """`[..., N]` log-probs of the policy with the highest value, reference exp(R / beta).

        For beta = 0 all on the first action with the highest reward.
        """
        soft = self.reference_logps + self.rewards / jnp.where(self.beta > 0, self.beta, 1)
        best = jnp.argmax(self.rewards, -1, keepdims=True) == jnp.arange(self.rewards.shape[-1])
        hard = jnp.where(best, 0.0, -jnp.inf)
        return jnp.where(self.beta > 0, jax.nn.log_softmax(soft), hard)

    def value(self, logits: Array) -> Array:
        """`[...]` expected reward minus beta times the KL to the reference."""
        earned = jnp.sum(jax.nn.softmax(logits) * self.rewards, -1)
        return earned - self.beta * kl_divergence(logits, self.reference_logps)

    def regret(self, logits: Array) -> Array:
        """`[...]` how far the policy's value lies below the best one's."""
        return self.value(self.best_policy) - self.value(logits)

    def game(self) -> PreferenceGame:
        """The Bradley–Terry game of these rewards."""
        shape = self.rewards.shape
        return bradley_terry(
            self.rewards,
            beta=self.beta,
            reference_logits=jnp.broadcast_to(self.reference_logps, shape),
        )


def copg_bandit() -> Bandit:
    """CoPG's three arms, with the two policies that gave its offline pairs.

    Flet-Berliac et al. 2024, arXiv:2406.19185: rewards (2.5, 2, 1), beta 1/2, uniform reference.

    >>> round(float(copg_bandit().regret(jnp.zeros(3))), 3)
    0.292
    """
    return Bandit(
        rewards=jnp.array([2.5, 2.0, 1.0]),
        reference_logps=jnp.full(3, -math.log(3)),
        beta=jnp.asarray(0.5),
        offline_logps=jnp.log(jnp.array([[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]])),
    )


def didactic_bandit(*, beta: float = 0.0) -> Bandit:
    """A hundred bins with rewards in four places, two of them where the reference hardly goes.

    Tajwar et al. 2024, arXiv:2404.14367. The reference is the law of tanh(Cauchy(-0.7, 0.4)) in
    100 equal bins of [-1, 1] (the authors take a histogram of 10,000 draws of it). Rewards
    `[4, 100]`: exp(-((a - 70) / 10)²) ("R4"), the same at 20 ("R5"), and at 70 of widths 20 ("R8")
    and 30 ("R9").

    Args:
        beta: KL weight of `value`; the paper has none.
    """
    if beta < 0:
        raise ValueError(f"beta must be at least 0; got {beta}")
    edges = np.linspace(-1, 1, 101)[1:-1]
    below = 0.5 + np.arctan((np.arctanh(edges) + 0.7) / 0.4) / np.pi
    bins = np.diff(np.concatenate([[0.0], below, [1.0]]))
    action = np.arange(100)
    peaks = ((70, 10), (20, 10), (70, 20), (70, 30))
    rewards = np.stack([np.exp(-(((action - at) / width) ** 2)) for at, width in peaks])
    return Bandit(jnp.asarray(rewards), jnp.log(jnp.asarray(bins)), jnp.asarray(beta, float))


def _game(preferences: Array, reference_logits: Array | None, beta: float) -> PreferenceGame:
    uniform = jnp.zeros(preferences.shape[:-1])
    return PreferenceGame(
        preferences, uniform if reference_logits is None else reference_logits, beta
    )


class _TorchStream:
    """torch's CPU random numbers after `manual_seed`, from numpy's Mersenne twister."""

    def __init__(self, seed: int):
        self.twister = np.random.RandomState(seed)

    def uniforms(self, number: int) -> np.ndarray:
        """As `torch.rand`: the low 24 bits of 32."""
        raw = self.twister.randint(0, 2**32, size=number, dtype=np.uint32)
        return (raw & np.uint32(0xFFFFFF)) / 2.0**24

    def normals(self, number: int) -> np.ndarray:
        """As `torch.randn` of at least 16 numbers: Box–Muller on blocks of 8 and 8."""
        if number < 16:
            raise ValueError(
                f"fewer than 16 reference logits ({number}) are drawn by another rule in torch; "
                "ask for more games or actions"
            )
        drawn = self.uniforms(number)
        for start in range(0, number - 15, 16):
            drawn[start : start + 16] = _box_muller(drawn[start : start + 16])
        if number % 16:
            drawn[-16:] = _box_muller(self.uniforms(16))
        return drawn


def _box_muller(block: np.ndarray) -> np.ndarray:
    radius, angle = np.sqrt(-2 * np.log(1 - block[:8])), 2 * np.pi * block[8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
