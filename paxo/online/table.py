"""The methods, one row each. Every number is its paper's (or the named code's); any can be changed.

| row | candidates | opponent | trained on | anchor |
|---|---|---|---|---|
| online_dpo, online_ipo, online_slic | 2 of the policy | each other | the pair | first |
| online_simpo | 2 of the policy | each other | the pair | none |
| online_ipo_v2 | 2 of the policy | each other | the pair | first |
| ipo_md | 2 of the mixture | each other | the pair | first |
| iterative_dpo, self_rewarding | K of the policy | one another | best and worst | snapshot |
| apo | as iterative_dpo | one another | best and worst | snapshot, extrapolated |
| sppo, gpo | 5 of the policy | one another | best and worst; all | snapshot |
| spo | K of the policy | one another | win rates as rewards | snapshot |
| dno, dno_prct | the policy's, a teacher's | own answers | soft, margin pairs | snapshot |
| inpo, inpo_pairs | 8, 2 of the policy | one another | best and worst; pair | snapshot, first |
| onpo | 2 of the policy | each other | the pair, twice | its own anchor |
| comal, mpo | 2 of the policy | each other | the pair | snapshot, reference that moves |
| online_ipo_v1, egpo | a full-support sampler | policy (egpo: half a step on) | win rates | first |
| nash_md, nash_md_pg | sampler; policy | mixture with the reference | win rates | first |
| nash_ema_pg | the policy's | average of policies | win rates | first |
| xpo, vpo, selm, hypo | policy, reference; data | one another | pair, samples | first; snapshot |
| rso | 64 of the first policy | each other | accepted pairs | first |
| ppo, ppo_max, dr_po, rto, pf_ppo | the policy's | - | token rewards | snapshot, first |
| grpo, rloo, p3o, copg, rebel, mdpo, brain, oreo | the policy's | - | rewards | snapshot, first |
| constrained, cgpo_*, maxmin | K of the policy | - | several rewards | snapshot, first |

The policy answers at the run's temperature, which is 1 unless it is set: what theory and importance
ratios want. Where a row names a temperature, it is the method's own.
"""

import dataclasses
import functools
from typing import Any

from paxo.losses.contract import nearest
from paxo.objectives import Objective, objective, weighted_sum
from paxo.online import targets
from paxo.online.method import ANY_REWARD, Draw, Method, Schedule
from paxo.online.pairing import (
    accepted_pairs,
    all_candidates,
    best_and_worst,
    every_candidate,
    filtered,
    given_pair,
    margin_pairs,
    ordered_pair,
    pairs,
    tournament,
)
from paxo.online.shaping import gae_advantages, penalised_rewards, rto_advantages

PAIR = (Draw("policy", 2),)
ONE = (Draw("policy", 1),)
# EGPO's released stand-in for the uniform sampler of its theory.
EXPLORING = (Draw("policy", 2, temperature=2.0, top_k=10),)
SNAPSHOT = Schedule(reference="snapshot")
SOFT = (targets.soft_labels,)
HARD = (targets.hard_labels,)
WINS = (targets.win_rates,)
REWARDS = (targets.rewards(),)


def row(name: str, paper: str, loss: str | Objective | None = None, **fields: Any) -> Method:
    """A row on the preferred one of the policy's own pairs, where `fields` do not say otherwise."""
    loss = name if loss is None else loss
    usual: dict[str, Any] = {"draws": PAIR, "pairing": pairs("winner"), "targets": HARD}
    bound = objective(loss) if isinstance(loss, str) else loss
    return Method(name, bound, paper=f"arXiv:{paper}", **(usual | fields))


def of_rewards(name: str, paper: str, loss: Any = None, *, count: int = 4, **fields: Any) -> Method:
    """A row on rewards of `count` candidates, without a judge."""
    usual: dict[str, Any] = {
        "draws": (Draw("policy", count),),
        "pairing": all_candidates,
        "targets": REWARDS,
        "rewards": ("reward",),
        "judged": False,
    }
    return row(name, paper, loss, **(usual | fields))


def ppo(name: str, paper: str, **fields: Any) -> Method:
    """A row on rewards token by token, with a critic."""
    loss = weighted_sum((objective("ppo_policy"), 1.0), (objective("ppo_value"), 0.1))
    usual: dict[str, Any] = {
        "draws": ONE,
        "pairing": every_candidate,
        "shape": gae_advantages(),
        "attach": ("reference", "previous"),
        "by_token": True,
    }
    return of_rewards(name, paper, loss, **(usual | fields))


_soft_pair = functools.partial(row, pairing=pairs("none"), targets=SOFT)
_regression = functools.partial(row, draws=EXPLORING, pairing=pairs("none"), targets=WINS)
_best_of_8 = functools.partial(row, draws=(Draw("policy", 8),), pairing=best_and_worst())
_policy_gradient = functools.partial(
    row, loss="nash_md_pg", draws=ONE, pairing=every_candidate, targets=WINS
)
_reward_pair = functools.partial(of_rewards, count=2, pairing=pairs("none"))

