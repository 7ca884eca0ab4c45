"""Rows of self-play, as `paxo.online` has them, played on games in exact expectation."""

from typing import Any

from paxo.games.solve import Update
from paxo.games.updates import (
    extragradient,
    extrapolated,
    fit_each_round,
    gradient_move,
    moving_reference,
    play,
    snapshot_reference,
)


def from_row(row: Any, *, newton_steps: int = 0, **size: Any) -> Update:
    """A row of `paxo.online.METHODS` in exact expectation: any record with its fields will do.

    Its objective is minimised on what it draws, against its opponent, by one gradient step a round
    or, as its theory has it, to the end; its reference and look-ahead move by its schedule. Of a
    pair each verdict counts as often as the judge gives it, and a row that explores draws from the
    uniform policy.

    Args:
        row: e.g. `paxo.online.method("egpo", beta=0.1)`; its objective keeps its own numbers, so
            give it the game's KL weight.
        newton_steps: of a round's fit, see `fitted`; 0 takes one step of gradient descent.
        **size: of that step, `eta` or `rate`.

    Raises:
        ValueError: for rows that train on rewards, on completions of a data set, of the reference
            or of an average, or on a choice among more candidates than it trains on; for no fit
            where the loss measures from the round's snapshot.

    >>> import jax.numpy as jnp
    >>> from paxo.games import exact
    >>> from paxo.games.builders import rock_paper_scissors
    >>> from paxo.games.solve import solve
    >>> from paxo.online import method
    >>> game = rock_paper_scissors(beta=0.1, reference_logits=jnp.array([1.0, 0.0, 0.0]))
    >>> played = solve(game, from_row(method("egpo", beta=0.1), eta=0.3), 300, at=(300,))
    >>> bool(exact.duality_gap(game, played.logits[-1]) < 1e-5)
    True
    """
    schedule, (draw, *others) = row.schedule, row.draws
    opponent = None if row.opponent is None else row.opponent.source
    plain = draw.source == "policy" and not others and row.group_size == row.num_candidates <= 2
    if row.rewards or not row.judged or not plain or opponent not in (None, "policy", "mixture"):
        raise ValueError(
            f"row {row.name!r} is more than pairs of the policy, judged: it cannot be played in "
            "exact expectation. Rows that choose among K take draws=(2,), where they have one draw"
        )
    if schedule.hyper_parameters or schedule.replay or schedule.average:
        raise ValueError(f"row {row.name!r} has a schedule that depends on earlier rounds' data")
    if "previous" in row.objective.roles and not newton_steps:
        raise ValueError(
            f"row {row.name!r} measures from its snapshot, where one step says little: give "
            "newton_steps=8 (1 is exact for losses that are quadratic in margins)"
        )
    if newton_steps:
        update = fit_each_round(row.objective, newton_steps, optimistic=schedule.optimistic)
    else:
        move = gradient_move(row.objective, on_policy=draw.is_plain, **size)
        mix = row.mix if opponent == "mixture" else 0.0
        update = extragradient(move) if schedule.extragradient else play(move, mix=mix)
    if schedule.reference == "snapshot":
        update = snapshot_reference(update)
    elif schedule.reference_every:
        update = moving_reference(update, schedule.reference_every)
    return extrapolated(update, alpha=schedule.extrapolation) if schedule.extrapolation else update
