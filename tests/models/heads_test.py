import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paxo.data.packing import sequence_tokens
from paxo.head_outputs import head_outputs
from paxo.models.heads import with_heads
from paxo.numerics import Mean, masked
from paxo.objectives import Objective, Term
from paxo.scoring import all_hidden
from paxo.training.state import init_state
from paxo.training.step import make_train_step
from tests.made import TINY, made_batch, tiny_policy


@pytest.fixture(scope="module")
def model():
    names = ["scores", "values", "step_scores", "embeddings:6", "degree_logits:3"]
    policy = with_heads(tiny_policy()[0], TINY.hidden_size, names)
    return policy, policy.init(jax.random.key(0))


def alone(policy, params, prompt, completion):
    tokens = jnp.array([[*prompt, *completion]])
    ones = jnp.ones_like(tokens)
    return policy.trunk(params, tokens, jnp.arange(tokens.shape[1])[None], ones, ones - 1)[0]


def test_heads_read_the_last_the_own_or_the_predicting_tokens_of_each_sequence_alone(model):
    policy, params = model
    batch = made_batch(6, rows=3, ragged=True, candidates=3)
    names = ["scores", "values", "step_scores"]
    out = jax.jit(lambda p, b: head_outputs(policy, p, b, names, all_hidden(policy, p, b)))(
        params, batch
    )
    for row, g, k, prompt, completion in sequence_tokens(batch):
        states = alone(policy, params, prompt, completion)
        expected = policy.heads["scores"](params, states[-1])
        np.testing.assert_allclose(out["scores"][row, g, k], expected, atol=1e-5)
        before = states[len(prompt) - 1 : -1]
        values = out["values"][row, g, k]
        np.testing.assert_allclose(
            values[: len(completion)], policy.heads["values"](params, before), atol=1e-5
        )
        assert not values[len(completion) :].any()
        scores = out["step_scores"][row, g, k]
        own = policy.heads["step_scores"](params, states[len(prompt) :])
        np.testing.assert_allclose(scores[: len(completion)], own, atol=1e-5)
        assert not scores[len(completion) :].any()


def test_a_loss_that_names_a_head_trains_it(model):
    policy, params = model

    def regress(scores, labels, *, where=None):
        return Mean(
            jnp.sum(masked((scores - labels) ** 2, where)), jnp.sum(where, dtype=jnp.float32)
        )

    objective = Objective((Term("regress", regress, {}),))
    optimizer = optax.sgd(0.01)
    batch = made_batch(6, rows=2)
    step = jax.jit(make_train_step(policy, objective, optimizer))
    state = init_state(params, objective, optimizer, jax.random.key(0))
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert second["loss"] < first["loss"]
    moved = state.params["heads"]["scores"]["kernel"] - params["heads"]["scores"]["kernel"]
    assert np.abs(moved).max() > 0
    np.testing.assert_array_equal(
        state.params["heads"]["values"]["kernel"], params["heads"]["values"]["kernel"]
    )


def test_a_loss_that_names_a_missing_head_is_refused():
    policy, params = tiny_policy()
    objective = Objective((Term("regress", lambda scores, *, where=None: scores[..., 0], {}),))
    optimizer = optax.sgd(0.01)
    state = init_state(params, objective, optimizer, jax.random.key(0))
    with pytest.raises(ValueError, match="needs scores, which nobody provides"):
        jax.eval_shape(make_train_step(policy, objective, optimizer), state, made_batch(2, rows=1))


def test_embeddings_read_each_candidates_last_token_and_degrees_that_of_the_groups_last(model):
    policy, params = model
    batch = made_batch(6, rows=3, ragged=True, candidates=3)
    names = ["embeddings", "degree_logits"]
    out = head_outputs(policy, params, batch, names, all_hidden(policy, params, batch))
    assert out["embeddings"].shape == (*batch.where.shape, 6)
    assert out["degree_logits"].shape == (*batch.where.shape[:-1], 3)
    last = {}
    for row, g, k, prompt, completion in sequence_tokens(batch):
        state = last[row, g] = alone(policy, params, prompt, completion)[-1]
        expected = policy.heads["embeddings"](params, state)
        np.testing.assert_allclose(out["embeddings"][row, g, k], expected, atol=1e-5)
    for (row, g), state in last.items():
        expected = policy.heads["degree_logits"](params, state)
        np.testing.assert_allclose(out["degree_logits"][row, g], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("values:3", "only vectors have a width, such as embeddings:2, degree_logits:4"),
        ("degree_logits:0", "only vectors have a width"),
        ("embeddings:x", "only vectors have a width"),
        ("embeddings:3", "give an even width"),
    ],
)
def test_heads_of_a_wrong_width_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        with_heads(tiny_policy()[0], 16, [name])


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="unknown heads"):
        with_heads(tiny_policy()[0], 16, ["rewards"])


def test_heads_change_nothing_of_the_decoder(model):
    _, params = model
    base = tiny_policy()[0].init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, {k: params[k] for k in base}, base)
