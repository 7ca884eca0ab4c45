"""The loop on games: what each schedule does, exactly; where the methods go, up to their noise.

A policy over 4 actions whose groups are drawn: after a round of gradient descent its logits have
moved by the mean gradient over the round's groups, which can be computed from the round's file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.games import builders, exact
from paxo.games.expected import expected_loss
from paxo.online import METHODS, RoundSettings, method, self_play
from paxo.online import anchors as anchoring
from tests.compiling import quick_compiles  # noqa: F401
from tests.online import playing

pytestmark = pytest.mark.usefixtures("quick_compiles")


def other_reference(game):
    """A reference that the policy does not start from."""
    params = playing.policy_of(game)[1]
    return params | {"logits": params["logits"] + jnp.array([[0.5, -0.5, 1.0, 0.0]])}


def as_logits(params):
    return jnp.asarray(params["logits"][0])


# --- the gradient of a round --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "temperature", "candidates"),
    [
        ("online_ipo_v1", {"beta": 0.5}, 2.0, 2),
        ("nash_md", {"beta": 0.5, "mix": 0.4}, 2.0, 2),
        ("online_ipo", {"tau": 0.5}, 1.0, 2),
        ("nash_md_pg", {"tau": 0.5, "mix": 0.4}, 1.0, 1),
        ("copg", {"beta": 0.5}, 1.0, 2),
    ],
)
def test_a_rounds_gradient_is_that_of_the_exact_game_in_the_mean(
    name, settings, temperature, candidates, tmp_path
):
    game, row, rate, rounds = playing.a_game(), method(name, **settings), 1e-4, 12
    reference, snapshots = other_reference(game), playing.Snapshots()
    playing.play_game(
        game, row, tmp_path, rounds=rounds, prompts=256, optimizer=optax.sgd(rate),
        frozen={"reference": reference}, evaluate=snapshots,
        draw=playing.sampler_of(game, 256) if name in ("online_ipo_v1", "nash_md") else None,
    )  # fmt: skip
    steps = np.array(snapshots.before) - np.array(snapshots.after)
    found = steps / rate
    logits = as_logits(playing.policy_of(game)[1])
    opponent = logits
    if row.opponent is not None and row.opponent.source == "mixture":
        opponent = exact.mixture(logits, as_logits(reference), row.mix)
    rewards = np.asarray(game.preferences).mean(1)
    expected = jax.grad(
        lambda x: expected_loss(
            row.objective, game, x, sampler=logits / temperature, opponent=opponent,
            reference=as_logits(reference), candidates=candidates,
            extras={"rewards": jnp.asarray(rewards)} if row.rewards else None,
        )
    )(logits)  # fmt: skip
    error = found.std(0, ddof=1) / np.sqrt(rounds)
    assert (np.abs(expected) > 10 * error).any()  # else nothing would be seen
    np.testing.assert_array_less(np.abs(found.mean(0) - expected), 4.5 * error + 1e-3)


def regression_gradient(rows, logits, reference_logps, beta):
    """`[N]` of `online_ipo_v1`, mean over the groups of a round's file."""
    logps = logits - np.log(np.exp(logits).sum())
    gradient = np.zeros(len(logits))
    for row in rows:
        i, j = (completion[0] for completion in row["completions_ids"])
        wins = row["win_rates"][0] - row["win_rates"][1]
        h = (logps - reference_logps)[i] - (logps - reference_logps)[j]
        residual = h - wins / beta
        gradient[i] += 2 * residual
        gradient[j] -= 2 * residual
    return gradient / len(rows)


# --- schedules, exactly -------------------------------------------------------------------------


def test_egpo_steps_twice_from_the_same_state_and_plays_where_the_first_step_led(tmp_path):
    game, rate, snapshots = playing.a_game(), 1.0, playing.Snapshots()
    judges, opponents = playing.judges_of(game), []

    def judge(prompts, rows, wanted=None):
        opponents.append([row[2][0] for row in rows])
        return judges.judge(prompts, rows, wanted=wanted)

    playing.play_game(
        game, method("egpo", beta=0.02), tmp_path, rounds=1, prompts=64,
        optimizer=optax.sgd(rate), evaluate=snapshots,
        judges=playing.judges_of(game, judge=judge),
    )  # fmt: skip
    start, reference = snapshots.before[0], np.asarray(game.reference_logps, np.float64)
    half_step, whole_step = (
        rate * regression_gradient(playing.rows_of(tmp_path, name), start, reference, 0.02)
        for name in ("0000-half", "0000")
    )
    np.testing.assert_allclose(snapshots.after[0], start - whole_step, rtol=2e-5)
    # Opponents first come from the policy, then from where the half step led.
    first, half = (playing.probabilities(x) for x in (start, start - half_step))
    assert np.abs(half - first).max() > 0.5
    for answers, p in zip(opponents, (first, half), strict=True):
        shares = np.bincount(answers, minlength=len(p)) / len(answers)
        np.testing.assert_array_less(np.abs(shares - p), 4 * np.sqrt(p * (1 - p) / 64) + 0.02)


