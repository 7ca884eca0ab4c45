"""The logic of preference losses: known losses re-derived, inequivalent ones told apart."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from paxo.losses.logic import (
    SPECIFICATIONS,
    Specification,
    distinguish,
    entails,
    equivalent,
    odds,
    specification_of,
)
from paxo.losses.pairwise import dpo_loss, simpo_loss
from paxo.losses.reference_free import asft_loss, cpo_loss, orpo_loss
from paxo.losses.semantic import compile_loss, log_odds, semantic_loss, semantic_reference_loss

P = np.array([[0.6, 0.3], [0.05, 0.9], [0.5, 0.5]])  # p_w, p_l
LENGTHS = np.array([[4, 6], [5, 3], [2, 2]], np.float32)
LOGPS = (np.log(P) * LENGTHS).astype(np.float32)
REFERENCE = (np.log([[0.3, 0.4], [0.2, 0.2], [0.7, 0.1]]) * LENGTHS).astype(np.float32)
W, L = P.T
WORLDS = list(itertools.product((0, 1), repeat=2))
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(WORLDS, n)]
EVERY = [(f, a) for f in SUBSETS for a in SUBSETS]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_entropy", -np.log(W)),
        ("unlikelihood", -np.log(W) - np.log(1 - L)),
        ("implication", -np.log(1 - L * (1 - W))),
        ("cpo", np.log1p(L / W)),
        ("orpo", np.log1p(L * (1 - W) / (W * (1 - L)))),
    ],
)
def test_specifications_compile_to_their_closed_forms(name, expected):
    np.testing.assert_allclose(
        compile_loss(SPECIFICATIONS[name])(LOGPS, LENGTHS), expected, rtol=1e-5
    )


def test_specifications_are_the_losses_they_name():
    of = lambda name: compile_loss(SPECIFICATIONS[name])(LOGPS, LENGTHS)  # noqa: E731
    ones = np.ones_like(LENGTHS)
    means = LOGPS / LENGTHS
    np.testing.assert_allclose(of("cpo"), cpo_loss(means, ones, beta=1.0, cpo_alpha=0.0), rtol=1e-5)
    simpo = simpo_loss(LOGPS, LENGTHS, beta=1.0, gamma_beta_ratio=0.0)
    np.testing.assert_allclose(of("cpo"), simpo, rtol=1e-5)
    nll = -means[:, 0]
    np.testing.assert_allclose(of("orpo"), orpo_loss(LOGPS, LENGTHS, lam=1.0) - nll, rtol=1e-5)
    np.testing.assert_allclose(of("unlikelihood"), asft_loss(LOGPS, LENGTHS) - nll, rtol=1e-5)


@pytest.mark.parametrize("link", ["logistic", "ipo"])
def test_dpo_is_a_specification_on_whole_sequences(link):
    loss = compile_loss(SPECIFICATIONS["dpo"], link=link, beta=0.3, length_normalize=False)
    found = loss(LOGPS, REFERENCE, LENGTHS)
    if link == "logistic":
        expected = dpo_loss(LOGPS, REFERENCE, beta=0.3)
    else:
        ratios = LOGPS - REFERENCE
        expected = (ratios[:, 0] - ratios[:, 1] - 1 / 0.6) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unnormalised_cpo_and_orpo_are_the_same_loss_minus_the_log_of_the_core():
    forms = [SPECIFICATIONS[name].unnormalised for name in ("cpo", "orpo", "implication")]
    assert all(equivalent(a, b) for a, b in itertools.combinations(forms, 2))
    for spec in (*forms, SPECIFICATIONS["dpo"].unnormalised):
        names = spec.variables
        point = {name: Fraction(i + 1, 7) for i, name in enumerate(names)}
        log_probs = {name: jnp.log(jnp.float32(p)) for name, p in point.items()}
        core = odds(spec, point) / (1 + odds(spec, point))  # its probability
        found = jax.nn.softplus(-log_odds(spec, log_probs))
        assert float(found) == pytest.approx(-math.log(core), rel=1e-5)


def test_unnormalised_dpo_is_not_dpo():
    dpo = SPECIFICATIONS["dpo"]
    point = distinguish(dpo, dpo.unnormalised)
    assert set(point) == {"w", "l", "rw", "rl"}
    assert odds(dpo, point) != odds(dpo.unnormalised, point)


def test_the_named_losses_are_told_apart():
    for a, b in itertools.combinations(SPECIFICATIONS.values(), 2):
        assert not equivalent(a, b)
        assert equivalent(a, a)
        assert equivalent(b, b)


def test_other_words_for_the_same_loss_are_equivalent():
    cpo = SPECIFICATIONS["cpo"]
    assert equivalent(cpo, Specification("w", given="w | l", also="l & w"))
    assert equivalent(cpo, Specification("~l | w", given="~(~w & ~l)", also="~(~w | ~l)"))
    # other worlds, the same odds: given l, w against not w is p_w / (1 - p_w)
    conditioned = Specification("w", given="l")
    assert conditioned.favourable != SPECIFICATIONS["cross_entropy"].favourable
    assert equivalent(conditioned, SPECIFICATIONS["cross_entropy"])
    # two variables against four: the reference cancels
    assert equivalent(Specification("w", given="rw | rl"), SPECIFICATIONS["cross_entropy"])


def test_equivalent_specifications_and_only_those_give_equal_values():
    rng = np.random.default_rng(0)
    specs = [specification_of(*EVERY[i]) for i in rng.choice(len(EVERY), 25, replace=False)]
    points = [{"w": Fraction(i, 11), "l": Fraction(j, 13)} for i, j in ((2, 5), (7, 3), (9, 11))]
    values = [[odds(spec, point) for point in points] for spec in specs]
    for (a, u), (b, v) in itertools.combinations(zip(specs, values), 2):
        assert equivalent(a, b) == (u == v)


def test_every_choice_of_worlds_has_a_specification():
    assert len(EVERY) == (2**4 - 1) ** 2  # of the 4^4 choices those with worlds on both sides
    for favourable, adverse in EVERY:
        spec = specification_of(favourable, adverse)
        assert set(spec.favourable) == set(favourable)
        assert set(spec.adverse) == set(adverse)


def test_exchanging_the_sides_negates_the_log_odds():
    log_probs = {"w": jnp.log(0.3), "l": jnp.log(0.8)}
    for favourable, adverse in EVERY[::17]:
        rho = log_odds(specification_of(favourable, adverse), log_probs)
        negated = log_odds(specification_of(adverse, favourable), log_probs)
        np.testing.assert_allclose(rho, -negated, atol=1e-6)


def test_log_odds_are_the_log_of_the_exact_odds():
    point = {"w": Fraction(1, 3), "l": Fraction(4, 5), "rw": Fraction(1, 7), "rl": Fraction(9, 10)}
    log_probs = {name: jnp.log(jnp.float32(p)) for name, p in point.items()}
    sampled = [specification_of(*pair) for pair in EVERY[::23]]
    for spec in (*sampled, *SPECIFICATIONS.values()):
        expected = math.log(odds(spec, point))
        assert float(log_odds(spec, log_probs)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_entailment_orders_the_losses():
    specs = [specification_of(*pair) for pair in EVERY[::19]] + [
        SPECIFICATIONS[name] for name in ("cross_entropy", "unlikelihood", "implication", "orpo")
    ]
    grid = [{"w": Fraction(i, 5), "l": Fraction(j, 5)} for i in range(1, 5) for j in range(1, 5)]
    entailed = [(a, b) for a, b in itertools.permutations(specs, 2) if entails(a, b)]
    assert len(entailed) > 5
    for a, b in entailed:
        assert all(odds(a, point) <= odds(b, point) for point in grid)
    assert entails(SPECIFICATIONS["unlikelihood"], SPECIFICATIONS["implication"])
    assert not entails(SPECIFICATIONS["implication"], SPECIFICATIONS["unlikelihood"])


@pytest.mark.parametrize(
    ("link", "of"),
    [
        ("logistic", lambda rho: math.log1p(math.exp(-0.5 * rho))),
        ("ipo", lambda rho: (rho - 1.0) ** 2),
        ("slic", lambda rho: max(0.0, 0.5 - rho)),
        ("rrhf", lambda rho: max(0.0, -0.5 * rho)),
    ],
)
def test_links(link, of):
    found = compile_loss(SPECIFICATIONS["cpo"], link=link, beta=0.5)(LOGPS, LENGTHS)
    np.testing.assert_allclose(found, [of(math.log(w / l)) for w, l in P], rtol=1e-4, atol=1e-6)  # noqa: E741


def test_a_tautology_is_a_constant():
    spec = Specification("w", also="true")
    np.testing.assert_allclose(compile_loss(spec)(LOGPS, LENGTHS), [math.log(2)] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("formula", "complaint"),
    [
        ("w &", "cannot read the formula 'w &'"),
        ("w & x", "cannot read 'x' in a formula: it knows w, l"),
        ("w -> l -> w", "cannot read 'w -> l -> w'"),
        ("w + l", "cannot read"),
        ("w | ~w", "leaves no adverse world"),
    ],
)
def test_formulas_that_cannot_be_read_or_decide_nothing_are_refused(formula, complaint):
    with pytest.raises(ValueError, match=complaint.replace("|", r"\|")):
        compile_loss(Specification(formula))(LOGPS, LENGTHS)


def test_a_specification_of_the_reference_needs_the_reference():
    with pytest.raises(ValueError, match="semantic_reference_loss"):
        semantic_loss(LOGPS, LENGTHS, core="w & rl")
    found = semantic_reference_loss(LOGPS, REFERENCE, LENGTHS, core="w", given="true", also="false")
    np.testing.assert_allclose(found, -np.log(W), rtol=1e-5)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_gradients_are_finite_at_certainty_and_exact_elsewhere(name):
    loss = compile_loss(SPECIFICATIONS[name])
    means = np.array([-100.0, -1.0, -1e-4, -1e-7, 0.0], np.float32)
    grid = np.stack(np.meshgrid(means, means), -1).reshape(-1, 2)
    ones = np.ones_like(grid)
    others = (np.full_like(grid, -1.0),) if name == "dpo" else ()
    gradient = jax.grad(lambda s: jnp.sum(loss(s, *others, ones)))(jnp.asarray(grid))
    assert np.isfinite(gradient).all()
    with jax.enable_x64(True):
        rest = [jnp.asarray(x, jnp.float64) for x in ((REFERENCE,) if others else ())]
        policy, lengths = (jnp.asarray(x, jnp.float64) for x in (LOGPS, LENGTHS))
        check_grads(lambda s: loss(s, *rest, lengths), (policy,), order=1, modes=["rev"], rtol=1e-6)
