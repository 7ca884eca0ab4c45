"""Values that every loss of a pair must have where it cannot tell the two apart, and identities.

A zero margin: with a reference the policy is that reference, without one the two completions have
one mean log-prob. Inputs are made from the names in a loss's signature.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.losses import (
    anchored,
    attributes,
    batchwise,
    calibration,
    comparisons,
    contrastive,
    diffusion,
    divergence,
    ensembles,
    exploration,
    group_relative,
    imitation,
    learning_to_rank,
    length,
    links,
    lipo,
    listwise,
    margins,
    mixture_of_judges,
    multi,
    nash,
    noisy,
    pairwise,
    pointwise,
    policy_gradient,
    posterior,
    rationale,
    reference_free,
    regression,
    reward,
    selfplay,
    semantic,
    soft_ranking,
    steps,
    tokenwise,
    tree,
    triple,
    uncertain,
)
from paxo.numerics import Mean
from tests.losses import tabular

LOG_2 = math.log(2)
P = math.exp(-1.5)  # a mean token probability
TOKENS = np.array([[-1.0, -2.0, -3.0, 0.0, 0.0], [-0.5, -1.5, -2.5, -3.5, -1.0]])  # sums -6, -9
MASK = np.arange(5) < np.array([[3], [5]])


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


# Losses that take more than a pair.
CANDIDATES = {
    imitation.rationale_dpo_loss: 3,
    triple.triple_po_loss: 3,
    triple.triple_po_l_loss: 3,
    rationale.rationale_orpo_loss: 3,
    multi.bpo_loss: 3,
    multi.srpo_loss: 6,
    multi.opa_dpo_loss: 5,
    exploration.xpo_loss: 3,
    exploration.vpo_loss: 3,
    exploration.selm_loss: 3,
    exploration.hypo_loss: 3,
}


def inputs_of(loss):
    """A batch of one group `[1, K]`; unequal completions where it has a policy to compare with."""
    parameters = inspect.signature(loss).parameters
    size = CANDIDATES.get(loss, 2)
    compared = any(name.startswith(("reference_", "previous_")) for name in parameters)
    tokens = np.resize(TOKENS, (size, 5))
    known = {
        "lengths": np.resize([3.0, 5.0], size) if compared else np.full(size, 4.0),
        "labels": np.arange(2.0)[::-1],
        "win_rates": np.full(2, 0.5),
        "rewards": np.full(2, 0.3),
        "margin_rewards": np.full(2, 0.3),
        "baseline_rewards": np.full(2, 0.3),
        "passed": np.array([1.0, 0.0]),
        "scores": np.full(2, 0.3),
        "flip_rates": np.array(0.3),
        "attribute_scores": np.full((2, 3), 0.3),
        "gate_logits": np.arange(3.0),
        "denoising_errors": np.array([0.1, 0.3]),
        "reference_denoising_errors": np.array([0.1, 0.3]),
        "start_values": np.ones(2),
        "end_values": np.ones(2),
        "embeddings": np.full((2, 2), 0.3),
        "degree_logits": np.zeros(4),
        "degree_labels": np.array(1.0),
        "token_mask": np.resize(MASK, (size, 5)),
        "step_ends": np.resize([0.0, 1.0, 1.0], (2, 5)),
        "step_similarities": np.full((2, 5), 0.5),
        "token_kls": np.zeros((2, 5)),
        "token_weights": np.ones((2, 5)),
        "token_collisions": tokens,
    }
    made = {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            continue
        if name.endswith("_token_logps"):
            made[name] = tokens
        elif name.endswith("_logps"):
            made[name] = tokens.sum(-1) if compared else np.full(size, -6.0)
        elif name in known:
            made[name] = known[name]
    made = {name: jnp.asarray(x)[None] for name, x in made.items()}
    if "key" in parameters and parameters["key"].default is inspect.Parameter.empty:
        made["key"] = jax.random.key(0)
    if hasattr(loss, "init_state"):
        made["state"] = loss.init_state()
    return made


def value(loss, settings):
    """The loss of one group at a zero margin: a number, whatever it returns."""
    inputs = inputs_of(loss)
    arrays = {name: x for name, x in settings.items() if isinstance(x, np.ndarray)}
    options = {name: x for name, x in settings.items() if name not in arrays}
    # A loss is called once: one program is compiled sooner than each of its operations.
    result = jax.jit(functools.partial(loss, **options))(**(inputs | arrays))
    result = result[0] if "state" in inputs else result
    return float(jnp.squeeze(result.value if isinstance(result, Mean) else result))


# Loss, its value at a zero margin, and its settings where the defaults add something to it.
AT_ZERO_MARGIN = [
    # log 2: the logistic losses, whatever their scale.
    (pairwise.dpo_loss, LOG_2, {}),
    (noisy.cdpo_loss, LOG_2, {"label_smoothing": 0.3}),
    (noisy.robust_dpo_loss, LOG_2, {"eps": 0.3}),
    (noisy.wpo_loss, LOG_2, {}),
    *((divergence.f_dpo_loss, LOG_2, {"divergence": d}) for d in ("reverse_kl", "js", "alpha")),
    (divergence.f_dpo_loss, LOG_2, {"divergence": "forward_kl"}),
    (divergence.chipo_loss, LOG_2, {}),
    (divergence.chipo_loss, LOG_2, {"alpha": 0.25, "gamma": 0.1, "r_max": 1.0}),
    (margins.dpop_loss, LOG_2, {}),
    (margins.flex_dpo_loss, LOG_2, {}),
    (margins.dove_loss, LOG_2, {}),
    (margins.odpo_loss, LOG_2, {"offset": "linear"}),  # equal rewards
    (margins.odpo_loss, softplus(2.0), {"offset": "linear", "rewards": np.array([[2.5, 0.5]])}),
    (margins.odpo_loss, softplus(math.log(1e-3)), {}),  # a tie, its gap taken as 1e-3
    (margins.modpo_loss, LOG_2, {}),  # equal margins
    (length.ln_dpo_loss, LOG_2, {}),
    (length.r_dpo_loss, LOG_2, {"alpha": 0.0}),
    (length.r_dpo_loss, softplus(2 * 0.3), {"alpha": 0.3}),  # two tokens behind: a head start
    (length.sampo_loss, LOG_2, {}),
    (length.ld_dpo_loss, LOG_2, {}),
    (tokenwise.token_dpo_loss, LOG_2, {}),
    (tokenwise.tdpo1_loss, LOG_2, {}),
    (tokenwise.tdpo2_loss, LOG_2, {}),
    (tokenwise.sparse_po_loss, LOG_2, {}),
    (tokenwise.sparse_po_loss, LOG_2 + 0.01 * 8 + 0.1 * 8, {"l1_u": 0.01, "l1_d": 0.1}),
    (tokenwise.d3po_loss, LOG_2, {}),
    (batchwise.aot_loss, LOG_2, {}),
    (batchwise.aot_unpaired_loss, LOG_2, {}),
    (batchwise.beta_dpo_loss, LOG_2, {}),
    (comparisons.cpl_kl_loss, LOG_2, {}),
    (imitation.rpo_loss, LOG_2, {"eta": 0.0}),
    (imitation.iterative_rpo_loss, LOG_2 + 0.5 * 2, {"alpha": 0.5}),  # mean log-prob -2
    (multi.ofs_dpo_loss, LOG_2 + 0.3 * LOG_2, {"alpha": 0.3}),
    (multi.ofs_dpo_loss, LOG_2 - 0.3 * LOG_2, {"alpha": 0.3, "module": "slow"}),
    (multi.spo_degree_loss, LOG_2 + 0.5 * math.log(4), {"weight": 0.5}),
    (selfplay.dno_prct_loss, LOG_2, {}),
    (selfplay.dno_loss, LOG_2, {}),
    (posterior.brain_loss, LOG_2, {}),
    (semantic.semantic_reference_loss, LOG_2, {}),
    (listwise.plackett_luce_loss, LOG_2, {}),
    (listwise.swepo_loss, LOG_2, {}),
    (contrastive.infonca_loss, LOG_2, {}),
    *((lipo.lipo_loss, LOG_2, {"ranking_loss": x}) for x in ("pair_logistic", "list_mle")),
    (lipo.lipo_loss, LOG_2, {"ranking_loss": "softmax"}),
    (learning_to_rank.unique_softmax_loss, LOG_2, {}),
    (learning_to_rank.poly1_softmax_loss, LOG_2 + 0.5, {}),
    (reward.bradley_terry_loss, LOG_2, {}),
    (reward.plackett_luce_reward_loss, LOG_2, {}),
    (reward.general_preference_loss, LOG_2, {}),
    (reward.pair_preference_loss, LOG_2, {}),
    (steps.regret_preference_loss, LOG_2, {}),
    (pointwise.bco_loss, LOG_2, {}),
    (uncertain.upo_loss, LOG_2, {}),
    (uncertain.upo_loss, LOG_2 + 0.5 * 2, {"lam": 0.5}),
    (diffusion.diffusion_dpo_loss, LOG_2, {}),
    (diffusion.seppo_loss, LOG_2, {}),
    (attributes.gated_preference_loss, LOG_2, {}),
    (mixture_of_judges.cgpo_codpo_loss, LOG_2 + 2.0, {}),
    (exploration.hypo_loss, LOG_2, {}),
    (exploration.selm_loss, LOG_2, {}),
    (exploration.vpo_loss, LOG_2, {}),
    (exploration.xpo_loss, LOG_2 - 6 * 0.01, {"alpha": 0.01}),
    # Other links.
    (links.rso_hinge_loss, 1.0, {}),
    (lipo.lipo_loss, 1.0, {"ranking_loss": "pair_hinge"}),
    (tree.tpo_tree_loss, (1 - 1 / math.log2(3)) * LOG_2, {}),  # equal completions
    (tree.tpo_tree_loss, LOG_2, {"ranking_loss": "pair_logistic", "step_weight": "none"}),
    (lipo.lipo_lambda_loss, 2 * (1 - 1 / math.log2(3)) * LOG_2, {}),
    (pairwise.ipo_loss, 25.0, {"tau": 0.1}),
    (nash.online_ipo_loss, 0.25, {}),
    (nash.ipo_md_loss, 0.25, {}),
    (nash.online_ipo_v2_loss, 25.0, {}),
    (selfplay.inpo_loss, 1 / (4 * 0.5**2), {"eta": 0.5, "tau": 0.1}),
    (selfplay.onpo_loss, 0.5**2 / 4, {"eta": 0.5}),
    # SPPO with hard labels: half of 1 / (2 beta^2), as the authors' code halves the squares.
    (selfplay.sppo_loss, 4.0**2 / 4, {"eta": 4.0, "win_rates": np.array([[1.0, 0.0]])}),
    (links.exo_pair_loss, 2.761231, {"eps": 1e-3}),
    (links.exo_pair_loss, -LOG_2 - 0.5 * math.log(0.2 * 0.8), {"eps": 0.2}),
    (contrastive.exo_loss, 2 * softplus(-10.0) / 2 + 10 / 2 - LOG_2, {}),
    (links.discopop_loss, 0.846574, {}),
    (links.discopop_loss, 0.846574, {"tau": 2.0}),
    (anchored.nca_pair_loss, 2 * LOG_2, {}),
    (contrastive.nca_loss, 2 * LOG_2, {}),
    (pointwise.nca_unpaired_loss, 1.5 * LOG_2, {}),  # the desirable half; 1/2 is the other's
    (batchwise.bco_pair_loss, 2 * LOG_2, {}),
    (multi.bpo_loss, 2 * LOG_2, {}),
    (multi.opa_dpo_loss, (1 + 1 + 0.2 + 0.2 + 4) * LOG_2, {}),
    (anchored.apo_zero_loss, 1.0, {}),
    (anchored.apo_down_loss, 1.0, {}),
    (pointwise.apo_zero_unpaired_loss, 0.5, {}),
    (pointwise.kto_loss, 0.5, {}),
    (multi.srpo_loss, (1 + 0.5) / 4, {"alpha": 0.5}),
    (anchored.cal_dpo_loss, LOG_2 + 1 / (4 * 0.1**2), {"beta": 0.1}),
    (imitation.rationale_dpo_loss, LOG_2 + 6.0, {}),
    (soft_ranking.diff_ndcg_loss, 0.5 * (1 - 1 / math.log2(3)), {}),
    (learning_to_rank.approx_ndcg_loss, -1 / math.log2(1 + 1.5), {}),
    (learning_to_rank.neural_ndcg_loss, -(1 + 1 / math.log2(3)) / 2, {}),
    (learning_to_rank.pairwise_soft01_loss, 0.5, {}),
    (learning_to_rank.pairwise_mse_loss, 0.5, {}),
    (learning_to_rank.pairwise_quantile_loss, 0.3, {"quantile": 0.3}),
    # Without a reference: both sums -6, both means -1.5 nats a token.
    (pairwise.simpo_loss, 1.600413, {"beta": 2.5, "gamma_beta_ratio": 0.55}),
    (reference_free.alphapo_loss, softplus(0.1), {}),
    (reference_free.cpo_loss, LOG_2 + 1.5, {}),
    (reference_free.cpo_loss, 25.0, {"link": "ipo", "cpo_alpha": 0.0}),
    (reference_free.cpo_loss, 1.0, {"link": "hinge", "cpo_alpha": 0.0}),
    (reference_free.cpo_simpo_loss, softplus(5.4) + 0.05 * 1.5, {}),
    (reference_free.slic_hf_loss, 1.0 + 0.1 * 6, {}),
    (calibration.slic_list_loss, 1.0 + 0.1 * 6, {}),
    (mixture_of_judges.cgpo_crraft_loss, 0.5 * 6, {}),
    (rationale.rationale_orpo_loss, 1.5 + 0.1 * LOG_2 + 6, {}),
    (reference_free.orpo_loss, 1.5 + 0.3 * LOG_2, {"lam": 0.3}),
    (reference_free.asft_loss, 1.5 + 1.5 - math.log(1 - P), {}),
    (triple.triple_po_loss, LOG_2 + 0.9 * 1.5, {}),
    (triple.triple_po_l_loss, softplus(0.5) + 0.9 * 1.5, {}),
    (comparisons.cpl_loss, LOG_2 + 1.5, {"contrastive_bias": 1.0, "bc_coeff": 1.0}),
    (comparisons.rrhf_loss, 6.0, {}),
    (semantic.semantic_loss, -math.log(1 - P * (1 - P)), {}),
    (listwise.mppo_loss, LOG_2, {}),
    (listwise.pro_loss, LOG_2, {"sft_weight": 0.0}),
]


@pytest.mark.parametrize(
    ("loss", "expected", "settings"), AT_ZERO_MARGIN, ids=lambda x: getattr(x, "__name__", "")
)
def test_value_at_zero_margin(loss, expected, settings):
    assert value(loss, settings) == pytest.approx(expected, rel=2e-6)


def slopes(loss, **settings):
    """Gradient of the loss at a zero margin with respect to the log-probs of the pair."""
    inputs = inputs_of(loss)

    def run(logps):
        result = loss(**(inputs | settings | {"policy_logps": logps}))
        return jnp.sum(result[0] if "state" in inputs else result)

    return np.asarray(jax.grad(run)(inputs["policy_logps"]))[0]


DISCOPOP = 0.75 - (1 - LOG_2) / 4  # minus its slope in z at tau = 1


@pytest.mark.parametrize(
    ("loss", "expected", "settings"),
    [
        (pairwise.dpo_loss, (-0.15, 0.15), {"beta": 0.3}),
        (noisy.cdpo_loss, (-0.3 * 0.3, 0.3 * 0.3), {"beta": 0.3, "label_smoothing": 0.2}),
        (noisy.robust_dpo_loss, (-0.3 * (0.5 + 1 / 3), 0.25), {"beta": 0.3, "eps": 0.2}),
        (divergence.f_dpo_loss, (-0.15, 0.15), {"beta": 0.3}),
        (divergence.f_dpo_loss, (-0.075, 0.075), {"beta": 0.3, "divergence": "js"}),
        (divergence.chipo_loss, (-0.3, 0.3), {"beta": 0.3}),  # acts like DPO with twice beta
        (margins.flex_dpo_loss, (-0.15, 0.05), {"beta_w": 0.3, "beta_l": 0.1}),
        (margins.modpo_loss, (-0.3, 0.3), {"beta": 0.3, "w0": 0.5}),
        (length.ln_dpo_loss, (-0.3 / 2 / 3, 0.3 / 2 / 5), {"beta": 0.3}),
        (links.rso_hinge_loss, (-0.3, 0.3), {"gamma": 0.3}),
        (links.exo_pair_loss, (-math.log(4) / 4, math.log(4) / 4), {"beta": 1.0, "eps": 0.2}),
        (links.discopop_loss, (-DISCOPOP, DISCOPOP), {"beta": 1.0, "tau": 1.0}),
        (pairwise.ipo_loss, (-10.0, 10.0), {"tau": 0.1}),
        (anchored.nca_pair_loss, (-0.3 / 4, 0.3 / 4), {"beta": 0.3}),
        (batchwise.bco_pair_loss, (-0.15, 0.15), {"beta": 0.3}),
        (anchored.apo_zero_loss, (-0.3 / 4, 0.3 / 4), {"beta": 0.3}),
        (anchored.apo_down_loss, (0.0, 0.3 / 4), {"beta": 0.3}),
        (anchored.cal_dpo_loss, (-0.5 - 1 / 0.6, 0.5 + 1 / 0.6), {"beta": 0.3}),
        (imitation.rpo_loss, (-0.3 * (0.5 + 0.1), 0.15), {"beta": 0.3, "eta": 0.1}),
        (selfplay.sppo_loss, (0.0, 0.0), {}),  # at win rates of 1/2
        (posterior.brain_loss, (0.0, 0.0), {}),  # at equal rewards
        (reference_free.cpo_loss, (-0.15, 0.15), {"beta": 0.3, "cpo_alpha": 0.0}),
        (pairwise.simpo_loss, (-0.3 / 8, 0.3 / 8), {"beta": 0.3, "gamma_beta_ratio": 0.0}),
        (reference_free.orpo_loss, (-(1 + 0.5 / (1 - P)) / 4, 0.5 / (1 - P) / 4), {"lam": 1.0}),
        (reference_free.asft_loss, (-2 / 4, P / (1 - P) / 4), {}),
        (listwise.mppo_loss, (-P / 2 / 4, P / 2 / 4), {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradient_at_zero_margin(loss, expected, settings):
    np.testing.assert_allclose(slopes(loss, **settings), expected, rtol=1e-5, atol=1e-7)


def test_dpo_pushes_probabilities_in_inverse_proportion():
    # In terms of probabilities the rejected one's gradient is pi_w / pi_l times the chosen's: the
    # less likely it already is, the harder it falls (3D-properties).
    p, q = jnp.array([0.3, 0.02]), jnp.array([0.1, 0.1])
    found = jax.grad(lambda p: pairwise.dpo_loss(jnp.log(p), jnp.log(q), beta=0.5))(p)
    assert found[1] / found[0] == pytest.approx(-0.3 / 0.02, rel=1e-5)


def test_cdpo_with_coin_flips_for_labels_is_even_and_least_at_zero():
    z = jnp.linspace(-4, 4, 17)
    policy = jnp.stack([z, jnp.zeros(17)], -1)
    loss = noisy.cdpo_loss(policy, jnp.zeros((17, 2)), beta=1.0, label_smoothing=0.5)
    np.testing.assert_allclose(loss, loss[::-1], rtol=1e-6)
    assert np.argmin(loss) == 8


def test_asft_is_0_beside_its_likelihood_only_for_certain_chosen_and_impossible_rejected():
    for logps, small in (([-1e-6, -40.0], True), ([-1e-6, -0.5], False), ([-3.0, -40.0], False)):
        both = reference_free.asft_loss(jnp.array(logps), jnp.ones(2))
        bracket = both - reference_free.asft_loss(jnp.array(logps), jnp.ones(2), lam=0.0)
        assert bracket >= 0
        assert (bracket < 1e-5) == small


def test_copg_with_rewards_of_a_quarter_is_ipo():
    # (beta / 2) (dh - dR / beta)^2 up to a constant: IPO's target 1 / (2 beta) at dR = 1/2.
    policy, reference = jnp.array([[-4.0, -6.5]]), jnp.array([[-5.0, -5.0]])
    rewards = jnp.array([[0.25, -0.25]])
    copg = jax.grad(lambda s: regression.copg_loss(s, reference, rewards, beta=0.4).sum())(policy)
    ipo = jax.grad(lambda s: pairwise.ipo_loss(s, reference, tau=0.4).sum())(policy)
    np.testing.assert_allclose(copg, 0.4 / 2 * ipo, rtol=1e-5)


def test_p3o_on_its_own_samples_has_rloos_gradient():
    old, rewards = jnp.array([[-4.0, -6.0]]), jnp.array([[1.0, 0.3]])
    p3o = jax.grad(lambda s: policy_gradient.p3o_loss(s, old, rewards).sum())(old)
    rloo = jax.grad(lambda s: group_relative.rloo_loss(s, old, old, rewards).total)(old)
    np.testing.assert_allclose(2 * p3o, rloo, rtol=1e-6)  # the total of two completions
    np.testing.assert_allclose(p3o, [[-0.35, 0.35]], rtol=1e-5)


def test_pro_takes_a_scale_of_rewards_for_one_of_log_probs():
    logps, lengths = jnp.array([-4.0, -9.0, -8.0]), jnp.array([2.0, 3.0, 4.0])
    grades = jnp.array([3.0, 1.0, 0.5])
    found = listwise.pro_loss(logps, lengths, 2.5 * grades, sft_weight=0.0)
    scaled = listwise.pro_loss(2.5 * logps, lengths, grades, sft_weight=0.0)
    np.testing.assert_allclose(found, scaled, rtol=1e-6)


def test_infonca_of_equal_rewards_is_least_at_equal_scores():
    run = jax.grad(lambda s: contrastive.infonca_loss(s, jnp.zeros(3), jnp.ones(3), beta=1.0))
    np.testing.assert_allclose(run(jnp.full(3, -2.0)), np.zeros(3), atol=1e-7)
    found = run(jnp.array([-1.0, -2.0, -3.0]))
    assert found[0] > 0 > found[2]


def test_any_antisymmetric_scores_are_a_general_preference_model():
    # Rank 4 out of 2k = 4 numbers a candidate: blocks from the eigenvectors of -i S.
    upper = np.triu(np.random.default_rng(0).standard_normal((5, 5)), 1)
    scores = upper - upper.T
    values, vectors = np.linalg.eigh(-1j * scores)
    blocks = []
    for value_, vector in zip(values, vectors.T):
        if value_ > 1e-9:
            blocks += [np.sqrt(2 * value_) * vector.real, np.sqrt(2 * value_) * vector.imag]
    assert len(blocks) == 4
    found = reward.general_preference_scores(jnp.asarray(np.stack(blocks, -1)))
    np.testing.assert_allclose(found, scores, atol=1e-5)


def test_ensembles_move_with_their_members_and_the_worst_case_is_below_the_mean():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    for how in ("mean", "wco", "uwo"):
        found = ensembles.ensemble_rewards(scores + 2.5, how)
        np.testing.assert_allclose(found, ensembles.ensemble_rewards(scores, how) + 2.5, rtol=1e-5)
    worst, mean = (ensembles.ensemble_rewards(scores, how) for how in ("wco", "mean"))
    assert (worst < mean).all()


@pytest.mark.parametrize(
    ("loss", "arrays", "settings", "changes"),
    [
        (reward.bradley_terry_loss, (), {}, False),
        (reward.bradley_terry_loss, (), {"centering": 0.01}, True),
        (reward.pair_preference_loss, (jnp.array([1.0, 0.0]),), {}, False),
        (reward.plackett_luce_reward_loss, (jnp.array([1.0, 0.0]),), {}, False),
        (steps.regret_preference_loss, (jnp.ones(2), jnp.zeros(2)), {}, False),
    ],
)
def test_only_centering_knows_where_rewards_lie(loss, arrays, settings, changes):
    scores = jnp.array([1.5, 0.5])
    found, moved = (float(loss(x, *arrays, **settings)) for x in (scores, scores + 3.0))
    assert (abs(found - moved) > 1e-5) == changes


def test_token_rewards_of_the_references_own_text_sum_to_minus_the_kl():
    # E_ref[beta log(pi / ref)] = -beta KL(ref | pi) <= 0: implicit rewards of data text fall.
    made = tabular.Tree(vocab=3)
    policy, reference = (np.asarray(made.token_logps(made.logits(i))) for i in (1, 2))
    found = tokenwise.token_rewards(policy, reference, np.ones((9, 2), bool), beta=0.3).sum(-1)
    weights = np.exp(reference.sum(-1))
    kl = weights @ (reference.sum(-1) - policy.sum(-1))
    assert weights @ found == pytest.approx(-0.3 * kl, rel=1e-5)
    assert kl > 0.1
