"""Every row of the table plays, trains, and hands its loss all that the loss can read."""

import dataclasses

import jax
import numpy as np
import pytest

from paxo.online import METHODS, RoundSettings, method, self_play
from paxo.online.method import ANY_REWARD, Draw, Method, Schedule
from paxo.online.pairing import filtered
from tests.compiling import compilations, quick_compiles  # noqa: F401
from tests.online import playing

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Row -> what a game of four actions wants instead of the papers' numbers, which are for texts.
SETTINGS = {
    "online_dpo": {},
    "online_slic": {},
    "online_simpo": {},
    "online_ipo": {},
    "online_ipo_v2": {"beta": 0.5},
    "ipo_md": {"mix": 0.5},
    "iterative_dpo": {"draws": (4,)},
    "self_rewarding": {},
    "apo": {"draws": (4,)},
    "sppo": {"eta": 1.0},
    "gpo": {"beta": 1.0},
    "spo": {"draws": (4,)},
    "dno": {"eta": 1.0},
    "dno_prct": {},
    "inpo": {"eta": 1.0, "tau": 0.3},
    "inpo_pairs": {"eta": 1.0, "tau": 0.3},
    "onpo": {},
    "comal": {"eta": 1.0, "tau": 0.3, "reference_every": 1},
    "mpo": {"reference_every": 2},
    "online_ipo_v1": {"beta": 0.5},
    "egpo": {"beta": 0.5},
    "nash_md": {"beta": 0.5, "mix": 0.5},
    "nash_md_pg": {"tau": 0.5},
    "nash_ema_pg": {"average": 0.5},
    "xpo": {"alpha": 0.01},
    "vpo": {"alpha": 0.01},
    "selm": {"alpha": 0.01, "beta": 0.1},
    "hypo": {"lam": 0.1},
    "rso": {"draws": (8,)},
    "ppo": {},
    "ppo_max": {},
    "dr_po": {},
    "rto": {},
    "pf_ppo": {"draws": (4,)},
    "grpo": {"draws": (4,), "beta": 0.04},
    "rloo": {},
    "p3o": {},
    "copg": {},
    "rebel": {},
    "mdpo": {},
    "brain": {"draws": (4,)},
    "oreo": {},
    "constrained": {},
    "cgpo_crpg": {},
    "cgpo_codpo": {},
    "cgpo_crraft": {},
    "maxmin": {},
}
# What a loss can do without and a row leaves out on purpose.
LEFT_OUT = {
    **{name: {"win_rates"} for name in ("inpo", "inpo_pairs", "comal")},  # they have labels
    "oreo": {"step_mask"},  # states are tokens
}
FROM_STEP = {"policy_logps", "policy_token_logps", "lengths", "token_mask", "values", "state"}


def test_every_row_has_settings_for_a_game():
    assert list(SETTINGS) == list(METHODS)


def arrays_of(batch):
    """Names of the arrays that a loss can read of a batch."""
    tokens = {f"{role}_token_logps" for role in batch.fixed_token_logps}
    summed = {f"{role}_logps" for role in batch.fixed_logps}
    return {"labels", "where"} | FROM_STEP | set(batch.extras) | summed | tokens