LIVE_PAIRS = (
    row("online_dpo", "2402.04792", "dpo"),
    # The hinge with a reference of the online paper; that of SLiC-HF has none (`slic_hf`).
    row("online_slic", "2402.04792", "rso_hinge"),
    row("online_simpo", "2405.14734", "simpo"),
    _soft_pair("online_ipo", "2403.08635"),
    _soft_pair("online_ipo_v2", "2503.08942"),
    _soft_pair("ipo_md", "2403.08635", draws=(Draw("mixture", 2),), mix=0.125),
)

SNAPSHOTS = (
    _best_of_8("iterative_dpo", "2405.07863", "dpo", schedule=SNAPSHOT),
    row(
        "self_rewarding",
        "2401.10020",
        "dpo",
        draws=(Draw("policy", 4),),
        pairing=best_and_worst("reward"),
        schedule=SNAPSHOT,
        judged=False,
        rewards=("reward",),  # `paxo.online.SelfReward`: the policy itself
    ),
    _best_of_8(
        "apo", "2410.06293", "dpo", schedule=Schedule(reference="snapshot", extrapolation=0.3)
    ),
    # The paper draws at temperature 1 and top-p 1; its code at 0.7 and 0.9.
    row(
        "sppo",
        "2405.00675",
        draws=(Draw("policy", 5, temperature=1.0, top_p=1.0),),
        pairing=best_and_worst(),
        targets=WINS,
    ),
    row(
        "gpo",
        "2410.02197",
        draws=(Draw("policy", 5),),
        pairing=all_candidates,
        targets=(targets.preference_scores,),
    ),
    # Any policy-gradient loss will do; K is ours.
    row(
        "spo",
        "2401.04056",
        objective("rloo", beta=0.0),
        draws=(Draw("policy", 8),),
        pairing=all_candidates,
        targets=(targets.wins_as_rewards,),
    ),
    row("dno", "2404.03715", pairing=pairs("none"), targets=WINS, opponent=Draw("policy", 2)),
    row(
        "dno_prct",
        "2404.03715",
        draws=(Draw("policy", 5, temperature=0.7, top_p=0.95), Draw("data", 1)),
        pairing=margin_pairs("points"),
        schedule=Schedule(replay=(0.3, 0.15)),
        judged=False,
        rewards=("points",),  # 0 to 6, as the paper's judge gives them
    ),
)

NASH_ROUNDS = (
    # Practice: best and worst of eight. Theory: independent pairs, the winner drawn.
    row("inpo", "2407.00617", draws=(Draw("policy", 8),), pairing=tournament),
    row("inpo_pairs", "2407.00617", "inpo", pairing=pairs("drawn")),
    row("onpo", "2502.16852", pairing=pairs("drawn"), schedule=Schedule(optimistic=True)),
    # The released script draws 5 at top-p 0.95; the theory's pairs are kept here.
    row(
        "comal",
        "2410.23223",
        objective("inpo", eta=0.002, tau=0.002 / 3),
        pairing=pairs("drawn"),
        schedule=Schedule(reference_every=12),
    ),
    # Rounds between moves of the magnet are ours.
    row(
        "mpo",
        "2410.16714",
        "mpo_magnetic",
        pairing=pairs("none"),
        targets=WINS,
        opponent=Draw("policy", 2),
        schedule=Schedule(reference_every=10),
    ),
)

AGAINST_AN_OPPONENT = (
    _regression("online_ipo_v1", "2503.08942", opponent=Draw("policy", temperature=1.0)),
    _regression(
        "egpo",
        "2503.08942",
        "online_ipo_v1",
        opponent=Draw("policy", temperature=1.0),
        schedule=Schedule(extragradient=True),
    ),
    # The theory wants mix = eta beta of a step; the number is the paper's for `nash_md_pg`.
    _regression("nash_md", "2312.00886", opponent=Draw("mixture", temperature=1.0), mix=0.125),
    _policy_gradient("nash_md_pg", "2312.00886", opponent=Draw("mixture"), mix=0.125),
    _policy_gradient(
        "nash_ema_pg", "2312.00886", opponent=Draw("average"), schedule=Schedule(average=0.999)
    ),
)

EXPLORATION = (
    row(
        "xpo",
        "2405.21046",
        draws=(Draw("policy"), Draw("reference")),
        pairing=ordered_pair,
        targets=(targets.hard_labels, targets.marks("reference")),
        schedule=Schedule(replay="all"),
    ),
    row(
        "vpo",
        "2405.19320",
        draws=(Draw("policy", 2), Draw("reference")),
        pairing=ordered_pair,
        targets=(targets.hard_labels, targets.marks("reference")),
        schedule=Schedule(replay="all"),
    ),
    row(
        "selm",
        "2405.19332",
        draws=(Draw("data", 2), Draw("policy")),
        pairing=best_and_worst(rest=True),
        targets=(targets.hard_labels, targets.marks("policy")),
        schedule=SNAPSHOT,
    ),
    row(
        "hypo",
        "2406.01462",
        draws=(Draw("data", 2), Draw("policy", 2)),
        pairing=given_pair,
        targets=(targets.hard_labels, targets.marks("policy")),
        judged=False,
    ),
    row(
        "rso",
        "2309.06657",
        objective("dpo", beta=0.05),
        draws=(Draw("reference", 64, temperature=0.7, top_k=40),),
        pairing=accepted_pairs(num=8, beta=0.5),
        rewards=("reward",),
    ),
)

