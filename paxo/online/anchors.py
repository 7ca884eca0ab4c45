"""The frozen policies of a run, as values: which a method keeps, and how a round moves them."""

from collections.abc import Mapping

import jax

from paxo.online.method import Schedule
from paxo.training.state import TrainState, snapshot
from paxo.types import Array, Params

Anchors = dict[str, Params]


def names(schedule: Schedule) -> tuple[str, ...]:
    """Anchors that a schedule wants.

    "snapshot" is the policy at the beginning of the round; "reference" one that moves; "ahead" the
    fitted policy of the round before, without the look-ahead; "anchor" the optimistic one;
    "average" that over the rounds.
    """
    used = {
        "reference": schedule.reference_every,
        "ahead": schedule.extrapolation,
        "anchor": schedule.optimistic,
        "average": schedule.average,
    }
    return ("snapshot", *(name for name, wanted in used.items() if wanted))


def reference(schedule: Schedule, anchors: Mapping[str, Params]) -> Params | None:
    """The reference of a round; None for that of the first round, which does not move."""
    if schedule.reference == "snapshot":
        return anchors["snapshot"]
    return anchors.get("reference")


def moved(
    schedule: Schedule, number: int, state: TrainState, anchors: Mapping[str, Params]
) -> tuple[TrainState, Anchors]:
    """State and anchors after round `number`, counted from 0."""
    anchors = dict(anchors)
    if schedule.extrapolation:
        fitted = snapshot(state.params)
        if number > 0:
            ahead = extrapolated(fitted, anchors["ahead"], schedule.extrapolation)
            state = state.replace(params=ahead)
        anchors["ahead"] = fitted
    if schedule.average:
        average = averaged(anchors["average"], state.params, schedule.average)
        # Where the policy lies: elsewhere, the next average would be another program.
        places = jax.tree.map(lambda x: x.sharding, state.params)
        anchors["average"] = jax.device_put(average, places)
    if schedule.reference_every and (number + 1) % schedule.reference_every == 0:
        anchors["reference"] = snapshot(state.params)
    return state, anchors


@jax.jit
def extrapolated(now: Params, before: Params, alpha: float | Array) -> Params:
    """Nesterov's look-ahead, arXiv:2410.06293: now + alpha (now - before).

    >>> float(extrapolated(2.0, 1.0, 0.5))
    2.5
    """
    return jax.tree.map(lambda x, y: x + (alpha * (x - y)).astype(x.dtype), now, before)


@jax.jit
def averaged(average: Params, params: Params, decay: float | Array) -> Params:
    """Exponential moving average: decay * average + (1 - decay) * params."""
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), average, params)