# One of each pairing and target that no other test plays, and of each look-ahead and schedule.
QUICK = {
    *("gpo", "inpo", "selm", "hypo", "rso", "grpo", "constrained", "cgpo_crpg", "maxmin"),
    *("egpo", "apo", "mdpo"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS],
)
def test_a_row_plays_its_loss_gets_all_arrays_and_compiles_once(name, tmp_path, monkeypatch):
    game, seen, original = playing.a_game(), [], self_play.fit

    def fit(step, state, feed, **given):
        seen.append(feed._batches[0])
        return original(step, state, feed, **given)

    monkeypatch.setattr(self_play, "fit", fit)
    row, first = method(name, **SETTINGS[name]), playing.policy_of(game)[1]
    frozen = {"dpo": first} if "dpo" in row.attach else None
    before, compiled = np.array(first["logits"]), []
    judges = playing.judges_of(game)
    if ANY_REWARD in row.rewards:  # each reward is a group of users
        judges.rewards.pop("constraints")
    with compilations() as counter:
        result = playing.play_game(
            game, row, tmp_path, frozen=frozen, judges=judges, rounds=3,
            pack=playing.packer(row.group_size, rows=32),  # replay has more groups every round
            evaluate=lambda *_: compiled.append(counter.count) or {},
        )  # fmt: skip
    after = np.array(result.state.params["logits"])
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-5
    assert len(seen) == 3 * (2 if row.schedule.optimistic else 1)
    wanted = set(row.objective.arrays) - LEFT_OUT.get(name, set())
    assert wanted <= arrays_of(seen[-1])
    assert {f"{role}_logps" for role in row.attach} <= arrays_of(seen[-1])
    assert seen[-1].where.shape[-1] == row.group_size
    # A look-ahead begins in the second round, so the third one is the first with nothing new.
    assert compiled[2] == compiled[1]
    assert compiled[1] == compiled[0] or row.schedule.extrapolation


def test_the_filter_that_keeps_the_best_alone_trains_too(tmp_path):
    row = dataclasses.replace(method("pf_ppo", draws=(4,)), pairing=filtered("best"))
    playing.play_game(playing.a_game(), row, tmp_path, rounds=1)
    sizes = {len(r["completions_ids"]) for r in playing.rows_of(tmp_path, "0000")}
    assert sizes == {1}


def test_grpo_attaches_its_reference_only_where_a_penalty_reads_it():
    free, penalised = (method("grpo", beta=beta) for beta in (0.0, 0.04))
    assert free.roles == ("previous",)
    assert penalised.roles == ("previous", "reference")


def test_names_and_numbers_are_the_papers():
    row = METHODS["egpo"]
    assert row.draws == (Draw("policy", 2, temperature=2.0, top_k=10),)
    assert row.opponent == Draw("policy", 1, temperature=1.0)
    sppo = METHODS["sppo"]
    assert sppo.draws == (Draw("policy", 5, temperature=1.0, top_p=1.0),)
    assert sppo.objective.hyper_parameters == {"eta": 1e3}
    assert METHODS["ipo_md"].mix == METHODS["nash_md_pg"].mix == 0.125
    assert METHODS["dno_prct"].schedule.replay == (0.3, 0.15)
    assert METHODS["rso"].draws == (Draw("reference", 64, temperature=0.7, top_k=40),)
    for name in METHODS:
        assert METHODS[name].paper.startswith("arXiv:")


