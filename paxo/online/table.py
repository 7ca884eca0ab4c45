"""The methods, one row each. Every number is its paper's (or the named code's); any can be changed.

| row | candidates | opponent | trained on | anchor |
|---|---|---|---|---|
| online_dpo, online_ipo, online_slic, online_simpo | 2 of the policy | each other | the pair | first policy |
| iterative_dpo, self_rewarding | K of the policy | one another | best and worst | snapshot |
| sppo, gpo | 5 of the policy | one another | best and worst; all | snapshot |
| spo | K of the policy | one another | win rates as rewards | first policy |
| dno, dno_prct | the policy's (and a teacher's) | own answers | soft, margin pairs | snapshot |
| inpo, inpo_pairs | 8, 2 of the policy | one another | best and worst; the pair | snapshot and first |
| onpo | 2 of the policy | each other | the pair, twice | its own anchor |
| comal, mpo | as inpo_pairs | each other | the pair | a reference that moves |
| online_ipo_v1, egpo | a full-support sampler | live policy (egpo: then half a step ahead) | win rates | first |
| online_ipo_v2 | 2 of the policy | each other | the pair | first |
| ipo_md | 2 of the mixture | each other | the pair | first |
| nash_md, nash_md_pg, nash_ema_pg | sampler; policy | mixture; average | win rates | first |
| apo | as iterative_dpo | one another | best and worst | snapshot, extrapolated |
| xpo, vpo, selm, hypo | policy and reference; data | one another | pair and samples | first; snapshot |
| rso | 64 of the policy | each other | accepted pairs | first |
| ppo, ppo_max, dr_po, rto, pf_ppo | the policy's | - | rewards by token | first and snapshot |
| grpo, rloo, p3o, copg, rebel, mdpo, brain, oreo | K of the policy | - | rewards | first, snapshot |
| constrained, cgpo_*, maxmin | K of the policy | - | several rewards | first, snapshot |
"""

import dataclasses
from typing import Any

from paxo.losses.contract import nearest
from paxo.objectives import Objective, objective, weighted_sum
from paxo.online import targets
from paxo.online.method import Draw, Method, Schedule
from paxo.online.pairing import (
    accepted_pairs,
    all_candidates,
    best_and_worst,
    filtered,
    margin_pairs,
    ordered_pair,
    pairs,
    tournament,
)
from paxo.online.shaping import gae_advantages, penalised_rewards, rto_advantages

POLICY_PAIR = (Draw("policy", 2),)
# EGPO's released stand-in for a uniform sampler.
EXPLORING = (Draw("policy", 2, temperature=2.0, top_k=10),)
SNAPSHOT = Schedule(reference="snapshot")


