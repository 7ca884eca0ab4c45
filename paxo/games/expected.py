r"""The loss of any objective on a game, in exact expectation or on drawn actions.

The actions play the part of completions of one token: a group holds K of them, the judge knows
P, and the arrays that a loss names are filled in from policies over actions. So the losses that
train language models are those that run here.

>>> from paxo.games.builders import rock_paper_scissors
>>> from paxo.objectives import objective
>>> game, logits = rock_paper_scissors(beta=0.1), jnp.array([1.0, 0.0, 0.0])
>>> uniform = jnp.zeros(3)
>>> float(expected_loss(objective("dpo", beta=0.1), game, uniform, sampler=uniform))
0.693147
>>> regression = objective("online_ipo_v1", beta=0.1)
>>> grad = jax.grad(lambda x: expected_loss(regression, game, x))(logits)
>>> float(jnp.sum(grad)) < 1e-5
True
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from paxo.games.exact import kl_divergence
from paxo.games.preference_game import PreferenceGame
from paxo.numerics import Array, Mean, at_least_float32
from paxo.objectives import Objective, Term

Loss = Objective | Callable[..., Any]


def expected_loss(
    loss: Loss,
    game: PreferenceGame,
    logits: Array,
    *,
    sampler: Array | Sequence[Array] | None = None,
    opponent: Array | None = None,
    previous: Array | None = None,
    reference: Array | None = None,
    candidates: int = 2,
    hard_labels: bool = False,
    extras: Mapping[str, Array] | None = None,
    group_extras: Mapping[str, Array] | None = None,
    key: Array | None = None,
) -> Array:
    r"""`[...]` mean of a loss over all groups of K actions, each drawn from `sampler`.

    A loss that names `labels` is told how often each action beats the others of its group; one that
    does not takes pairs "winner first", so that each ordered pair counts as often as the judge
    says. Whoever draws and judges is fixed: gradients go through the policy's log-probs alone.

    Losses over the whole batch see all groups as one batch, each once, and what they say of each is
    then weighted. Of those that say one figure for all (KTO, BCO, beta-DPO, DRPO's ranks) every
    group counts once: there is no sampler to choose. Those with memory start from their first one.

    Args:
        loss: an objective, or a loss function whose hyper-parameters have been bound.
        game: one or several.
        logits: `[..., N]` of the live policy, differentiated.
        sampler: `[..., N]` logits that actions are drawn from; uniform where None. K of them draw
            each candidate from its own.
        opponent: `[..., N]` logits that `win_rates` and `preference_scores` are against; the live
            policy where None.
        previous: `[..., N]` logits of the snapshot, where the loss names `previous_logps`.
        reference: `[..., N]` logits, where it is not the game's.
        candidates: K; all N^K groups are visited.
        hard_labels: whether a loss that names `labels` gets (1, 0) or (0, 1), as often as the judge
            says, instead of probabilities; for K = 2.
        extras: name -> `[..., N]` of each action, for any other array that the loss names; by token
            `[..., N, 1]`. `[N, ...]` is the same for all games.
        group_extras: name -> `[..., N, ..., N]` of each group, K axes in the order in which its
            actions stand, and more where the loss has more; for arrays that belong to no one
            action, such as flip rates. `[N, ..., N]` is the same for all games.
        key: random key of losses that draw.

    Raises:
        ValueError: if nobody gives an array that the loss cannot do without, for logits that do not
            fit the game, for hard labels of other groups than pairs, or for a sampler where groups
            cannot be weighted.
    """
    if hard_labels and candidates != 2:
        raise ValueError(f"hard_labels=True is for pairs; got candidates={candidates}")
    parts = _parts(
        game, logits, sampler, opponent, previous, reference, extras, group_extras, candidates
    )

    def on_one(parts: dict[str, Any]) -> Array:
        preferences, against = parts["preferences"], jax.nn.softmax(parts["opponent"])
        groups = _AllGroups(game.num_actions, candidates)
        judged = groups.judged(preferences)
        weights = groups.weights([jax.nn.log_softmax(x) for x in parts["sampler"]])
        judge = {
            "win_rates": lambda: groups.values(preferences @ against),
            "preference_scores": lambda: groups.values(_logit(preferences) @ against),
        }
        total = jnp.zeros((), weights.dtype)
        for term in _terms(loss):
            given, weighted = dict(judge), weights
            if candidates == 2 and (hard_labels or "labels" not in term.arrays):
                # Either of the pair may be the winner: it then stands first.
                weighted = (weights + weights.T) * judged[..., 0, 1]
                given["labels"] = lambda: jnp.broadcast_to(jnp.array([1, 0]), (*weights.shape, 2))
            else:
                given["labels"] = lambda: _soft_labels(judged)
            losses = _call(term, parts, groups, given | {"key": lambda: key})
            if sampler is not None and _is_one_figure(losses, weights):
                raise ValueError(
                    f"loss {term.name!r} says one figure for its whole batch, in which groups "
                    "cannot be weighted: leave `sampler` out, or use sampled_loss"
                )
            total += term.weight * _weighted_mean(losses, weighted)
        return total

    return _over_games(on_one, parts, game.batch_shape)


def sampled_loss(
    loss: Loss,
    game: PreferenceGame,
    logits: Array,
    key: Array,
    *,
    num_samples: int,
    sampler: Array | Sequence[Array] | None = None,
    opponent: Array | None = None,
    previous: Array | None = None,
    reference: Array | None = None,
    candidates: int = 2,
    extras: Mapping[str, Array] | None = None,
    group_extras: Mapping[str, Array] | None = None,
) -> Array:
    r"""`[...]` mean of a loss over drawn groups: without bias, what `expected_loss` gives.

    Each group of K actions comes with one drawn opponent, shared by its actions, so that
    `win_rates` are the judge's probabilities against that one. A loss that takes pairs winner
    first gets them in the order of a drawn verdict.

    Args:
        loss: an objective, or a loss function whose hyper-parameters have been bound.
        game: one or several; each draws its own groups.
        logits: `[..., N]` of the live policy, differentiated.
        key: random key.
        num_samples: groups drawn for each game.
        sampler: see `expected_loss`, as for the rest.
        opponent: see there.
        previous: see there.
        reference: see there.
        candidates: K.
        extras: see there.
        group_extras: see there.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    parts = _parts(
        game, logits, sampler, opponent, previous, reference, extras, group_extras, candidates
    )
    for_draws, for_loss = jax.random.split(key)
    shape = (*game.batch_shape, num_samples, candidates + 2)
    parts["uniform"] = jax.random.uniform(for_draws, shape, parts["policy"].dtype)

    def on_one(parts: dict[str, Any]) -> Array:
        preferences, uniform = parts["preferences"], parts["uniform"]
        drawn = [_drawn(uniform[:, k], x) for k, x in enumerate(parts["sampler"])]
        index = jnp.stack(drawn, -1)
        against = _drawn(uniform[:, candidates, None], parts["opponent"])
        weights = jnp.full(num_samples, 1 / num_samples, preferences.dtype)
        total = jnp.zeros((), weights.dtype)
        for term in _terms(loss):
            ordered = index
            if candidates == 2 and "labels" not in term.arrays:
                wins = uniform[:, -1] < preferences[index[:, 0], index[:, 1]]
                ordered = jnp.where(wins[:, None], index, index[:, ::-1])
            groups = _DrawnGroups(ordered, game.num_actions)
            matchups = preferences[ordered, against]
            given = {
                "win_rates": lambda m=matchups: m,
                "preference_scores": lambda m=matchups: _logit(m),
                "labels": lambda g=groups: _soft_labels(g.judged(preferences)),
                "key": lambda: for_loss,
            }
            total += term.weight * _weighted_mean(_call(term, parts, groups, given), weights)
        return total

    return _over_games(on_one, parts, game.batch_shape)


class _Groups(Protocol):
    """Groups of K actions: what lies along their leading axes."""

    def values(self, x: Array) -> Array:
        """`[N, ...] -> [groups, K, ...]`."""
        ...

    def judged(self, preferences: Array) -> Array:
        """`[N, N] -> [groups, K, K]`."""
        ...

    def of_groups(self, x: Array) -> Array:
        """`[N, ..., N, ...] -> [groups, ...]`, the first K axes in the order of the actions."""
        ...


@dataclasses.dataclass(frozen=True)
class _AllGroups:
    """All N^K of them, one axis for each place: broadcasting, so that gradients are sums."""

    num_actions: int
    size: int

    def values(self, x: Array) -> Array:
        lead = (self.num_actions,) * self.size
        places = [
            jnp.broadcast_to(x.reshape(self._at((k,)) + x.shape[1:]), lead + x.shape[1:])
            for k in range(self.size)
        ]
        return jnp.stack(places, self.size)

    def judged(self, preferences: Array) -> Array:
        places = range(self.size)
        own = jnp.full((self.num_actions,) * self.size, 0.5, preferences.dtype)
        rows = [
            jnp.stack([own if i == j else self._pair(preferences, i, j) for j in places], -1)
            for i in places
        ]
        return jnp.stack(rows, -2)

    def of_groups(self, x: Array) -> Array:
        return x

    def weights(self, logps: Sequence[Array]) -> Array:
        """`[N, ..., N]` probability of each group, its candidates drawn independently."""
        return jnp.exp(sum(self._along(x, (k,)) for k, x in enumerate(logps)))

    def _pair(self, preferences: Array, i: int, j: int) -> Array:
        return self._along(preferences if i < j else preferences.T, (min(i, j), max(i, j)))

    def _along(self, x: Array, places: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(x.reshape(self._at(places)), (self.num_actions,) * self.size)

    def _at(self, places: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.num_actions if k in places else 1 for k in range(self.size))


@dataclasses.dataclass(frozen=True)
class _DrawnGroups:
    """Those of `index [S, K]`."""

    index: Array
    num_actions: int

    def values(self, x: Array) -> Array:
        # A comparison instead of a gather, whose gradient would be a scatter: slow on CPUs.
        hit = self.index[..., None] == jnp.arange(self.num_actions)
        rest = x.shape[1:]
        hit = hit.reshape(hit.shape + (1,) * len(rest))
        return jnp.sum(jnp.where(hit, x, 0), self.index.ndim)

    def judged(self, preferences: Array) -> Array:
        own = jnp.eye(self.index.shape[-1], dtype=bool)
        return jnp.where(own, 0.5, preferences[self.index[:, :, None], self.index[:, None, :]])

    def of_groups(self, x: Array) -> Array:
        return x[tuple(self.index.T)]


def _samplers(sampler: Any, candidates: int) -> list[Array | None]:
    """One for each candidate."""
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1; got {candidates}")
    if sampler is None or hasattr(sampler, "shape"):
        return [sampler] * candidates
    if len(sampler) != candidates:
        raise ValueError(
            f"sampler must be one policy's logits or {candidates}, one a candidate; got "
            f"{len(sampler)}"
        )
    return list(sampler)


def _parts(
    game, logits, sampler, opponent, previous, reference, extras, group_extras, candidates
) -> dict[str, Any]:
    """Everything that has one value for each game, with all leading axes of the games."""
    lead = (*game.batch_shape, game.num_actions)
    logits = at_least_float32(game.checked("logits", logits))
    if logits.ndim > len(lead):
        raise ValueError(
            f"logits must have shape {list(lead)}, one policy a game; got {list(logits.shape)}: "
            "jax.vmap over further axes"
        )

    def fixed(name: str, x: Array) -> Array:
        return jax.lax.stop_gradient(jnp.broadcast_to(game.checked(name, x), lead))

    uniform = jnp.zeros(game.num_actions, logits.dtype)
    parts = {
        "preferences": game.preferences,
        "policy": jnp.broadcast_to(logits, lead),
        "sampler": [
            fixed("sampler", uniform if x is None else x) for x in _samplers(sampler, candidates)
        ],
        "opponent": fixed("opponent", logits if opponent is None else opponent),
        "reference": fixed("reference", game.reference_logps if reference is None else reference),
        "extras": _for_games(game, "extras", extras, 1),
        "group_extras": _for_games(game, "group_extras", group_extras, candidates),
    }
    return parts if previous is None else parts | {"previous": fixed("previous", previous)}


def _for_games(game: PreferenceGame, what: str, given: Any, places: int) -> dict[str, Array]:
    """Values of actions, or groups of that many of them, with all leading axes of the games."""
    own = (game.num_actions,) * places
    lead, found = (*game.batch_shape, *own), {}
    for name, x in (given or {}).items():
        x = jnp.asarray(x)
        if x.shape[: len(lead)] != lead:
            if x.shape[:places] != own:
                raise ValueError(
                    f"{what}[{name!r}] must have shape {list(lead)} or {list(own)}, one value "
                    f"{'an action' if what == 'extras' else 'a group'} (and more axes where the "
                    f"loss has more); got {list(x.shape)}"
                )
            x = jnp.broadcast_to(x, (*game.batch_shape, *x.shape))
        found[name] = x
    return found


def _over_games(function: Callable[[dict[str, Any]], Array], parts: Any, batch_shape: Any) -> Array:
    for _ in batch_shape:
        function = jax.vmap(function)
    return function(parts)


def _terms(loss: Loss) -> tuple[Term, ...]:
    if not callable(loss) and not isinstance(loss, Objective):
        raise TypeError(
            f"loss must be an objective, as objective('dpo', beta=0.1), or a loss function; got "
            f"{loss!r}"
        )
    return loss.terms if isinstance(loss, Objective) else (Term("loss", loss, {}),)


def _drawn(uniform: Array, logits: Array) -> Array:
    """Actions by the inverse of their distribution function: one number each, not N."""
    p = jax.nn.softmax(logits)
    below = jnp.tri(p.size, dtype=p.dtype) @ p  # compiled ten times as fast as a cumulative sum
    return jnp.sum(uniform[..., None] * below[-1] >= below[:-1], -1)


def _soft_labels(judged: Array) -> Array:
    """`[..., K, K] -> [..., K]` how often each beats the others: (p, 1 - p) for a pair."""
    others = judged.shape[-1] - 1
    if not others:
        return jnp.ones(judged.shape[:-1], judged.dtype)
    return (jnp.sum(judged, -1) - 0.5) / others


def _logit(p: Array) -> Array:
    return jnp.log(p) - jnp.log1p(-p)


def _call(term: Term, parts: dict[str, Any], groups: _Groups, given: Mapping[str, Any]) -> Any:
    """The loss of every group, from whatever arrays its signature names."""
    logps = {
        role: jax.nn.log_softmax(parts[role])
        for role in ("policy", "reference", "previous")
        if role in parts
    }
    shape = groups.values(logps["policy"]).shape
    on_tokens = lambda x: jnp.broadcast_to(x, (*shape, 1))  # noqa: E731
    p = jnp.exp(logps["policy"])
    providers = {
        "lengths": lambda: jnp.ones(shape, p.dtype),
        "where": lambda: jnp.ones(shape, bool),
        "token_mask": lambda: jnp.ones((*shape, 1), bool),
        "token_entropies": lambda: on_tokens(-jnp.sum(p * logps["policy"])),
        "token_collisions": lambda: on_tokens(jnp.log(jnp.sum(p * p))),
        "token_kls": lambda: on_tokens(kl_divergence(logps["reference"], logps["policy"])),
        **given,
    }
    for role, x in logps.items():
        providers[f"{role}_logps"] = lambda x=x: groups.values(x)
        providers[f"{role}_token_logps"] = lambda x=x: groups.values(x)[..., None]
    for name, x in parts["extras"].items():
        providers[name] = lambda x=x: groups.values(x)
    for name, x in parts["group_extras"].items():
        providers[name] = lambda x=x: groups.of_groups(x)
    if term.stateful:
        wanted = inspect.signature(term.loss.init_state).parameters
        hyper = {name: x for name, x in term.hyper_parameters.items() if name in wanted}
        providers["state"] = lambda: term.loss.init_state(**hyper)
    missing = [name for name, needed in term.arrays.items() if needed and name not in providers]
    if missing:
        known = sorted(set(providers) - {"state", "key"})
        raise ValueError(
            f"loss {term.name!r} needs {', '.join(missing)}, which nobody gives: pass "
            "extras={name: values [..., N]}, group_extras={name: values [N, ..., N]} for one a "
            f"group, or previous=logits; there are {', '.join(known)}"
        )
    arrays = {name: providers[name]() for name in term.arrays if name in providers}
    result = _run(term, arrays)
    coupled = getattr(term.loss, "whole_batch", False)
    if isinstance(result, Mean) and result.total.shape != shape[:-1] and not coupled:
        # A loss that adds its groups up: each is called alone, so that it can be weighed.
        axes = {name: None if name == "key" else 0 for name in arrays}
        alone = functools.partial(_run, term)
        for _ in shape[:-1]:
            alone = jax.vmap(alone, in_axes=(axes,))
        result = alone(arrays)
    return result


def _run(term: Term, arrays: Mapping[str, Any]) -> Any:
    result = term.loss(**arrays, **term.hyper_parameters)
    return result[0] if term.stateful else result


def _weighted_mean(losses: Array | Mean, weights: Array) -> Array:
    if not isinstance(losses, Mean):
        return jnp.sum(weights * losses)
    if _is_one_figure(losses, weights):
        return losses.value
    return Mean(jnp.sum(weights * losses.total), jnp.sum(weights * losses.count)).value


def _is_one_figure(losses: Array | Mean, weights: Array) -> bool:
    return isinstance(losses, Mean) and losses.total.shape != weights.shape
