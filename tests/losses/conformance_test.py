"""Every loss of the table passes the same checks; a wrong one fails the check that is meant for it.

A new loss needs a row in `ROWS` only where a default of `Case` does not hold for it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from paxo.losses.contract import Positive, stateful
from paxo.losses.pairwise import dpo_loss, log_ratios, margin
from paxo.numerics import Mean, at_least_float32, logsumexp, masked, masked_rows, valid_rows
from paxo.objectives import LOSSES
from tests.losses.cases import Case
from tests.losses.conformance import CHECKS

BOTH = {"log_ratios": True, "group_shift": True}
GRADED = {"candidates": 4, "given": {"labels": (0.9, 0.6, 0.6, 0.1)}}
JUDGED = {"candidates": 3, "given": {"passed": (1, 0, 1)}}
STEPS = {"given": {"step_mask": [0, 1, 0, 1]}, "axes": {"step_mask": "KT"}, "log_ratios": True}
ROWS = {
    "dpo": {**BOTH},
    "ipo": {"log_ratios": True},
    "cdpo": {**BOTH},
    "robust_dpo": {**BOTH},
    "wpo": {"perturbed": {"clip_max": [0.01]}},
    "rso_hinge": {**BOTH},
    "exo_pair": {**BOTH},
    "discopop": {**BOTH},
    "odpo": {**BOTH},
    "modpo": {**BOTH},
    "dpop": {"log_ratios": True},
    "flex_dpo": {"log_ratios": True},
    "dove": {**BOTH},
    "rpo": {"base": {"beta": 1.0, "eta": 1.0}},
    "rationale_dpo": {"candidates": 3},
    "f_dpo": {"log_ratios": True},
    "chipo": {"log_ratios": True},
    "nca_pair": {"base": {"beta": 1.0}, "log_ratios": True},
    "apo_zero": {"base": {"beta": 1.0}, "log_ratios": True},
    "apo_down": {"log_ratios": True},
    "cal_dpo": {"log_ratios": True},
    "ln_dpo": {"log_ratios": True},
    "r_dpo": {**BOTH},
    "sampo": {"log_ratios": True},
    "ld_dpo": {"log_ratios": True},
    "aot": {"group_shift": True},
    "aot_unpaired": {"log_ratios": True},
    "beta_dpo": {**BOTH, "perturbed": {"rho": [0.5], "beta_min": [1.0]}},
    "bco_pair": {"log_ratios": True},
    "bpo": {**BOTH, "candidates": 3},
    "srpo": {**BOTH, "candidates": 6},
    "opa_dpo": {
        "candidates": 5,
        "axes": {"response_weights": "KT", "image_weights": "KT"},
        "log_ratios": True,
    },
    "ofs_dpo": {"group_shift": True},
    "spo_degree": {**BOTH, "axes": {"degree_labels": ""}},
    "triple_po": {"candidates": 3},
    "triple_po_l": {"candidates": 3},
    "cpl": {"given": {"labels": (0.7, 0.3)}},
    "cpl_kl": {"given": {"labels": (0.7, 0.3)}, "log_ratios": True},
    "rrhf": {"candidates": 3},
    "token_dpo": {**BOTH},
    "tdpo1": {**BOTH},
    "tdpo2": {**BOTH},
    "sparse_po": {"base": {"beta": 2.0}, "axes": {"kl_token_weights": "KT"}, "log_ratios": True},
    "d3po": {"base": {"epsilon": 0.9}, "log_ratios": True},
    "kto": {
        "base": {"beta": 2.0},
        "candidates": 3,
        "given": {"labels": (1, -1, 0)},
        "log_ratios": True,
    },
    "apo_zero_unpaired": {"base": {"beta": 2.0}, "given": {"labels": (1, -1)}, "log_ratios": True},
    "nca_unpaired": {"base": {"beta": 2.0}, "given": {"labels": (1, -1)}, "log_ratios": True},
    "bco": {
        "base": {"beta": 2.0},
        "given": {"labels": (1, -1)},
        "axes": {"density_ratios": ""},
        "perturbed": {"max_density_ratio": [0.6]},
        "log_ratios": True,
    },
    "plackett_luce": {**GRADED, **BOTH},
    "pro": {**GRADED, "axes": {"sft_index": ""}},
    "swepo": {**GRADED, **BOTH},
    "mppo": {**GRADED},
    "lipo": {**GRADED, **BOTH},
    "lipo_lambda": {**GRADED, **BOTH},
    "unique_softmax": {**GRADED, **BOTH},
    "poly1_softmax": {**GRADED, **BOTH},
    "pairwise_mse": {**GRADED, **BOTH},
    "pairwise_quantile": {**GRADED, **BOTH},
    "pairwise_soft01": {**GRADED, **BOTH},
    "approx_ndcg": {**GRADED, **BOTH},
    "neural_ndcg": {**GRADED, **BOTH},
    "infonca": {**GRADED, **BOTH, "perturbed": {"reward_temperature": [0.5]}},
    "nca": {
        **GRADED,
        "perturbed": {"reward_temperature": [0.5]},
        "base": {"beta": 1.0},
        "log_ratios": True,
    },
    "exo": {**GRADED, **BOTH},
    "diff_ndcg": {**GRADED, **BOTH},
    "drpo_rank": {**GRADED, "base": {"decay": 0.5}, "perturbed": {"spread_limit": [0.01]}},
    "tpo_tree": {
        **GRADED,
        "axes": {"step_ends": "KT", "step_similarities": "KT"},
        "log_ratios": True,
    },
    "online_ipo_v1": {**BOTH},
    "online_ipo_v2": {**BOTH},
    "online_ipo": {**BOTH},
    "ipo_md": {**BOTH},
    "nash_md": {**BOTH},
    "inpo": {"group_shift": True},
    "onpo": {"group_shift": True},
    "dno": {"group_shift": True},
    "dno_prct": {"group_shift": True},
    "xpo": {"candidates": 3, "base": {"alpha": 0.5}},
    "vpo": {"candidates": 3, "base": {"alpha": 0.5}, "log_ratios": True},
    "selm": {"candidates": 3, "base": {"alpha": 0.5, "beta": 0.5}, "log_ratios": True},
    "hypo": {"candidates": 4},
    "ppo_policy": {"axes": {"advantages": "KT"}},
    "ppo_value": {"axes": {"previous_values": "KT", "returns": "KT"}, "group_shift": True},
    "grpo": {"candidates": 3},
    "cispo": {"candidates": 3},
    "sapo": {"candidates": 3},
    "rloo": {"candidates": 3},
    "copg": {**BOTH, "candidates": 3},
    "rebel": {"group_shift": True},
    "bradley_terry": {"axes": {"margins": "", "preference_probabilities": ""}, "group_shift": True},
    "plackett_luce_reward": {**GRADED, "group_shift": True},
    "general_preference": {"axes": {"embeddings": "KT", "margins": ""}, "group_shift": True},
    "pair_preference": {"given": {"labels": (1, 1)}, "group_shift": True},
    "prm": {"axes": {"step_labels": "KT", "step_mask": "KT"}, "group_shift": True},
    "regret_preference": {"group_shift": True},
    "semantic": {"perturbed": {"core": ["w"], "given": ["w | l"], "also": ["w & l"]}},
    "semantic_reference": {
        "perturbed": {"core": ["w"], "given": ["w | rl"], "also": ["false"]},
        "log_ratios": True,
    },
    "upo": {**BOTH, "axes": {"flip_rates": ""}},
    "rationale_orpo": {"candidates": 3},
    "slic_list": {**GRADED},
    "gumbel": {**GRADED, **BOTH},
    "mpo_magnetic": {"group_shift": True},
    "oreo": STEPS,
    "oreo_policy": STEPS,
    "oreo_value": STEPS,
    "brain": {"candidates": 3, "group_shift": True},
    "constrained_rlhf": {"candidates": 3},
    "cgpo_crpg": {**JUDGED, "base": {"kl_max": 5.0}},
    "cgpo_codpo": JUDGED,
    "cgpo_crraft": JUDGED,
}
CASES = {name: Case(name, loss, **ROWS.get(name, {})) for name, loss in LOSSES.items()}


def test_rows_are_of_losses_that_exist():
    assert not set(ROWS) - set(LOSSES)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_loss(name, check):
    CHECKS[check](CASES[name])


# Right losses of kinds that the table may not hold yet: the checks must not complain about them.


def token_level(
    policy_token_logps,
    reference_token_logps,
    token_mask,
    example_weights,
    *,
    clip: Positive = 1.0,
    sign: Literal["plus", "minus"] = "plus",
    where=None,
):
    """https://example.org: >>> policy_token_logps: reference_token_logps: token_mask: clip: sign:
    example_weights:
    """
    where = jnp.ones(policy_token_logps.shape[:-1], bool) if where is None else where
    keep = token_mask & where[..., None]
    policy = masked(at_least_float32(policy_token_logps), keep)
    ratios = jnp.clip(policy - masked(at_least_float32(reference_token_logps), keep), -clip, clip)
    total = example_weights * jnp.sum(ratios, (-2, -1))
    count = jnp.sum(keep, (-2, -1), dtype=total.dtype)
    return Mean(total if sign == "plus" else -total, count)


def noisy_list(
    policy_logps, labels, rewards, values=None, *, key, temperature: Positive = 1.0, where=None
):
    """https://example.org: >>> policy_logps: labels: rewards: values: key: temperature:"""
    where = jnp.ones(policy_logps.shape, bool) if where is None else where
    wanted = masked(at_least_float32(labels) + at_least_float32(rewards), where)
    wanted = wanted * jax.random.uniform(key, policy_logps.shape)
    scores = masked(at_least_float32(policy_logps), where) / temperature
    if values is not None:
        scores = scores + jnp.sum(masked(at_least_float32(values), where[..., None]), -1)
    every = logsumexp(scores, where=where)
    found = jnp.sum(masked(wanted * (every[..., None] - scores), where), -1)
    return masked(found, jnp.any(where, -1)).astype(scores.dtype)


