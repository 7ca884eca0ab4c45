"""The implicit reward that is reported of each loss is the one that its formula compares."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxo.losses
from paxo.losses.implicit_rewards import REWARDS, reward_of
from paxo.numerics import Mean
from paxo.objectives import Objective, Term


def _all_losses():
    found = {}
    for module in pkgutil.iter_modules(paxo.losses.__path__):
        for name, value in vars(importlib.import_module(f"paxo.losses.{module.name}")).items():
            own = getattr(value, "__module__", "") == f"paxo.losses.{module.name}"
            takes = own and callable(value) and "where" in inspect.signature(value).parameters
            if takes and name.endswith("_loss") and not name.startswith("_"):
                found[name.removesuffix("_loss")] = value
    return found


LOSSES = _all_losses()
NOT_HYPER = ("where", "key", "state")


def hyper_parameters(loss):
    parameters = inspect.signature(loss).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in NOT_HYPER
    }


def arrays(loss):
    return [
        p.name
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def test_the_table_holds_losses_that_exist_and_hyper_parameters_that_they_have():
    assert set(REWARDS) <= set(LOSSES)
    for name, reward in REWARDS.items():
        known = hyper_parameters(LOSSES[name])
        assert not reward.scale or reward.scale.removeprefix("1/") in known, name
        assert isinstance(reward.per_token, bool) or reward.per_token[0] in known, name


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_positive_scale(name):
    goal = Objective((Term(name, LOSSES[name], hyper_parameters(LOSSES[name])),))
    assert goal.reward_scale > 0
    assert goal.reward_per_token in (True, False)


# Hyper-parameters that leave nothing of a loss but its comparison: likelihood terms, penalties.
COMPARISON = {
    "cgpo_codpo": {"lam": 0.0},
    "cpo": {"cpo_alpha": 0.0},
    "cpo_simpo": {"cpo_alpha": 0.0},
    "iterative_rpo": {"alpha": 0.0},
    "orpo": {"nll_reduction": "sequence_mean"},
    "pro": {"sft_weight": 0.0},
    "rationale_orpo": {"gamma": 0.0},
    "slic_list": {"lam": 0.0},
    "r_dpo": {"alpha": 0.0},
    "rpo": {"eta": 0.0},
    "rrhf": {"nll_reduction": "sequence_mean"},
    "slic_hf": {"lam": 0.0},
    "triple_po": {"tpo_alpha": 0.0},
    "triple_po_l": {"tpo_alpha": 0.0},
}
VARIANTS = [("cpo", {"link": "ipo"}), ("ipo", {"length_normalize": False})]
WITH_LENGTHS = [
    name
    for name, loss in LOSSES.items()
    if "lengths" in arrays(loss) and not any("token" in array for array in arrays(loss))
]


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in WITH_LENGTHS), *VARIANTS], ids=str
)
def test_a_reward_is_per_token_exactly_where_the_loss_divides_by_lengths(name, changes):
    loss = LOSSES[name]
    hyper = hyper_parameters(loss) | COMPARISON.get(name, {}) | changes
    candidates = 3 if name.startswith(("triple", "rationale")) else 2
    rng = np.random.default_rng(0)
    given = {
        n: jnp.asarray(rng.uniform(-3, -1, (4, candidates)), jnp.float32)
        for n in ("policy_logps", "reference_logps")
    }
    given["labels"] = given["win_rates"] = jnp.linspace(1, 0, candidates) * jnp.ones((4, 1))
    given["rewards"] = given["passed"] = given["labels"]
    given["flip_rates"] = jnp.full(4, 0.1)
    given["lengths"] = jnp.asarray(rng.integers(2, 9, (4, candidates)), jnp.float32)
    given = {n: x for n, x in given.items() if n in arrays(loss)}
    if hasattr(loss, "init_state"):
        wanted = inspect.signature(loss.init_state).parameters
        given["state"] = jax.tree.map(
            jnp.asarray, loss.init_state(**{k: v for k, v in hyper.items() if k in wanted})
        )

    def value(logps_factor, lengths_factor):
        scaled = {n: x * logps_factor if n.endswith("_logps") else x for n, x in given.items()}
        scaled["lengths"] = given["lengths"] * lengths_factor
        result = loss(**scaled, **hyper)
        result = result[0] if "state" in given else result
        return np.asarray(result.value if isinstance(result, Mean) else result)

    per_token = reward_of(loss, hyper).is_per_token(hyper)
    # Twice the tokens of the same mean log-prob, and the same sum over twice the tokens.
    same_mean = np.allclose(value(2, 2), value(1, 1), rtol=1e-5)
    same_sum = np.allclose(value(1, 2), value(1, 1), rtol=1e-5)
    assert same_mean != same_sum
    assert per_token == same_mean


FACTORS = {
    "aot": {"beta": 0.3},
    "cpl": {"alpha": 0.3},
    "cpl_kl": {"alpha": 0.3, "contrastive_bias": 1.0},
    "cpo": {"beta": 0.3, "cpo_alpha": 0.0},
    "discopop": {"beta": 0.3},
    "dno_prct": {"eta": 0.3},
    "dpo": {"beta": 0.3},
    "flex_dpo": {"beta_w": 0.3, "beta_l": 0.3},
    "rso_hinge": {"gamma": 0.01},
    "simpo": {"beta": 0.3, "gamma_beta_ratio": 0.0},
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_loss_of_the_reward_alone_is_unchanged_where_scale_and_log_ratio_trade(name):
    loss = LOSSES[name]
    hyper = hyper_parameters(loss) | FACTORS[name]
    symbols = {reward_of(loss, hyper).scale, *(n for n in ("beta_l",) if n in hyper)}
    twice = hyper | {symbol: 2 * hyper[symbol] for symbol in symbols}
    assert reward_of(loss, twice).scale_of(twice) == 2 * reward_of(loss, hyper).scale_of(hyper)
    ones = jnp.ones((3, 2))
    policy = jnp.array([[-1.0, -3.0], [-4.0, -2.0], [-2.0, -2.5]])
    given = {"labels": jnp.array([1.0, 0.0]) * ones, "lengths": 2 * ones}
    given |= {"reference_logps": 0 * ones, "previous_logps": 0 * ones}
    given = {n: x for n, x in given.items() if n in arrays(loss)}
    once = loss(policy, **given, **hyper)
    np.testing.assert_allclose(loss(policy / 2, **given, **twice), once, rtol=1e-5)


@pytest.mark.parametrize(("name", "eta"), [("sppo", 4.0), ("rebel", 4.0), ("mdpo", 0.25)])
def test_where_steps_are_inverse_the_minimiser_has_the_reward_of_the_data(name, eta):
    """At the minimum of a regression the implicit reward's margin is that of the given rewards."""
    loss = LOSSES[name]
    hyper = {"sppo": {"eta": eta}, "rebel": {"eta": eta}, "mdpo": {"t_k": eta}}[name]
    data = {"sppo": "win_rates", "rebel": "rewards", "mdpo": "advantages"}[name]
    rewards = jnp.array([0.75, 0.25])
    rewards = rewards - 0.5 if name == "mdpo" else rewards
    previous = jnp.zeros(2)
    logps = (rewards if name != "sppo" else rewards - 0.5) * eta
    gradient = jax.grad(lambda x: jnp.sum(loss(x, previous, **{data: rewards}, **hyper)))(logps)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    found = reward_of(loss, hyper).scale_of(hyper) * (logps[0] - logps[1])
    np.testing.assert_allclose(found, rewards[0] - rewards[1], rtol=1e-6)
