"""Methods on games as a few compiled programs, and published figures as they are printed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from paxo.games import builders, exact, updates
from paxo.games.solve import Update, solve

SEEN = 8  # iterations kept by every run: one program a method


def golden(beta):
    """The ten published games, in the precision that is on."""
    return _golden(beta, jax.config.jax_enable_x64)


@functools.cache
def _golden(beta, _):
    return builders.egpo_golden(beta=beta)


def sized(make):
    """The method `make(eta, mix)` with both as memory: one program for all steps and KL weights."""

    def step(logits, game, t, key, sizes):
        eta, mix = sizes
        return make(eta, lambda t: mix).step(logits, game, t, key, ())[0], sizes

    return Update(step)


METHODS = {
    "online_ipo_v1": sized(lambda eta, mix: updates.online_ipo_v1(eta=eta)),
    "online_ipo_v2": sized(lambda eta, mix: updates.online_ipo_v2(eta=eta)),
    "nash_md": sized(lambda eta, mix: updates.nash_md(eta=eta, mix=mix)),
    "nash_md_pg": sized(lambda eta, mix: updates.nash_md_pg(eta=eta, mix=mix)),
    "egpo": sized(lambda eta, mix: updates.egpo(eta=eta)),
}


def scheduled(logits, game, t, key, sizes):
    """Mirror steps of given sizes against mixtures of given weights."""
    eta, weight = sizes[:, t]
    against = exact.mixture(logits, game.reference_logps, weight)
    return exact.mirror_step(game, logits, eta=eta, opponent=against), sizes


SCHEDULED = Update(scheduled)
LONGEST = 100_000


def played(game, update, at, **options):
    """A run with at least these iterations, `SEEN` of them, and where those asked for are."""
    others = (t for t in itertools.count() if t not in at)
    every = sorted({*at, *itertools.islice(others, SEEN - len(at))})
    return solve(game, update, every[-1], at=every, **options), np.searchsorted(every, at)


def gaps(game, update, at, *, average=False, **options):
    """Mean duality gaps at these iterations."""
    run, kept = played(game, update, at, **options)
    found = exact.duality_gap(game, run.average if average else run.logits)
    return np.asarray(found).reshape(len(found), -1).mean(-1)[kept]


@functools.cache
def method_gaps(name, game, at, *, eta, mix=0.0):
    """Those of a method of `METHODS`."""
    sizes = jnp.asarray([eta, mix], game.beta.dtype)
    return gaps(game, METHODS[name], at, memory=sizes)


def mirror_gaps(game, at, *, eta, mix=False, average=False):
    """What `mirror_descent(eta=eta, mix=mix)` gives, with `eta` a number or a schedule."""
    t = np.arange(LONGEST, dtype=float)
    size = eta(t) if callable(eta) else np.full(t.shape, eta)
    weight = size * float(game.beta) if mix else np.zeros(t.shape)
    sizes = jnp.asarray(np.stack([size, weight]))
    return gaps(game, SCHEDULED, at, average=average, memory=sizes)


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def agrees(found, printed):
    """To 1 %, and half a unit of the last digit where fewer than three are printed; 0 to 1e-14.

    Args:
        found: figures.
        printed: the same in one text, as a table has them; `-` for one that is not compared.
    """
    cells = printed.split()
    assert len(cells) == len(found)
    for value, cell in zip(np.asarray(found, float), cells):
        if cell != "-":
            np.testing.assert_allclose(value, float(cell), rtol=0, atol=room(cell))


def room(cell):
    digits, _, exponent = cell.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    few = len(digits.replace(".", "").lstrip("0")) < 3
    return max(0.01 * float(cell) + (unit / 2 if few else 0), 1e-14) if float(cell) else 1e-14
