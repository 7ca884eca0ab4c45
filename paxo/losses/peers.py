"""Which losses here are those of other libraries, and where they part: plain data.

TRL's rows are tested against its own code, value and gradient (`tests/losses/trl_parity_test.py`,
TRL 1.16; the XPO, Nash-MD, BCO and PRM trainers are in TRL up to 1.13 only). The others were read:
EasyDeL 0.3 (090a03b; its DPO and CPO functions and its odds ratio were run too), HALOs (4831988),
and the code that authors published with their papers.

>>> [(row.peer_name, row.equal) for row in comparison("TRL") if row.name == "rso_hinge"]
[('DPOTrainer hinge', True)]
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peer:
    """One of our losses beside one of another library's.

    Attributes:
        name: ours.
        peer: the library, or "authors" for the code published with the paper.
        peer_name: what the loss is called there, with its trainer where there are several.
        equal: whether value and gradient are the same once hyper-parameters are renamed, or
            converted as `note` says.
        note: how to convert, or where the two part.
    """

    name: str
    peer: str
    peer_name: str
    equal: bool
    note: str = ""


def comparison(peer: str | None = None) -> list[Peer]:
    """The rows in order of our names; of one library alone if `peer` names it, in any case.

    Raises:
        ValueError: if no row is about that library.

    >>> {row.peer for row in comparison("halos")}
    {'HALOs'}
    """
    known = sorted({row.peer for row in PEERS})
    if peer is not None and peer.lower() not in (name.lower() for name in known):
        raise ValueError(f"unknown library {peer!r}; expected one of {', '.join(known)}")
    rows = [row for row in PEERS if peer is None or row.peer.lower() == peer.lower()]
    return sorted(rows, key=lambda row: (row.name, row.peer, row.peer_name))


_CPO = "cpo_alpha=0 beside nll is equal: its likelihood averages over the batch's tokens"
_CPO_HARD = _CPO + "; no smoothing"
_TPO = "tpo_alpha=0 beside nll of the gold is equal: it averages over the batch's gold tokens"
_RPO = "dpo beside nll is equal: its likelihood averages over the batch's tokens"
_SPPO = "twice ours at win rates (1, 0) and eta = 1 / beta"
_KTO = "given its mismatched completions, on one device: "

PEERS = (
    # TRL: DPOTrainer.
    Peer("dpo", "TRL", "DPOTrainer sigmoid", True),
    Peer("token_dpo", "TRL", "DPOTrainer sigmoid", True),
    Peer("dno_prct", "TRL", "DPOTrainer sigmoid", True, "the reference is the snapshot"),
    Peer("plackett_luce", "TRL", "DPOTrainer sigmoid", True, "lists of two"),
    Peer("infonca", "TRL", "DPOTrainer sigmoid", True, "two completions, rewards far apart"),
    Peer("cdpo", "TRL", "DPOTrainer sigmoid", False, "ignores label_smoothing since 0.29"),
    Peer("rso_hinge", "TRL", "DPOTrainer hinge", True, "its beta is gamma"),
    Peer("ipo", "TRL", "DPOTrainer ipo", True, "averages over tokens; its beta is tau"),
    Peer("exo_pair", "TRL", "DPOTrainer exo_pair", True, "its label_smoothing is eps"),
    Peer("exo", "TRL", "DPOTrainer exo_pair", True, "pairs; eps = 1 / (1 + e^(1 / temperature))"),
    Peer("nca_pair", "TRL", "DPOTrainer nca_pair", True),
    Peer("nca", "TRL", "DPOTrainer nca_pair", True, "two completions, rewards far apart"),
    Peer("robust_dpo", "TRL", "DPOTrainer robust", True, "its label_smoothing is eps"),
    Peer("bco_pair", "TRL", "DPOTrainer bco_pair", True, 'shift="none"; a running mean up to 0.28'),
    Peer("sppo", "TRL", "DPOTrainer sppo_hard", False, _SPPO),
    Peer("aot", "TRL", "DPOTrainer aot", True, "on one device: it sorts each device's batch"),
    Peer("aot_unpaired", "TRL", "DPOTrainer aot_unpaired", True, "on one device, as aot"),
    Peer("apo_zero", "TRL", "DPOTrainer apo_zero", True),
    Peer("apo_down", "TRL", "DPOTrainer apo_down", True),
    Peer("discopop", "TRL", "DPOTrainer discopop", True),
    Peer("ln_dpo", "TRL", "DPOTrainer sigmoid_norm", True),
    Peer("nll", "TRL", "DPOTrainer sft", True, "token_mean"),
    Peer("rpo", "TRL", "DPOTrainer sigmoid + sft", False, _RPO),
    Peer(
        "iterative_rpo",
        "TRL",
        "DPOTrainer sigmoid + sft",
        False,
        _RPO,
    ),
    Peer("f_dpo", "TRL", "DPOTrainer sigmoid, reverse_kl", True),
    Peer("f_dpo", "TRL", "DPOTrainer sigmoid, forward_kl", True),
    Peer("f_dpo", "TRL", "DPOTrainer sigmoid, js_divergence", True),
    Peer("f_dpo", "TRL", "DPOTrainer sigmoid, alpha_divergence", True, "coefficient is 1 - alpha"),
    Peer("ld_dpo", "TRL", "DPOTrainer sigmoid, ld_alpha", True),
    Peer(
        "wpo",
        "TRL",
        "DPOTrainer sigmoid, use_weighting",
        True,
        "clip_max=0; clipped at 1 up to 0.28",
    ),
    # TRL: other offline trainers.
    Peer("kto", "TRL", "KTOTrainer kto", True, _KTO + "it shifts a device's batch by one"),
    Peer("apo_zero_unpaired", "TRL", "KTOTrainer apo_zero_unpaired", True),
    Peer("bco", "TRL", "BCOTrainer", True, 'delta_mode="running_mean"; TRL up to 1.13'),
    Peer("cpo", "TRL", "CPOTrainer sigmoid", False, _CPO),
    Peer("cpo", "TRL", "CPOTrainer hinge", False, _CPO_HARD),
    Peer("cpo", "TRL", "CPOTrainer ipo", False, _CPO_HARD),
    Peer(
        "slic_hf",
        "TRL",
        "CPOTrainer hinge",
        False,
        "lam=0 over delta, beside nll over the batch's tokens, at beta = 1 / delta",
    ),
    Peer("simpo", "TRL", "CPOTrainer simpo", True, "cpo_alpha=0, simpo_gamma = beta * ratio"),
    Peer("cpo_simpo", "TRL", "CPOTrainer simpo", False, _CPO),
    Peer(
        "alphapo",
        "TRL",
        "CPOTrainer simpo, alpha",
        True,
        "cpo_alpha=0; away from overflow",
    ),
    Peer(
        "orpo",
        "TRL",
        "ORPOTrainer",
        False,
        "the odds ratio is equal; the likelihood is over the batch's tokens, prompts included",
    ),
    Peer("triple_po", "TRL", "TPOTrainer sigmoid", False, _TPO),
    Peer("triple_po", "TRL", "TPOTrainer hinge", False, _TPO),
    Peer("triple_po", "TRL", "TPOTrainer ipo", False, _TPO),
    Peer("triple_po_l", "TRL", "TPOTrainer tpo-l", False, _TPO),
    Peer("bradley_terry", "TRL", "RewardTrainer", True),
    Peer("prm", "TRL", "PRMTrainer", True, "values: difference of its logits; TRL up to 1.13"),
    # TRL: online trainers.
    Peer("dpo", "TRL", "OnlineDPOTrainer sigmoid", True),
    Peer("ipo", "TRL", "OnlineDPOTrainer ipo", True, "without lengths; its beta is tau"),
    Peer("online_ipo", "TRL", "OnlineDPOTrainer ipo", True, "hard labels; its beta is tau"),
    Peer("online_ipo_v2", "TRL", "OnlineDPOTrainer ipo", True, "hard labels"),
    Peer("xpo", "TRL", "XPOTrainer sigmoid", True, "on fresh pairs; TRL up to 1.13"),
    Peer(
        "nash_md_pg",
        "TRL",
        "NashMDTrainer",
        False,
        "it weighs each token with its own log-ratio alone, a biased gradient; TRL up to 1.13",
    ),
    Peer("grpo", "TRL", "GRPOTrainer grpo", True, 'reduction="sequence_mean"'),
    Peer("grpo", "TRL", "GRPOTrainer bnpo", True, "token_mean; it averages microbatches"),
    Peer("grpo", "TRL", "GRPOTrainer dapo", True, "token_mean"),
    Peer("grpo", "TRL", "GRPOTrainer dr_grpo", True, "fixed_length, T its max_completion_length"),
    Peer("grpo", "TRL", "GRPOTrainer luspo", True, "sequence_sum"),
    Peer("cispo", "TRL", "GRPOTrainer cispo", True, "token_mean; its epsilon_high must be set"),
    Peer("sapo", "TRL", "GRPOTrainer sapo", True),
    Peer("rloo", "TRL", "RLOOTrainer", True),
    # EasyDeL.
    Peer("dpo", "EasyDeL", "DPOTrainer sigmoid", True),
    Peer("cdpo", "EasyDeL", "DPOTrainer sigmoid", True, "label_smoothing"),
    Peer("cdpo", "EasyDeL", "DPOTrainer kto", True, "under a wrong name; label_smoothing"),
    Peer("rso_hinge", "EasyDeL", "DPOTrainer hinge", True, "its beta is gamma"),
    Peer("ipo", "EasyDeL", "DPOTrainer ipo", True, "averages over tokens; its beta is tau"),
    Peer("robust_dpo", "EasyDeL", "DPOTrainer robust", True, "its label_smoothing is eps"),
    Peer("exo_pair", "EasyDeL", "DPOTrainer exo_pair", False, "cannot be compiled: math.log"),
    Peer("nca_pair", "EasyDeL", "DPOTrainer nca_pair", True),
    Peer(
        "bco_pair",
        "EasyDeL",
        "DPOTrainer bco_pair",
        False,
        "the shift is the batch's mean, and the gradient goes through it",
    ),
    Peer("sppo", "EasyDeL", "DPOTrainer sppo_hard", False, _SPPO),
    Peer("aot", "EasyDeL", "DPOTrainer aot", True, "without accumulation: it sorts microbatches"),
    Peer("aot_unpaired", "EasyDeL", "DPOTrainer aot_pair", True, "without accumulation, as aot"),
    Peer("apo_zero", "EasyDeL", "DPOTrainer apo_zero", True),
    Peer("apo_down", "EasyDeL", "DPOTrainer apo_down", True),
    Peer("discopop", "EasyDeL", "DPOTrainer discopop", False, "tau is always 1"),
    Peer("kto", "EasyDeL", "KTOTrainer kto", True, _KTO + "rolled by microbatch"),
    Peer("apo_zero_unpaired", "EasyDeL", "KTOTrainer apo_zero_unpaired", True),
    Peer("bco", "EasyDeL", "BCOTrainer", False, "its running mean is never moved: the shift is 0"),
    Peer("cpo", "EasyDeL", "CPOTrainer sigmoid", False, _CPO),
    Peer("cpo", "EasyDeL", "CPOTrainer hinge", False, _CPO_HARD),
    Peer("cpo", "EasyDeL", "CPOTrainer ipo", False, _CPO_HARD),
    Peer("simpo", "EasyDeL", "CPOTrainer simpo", True, "cpo_alpha=0, simpo_gamma = beta * ratio"),
    Peer("cpo_simpo", "EasyDeL", "CPOTrainer simpo", False, _CPO),
    Peer("alphapo", "EasyDeL", "CPOTrainer simpo, alpha", True, "cpo_alpha=0; as TRL's"),
    Peer("orpo", "EasyDeL", "ORPOTrainer", False, "as TRL's, with log1p(-exp(x))"),
    Peer("bradley_terry", "EasyDeL", "RewardTrainer", True),
    Peer("xpo", "EasyDeL", "XPOTrainer sigmoid", True, "on fresh pairs"),
    Peer(
        "nash_md_pg",
        "EasyDeL",
        "NashMDTrainer",
        False,
        "as TRL's, and the gradient goes through the log-ratio",
    ),
    Peer(
        "grpo",
        "EasyDeL",
        "GRPOTrainer",
        False,
        "takes the larger of the two terms where the advantage is negative; deviation over K",
    ),
    Peer("cispo", "EasyDeL", "GRPOTrainer cispo", False, "the gradient goes through the weight"),
    Peer("ppo_policy", "EasyDeL", "PPOTrainer", True, "averages microbatches"),
    Peer("ppo_value", "EasyDeL", "PPOTrainer", True, "averages microbatches"),
    # HALOs.
    Peer("dpo", "HALOs", "dpo", True),
    Peer("cdpo", "HALOs", "cdpo", True, "its epsilon is label_smoothing"),
    Peer("ipo", "HALOs", "ipo", True, "where no token's log-ratio is 0: it does not count those"),
    Peer("simpo", "HALOs", "simpo", True),
    Peer(
        "slic_hf",
        "HALOs",
        "slic",
        False,
        "adds token log-probs, padding included, to the hinge of the sequence, by broadcasting",
    ),
    Peer("kto", "HALOs", "kto", True, "given its mismatched completions, none with log-ratio 0"),
    Peer("bradley_terry", "HALOs", "bradley-terry", True, "scores: logit 1 of its two"),
    Peer(
        "grpo",
        "HALOs",
        "grpo",
        False,
        "ratios to the reference, deviation over K plus 0.01",
    ),
    Peer("ppo_policy", "HALOs", "ppo", True, "averages microbatches"),
    Peer("ppo_value", "HALOs", "ppo", False, "unclipped, towards discounted rewards"),
    # The code that authors published.
    Peer("dpo", "authors", "direct-preference-optimization", True),
    Peer("cdpo", "authors", "direct-preference-optimization", True, "label_smoothing"),
    Peer("simpo", "authors", "SimPO", True),
    Peer("wpo", "authors", "WPO", True),
    Peer("f_dpo", "authors", "f-divergence-dpo", True, "cuts no exponent"),
    Peer("rpo", "authors", "RPO", True),
    Peer("discopop", "authors", "DiscoPOP", True),
    Peer("sppo", "authors", "SPPO", True, "K = 2"),
    Peer("exo", "authors", "exact_loss pref", False, "a constant log(1 + e^-10) less"),
    Peer("infonca", "authors", "NCA", False, "adds 0.01 to the first reward against ties"),
    Peer("nca", "authors", "NCA", False, "adds 0.01 to the first reward against ties"),
    Peer("nca_pair", "authors", "NCA", True),
    Peer("cpo_simpo", "authors", "CPO_SIMPO", False, _CPO),
    Peer("triple_po", "authors", "triple-preference-optimization", False, _TPO),
    Peer(
        "orpo",
        "authors",
        "orpo",
        False,
        "its likelihood averages over the batch's tokens, prompts included",
    ),
    Peer("sampo", "authors", "SamPO", False, "draws other tokens for the reference"),
    Peer("cal_dpo", "authors", "Cal-DPO", True, "the same mean, other values per pair"),
)