@stateful(lambda rate: jnp.zeros(()))
def with_memory(policy_logps, reference_logps, *, rate: Positive = 0.5, where=None, state):
    """https://example.org: >>> policy_logps: reference_logps: rate: state:"""
    ratios = log_ratios(policy_logps, reference_logps, where)
    mean = Mean.over(jax.lax.stop_gradient(ratios), where).value
    state = (1 - rate) * state + rate * mean.astype(state.dtype)
    return masked_rows(jax.nn.softplus(-margin(ratios) + state), where), state


RIGHT = [
    Case(
        "token_level",
        token_level,
        candidates=3,
        axes={"example_weights": ""},
        log_ratios=True,
    ),
    Case("noisy_list", noisy_list, candidates=4, group_shift=True),
    Case("with_memory", with_memory, log_ratios=True),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_right_loss_of_another_kind_passes(case, check):
    CHECKS[check](case)


# Wrong losses: what each check is there to find.


def masks_only_its_output(policy_logps, reference_logps, *, beta=0.1, where=None):
    """DPO whose mask comes too late: the value is right, the gradient NaN."""
    loss = jax.nn.softplus(-beta * margin(policy_logps - reference_logps))
    return masked_rows(loss, where)


def takes_the_mean(policy_logps, reference_logps, *, beta: Positive = 0.1, where=None):
    return jnp.mean(dpo_loss(policy_logps, reference_logps, beta=beta, where=where))


def ignores_the_mask(policy_logps, *, where=None):
    return jax.nn.softplus(-margin(policy_logps.astype(jnp.float32)))


def compiles_at_every_call(policy_logps, *, where=None):
    policy_logps = masked(policy_logps.astype(jnp.float32), where)
    return masked_rows(jax.jit(lambda x: jax.nn.softplus(-margin(x)))(policy_logps), where)


@stateful(lambda: jnp.zeros((), jnp.int32))
def changes_the_dtype_of_its_state(policy_logps, *, where=None, state=None):
    margins = margin(masked(policy_logps, where))
    return masked_rows(jax.nn.softplus(-margins), where), state + jnp.mean(margins)


def couples_groups_unmarked(policy_logps, *, where=None):
    margins = margin(masked(policy_logps, where))
    return masked_rows(jax.nn.softplus(jnp.mean(margins) - margins), where)


def takes_the_log_of_a_sigmoid(policy_logps, *, where=None):
    margins = margin(masked(policy_logps, where))
    return masked_rows(-jnp.log(jax.nn.sigmoid(margins)), where)


def computes_in_bfloat16(policy_logps, reference_logps, *, where=None):
    ratios = masked(policy_logps, where) - masked(reference_logps, where)
    return masked_rows(jax.nn.softplus(-margin(ratios)).astype(jnp.float32), where)


def falls_to_float32(policy_logps, reference_logps, *, where=None):
    ratios = log_ratios(policy_logps, reference_logps, where).astype(jnp.float32)
    return masked_rows(jax.nn.softplus(-margin(ratios)), where)


def reads_no_beta(policy_logps, *, beta: Positive = 0.1, where=None):
    """beta: does nothing."""
    return masked_rows(jax.nn.softplus(-margin(masked(policy_logps, where))), where)


def takes_any_number(policy_logps, *, beta: float = 0.1, where=None):
    """beta: of any sign."""
    return masked_rows(jax.nn.softplus(-beta * margin(masked(policy_logps, where))), where)


def branches_on_a_value(policy_logps, *, where=None):
    rows = masked_rows(jax.nn.softplus(-margin(masked(policy_logps, where))), where)
    return rows if jnp.sum(rows) > 0 else -rows


def needs_a_mask(policy_logps, *, where=None):
    return jnp.where(valid_rows(where), -margin(masked(policy_logps, where)), 0.0)


WRONG = [
    (masks_only_its_output, "masked", "gets through"),
    (takes_the_mean, "shape", "no mean inside"),
    (needs_a_mask, "shape", "NoneType"),
    (ignores_the_mask, "masked", "has a gradient where masked"),
    (compiles_at_every_call, "compiles_once", "eager call compiles again"),
    (changes_the_dtype_of_its_state, "compiles_once", "second step compiles again"),
    (couples_groups_unmarked, "transforms", "vmap differs from eager; @whole_batch"),
    (branches_on_a_value, "transforms", "boolean conversion|boolean value"),
    (takes_the_log_of_a_sigmoid, "extremes", "not finite at margins"),
    (computes_in_bfloat16, "dtypes", "must be cast before"),
    (falls_to_float32, "dtypes", "float32 out of float64"),
    (reads_no_beta, "hyper_parameters", "beta=0.13 gives the same as beta=0.1"),
    (takes_any_number, "hyper_parameters", "beta is a number without a range"),
    (reads_no_beta, "documented", "names no arXiv"),
    (needs_a_mask, "invariances", "group_shift does not change the loss"),
]


@pytest.mark.parametrize(
    ("loss", "check", "complaint"),
    WRONG,
    ids=[f"{loss.__name__}-{check}" for loss, check, _ in WRONG],
)
def test_wrong_loss_is_found(loss, check, complaint):
    with pytest.raises(Exception, match=complaint):
        CHECKS[check](Case(loss.__name__, loss))


def test_every_check_finds_some_wrong_loss():
    assert {check for _, check, _ in WRONG} == set(CHECKS)