def _ppo(name: str, paper: str, **changes: Any) -> Method:
    loss = weighted_sum((objective("ppo_policy"), 1.0), (objective("ppo_value"), 0.1))
    row = Method(
        name, loss, (Draw("policy", 1),), _every_candidate, (targets.rewards(),),
        shape=gae_advantages(), attach=("reference", "previous"), by_token=True,
        rewards=("reward",), judged=False, paper=paper,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def _every_candidate(bench, rng):
    """All candidates, also where a prompt has only one."""
    return all_candidates(bench, rng, least=1)


def _of_rewards(name: str, paper: str, *, count: int = 4, **changes: Any) -> Method:
    """A method that reads one reward of each of K candidates."""
    row = Method(
        name, objective(changes.pop("loss", name)), (Draw("policy", count),), all_candidates,
        (targets.rewards(),), rewards=("reward",), judged=False, paper=paper,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def _of_pair(name: str, loss: Objective, paper: str, **changes: Any) -> Method:
    """A method on one pair of the policy's own answers, winner first."""
    row = Method(name, loss, POLICY_PAIR, pairs("winner"), (targets.hard_labels,), paper=paper)
    return dataclasses.replace(row, **changes)


def _exploring(name: str, loss: str, opponent: Draw, paper: str, **changes: Any) -> Method:
    """A regression on win rates against an opponent; the pair is anybody's."""
    row = Method(
        name, objective(loss), EXPLORING, pairs("none"), (targets.win_rates,), opponent=opponent,
        paper=paper,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


_ROWS = (
    # pairs of the live policy
    _of_pair("online_dpo", objective("dpo"), "arXiv:2402.04792"),
    _of_pair("online_slic", objective("slic_hf"), "arXiv:2305.10425"),
    _of_pair("online_simpo", objective("simpo"), "arXiv:2405.14734"),
    _of_pair(
        "online_ipo",
        objective("online_ipo"),
        "arXiv:2403.08635",
        pairing=pairs("none"),
        targets=(targets.soft_labels,),
    ),  # fmt: skip
    _of_pair(
        "online_ipo_v2",
        objective("online_ipo_v2"),
        "arXiv:2503.08942",
        pairing=pairs("none"),
        targets=(targets.soft_labels,),
    ),  # fmt: skip
    _of_pair(
        "ipo_md",
        objective("ipo_md"),
        "arXiv:2403.08635",
        draws=(Draw("mixture", 2),),
        mix=0.125,
        pairing=pairs("none"),
        targets=(targets.soft_labels,),
    ),  # fmt: skip
    # rounds from a snapshot
    _of_pair(
        "iterative_dpo",
        objective("dpo"),
        "arXiv:2405.07863",
        draws=(Draw("policy", 8),),
        pairing=best_and_worst(),
        schedule=SNAPSHOT,
    ),  # fmt: skip
    _of_pair(
        "self_rewarding",
        objective("dpo"),
        "arXiv:2401.10020",
        draws=(Draw("policy", 4),),
        pairing=best_and_worst("reward"),
        schedule=SNAPSHOT,
        judged=False,
        rewards=("reward",),
    ),  # fmt: skip
    _of_pair(
        "apo",
        objective("dpo"),
        "arXiv:2410.06293",
        draws=(Draw("policy", 8),),
        pairing=best_and_worst(),
        schedule=Schedule(reference="snapshot", extrapolation=0.3),
    ),  # fmt: skip
    Method(
        "sppo",
        objective("sppo"),
        (Draw("policy", 5),),
        best_and_worst(),
        (targets.win_rates,),
        paper="arXiv:2405.00675",
    ),  # fmt: skip
    Method(
        "gpo",
        objective("gpo"),
        (Draw("policy", 5),),
        all_candidates,
        (targets.preference_scores,),
        paper="arXiv:2410.02197",
    ),  # fmt: skip
    Method(
        "spo",
        objective("rloo", beta=0.0),
        (Draw("policy", 8),),
        all_candidates,
        (targets.wins_as_rewards,),
        paper="arXiv:2401.04056",
    ),  # fmt: skip
    Method(
        "dno",
        objective("dno"),
        POLICY_PAIR,
        pairs("none"),
        (targets.win_rates,),
        opponent=Draw("policy", 2),
        paper="arXiv:2404.03715",
    ),  # fmt: skip
    Method(
        "dno_prct",
        objective("dno_prct"),
        (Draw("policy", 5, temperature=0.7, top_p=0.95), Draw("data", 1)),
        margin_pairs(),
        (targets.hard_labels,),
        schedule=Schedule(replay=(0.3, 0.15)),
        rewards=("reward",),
        judged=False,
        paper="arXiv:2404.03715",
    ),  # fmt: skip
    _of_pair(
        "inpo",
        objective("inpo"),
        "arXiv:2407.00617",
        draws=(Draw("policy", 8),),
        pairing=tournament,
    ),
    _of_pair("inpo_pairs", objective("inpo"), "arXiv:2407.00617", pairing=pairs("drawn")),
    _of_pair(
        "onpo",
        objective("onpo"),
        "arXiv:2502.16852",
        pairing=pairs("drawn"),
        schedule=Schedule(optimistic=True),
    ),  # fmt: skip
    _of_pair(
        "comal",
        objective("inpo", eta=0.002, tau=0.002 / 3),
        "arXiv:2410.23223",
        pairing=pairs("drawn"),
        schedule=Schedule(reference_every=12),
    ),  # fmt: skip
    Method(
        "mpo",
        objective("mpo_magnetic"),
        POLICY_PAIR,
        pairs("none"),
        (targets.win_rates,),
        opponent=Draw("policy", 2),
        schedule=Schedule(reference_every=10),
        paper="arXiv:2410.16714",
    ),  # fmt: skip
    # games against an opponent
    _exploring("online_ipo_v1", "online_ipo_v1", Draw("policy"), "arXiv:2503.08942"),
    _exploring(
        "egpo",
        "online_ipo_v1",
        Draw("policy"),
        "arXiv:2503.08942",
        schedule=Schedule(extragradient=True),
    ),  # fmt: skip
    _exploring("nash_md", "nash_md", Draw("mixture"), "arXiv:2312.00886", mix=0.125),
    Method(
        "nash_md_pg",
        objective("nash_md_pg"),
        (Draw("policy", 1),),
        _every_candidate,
        (targets.win_rates,),
        opponent=Draw("mixture"),
        mix=0.125,
        paper="arXiv:2312.00886",
    ),  # fmt: skip
    Method(
        "nash_ema_pg",
        objective("nash_md_pg"),
        (Draw("policy", 1),),
        _every_candidate,
        (targets.win_rates,),
        opponent=Draw("average"),
        schedule=Schedule(average=0.999),
        paper="arXiv:2312.00886",
    ),  # fmt: skip
    # exploration
    Method(
        "xpo",
        objective("xpo"),
        (Draw("policy"), Draw("reference")),
        ordered_pair,
        (targets.hard_labels, targets.marks("reference")),
        schedule=Schedule(replay="all"),
        paper="arXiv:2405.21046",
    ),  # fmt: skip
    Method(
        "vpo",
        objective("vpo"),
        (Draw("policy", 2), Draw("reference")),
        ordered_pair,
        (targets.hard_labels, targets.marks("reference")),
        schedule=Schedule(replay="all"),
        paper="arXiv:2405.19320",
    ),  # fmt: skip
    Method(
        "selm",
        objective("selm"),
        (Draw("data", 2), Draw("policy")),
        best_and_worst(rest=True),
        (targets.hard_labels, targets.marks("policy")),
        schedule=SNAPSHOT,
        paper="arXiv:2405.19332",
    ),  # fmt: skip
    Method(
        "hypo",
        objective("hypo"),
        (Draw("data", 2), Draw("policy", 2)),
        all_candidates,
        (targets.hard_labels, targets.marks("policy")),
        judged=False,
        paper="arXiv:2406.01462",
    ),  # fmt: skip
    Method(
        "rso",
        objective("dpo", beta=0.05),
        (Draw("reference", 64, temperature=0.7, top_k=40),),
        accepted_pairs(),
        (targets.hard_labels,),
        rewards=("reward",),
        paper="arXiv:2309.06657",
    ),  # fmt: skip
    # rewards
    _ppo("ppo", "arXiv:1707.06347"),
    _ppo("ppo_max", "arXiv:2307.04964", shape=gae_advantages(normalise=True)),
    _ppo("dr_po", "arXiv:2404.08495", reset=1.0),
    _ppo(
        "pf_ppo",
        "arXiv:2409.06957",
        draws=(Draw("policy", 8),),
        pairing=filtered("best_worst"),
        shape=gae_advantages(kl=0.01),
    ),  # fmt: skip
    _ppo(
        "rto", "arXiv:2404.18922", shape=rto_advantages(), attach=("reference", "previous", "dpo")
    ),
    _of_rewards("grpo", "arXiv:2402.03300", count=8),
    _of_rewards("rloo", "arXiv:2402.14740", count=4),
    _of_rewards(
        "p3o",
        "arXiv:2310.00212",
        count=2,
        pairing=pairs("none"),
        shape=penalised_rewards(0.05),
        attach=("reference",),
    ),  # fmt: skip
    _of_rewards("copg", "arXiv:2406.19185", count=2, pairing=pairs("none")),
    _of_rewards(
        "rebel",
        "arXiv:2404.16767",
        count=2,
        pairing=pairs("none"),
        shape=penalised_rewards(0.05),
        attach=("reference",),
    ),  # fmt: skip
    _of_rewards(
        "mdpo",
        "arXiv:2005.09814",
        targets=(targets.leave_one_out(),),
        schedule=Schedule(hyper_parameters={"t_k": lambda t, total: 1 - t / total}),
    ),  # fmt: skip
    _of_rewards("brain", "arXiv:2402.02479", count=8),
    _of_rewards("oreo", "arXiv:2412.16145"),
    _of_rewards(
        "constrained",
        "arXiv:2310.04373",
        loss="constrained_rlhf",
        targets=(targets.constraints(),),
        rewards=("constraints",),
    ),  # fmt: skip
    *(
        _of_rewards(
            name,
            "arXiv:2409.20370",
            opponent=Draw("reference") if further else None,
            rewards=("reward", "passed"),
            targets=(targets.rewards(), targets.judgements(), *further),
        )  # fmt: skip
        for name, further in (
            ("cgpo_crpg", (targets.baseline(),)),
            ("cgpo_codpo", ()),
            ("cgpo_crraft", (targets.baseline(),)),
        )
    ),
    _of_rewards(
        "maxmin", "arXiv:2402.08925", loss="rloo", targets=(targets.lowest_mean_reward,), rewards=()
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


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
    row = METHODS[name]
    unknown = [key for key in settings if key not in row.field_names()]
    if unknown:
        raise ValueError(
            f"method {name!r} has no setting {unknown[0]!r}{nearest(unknown[0], row.field_names())}"
        )
    hyper = {key: value for key, value in settings.items() if key in row.objective.field_names()}
    if hyper:  # together, as their checks see one another
        row = dataclasses.replace(row, objective=_with_fields(row.objective, hyper))
    for key, value in settings.items():
        if key not in hyper:
            row = row.with_field(key, value)
    return row


def _with_fields(loss: Objective, values: dict[str, Any]) -> Objective:
    if len(loss.terms) == 1:
        return objective(loss.terms[0].name, **{**loss.hyper_parameters, **values})
    for key, value in values.items():
        loss = loss.with_field(key, value)
    return loss
