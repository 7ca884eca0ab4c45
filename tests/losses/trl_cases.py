"""Each loss of ours that TRL has too, beside TRL's own code: the cases of `trl_parity_test`."""

import dataclasses
import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch and trl: pip install -e '.[parity]'")
pytest.importorskip("trl", reason="needs trl: pip install -e '.[parity]'")

from paxo.numerics import Mean
from tests.losses import trl_trainers as trl
from tests.losses.every_loss import LOSSES

PAIRS = (trl.GROUPS, 2)
DENSITY = np.array([0.2, 0.6, 0.9, 0.4, 0.7])


def ours(name, made, leaf, candidates=slice(None), arrays=(), **options):
    """The mean of a loss of ours, whose arrays are found by name.

    `candidates` are those that it sees, `arrays` the optional arrays to pass; `options` are
    hyper-parameters, and arrays other than those of `made`.
    """
    there = jnp.asarray(made.mask)[:, candidates]
    tokens = {
        "policy": leaf,
        "reference": jnp.asarray(made.reference),
        "previous": jnp.asarray(made.previous),
    }
    hard = jnp.broadcast_to(jnp.array([1, 0], leaf.dtype), PAIRS)
    collisions = lambda: jnp.logaddexp(2 * leaf, 2 * jnp.log(-jnp.expm1(leaf)))  # noqa: E731
    known = {
        "token_collisions": lambda: collisions()[:, candidates],
        "token_mask": lambda: there,
        "lengths": lambda: there.sum(-1).astype(leaf.dtype),
        "rewards": lambda: jnp.asarray(made.rewards)[:, candidates],
        "labels": lambda: hard,
        "win_rates": lambda: hard,
        "scores": lambda: leaf,
        "state": lambda: LOSSES[name].init_state(),
    }
    given = {}
    for p in inspect.signature(LOSSES[name]).parameters.values():
        role, _, kind = p.name.partition("_")
        if p.name in options or not (p.default is p.empty or p.name in arrays):
            continue
        if kind == "token_logps":
            given[p.name] = tokens[role][:, candidates]
        elif kind == "logps":
            given[p.name] = jnp.sum(jnp.where(there, tokens[role][:, candidates], 0), -1)
        else:
            given[p.name] = known[p.name]()
    loss = LOSSES[name](**given, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.value if isinstance(loss, Mean) else jnp.mean(loss)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of ours beside one of TRL's.

    Attributes:
        name: ours.
        peer_name: TRL's, as in the table of peers.
        theirs: `(made, leaf) -> loss` by TRL's code.
        mine: `(made, leaf) -> loss` by ours.
        candidates: K of the made numbers.
        instead: what TRL's equals, in terms of ours, where the two differ by a known form.
        leaf: which numbers are trained.
        dtypes: in which TRL's code runs.
    """

    name: str
    peer_name: str
    theirs: typing.Callable
    mine: typing.Callable
    candidates: int = 2
    instead: typing.Callable | None = None
    leaf: str = "policy"
    dtypes: tuple = ("float64", "float32")


def case(name, peer_name, theirs, mine=None, **rest):
    """`theirs`: a function of `trl_trainers` and its settings; `mine`: options of `ours`."""
    run, *settings = theirs
    named = settings.pop() if settings and isinstance(settings[-1], dict) else {}
    theirs = lambda made, leaf: run(made, leaf, *settings, **named)  # noqa: E731
    if not callable(mine):
        mine = functools.partial(ours, name, **(mine or {}))
    return Case(name, peer_name, theirs, mine, **rest)


def dpo(name, loss_type, settings, mine=None, *, peer_name=None, **rest):
    """A loss type of `DPOTrainer`."""
    theirs = (trl.dpo, loss_type, settings)
    peer_name = peer_name or f"DPOTrainer {loss_type}"
    return case(name, peer_name, theirs, settings if mine is None else mine, **rest)


def grpo(loss_type, settings, mine, name="grpo"):
    """A loss type of `GRPOTrainer`, three completions of each prompt."""
    theirs = (trl.grpo, {"loss_type": loss_type} | settings)
    return case(name, f"GRPOTrainer {loss_type}", theirs, mine, candidates=3)


def plus_nll(name, weight, index=0, **options):
    """A loss of ours, and the likelihood of a candidate over the tokens of the batch."""
    one = {"candidates": slice(index, index + 1), "labels": jnp.ones((trl.GROUPS, 1))}
    return lambda made, leaf: (
        ours(name, made, leaf, **options) + weight * ours("nll", made, leaf, **one)
    )


def cpo(name, loss_type, settings, mine, alpha=0.7):
    """A loss of `CPOTrainer`, whose likelihood is over the tokens of the batch."""
    return case(
        name,
        f"CPOTrainer {loss_type}",
        (trl.cpo, loss_type, settings | {"cpo_alpha": alpha}),
        mine | {"cpo_alpha": alpha},
        instead=plus_nll(name, alpha, **mine, cpo_alpha=0.0),
    )


def tpo(name, loss_type, settings, mine, alpha=0.7):
    """A loss of `TPOTrainer`, whose likelihood is over the gold tokens of the batch."""
    return case(
        name,
        f"TPOTrainer {loss_type}",
        (trl.tpo, loss_type, settings | {"tpo_alpha": alpha}),
        mine | {"tpo_alpha": alpha},
        instead=plus_nll(name, alpha, 2, **mine, tpo_alpha=0.0),
        candidates=3,
    )


def rpo(name, settings, mine, weight):
    """DPO beside a likelihood over the tokens of the batch."""
    theirs = (trl.dpo, "sigmoid", "sft", settings | {"weights": [1.0, weight]})
    instead = plus_nll("dpo", weight, **settings)
    return case(name, "DPOTrainer sigmoid + sft", theirs, mine, instead=instead)


def likelihood_with_prompts(made, leaf, lam=0.3):
    """ORPO with its likelihood over the batch's tokens, those of prompts included."""
    odds_ratio = ours("orpo", made, leaf, lam=1 + lam) - ours("orpo", made, leaf, lam=1.0)
    chosen, prompts = jnp.asarray(made.mask)[:, 0], trl.GROUPS * (trl.PROMPT - 1)
    nll = -jnp.sum(jnp.where(chosen, leaf[:, 0], 0)) - prompts * trl.PROMPT_LOGP
    return nll / (jnp.sum(chosen) + prompts) + odds_ratio


def unpaired(name, **options):
    """A loss of KTO's kind: the second candidate is a mismatched completion."""

    def mine(made, leaf):
        labels = jnp.asarray(made.labels) * jnp.array([1, 0])[: leaf.shape[1]]
        return ours(name, made, leaf, labels=labels, **options)

    return mine


def bco(made, leaf, rounds, density=None, **options):
    """The last loss of `rounds` batches, the others made of `made.previous`."""
    state, labels = LOSSES["bco"].init_state(), jnp.asarray(made.labels)
    there = jnp.asarray(made.mask)
    total = lambda x: jnp.sum(jnp.where(there, x, 0), -1)  # noqa: E731
    ratios = None if density is None else jnp.asarray(density / (1 - density))
    run = functools.partial(LOSSES["bco"], delta_mode="running_mean", **options)
    for tokens in [*[jnp.asarray(made.previous)] * (rounds - 1), leaf]:
        arrays = (total(tokens), total(jnp.asarray(made.reference)), labels, ratios)
        loss, state = run(*arrays, state=state)
    return loss.value


def better_first(name, **options):
    """A loss of the pair in the order of its rewards."""

    def mine(made, leaf):
        order = jnp.argsort(-jnp.asarray(made.rewards), axis=-1, stable=True)
        there = jnp.asarray(made.mask)
        total = lambda x: jnp.sum(jnp.where(there, x, 0), -1)  # noqa: E731
        pair = lambda x: jnp.take_along_axis(total(x), order, -1)  # noqa: E731
        extra = {}
        if name == "xpo":  # the second completion is the reference's
            extra["samples"] = jnp.take_along_axis(
                jnp.broadcast_to(jnp.arange(2), PAIRS), order, -1
            )
        return jnp.mean(
            LOSSES[name](pair(leaf), pair(jnp.asarray(made.reference)), **extra, **options)
        )

    return mine


def winner(name, **options):
    """A loss whose labels say which of the two has the larger reward."""

    def mine(made, leaf):
        first = jnp.asarray(made.rewards[:, 0] >= made.rewards[:, 1])
        labels = jnp.stack([first, ~first], -1).astype(leaf.dtype)
        return ours(name, made, leaf, labels=labels, **options)

    return mine


def swapped(made):
    """The snapshot takes the reference's place."""
    return dataclasses.replace(made, reference=made.previous, previous=made.reference)


def margins(made):
    return made.rewards[:, 0]


SIMPO = {"beta": 2.5, "simpo_gamma": 0.5}
TPO_L = {"beta": 2.5, "tpo_l_gamma": 0.5}
RATIO = {"beta": 2.5, "gamma_beta_ratio": 0.2}
F_DPO = "DPOTrainer sigmoid, {}".format
BETA, SMOOTH = {"beta": 0.3}, {"beta": 0.3, "label_smoothing": 0.1}
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}