def test_a_row_is_a_record_of_settings():
    row = method("egpo", beta=0.2, opponents=3)
    assert (row.hyper_parameters["beta"], row.opponent.count) == (0.2, 3)
    assert row.with_field("mix", 0.5).hyper_parameters["mix"] == 0.5
    assert set(row.field_names()) == set(row.hyper_parameters)
    assert Method.named("inpo") == METHODS["inpo"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: method("egpoo"), "unknown method 'egpoo'; did you mean 'egpo'?"),
        (lambda: method("inpo", betta=1), "method 'inpo' has no setting 'betta'"),
        (lambda: method("egpo", mix=2.0), "mix must lie in [0, 1]; got 2.0"),
        (lambda: method("xpo", draws=(1,)), "draws from 2 sources (policy, reference); got"),
        (lambda: method("apo", extrapolation=1.0), "schedule.extrapolation must lie in [0, 1)"),
        (lambda: method("nash_ema_pg", average=0.0), "draws from the average policy: set"),
        (lambda: method("comal", reference_every=-1), "must not be negative; got -1"),
        (lambda: method("apo", reference_every=2), "a reference that is the snapshot moves every"),
        (lambda: Draw("teacher"), "Draw.source must be one of policy, reference"),
        (lambda: Draw("policy", 0), "Draw.count must be at least 1; got 0"),
        (lambda: Schedule(extragradient=True, optimistic=True), "goes with no other look-ahead"),
        (lambda: Schedule(reference="last"), "must be 'first' or 'snapshot'; got 'last'"),
        (lambda: RoundSettings(0), "rounds.num_rounds must be at least 1; got 0"),
        (lambda: RoundSettings(1, evaluate_every=-1), "rounds.evaluate_every must not be negative"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_mdpo_steps_become_shorter_over_the_rounds(tmp_path, monkeypatch):
    seen, original = [], self_play.make_train_step

    def make_train_step(policy, objective, *args, **given):
        jax.debug.callback(lambda x: seen.append(float(x)), objective.hyper_parameters["t_k"])
        return original(policy, objective, *args, **given)

    monkeypatch.setattr(self_play, "make_train_step", make_train_step)
    settings = RoundSettings(4, prompts_per_round=8, epochs=2)
    playing.play_game(playing.a_game(), METHODS["mdpo"], tmp_path, settings=settings)
    jax.effects_barrier()
    assert seen == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "setting", "value", "told"),
    [
        ("mdpo", "t_k", lambda t, total: 1.0 - t, "round 1: objective 'mdpo': t_k"),
        ("grpo", "beta", lambda t, total: 0.1 / (1 + t), "must be the same in all rounds"),
    ],
)
def test_a_schedule_that_a_loss_cannot_have_is_refused(name, setting, value, told, tmp_path):
    schedule = Schedule(hyper_parameters={setting: value})
    row = dataclasses.replace(METHODS[name], schedule=schedule)
    with pytest.raises(ValueError, match=told):
        playing.play_game(playing.a_game(), row, tmp_path)


def test_an_egpo_round_costs_twice_an_online_ipo_round(tmp_path, monkeypatch):
    costs = {}
    for name in ("online_ipo_v1", "egpo"):
        count = costs[name] = {"prompts": 0, "judged": 0, "steps": 0, "scored": 0}
        judges = playing.judges_of(playing.a_game())

        def judge(prompts, rows, wanted=None, *, inner=judges.judge, count=count):
            count["judged"] += len(prompts) * int(wanted.sum())
            return inner(prompts, rows, wanted=wanted)

        with monkeypatch.context() as patched:
            counted(patched, playing.TableDrawer, "__call__", count, "prompts", lambda a: len(a[3]))
            counted(patched, self_play, "attach_logps", count, "scored", lambda a: 1)
            original = self_play.compile_step

            def compile_step(*args, original=original, count=count, **given):
                step = original(*args, **given)

                def counted_step(state, batch):
                    count["steps"] += 1
                    return step(state, batch)

                return counted_step

            patched.setattr(self_play, "compile_step", compile_step)
            playing.play_game(
                playing.a_game(),
                method(name, beta=0.5),
                tmp_path / name,
                rounds=3,
                judges=playing.judges_of(playing.a_game(), judge=judge),
            )
    assert all(costs["online_ipo_v1"].values())
    assert costs["egpo"] == {k: 2 * v for k, v in costs["online_ipo_v1"].items()}


def counted(patched, owner, name, count, what, of):
    original = getattr(owner, name)

    def wrapper(*args, **given):
        count[what] += of(args)
        return original(*args, **given)

    patched.setattr(owner, name, wrapper)


def test_the_policy_judges_the_rewards_that_it_gives_itself(tmp_path):
    """`of_policy` is asked with each round's own snapshot."""
    seen = []

    class OwnReward:
        def of_policy(self, params, key):
            seen.append(np.array(params["logits"]))
            assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
            return playing.reward_of(playing.a_game())

    snapshots = playing.Snapshots()
    playing.play_game(
        playing.a_game(),
        METHODS["self_rewarding"],
        tmp_path,
        judges=playing.judges_of(playing.a_game(), rewards={"reward": OwnReward()}),
        evaluate=snapshots,
    )
    assert len(seen) == 2
    np.testing.assert_array_equal(np.concatenate(seen), np.array(snapshots.before, np.float32))