TOKEN_REWARDS = (
    ppo("ppo", "1707.06347"),
    # Without the paper's pre-training of the critic and its language-model term.
    ppo("ppo_max", "2307.04964", shape=gae_advantages(normalise=True)),
    # What stands before the policy's own tokens is masked in all losses; the released code masks it
    # in the actor's only.
    ppo("dr_po", "2404.08495", reset=1.0),
    ppo("rto", "2404.18922", shape=rto_advantages(), attach=("reference", "previous", "dpo")),
    ppo(
        "pf_ppo",
        "2409.06957",
        draws=(Draw("policy", 8),),
        pairing=filtered("best_worst"),
        shape=gae_advantages(kl=0.01),
    ),
)

REWARDED = (
    # Numbers of these two are TRL's; the first GRPO has `method.beta=0.04`.
    of_rewards("grpo", "2402.03300", count=8),
    of_rewards("rloo", "2402.14740", count=2),
    # The weight of the KL penalty of p3o is not known here.
    _reward_pair("p3o", "2310.00212", shape=penalised_rewards(0.05), attach=("reference",)),
    _reward_pair("copg", "2406.19185"),
    _reward_pair("rebel", "2404.16767", shape=penalised_rewards(0.05), attach=("reference",)),
    of_rewards(
        "mdpo",
        "2005.09814",
        targets=(targets.leave_one_out(),),
        schedule=Schedule(hyper_parameters={"t_k": lambda t, total: 1 - t / total}),
    ),
    of_rewards("brain", "2402.02479", count=8),  # K is ours
    # On the policy's own completions, as when the paper iterates; it starts from a data set's.
    of_rewards("oreo", "2412.16145", pairing=every_candidate),
)

SEVERAL_REWARDS = (
    of_rewards(
        "constrained",
        "2310.04373",
        "constrained_rlhf",
        targets=(targets.constraints(),),
        rewards=("constraints",),
    ),
    *(
        of_rewards(
            name,
            "2409.20370",
            targets=(targets.rewards(), targets.judgements(), *baseline),
            opponent=Draw("reference") if baseline else None,
            rewards=("reward", "passed"),
        )
        for name, baseline in (
            ("cgpo_crpg", (targets.baseline(),)),
            ("cgpo_codpo", ()),
            ("cgpo_crraft", (targets.baseline(),)),
        )
    ),
    of_rewards(
        "maxmin", "2402.08925", "rloo", targets=(targets.lowest_mean_reward,), rewards=(ANY_REWARD,)
    ),
)

METHODS: dict[str, Method] = {
    one.name: one
    for family in (
        *(LIVE_PAIRS, SNAPSHOTS, NASH_ROUNDS, AGAINST_AN_OPPONENT),
        *(EXPLORATION, TOKEN_REWARDS, REWARDED, SEVERAL_REWARDS),
    )
    for one in family
}


def method(name: str, **settings: Any) -> Method:
    """The row of that name, with some of its settings changed.

    Args:
        name: a key of `METHODS`.
        **settings: hyper-parameters of the objective, `mix`, `reset`, `draws` (counts), `opponents`
            (a count), or settings of the schedule (`reference_every`, `extrapolation`, `average`).

    Raises:
        ValueError: for an unknown name or setting (the nearest is named), or a value out of range.

    >>> method("inpo", eta=0.1, tau=0.05, draws=(4,)).num_candidates
    4
    """
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}{nearest(name, METHODS)} Known: {', '.join(METHODS)}"
        )
    found = METHODS[name]
    unknown = [key for key in settings if key not in found.field_names()]
    if unknown:
        known = found.field_names()
        raise ValueError(
            f"method {name!r} has no setting {unknown[0]!r}{nearest(unknown[0], known)} "
            f"It has: {', '.join(known)}"
        )
    hyper = {key: value for key, value in settings.items() if key in found.objective.field_names()}
    if hyper:  # together, as their checks see one another
        found = dataclasses.replace(found, objective=_with_fields(found.objective, hyper))
    for key, value in settings.items():
        if key not in hyper:
            found = found.with_field(key, value)
    return found


def _with_fields(loss: Objective, values: dict[str, Any]) -> Objective:
    if len(loss.terms) == 1:
        return objective(loss.terms[0].name, **{**loss.hyper_parameters, **values})
    for key, value in values.items():
        loss = loss.with_field(key, value)
    return loss
