"""Expected losses against sums written out, and sampled ones against expected ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.games import builders, exact
from paxo.games.expected import expected_loss, sampled_loss
from paxo.objectives import LOSSES, objective, weighted_sum

with jax.enable_x64(True):
    GAMES = builders.numpy_game(4, 4, beta=0.3, num_games=3)
    GAME = GAMES[0]
    RNG = np.random.default_rng(2)
    POLICY, OTHER, THIRD = (jnp.asarray(RNG.standard_normal((3, 4))) for _ in range(3))
    REWARDS = jnp.asarray(RNG.standard_normal((3, 4)))


def value(loss, games, logits, **arguments):
    """`expected_loss`, compiled as one program."""
    return jax.jit(lambda x: expected_loss(loss, games, x, **arguments))(logits)


def spied(seen, spy, **arguments):
    """What a loss that keeps its arguments in `seen` is given on the first game, compiled."""

    @jax.jit
    def run(x):
        expected_loss(spy, GAME, x, **arguments)
        return dict(seen)

    return run(POLICY[0])


def logp(x):
    return np.asarray(jax.nn.log_softmax(x))


def written_out(name, settings, *, sampler, arrays, winner_first):
    """The mean over ordered pairs of the first game, one call of the loss for each."""
    loss, p, total = LOSSES[name], np.exp(logp(sampler[0])), 0.0
    judge = np.asarray(GAME.preferences)
    for y, z in itertools.product(range(4), range(4)):
        both = np.array([y, z])
        given = {k: x[both] for k, x in arrays.items()}
        if winner_first:
            turned = {k: x[::-1] for k, x in given.items()}
            value = judge[y, z] * loss(**given, **settings)
            value += judge[z, y] * loss(**turned, **settings)
        else:
            value = loss(**given, labels=np.array([judge[y, z], judge[z, y]]), **settings)
        total += p[y] * p[z] * value
    return float(total)


def test_pairs_without_labels_are_taken_winner_first_as_often_as_the_judge_says():
    arrays = {"policy_logps": logp(POLICY[0]), "reference_logps": logp(GAME.reference_logps)}
    found = value(objective("dpo", beta=0.7), GAMES, POLICY, sampler=OTHER)
    expected = written_out("dpo", {"beta": 0.7}, sampler=OTHER, arrays=arrays, winner_first=True)
    assert found.shape == (3,)
    assert float(found[0]) == pytest.approx(expected, rel=1e-12)


def test_losses_with_labels_are_told_the_judges_probabilities():
    arrays = {"policy_logps": logp(POLICY[0]), "reference_logps": logp(GAME.reference_logps)}
    settings = {"beta": 0.7}
    found = value(objective("online_ipo_v2", beta=0.7), GAMES, POLICY, sampler=POLICY)
    expected = written_out(
        "online_ipo_v2", settings, sampler=POLICY, arrays=arrays, winner_first=False
    )
    assert float(found[0]) == pytest.approx(expected, rel=1e-12)


def test_soft_labels_are_the_mean_of_hard_ones_for_online_ipo():
    loss = objective("online_ipo", tau=0.4)
    soft, hard = (value(loss, GAMES, POLICY, hard_labels=h) for h in (False, True))
    np.testing.assert_allclose(soft, hard, rtol=1e-12)
    with pytest.raises(ValueError, match="for pairs; got candidates=3"):
        expected_loss(loss, GAMES, POLICY, hard_labels=True, candidates=3)


def test_each_candidate_may_have_a_sampler_of_its_own():
    rewards = {"rewards": REWARDS}
    loss = objective("copg", beta=0.5)
    found = value(loss, GAMES, POLICY, sampler=[OTHER, THIRD], extras=rewards)[0]
    p, r = np.exp(logp(OTHER[0])), np.exp(logp(THIRD[0]))
    h, R = logp(POLICY[0]) - logp(GAME.reference_logps), np.asarray(REWARDS[0])
    by_hand = sum(
        p[y] * r[z] * -((R[y] - R[z]) - 0.25 * (h[y] - h[z])) * (h[y] - h[z])
        for y, z in itertools.product(range(4), range(4))
    )
    assert float(found) == pytest.approx(by_hand, rel=1e-12)
    # The winner stands first whoever drew it: the order of the samplers does not matter.
    dpo = functools.partial(value, objective("dpo"), GAMES, POLICY)
    np.testing.assert_allclose(dpo(sampler=[OTHER, THIRD]), dpo(sampler=[THIRD, OTHER]), rtol=1e-12)
    with pytest.raises(ValueError, match="one policy's logits or 2"):
        dpo(sampler=[OTHER])


def test_win_rates_are_against_the_opponent_and_the_live_policy_by_default():
    loss = objective("sppo", eta=2.0)
    found = value(loss, GAMES, POLICY, sampler=OTHER, opponent=THIRD, previous=OTHER)
    g, w = logp(POLICY) - logp(OTHER), np.asarray(GAMES.win_rates(THIRD))
    expected = (np.exp(logp(OTHER)) * (g - 2 * (w - 0.5)) ** 2).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    live = value(loss, GAMES, POLICY, previous=OTHER)
    np.testing.assert_allclose(live, value(loss, GAMES, POLICY, previous=OTHER, opponent=POLICY))


def test_longer_lists_are_judged_by_how_often_each_beats_the_others():
    seen = {}

    def spy(policy_logps, labels):
        seen["labels"] = labels
        return jnp.sum(policy_logps * labels, -1)

    labels = spied(seen, spy, candidates=3)["labels"]
    p = np.asarray(GAME.preferences)
    assert labels.shape == (4, 4, 4, 3)
    np.testing.assert_allclose(labels[1, 3, 0, 1], (p[3, 1] + p[3, 0]) / 2, rtol=1e-14)


def test_nothing_but_the_policys_log_probs_is_differentiated():
    loss = objective("online_ipo_v2", beta=0.3)
    slope = lambda run: jax.jit(jax.grad(lambda x: run(x).sum()))(POLICY)  # noqa: E731
    live = slope(lambda x: expected_loss(loss, GAMES, x, sampler=x, opponent=x))
    held = slope(lambda x: expected_loss(loss, GAMES, x, sampler=POLICY))
    np.testing.assert_allclose(live, held, rtol=1e-13)


def test_terms_of_an_objective_are_summed_with_their_weights():
    dpo, nll = objective("dpo"), objective("online_ipo_v1")
    both = value(weighted_sum((dpo, 1.0), (nll, 0.5)), GAMES, POLICY)
    alone = [value(x, GAMES, POLICY) for x in (dpo, nll)]
    np.testing.assert_allclose(both, alone[0] + 0.5 * alone[1], rtol=1e-13)


def test_a_one_token_completion_has_the_entropy_and_kl_of_its_policy():
    loss = objective("tdpo1", beta=0.2)
    found = value(loss, GAMES, POLICY)
    kl = exact.kl_divergence(GAMES.reference_logps, POLICY)
    assert bool(jnp.isfinite(found).all())
    assert bool((kl > 0).all())
    seen = {}

    def spy(policy_logps, token_entropies, token_kls, token_collisions, token_mask, lengths):
        seen.update(entropy=token_entropies, kl=token_kls, collisions=token_collisions)
        return jnp.sum(policy_logps, -1)

    found, p = spied(seen, spy), np.exp(logp(POLICY[0]))
    assert float(found["entropy"][0, 0, 0, 0]) == pytest.approx(-(p * np.log(p)).sum())
    assert float(found["kl"][1, 2, 1, 0]) == pytest.approx(float(kl[0]))
    assert float(found["collisions"][1, 2, 1, 0]) == pytest.approx(np.log((p * p).sum()))


# Arrays by action that some losses name, and the size of their groups where a pair does not fit.
EXTRAS = {
    **dict.fromkeys(("rewards", "margin_rewards", "scores", "start_values"), ()),
    **dict.fromkeys(("end_values", "passed", "baseline_rewards", "constraint_rewards"), ()),
    **dict.fromkeys(("advantages", "values", "previous_values", "returns"), (1,)),
    **dict.fromkeys(("token_weights", "step_labels", "step_scores", "step_mask"), (1,)),
    **dict.fromkeys(("step_ends", "step_similarities"), (1,)),
    "embeddings": (2,),
}
# Arrays that belong to a group: how often its label is wrong, its degree of preference.
GROUP_EXTRAS = {"flip_rates": (), "degree_labels": (), "degree_logits": (3,)}
SIZES = {"rationale_dpo": 3, "rationale_orpo": 3, "bpo": 3, "triple_po": 3, "triple_po_l": 3}
SIZES |= {"xpo": 3, "vpo": 3, "selm": 3, "hypo": 3, "srpo": 6, "opa_dpo": 5}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_objective_has_an_expected_loss(name):
    size = SIZES.get(name, 2)
    n = 2 if size > 3 else 4  # N^K groups
    game = builders.numpy_game(4, n, beta=0.3, num_games=1)[0]
    rng = np.random.default_rng(5)
    shapes = EXTRAS | ({"advantages": ()} if name == "mdpo" else {})
    extras = {k: rng.uniform(0.1, 0.9, (n, *rest)) for k, rest in shapes.items()}
    of_groups = {k: rng.uniform(0, 0.5, (n,) * size + rest) for k, rest in GROUP_EXTRAS.items()}
    loss = jax.eval_shape(
        lambda x: expected_loss(
            objective(name), game, x, previous=jnp.zeros(n), extras=extras, group_extras=of_groups,
            candidates=size, key=jax.random.key(0),
        ),
        jnp.zeros(n),
    )  # fmt: skip
    assert loss.shape == ()
    assert loss.dtype == jnp.float64


def test_arrays_of_groups_stand_in_the_order_of_their_actions():
    # UPO with the judge's doubt as flip rate: both orders of a pair then say the same, that of DPO
    # with soft labels.
    doubt = 1 - GAMES.preferences
    loss = objective("upo", beta=0.7)
    found = value(loss, GAMES, POLICY, sampler=OTHER, group_extras={"flip_rates": doubt})
    soft, h = np.asarray(GAMES.preferences), logp(POLICY) - logp(GAMES.reference_logps)
    z = 0.7 * (h[:, :, None] - h[:, None, :])
    each = np.log1p(np.exp(-z)) * soft + np.log1p(np.exp(z)) * (1 - soft)
    p = np.exp(logp(OTHER))
    told = 2 * soft * each  # the winner first, as often as the judge says
    expected = np.einsum("gi,gj,gij->g", p, p, told)
    np.testing.assert_allclose(found, expected, rtol=1e-12)

    @jax.jit
    def drawn(rates):
        run = functools.partial(sampled_loss, loss, GAMES, POLICY, sampler=OTHER)
        return run(jax.random.key(0), num_samples=40000, group_extras={"flip_rates": rates})

    np.testing.assert_allclose(drawn(doubt), found, rtol=0.02)
    with pytest.raises(ValueError, match=r"group_extras\['flip_rates'\].*\[3, 4, 4\] or \[4, 4\]"):
        expected_loss(loss, GAMES, POLICY, group_extras={"flip_rates": np.ones(4)})


def test_a_loss_that_adds_its_groups_up_is_weighted_too():
    found = value(objective("nll"), GAMES, POLICY, sampler=OTHER, candidates=1)
    np.testing.assert_allclose(found, -(np.exp(logp(OTHER)) * logp(POLICY)).sum(-1), rtol=1e-12)


def test_one_figure_for_the_whole_batch_cannot_be_weighted():
    loss = objective("kto")
    assert value(loss, GAMES, POLICY).shape == (3,)
    with pytest.raises(ValueError, match=r"'kto' says one figure.*leave `sampler` out"):
        expected_loss(loss, GAMES, POLICY, sampler=OTHER)


def test_missing_and_misshapen_arrays_are_named():
    with pytest.raises(ValueError, match=r"'inpo' needs previous_logps.*previous=logits"):
        expected_loss(objective("inpo"), GAMES, POLICY)
    with pytest.raises(ValueError, match="needs rewards"):
        expected_loss(objective("copg"), GAMES, POLICY)
    with pytest.raises(ValueError, match=r"extras\['rewards'\] must have shape \[3, 4\]"):
        expected_loss(objective("copg"), GAMES, POLICY, extras={"rewards": np.ones(5)})
    with pytest.raises(ValueError, match=r"logits must have shape \[..., 3, 4\].*got \[5\]"):
        expected_loss(objective("dpo"), GAMES, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"one policy a game; got .*vmap"):
        expected_loss(objective("dpo"), GAMES, jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"sampler must have shape.*got \[2, 4\]"):
        expected_loss(objective("dpo"), GAMES, POLICY, sampler=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="candidates must be at least 1; got 0"):
        expected_loss(objective("dpo"), GAMES, POLICY, candidates=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        sampled_loss(objective("dpo"), GAMES, POLICY, jax.random.key(0), num_samples=0)
    with pytest.raises(TypeError, match=r"as objective\('dpo', beta=0.1\).*got 'dpo'"):
        expected_loss("dpo", GAMES, POLICY)


# T9: a wrong opponent distribution, such as one normalised over games, is outside these intervals.


@pytest.mark.parametrize("on_policy", [False, True])
def test_sampled_gradients_are_unbiased(on_policy):
    games, policy = GAMES[:2], POLICY[:2]
    # A regression on labels and a loss that takes the drawn winner first; or one on win rates, that
    # of Nash-MD and EGPO too.
    own = weighted_sum((objective("online_ipo_v2", beta=0.3), 1.0), (objective("dpo"), 1.0))
    loss = own if on_policy else objective("online_ipo_v1", beta=0.3)
    sampler = policy if on_policy else None

    @jax.jit
    def exactly(opponent):
        run = lambda x: expected_loss(loss, games, x, sampler=sampler, opponent=opponent)  # noqa: E731
        return jax.grad(lambda x: run(x).sum())(policy)

    @jax.jit
    def sampled(opponent):
        def one(key):
            run = lambda x: sampled_loss(  # noqa: E731
                loss, games, x, key, num_samples=100, sampler=sampler, opponent=opponent
            ).sum()
            return jax.grad(run)(policy)

        drawn = jax.vmap(one)(jax.random.split(jax.random.key(7), 1000))  # 1e5 groups a game
        return drawn.mean(0), drawn.std(0) / np.sqrt(1000)

    # Nash-MD plays the mixture, plain self-play the policy, EGPO's second step where its first led.
    mixed = exact.mixture(policy, games.reference_logps, 0.4)
    half = exact.mirror_step(games, policy, eta=0.4)
    for opponent in (policy,) if on_policy else (policy, half, mixed):
        found, error = sampled(opponent)
        assert float((jnp.abs(found - exactly(opponent)) / error).max()) < 4
    if not on_policy:
        biased = exactly(jnp.log(jax.nn.softmax(mixed, 0)))  # over the games
        assert float((jnp.abs(found - biased) / error).max()) > 8


def test_draws_have_the_samplers_frequencies():
    counted = {}

    def count(policy_logps, actions):
        counted["actions"] = actions
        return jnp.sum(policy_logps, -1)

    @jax.jit
    def actions(key):
        extras = {"actions": jnp.arange(4)}
        sampled_loss(
            count, GAME, POLICY[0], key, num_samples=20000, sampler=OTHER[0], extras=extras
        )
        return counted["actions"]

    p, drawn = np.exp(logp(OTHER[0])), actions(jax.random.key(0))
    frequency = np.bincount(np.asarray(drawn).ravel(), minlength=4) / 40000
    assert (np.abs(frequency - p) < 5 * np.sqrt(p / 40000)).all()
