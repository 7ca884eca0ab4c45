"""Head, loss and gradient row by row, against the step that runs the whole head first."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from paxo import scoring
from paxo.models.heads import with_heads
from paxo.models.policy import make_policy, param_shapes
from paxo.objectives import objective, weighted_sum
from paxo.scoring import attach_logps, make_scorer
from paxo.training import one_pass
from paxo.training.state import init_state
from paxo.training.step import make_train_step
from tests.compiling import quick_compiles  # noqa: F401
from tests.made import TINY, made_batch, tiny_policy

pytestmark = pytest.mark.usefixtures("quick_compiles")

RATE = 0.1
OBJECTIVES = {
    "dpo + nll": weighted_sum((objective("dpo", beta=0.5), 1.0), (objective("nll"), 0.2)),
    "wpo": objective("wpo"),  # collisions of the policy's distributions
    "bradley_terry": objective("bradley_terry"),  # a head that is read at the last tokens
}


def step(name, *, parts, tied=True, dtype="float32"):
    """Gradients and report of one step; plain SGD moves by rate * gradient."""
    policy, params = tiny_policy(num_layers=1, tie_embeddings=tied, compute_dtype=dtype)
    batch = made_batch(20, rows=8, length=32, longest=5)
    batch = attach_logps(batch, "reference", make_scorer(*tiny_policy(seed=7, num_layers=1)))
    if name == "bradley_terry":
        policy = with_heads(policy, TINY.hidden_size, ["scores"])
        params = policy.init(jax.random.key(1))
    optimizer = optax.sgd(RATE)
    state = init_state(params, OBJECTIVES[name], optimizer, jax.random.key(3))
    found = []

    def chosen(*arguments):
        found.append(None if parts is None else original(*arguments))
        return found[-1]

    original = one_pass.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "parts", chosen)
        # One row's logits are then as many as may exist at a time, or half or all of the rows'.
        rows = 8 if parts is None else 8 // parts
        patch.setattr(scoring, "chunk_tokens", lambda _: rows * batch.score_token.shape[1])
        after, report = jax.jit(make_train_step(policy, OBJECTIVES[name], optimizer))(state, batch)
    assert found == [parts]
    moved = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, after.params)
    return jax.tree.map(np.asarray, moved), {name: float(x) for name, x in report.items()}


@pytest.mark.parametrize(
    ("name", "parts", "tied"),
    [
        ("dpo + nll", 8, True), ("dpo + nll", 2, False), ("dpo + nll", 1, True),
        ("wpo", 4, True), ("bradley_terry", 8, True),
    ],
)  # fmt: skip
def test_loss_gradient_and_report_are_those_of_the_plain_step(name, parts, tied):
    grads, report = step(name, parts=parts, tied=tied)
    wanted, wanted_report = step(name, parts=None, tied=tied)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    assert report == pytest.approx(wanted_report, rel=1e-5, abs=1e-6)


def shapes(rows, slots, vocabulary, width=16):
    config = dataclasses.replace(TINY, vocab_size=vocabulary, hidden_size=width)
    figures = jax.ShapeDtypeStruct((rows, slots), np.int32)
    batch = made_batch(4, rows=2, length=32).replace(score_token=figures)
    return make_policy(config), param_shapes(config), batch


def test_few_rows_meet_the_head_at_a_time(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 1)
    monkeypatch.setitem(scoring.MIN_CHUNK_TOKENS, "cpu", 128)
    assert one_pass.parts(*shapes(8, 256, 1000), 1) == 8  # a row is more than is wanted
    assert one_pass.parts(*shapes(8, 64, 1000), 1) == 4  # two rows
    assert one_pass.parts(*shapes(9, 64, 1000), 1) == 9  # of nine, two cannot be dealt out
    assert one_pass.parts(*shapes(8, 64, 1000), 4) == 1  # two rows on each of four devices


def test_rows_whose_logits_are_too_many_take_the_path_that_makes_them_twice(monkeypatch):
    monkeypatch.setattr(one_pass, "MOST_LOGITS", 2**18)
    assert one_pass.parts(*shapes(4, 256, 1024), 1) == 4
    assert one_pass.parts(*shapes(4, 257, 1024), 1) is None
    # The head's own gradient is as large: nothing is saved by making the logits twice.
    assert one_pass.parts(*shapes(4, 257, 1024, width=512), 1) == 4
    assert one_pass.parts(*shapes(6, 4, 1024), 4) is None  # rows that the devices do not divide