def labelled_step(rows, eta, rate, num):
    """What one gradient step of `onpo` from its anchor adds to the logits."""
    step = np.zeros(num)
    for row in rows:
        winner, loser = (completion[0] for completion in row["completions_ids"])
        step[winner] += rate * eta
        step[loser] -= rate * eta
    return step / len(rows)


def test_onpo_is_optimistic_mirror_descent_on_the_rounds_pairs(tmp_path):
    """From the anchor its loss is (0 - eta/2)²: a step adds `rate eta (e_w - e_l)`, and twice."""
    game, eta, rate, snapshots = playing.a_game(), 0.5, 0.4, playing.Snapshots()
    result = playing.play_game(
        game, method("onpo", eta=eta), tmp_path, rounds=3, prompts=32,
        optimizer=optax.sgd(rate), evaluate=snapshots,
    )  # fmt: skip
    steps = [
        labelled_step(playing.rows_of(tmp_path, f"{n:04d}"), eta, rate, game.num_actions)
        for n in range(3)
    ]
    expected, before = snapshots.before[0], np.zeros(game.num_actions)
    for number in range(3):
        expected = expected + 2 * steps[number] - before
        before = steps[number]
        np.testing.assert_allclose(snapshots.after[number], expected, atol=2e-6)
    anchor = np.array(result.anchors["anchor"]["logits"][0])
    np.testing.assert_allclose(anchor, snapshots.before[0] + sum(steps), atol=2e-6)


def test_apo_looks_ahead_from_the_second_round_on(tmp_path):
    game, snapshots = playing.a_game(), playing.Snapshots()
    result = playing.play_game(
        game, method("apo", draws=(4,), extrapolation=0.5), tmp_path, evaluate=snapshots
    )
    fitted = np.array(result.anchors["ahead"]["logits"][0])
    ahead = fitted + np.float32(0.5) * (fitted - np.float32(snapshots.after[0]))
    np.testing.assert_array_equal(np.array(result.state.params["logits"][0]), ahead)
    np.testing.assert_array_equal(snapshots.before[1], snapshots.after[0])
    # Without look-ahead the second round would have ended at what was fitted.
    assert np.abs(ahead - fitted).max() > 1e-4


def test_the_average_policy_is_an_exponential_moving_average(tmp_path):
    game, snapshots = playing.a_game(), playing.Snapshots()
    result = playing.play_game(
        game, method("nash_ema_pg", average=0.75, tau=0.5), tmp_path, rounds=3, evaluate=snapshots
    )
    average = snapshots.before[0]
    for after in snapshots.after:
        average = 0.75 * average + 0.25 * after
    np.testing.assert_allclose(result.anchors["average"]["logits"][0], average, rtol=1e-6)


def test_a_reference_moves_when_its_rounds_are_over_or_never_or_always(tmp_path):
    game, snapshots = playing.a_game(), playing.Snapshots()
    row = method("comal", eta=1.0, tau=0.3, reference_every=2)
    result = playing.play_game(game, row, tmp_path, rounds=5, evaluate=snapshots)
    np.testing.assert_array_equal(
        result.anchors["reference"]["logits"][0], np.float32(snapshots.after[3])
    )
    params = [{"logits": x} for x in (snapshots.before[4], snapshots.before[0])]
    kept = {"snapshot": params[0]}
    assert anchoring.reference(METHODS["apo"].schedule, kept) is params[0]
    assert anchoring.reference(METHODS["online_dpo"].schedule, kept) is None
    assert anchoring.names(METHODS["online_dpo"].schedule) == ("snapshot",)


def test_replay_takes_shares_of_the_last_rounds_or_all_of_them(tmp_path):
    game, sizes = playing.a_game(), {}

    def sizes_of(name, rounds, workdir):
        seen, pack = [], playing.packer(METHODS[name].group_size)

        def packing(groups):
            seen.append([group.source for group in groups])
            return pack(groups)

        playing.play_game(game, METHODS[name], workdir, rounds=rounds, prompts=20, pack=packing)
        return seen

    sizes["shares"] = sizes_of("dno_prct", 3, tmp_path / "shares")
    own = [len(playing.rows_of(tmp_path / "shares", f"{n:04d}")) for n in range(3)]
    first, second, third = sizes["shares"]
    assert len(first) == own[0]
    assert len(second) == own[1] + round(0.3 * own[1])
    assert len(third) == own[2] + round(0.3 * own[2]) + round(0.15 * own[2])
    assert sum("round 0001" in source for source in third) == round(0.3 * own[2])
    assert len(set(third)) == len(third)  # none twice
    every = sizes_of("xpo", 3, tmp_path / "all")
    own = [len(playing.rows_of(tmp_path / "all", f"{n:04d}")) for n in range(3)]
    assert [len(x) for x in every] == list(np.cumsum(own))


