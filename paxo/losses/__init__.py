"""Preference losses: pure functions of log-prob arrays, candidates on the last axis.

They know nothing of batches, models, optimisers or devices. `paxo.losses.table` names them.
"""

from paxo.losses.advantages import (
    gae,
    rto_rewards,
    whiten,
)
from paxo.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    cal_dpo_loss,
    nca_pair_loss,
)
from paxo.losses.attributes import (
    attribute_regression_loss,
    gated_preference_loss,
    gated_scores,
    meta_gradient,
    reward_differences,
)
from paxo.losses.batchwise import (
    aot_loss,
    aot_unpaired_loss,
    bco_pair_loss,
    beta_dpo_loss,
)
from paxo.losses.calibration import (
    slic_list_loss,
)
from paxo.losses.comparisons import (
    cpl_kl_loss,
    cpl_loss,
    rrhf_loss,
)
from paxo.losses.constrained import (
    constrained_rlhf_loss,
    first_multipliers,
    mixed_advantage,
    multiplier_step,
    multipliers,
)
from paxo.losses.contract import (
    stateful,
    whole_batch,
)
from paxo.losses.contrastive import (
    exo_loss,
    infonca_loss,
    nca_loss,
)
from paxo.losses.diffusion import (
    diffusion_dpo_loss,
    seppo_loss,
)
from paxo.losses.divergence import (
    chipo_loss,
    f_dpo_loss,
)
from paxo.losses.ensembles import (
    ensemble_rewards,
    preference_strength,
)
from paxo.losses.exploration import (
    hypo_loss,
    selm_loss,
    vpo_loss,
    xpo_loss,
)
from paxo.losses.group_relative import (
    cispo_loss,
    grpo_loss,
    rloo_loss,
    sapo_loss,
)
from paxo.losses.gumbel import (
    gumbel_loss,
)
from paxo.losses.imitation import (
    iterative_rpo_loss,
    rationale_dpo_loss,
    rpo_loss,
)
from paxo.losses.learning_to_rank import (
    approx_ndcg_loss,
    neural_ndcg_loss,
    pairwise_mse_loss,
    pairwise_quantile_loss,
    pairwise_soft01_loss,
    poly1_softmax_loss,
    unique_softmax_loss,
)
from paxo.losses.length import (
    ld_dpo_loss,
    ln_dpo_loss,
    r_dpo_loss,
    sampo_loss,
)
from paxo.losses.likelihood import (
    nll_loss,
)
from paxo.losses.links import (
    discopop_loss,
    exo_pair_loss,
    rso_hinge_loss,
)
from paxo.losses.lipo import (
    lipo_lambda_loss,
    lipo_loss,
)
from paxo.losses.listwise import (
    mppo_loss,
    plackett_luce_loss,
    pro_loss,
    swepo_loss,
)
from paxo.losses.logic import (
    SPECIFICATIONS,
    Specification,
    distinguish,
    entails,
    equivalent,
    odds,
    specification_of,
)
from paxo.losses.magnetic import (
    mpo_magnetic_loss,
)
from paxo.losses.margins import (
    dove_loss,
    dpop_loss,
    flex_dpo_loss,
    modpo_loss,
    odpo_loss,
)
from paxo.losses.mixture_of_judges import (
    calibrated_rewards,
    cgpo_codpo_loss,
    cgpo_crpg_loss,
    cgpo_crraft_loss,
    cgpo_rewards,
    passes_all,
)
from paxo.losses.multi import (
    bpo_loss,
    ofs_dpo_loss,
    opa_dpo_loss,
    spo_degree_loss,
    srpo_loss,
)
from paxo.losses.nash import (
    ipo_md_loss,
    nash_md_loss,
    nash_md_pg_loss,
    online_ipo_loss,
    online_ipo_v1_loss,
    online_ipo_v2_loss,
)
from paxo.losses.noisy import (
    cdpo_loss,
    robust_dpo_loss,
    wpo_loss,
)
from paxo.losses.pairwise import (
    dpo_loss,
    ipo_loss,
    simpo_loss,
)
from paxo.losses.pointwise import (
    apo_zero_unpaired_loss,
    bco_loss,
    bco_state,
    density_ratios_from,
    kto_loss,
    nca_unpaired_loss,
)
from paxo.losses.policy_gradient import (
    mdpo_loss,
    p3o_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from paxo.losses.posterior import (
    brain_loss,
)
from paxo.losses.rationale import (
    rationale_orpo_loss,
)
from paxo.losses.reference_free import (
    alphapo_loss,
    asft_loss,
    cpo_loss,
    cpo_simpo_loss,
    orpo_loss,
    slic_hf_loss,
)
from paxo.losses.regression import (
    copg_loss,
    rebel_loss,
)
from paxo.losses.reward import (
    bradley_terry_loss,
    contrastive_reward_loss,
    general_preference_loss,
    general_preference_scores,
    order_corrected,
    pair_preference_loss,
    plackett_luce_reward_loss,
)
from paxo.losses.selfplay import (
    dno_loss,
    dno_prct_loss,
    gpo_loss,
    inpo_loss,
    onpo_loss,
    spo_rewards,
    sppo_loss,
)
from paxo.losses.semantic import (
    compile_loss,
    log_odds,
    semantic_loss,
    semantic_reference_loss,
)
from paxo.losses.soft_bellman import (
    oreo_loss,
    oreo_policy_loss,
    oreo_value_loss,
)
from paxo.losses.soft_ranking import (
    diff_ndcg_loss,
    drpo_rank_loss,
)
from paxo.losses.steps import (
    aggregate_steps,
    prm_loss,
    regret_preference_loss,
    segment_regret,
)
from paxo.losses.tokenwise import (
    d3po_loss,
    sparse_po_loss,
    tdpo1_loss,
    tdpo2_loss,
    token_dpo_loss,
    token_rewards,
)
from paxo.losses.tree import (
    tpo_tree_loss,
)
from paxo.losses.triple import (
    triple_po_l_loss,
    triple_po_loss,
)
from paxo.losses.uncertain import (
    flip_rates_from,
    information_gain,
    upo_loss,
)

__all__ = [
    "SPECIFICATIONS",
    "Specification",
    "aggregate_steps",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "approx_ndcg_loss",
    "asft_loss",
    "attribute_regression_loss",
    "bco_loss",
    "bco_pair_loss",
    "bco_state",
    "beta_dpo_loss",
    "bpo_loss",
    "bradley_terry_loss",
    "brain_loss",
    "cal_dpo_loss",
    "calibrated_rewards",
    "cdpo_loss",
    "cgpo_codpo_loss",
    "cgpo_crpg_loss",
    "cgpo_crraft_loss",
    "cgpo_rewards",
    "chipo_loss",
    "cispo_loss",
    "compile_loss",
    "constrained_rlhf_loss",
    "contrastive_reward_loss",
    "copg_loss",
    "cpl_kl_loss",
    "cpl_loss",
    "cpo_loss",
    "cpo_simpo_loss",
    "d3po_loss",
    "density_ratios_from",
    "diff_ndcg_loss",
    "diffusion_dpo_loss",
    "discopop_loss",
    "distinguish",
    "dno_loss",
    "dno_prct_loss",
    "dove_loss",
    "dpo_loss",
    "dpop_loss",
    "drpo_rank_loss",
    "ensemble_rewards",
    "entails",
    "equivalent",
    "exo_loss",
    "exo_pair_loss",
    "f_dpo_loss",
    "first_multipliers",
    "flex_dpo_loss",
    "flip_rates_from",
    "gae",
    "gated_preference_loss",
    "gated_scores",
    "general_preference_loss",
    "general_preference_scores",
    "gpo_loss",
    "grpo_loss",
    "gumbel_loss",
    "hypo_loss",
    "infonca_loss",
    "information_gain",
    "inpo_loss",
    "ipo_loss",
    "ipo_md_loss",
    "iterative_rpo_loss",
    "kto_loss",
    "ld_dpo_loss",
    "lipo_lambda_loss",
    "lipo_loss",
    "ln_dpo_loss",
    "log_odds",
    "mdpo_loss",
    "meta_gradient",
    "mixed_advantage",
    "modpo_loss",
    "mpo_magnetic_loss",
    "mppo_loss",
    "multiplier_step",
    "multipliers",
    "nash_md_loss",
    "nash_md_pg_loss",
    "nca_loss",
    "nca_pair_loss",
    "nca_unpaired_loss",
    "neural_ndcg_loss",
    "nll_loss",
    "odds",
    "odpo_loss",
    "ofs_dpo_loss",
    "online_ipo_loss",
    "online_ipo_v1_loss",
    "online_ipo_v2_loss",
    "onpo_loss",
    "opa_dpo_loss",
    "order_corrected",
    "oreo_loss",
    "oreo_policy_loss",
    "oreo_value_loss",
    "orpo_loss",
    "p3o_loss",
    "pair_preference_loss",
    "pairwise_mse_loss",
    "pairwise_quantile_loss",
    "pairwise_soft01_loss",
    "passes_all",
    "plackett_luce_loss",
    "plackett_luce_reward_loss",
    "poly1_softmax_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "preference_strength",
    "prm_loss",
    "pro_loss",
    "r_dpo_loss",
    "rationale_dpo_loss",
    "rationale_orpo_loss",
    "rebel_loss",
    "regret_preference_loss",
    "reward_differences",
    "rloo_loss",
    "robust_dpo_loss",
    "rpo_loss",
    "rrhf_loss",
    "rso_hinge_loss",
    "rto_rewards",
    "sampo_loss",
    "sapo_loss",
    "segment_regret",
    "selm_loss",
    "semantic_loss",
    "semantic_reference_loss",
    "seppo_loss",
    "simpo_loss",
    "slic_hf_loss",
    "slic_list_loss",
    "sparse_po_loss",
    "specification_of",
    "spo_degree_loss",
    "spo_rewards",
    "sppo_loss",
    "srpo_loss",
    "stateful",
    "swepo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "token_dpo_loss",
    "token_rewards",
    "tpo_tree_loss",
    "triple_po_l_loss",
    "triple_po_loss",
    "unique_softmax_loss",
    "upo_loss",
    "vpo_loss",
    "whiten",
    "whole_batch",
    "wpo_loss",
    "xpo_loss",
]