CASES = [
    dpo("dpo", "sigmoid", BETA),
    dpo("token_dpo", "sigmoid", BETA),
    dpo("plackett_luce", "sigmoid", BETA),
    dpo("infonca", "sigmoid", BETA),
    dpo("cdpo", "sigmoid", SMOOTH, instead=functools.partial(ours, "dpo", **BETA)),
    case(
        "dno_prct",
        "DPOTrainer sigmoid",
        (lambda made, leaf: trl.dpo(swapped(made), leaf, "sigmoid", beta=0.3),),
        {"eta": 0.3},
    ),
    dpo("rso_hinge", "hinge", {"beta": 0.6}, {"gamma": 0.6}),
    dpo("ipo", "ipo", BETA, {"tau": 0.3, "arrays": ["lengths"]}),
    dpo("exo_pair", "exo_pair", SMOOTH, {"beta": 0.3, "eps": 0.1}),
    dpo(
        "exo",
        "exo_pair",
        {"beta": 0.3, "label_smoothing": 1 / (1 + np.exp(4.0))},
        {"beta": 0.3, "reward_temperature": 0.25},
    ),
    dpo("nca_pair", "nca_pair", BETA),
    dpo("nca", "nca_pair", BETA),
    dpo("robust_dpo", "robust", SMOOTH, {"beta": 0.3, "eps": 0.1}),
    dpo("bco_pair", "bco_pair", BETA, {"beta": 0.3, "shift": "none"}),
    case(
        "sppo",
        "DPOTrainer sppo_hard",
        (lambda made, leaf: trl.dpo(swapped(made), leaf, "sppo_hard", beta=0.2),),
        {"eta": 5.0},
        instead=lambda made, leaf: 2 * ours("sppo", made, leaf, eta=5.0),
    ),
    dpo("aot", "aot", SMOOTH),
    dpo("aot_unpaired", "aot_unpaired", SMOOTH),
    dpo("apo_zero", "apo_zero", BETA),
    dpo("apo_down", "apo_down", BETA),
    dpo("discopop", "discopop", {"beta": 0.3, "discopop_tau": 0.07}, {"beta": 0.3, "tau": 0.07}),
    dpo("ln_dpo", "sigmoid_norm", {"beta": 5.0}),
    dpo("nll", "sft", BETA, {}),
    rpo("rpo", BETA, {"beta": 0.3, "eta": 0.2}, weight=0.2),
    rpo("iterative_rpo", BETA, {"beta": 0.3, "alpha": 0.8}, weight=0.8),
    *(
        dpo(
            "f_dpo",
            "sigmoid",
            {"beta": 0.3, "f_divergence_type": theirs},
            {"beta": 0.3, "divergence": mine},
            peer_name=F_DPO(theirs),
        )
        for theirs, mine in [
            ("reverse_kl", "reverse_kl"),
            ("forward_kl", "forward_kl"),
            ("js_divergence", "js"),
        ]
    ),
    *(
        dpo(
            "f_dpo",
            "sigmoid",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha},
            {"divergence": "alpha", "alpha": alpha},
            peer_name=F_DPO("alpha_divergence"),
            dtypes=("float32",),
        )
        for alpha in (0.0, 0.3, 0.5, 1.0)
    ),
    *(
        dpo(
            "ld_dpo",
            "sigmoid",
            {"beta": 0.3, "ld_alpha": alpha},
            {"beta": 0.3, "alpha": alpha},
            peer_name=F_DPO("ld_alpha"),
        )
        for alpha in (0.0, 0.4)
    ),
    dpo(
        "wpo",
        "sigmoid",
        {"beta": 0.3, "use_weighting": True},
        {"beta": 0.3, "clip_max": 0.0},
        peer_name=F_DPO("use_weighting"),
    ),
    case(
        "kto",
        "KTOTrainer kto",
        (trl.kto, "kto", BETA | WEIGHTS),
        unpaired("kto", **BETA, **WEIGHTS),
    ),
    case(
        "apo_zero_unpaired",
        "KTOTrainer apo_zero_unpaired",
        (trl.kto, "apo_zero_unpaired", BETA | WEIGHTS),
        unpaired("apo_zero_unpaired", **BETA, **WEIGHTS),
    ),
    *(
        case(
            "bco",
            "BCOTrainer",
            (trl.bco, {"rounds": rounds, "density": density} | BETA),
            functools.partial(bco, rounds=rounds, density=density, **BETA),
            candidates=1,
        )
        for rounds, density in [(1, None), (3, None), (2, DENSITY)]
    ),
    cpo("cpo", "sigmoid", SMOOTH, SMOOTH),
    cpo("cpo", "hinge", SMOOTH, {"beta": 0.3, "link": "hinge"}),  # TRL smooths "sigmoid" alone
    cpo("cpo", "ipo", SMOOTH, {"beta": 0.3, "link": "ipo"}),
    cpo("cpo_simpo", "simpo", SIMPO, RATIO),
    case(
        "slic_hf",
        "CPOTrainer hinge",
        (trl.cpo, "hinge", {"beta": 0.5, "cpo_alpha": 0.7}),
        {"delta": 2.0, "lam": 0.7},
        instead=lambda made, leaf: plus_nll("slic_hf", 1.4, delta=2.0, lam=0.0)(made, leaf) / 2.0,
    ),
    case(
        "simpo",
        "CPOTrainer simpo",
        (trl.cpo, "simpo", SIMPO | {"cpo_alpha": 0.0, "label_smoothing": 0.1}),
        RATIO | {"label_smoothing": 0.1},
    ),
    *(
        case(
            "alphapo",
            "CPOTrainer simpo, alpha",
            (trl.cpo, "simpo", SIMPO | {"cpo_alpha": 0.0, "alpha": alpha}),
            {"beta": 2.5, "gamma": 0.5, "alpha": alpha},
        )
        for alpha in (0.25, -0.6)
    ),
    case(
        "orpo",
        "ORPOTrainer",
        (trl.orpo, BETA),
        {"lam": 0.3},
        instead=likelihood_with_prompts,
        dtypes=("float32",),
    ),
    tpo("triple_po", "sigmoid", BETA, BETA),
    tpo("triple_po", "hinge", {"beta": 0.6}, {"beta": 0.6, "link": "hinge"}),
    tpo("triple_po", "ipo", BETA, {"beta": 0.3, "link": "ipo"}),
    tpo("triple_po_l", "tpo-l", TPO_L, RATIO),
    case("bradley_terry", "RewardTrainer", (trl.reward,), leaf="scores"),
    case(
        "bradley_terry",
        "RewardTrainer",
        (
            lambda made, leaf: trl.reward(
                made, leaf, margins=margins(made), center_rewards_coefficient=0.1
            ),
        ),
        lambda made, leaf: ours(
            "bradley_terry", made, leaf, margins=jnp.asarray(margins(made)), centering=0.1
        ),
        leaf="scores",
    ),
    case(
        "prm",
        "PRMTrainer",
        (trl.prm,),
        lambda made, leaf: ours(
            "prm",
            made,
            leaf,
            step_scores=leaf,
            step_mask=jnp.asarray(made.mask),
            step_labels=jnp.broadcast_to(jnp.asarray(made.rewards > 0)[..., None], leaf.shape),
        ),
        candidates=1,
        dtypes=("float32",),
    ),
    case(
        "dpo",
        "OnlineDPOTrainer sigmoid",
        (trl.online_dpo, "sigmoid", 0.3),
        better_first("dpo", **BETA),
    ),
    case("ipo", "OnlineDPOTrainer ipo", (trl.online_dpo, "ipo", 0.3), better_first("ipo", tau=0.3)),
    case(
        "online_ipo",
        "OnlineDPOTrainer ipo",
        (trl.online_dpo, "ipo", 0.3),
        winner("online_ipo", tau=0.3),
    ),
    case(
        "online_ipo_v2",
        "OnlineDPOTrainer ipo",
        (trl.online_dpo, "ipo", 0.3),
        winner("online_ipo_v2", beta=0.3),
    ),
    case(
        "xpo",
        "XPOTrainer sigmoid",
        (trl.xpo, "sigmoid", 0.3, 0.2),
        better_first("xpo", alpha=0.2, beta=0.3),
    ),
    case(
        "nash_md_pg",
        "NashMDTrainer",
        (trl.nash_md, 0.3),
        lambda made, leaf: ours(
            "nash_md_pg", made, leaf, win_rates=jax.nn.sigmoid(jnp.asarray(made.rewards)), tau=0.3
        ),
        candidates=1,
    ),
    grpo("grpo", {}, {"reduction": "sequence_mean"}),
    grpo(
        "grpo",
        {"beta": 0.2, "epsilon_high": 0.28, "args": {"delta": 1.5}},
        {
            "beta": 0.2,
            "epsilon_high": 0.28,
            "delta": 1.5,
            "reduction": "sequence_mean",
            "arrays": ["reference_token_logps"],
        },
    ),
    grpo("bnpo", {}, {"reduction": "token_mean"}),
    grpo("dapo", {"epsilon_high": 0.28}, {"epsilon_high": 0.28}),
    grpo(
        "dr_grpo",
        {"scale_rewards": "none"},
        {"scale_rewards": "none", "reduction": "fixed_length"},
    ),
    grpo(
        "luspo",
        {"importance_sampling_level": "sequence"},
        {"importance": "sequence", "reduction": "sequence_sum"},
    ),
    grpo("cispo", {"epsilon_high": 1.3}, {"epsilon_high": 1.3}, name="cispo"),
    grpo(
        "sapo",
        {"args": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4}},
        {"tau_pos": 0.8, "tau_neg": 1.4},
        name="sapo",
    ),
    case("rloo", "RLOOTrainer", (trl.rloo, {"beta": 0.2}), {"beta": 0.2}, candidates=3),
]