def test_prompts_come_in_another_order_each_epoch_and_none_twice_in_a_round(tmp_path):
    game = playing.a_game()
    settings = RoundSettings(5, prompts_per_round=4)
    playing.play_game(
        game, METHODS["copg"], tmp_path, settings=settings, asked=playing.prompts_for(game, 10)
    )
    seen = [
        [row["prompt_index"] for row in playing.rows_of(tmp_path, f"{n:04d}")] for n in range(5)
    ]
    assert all(len(set(row)) == 4 for row in seen)
    assert not set(seen[0]) & set(seen[1])  # one epoch
    assert not set(seen[2]) & set(seen[3])
    assert seen[0] + seen[1] != seen[2] + seen[3]


def test_epochs_take_the_same_parts_in_another_order_and_pack_and_score_them_once(
    tmp_path, monkeypatch
):
    game, parts, scored, fed = playing.a_game(), [], [], []
    pack, attach, fit = playing.packer(2), self_play.attach_logps, self_play.fit

    def packing(groups):
        parts.append(sorted(group.index for group in groups))
        return pack(groups)

    def attaching(batch, role, *args, **given):
        scored.append(role)
        return attach(batch, role, *args, **given)

    def fitting(step, state, feed, **given):
        fed.extend(id(batch) for batch in feed._batches)
        return fit(step, state, feed, **given)

    monkeypatch.setattr(self_play, "attach_logps", attaching)
    monkeypatch.setattr(self_play, "fit", fitting)
    settings = RoundSettings(1, prompts_per_round=10, epochs=4, minibatches=3)
    result = playing.play_game(
        game, METHODS["copg"], tmp_path, settings=settings, asked=playing.prompts_for(game, 10),
        pack=packing,
    )  # fmt: skip
    assert int(result.state.step) == 12
    assert [len(part) for part in parts] == [4, 3, 3]
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert scored == ["reference"] * 3
    epochs = [tuple(fed[i : i + 3]) for i in range(0, 12, 3)]
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len(set(epochs)) > 1


# --- where they go ------------------------------------------------------------------------------


def total_variation(p, q):
    return np.abs(np.asarray(p) - np.asarray(q)).sum() / 2


# A step of these is a mirror step of eta = 4 rate / (beta N) for uniform pairs. Of 256 groups the
# logits keep a noise of about 0.03: the residual of a regression, 0.3 / beta, times 2 rate,
# over 16. That moves probabilities by less than 0.02; three times as much is allowed.
NOISE = 0.06


@pytest.mark.parametrize(
    ("name", "settings", "rate"),
    [
        ("online_ipo_v1", {"beta": 0.5}, 0.4),
        ("egpo", {"beta": 0.5}, 0.4),
        ("nash_md", {"beta": 0.5, "mix": 0.3}, 0.4),
        ("online_ipo_v2", {"beta": 0.5}, 0.6),
    ],
)
def test_methods_of_the_regularised_game_come_to_its_nash_policy(name, settings, rate, tmp_path):
    game = playing.a_game()
    nash = np.asarray(jax.nn.softmax(exact.nash_policy(game)))
    if name == "nash_md":  # its mixture is the Nash policy at another KL weight
        mix = settings["mix"]
        mixed = exact.nash_policy(game.replace(beta=game.beta / (1 - mix)))
        logits = (jax.nn.log_softmax(mixed) - mix * game.reference_logps) / (1 - mix)
        nash = np.asarray(jax.nn.softmax(logits))
    result = playing.play_game(
        game, method(name, **settings), tmp_path, rounds=14, prompts=256,
        optimizer=optax.sgd(rate), draw=playing.sampler_of(game, 256),
    )  # fmt: skip
    found = playing.probabilities(playing.logits_of(result))
    start = np.asarray(jax.nn.softmax(game.reference_logps))
    assert total_variation(start, nash) > 2.5 * NOISE
    assert total_variation(found, nash) < NOISE


def test_inpo_rounds_come_to_the_nash_policy_too(tmp_path):
    game = playing.a_game()
    row = method("inpo_pairs", eta=1.25, tau=float(game.beta))
    settings = RoundSettings(12, prompts_per_round=256, epochs=3)
    result = playing.play_game(game, row, tmp_path, settings=settings, optimizer=optax.sgd(0.5))
    nash = np.asarray(jax.nn.softmax(exact.nash_policy(game)))
    assert total_variation(playing.probabilities(playing.logits_of(result)), nash) < NOISE


@pytest.mark.slow
def test_comal_goes_on_to_the_nash_policy_of_the_game_without_a_penalty(tmp_path):
    game = builders.cyclic(3, beta=0.3, reference_logits=jnp.array([1.5, 0.0, -0.5]))
    gaps = {}
    for name, every in (("inpo_pairs", 0), ("comal", 5)):
        row = method(name, eta=0.6, tau=0.3, reference_every=every)
        settings = RoundSettings(60, prompts_per_round=512, epochs=3)
        result = playing.play_game(
            game, row, tmp_path / name, settings=settings, optimizer=optax.sgd(0.5)
        )
        logits = jnp.asarray(playing.logits_of(result))
        gaps[name] = float(exact.unregularised_gap(game, logits))
    assert gaps["comal"] < 0.25 * gaps["inpo_pairs"]
