"""A loss as a case of the conformance tests, and arrays for whatever its signature names."""

import dataclasses
import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np

from paxo.objectives import FROM_STEP, TOKENWISE

LEAD, TOKENS = (2, 3), 4
HEADS = {"scores": "K", "values": "KT", "step_scores": "KT", "token_weights": "KT"}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A loss with what cannot be read from its signature.

    Attributes:
        name: for messages.
        loss: the function.
        candidates: K.
        given: name -> numbers of an array, broadcast to its shape; labels are K - 1, ..., 1, 0
            and extras between 0.1 and 0.9 otherwise.
        base: hyper-parameters that the others are perturbed beside, where the defaults switch some
            of them off.
        perturbed: hyper-parameter -> another value, where none can be made from its annotation.
        axes: name -> axes of an extra after the leading ones, where they are not "K": "" for
            one number a group, "KK" for pairs of candidates, "KT" for tokens.
        log_ratios: the same number added to policy's and reference's log-probs changes nothing.
        group_shift: a number added to the policy's log-probs of a group changes nothing.
    """

    name: str
    loss: typing.Callable
    candidates: int = 2
    given: dict = dataclasses.field(default_factory=dict)
    base: dict = dataclasses.field(default_factory=dict)
    perturbed: dict = dataclasses.field(default_factory=dict)
    axes: dict = dataclasses.field(default_factory=dict)
    log_ratios: bool = False
    group_shift: bool = False

    def __str__(self):
        return self.name

    @functools.cached_property
    def parameters(self):
        """Of the loss's signature."""
        return inspect.signature(self.loss).parameters.values()

    @functools.cached_property
    def arrays(self):
        """Names of the positional arrays."""
        return [p.name for p in self.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.cached_property
    def hyper_parameters(self):
        """Name -> default (or base) value."""
        known = {
            p.name: p.default
            for p in self.parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in ("where", *FROM_STEP)
        }
        return known | self.base

    @property
    def takes_key(self):
        """Whether it draws at random."""
        return any(p.name == "key" for p in self.parameters)

    @property
    def coupled(self):
        """Whether it must see the whole batch."""
        return getattr(self.loss, "whole_batch", False)


def axes_of(case, name):
    """Axes of the array of that name after the leading ones: "", "K", "KT" or "KK"."""
    if name in HEADS:
        return HEADS[name]
    if name in TOKENWISE or name.endswith("_token_logps"):
        return "KT"
    return case.axes.get(name, "K")


def differentiated(case, inputs):
    """Names of the arrays that depend on the trained parameters."""
    trained = {"policy_logps", *TOKENWISE, *HEADS} - {"token_mask"}
    return [name for name in inputs if name in trained]


def made_inputs(case, seed=0, lead=LEAD):
    """Everything the loss takes, by name; sums of log-probs agree with the token-level ones."""
    rng = np.random.default_rng(seed)
    per_token = (*lead, case.candidates, TOKENS)
    lengths = rng.integers(1, TOKENS + 1, per_token[:-1])
    lengths[0, 0], lengths[0, 1] = 1, TOKENS
    lengths[..., 0], lengths[..., -1] = 1 + lengths[..., 0] // 2, 4 - lengths[..., -1] // 4
    mask = np.arange(TOKENS) < lengths[..., None]
    by_role = functools.cache(lambda role: rng.uniform(-2, -0.1, per_token) * mask)
    made = {}
    for name in [*case.arrays, "where"]:
        shape = (*lead, *({"K": case.candidates, "T": TOKENS}[a] for a in axes_of(case, name)))
        if name in case.given:
            made[name] = np.broadcast_to(np.float32(case.given[name]), shape)
        elif name == "where":
            made[name] = np.ones(shape, bool)
        elif name == "labels":
            made[name] = np.broadcast_to(np.float32(range(case.candidates)[::-1]), shape)
        elif name == "lengths":
            made[name] = lengths.astype(np.float32)
        elif name == "token_mask":
            made[name] = mask
        elif name.endswith("_token_logps"):
            made[name] = by_role(name.removesuffix("_token_logps")).astype(np.float32)
        elif name.endswith("_logps"):
            made[name] = by_role(name.removesuffix("_logps")).sum(-1).astype(np.float32)
        elif name not in FROM_STEP:
            drawn = rng.uniform(0.1, 0.9, shape).astype(np.float32)
            made[name] = -drawn if name == "token_collisions" else drawn
    return {name: jnp.asarray(x) for name, x in made.items()} | from_step(case)


def from_step(case):
    """The random key and the first memory, for the losses that take them."""
    given = {"key": jax.random.key(5)} if case.takes_key else {}
    if hasattr(case.loss, "init_state"):
        wanted = inspect.signature(case.loss.init_state).parameters
        state = case.loss.init_state(
            **{k: v for k, v in case.hyper_parameters.items() if k in wanted}
        )
        given["state"] = jax.tree.map(jnp.asarray, state)
    return given
