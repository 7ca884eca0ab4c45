"""Every figure of the chunked head against dense float64 logits, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.chunked_head import QUANTITIES, head_scores

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 10, 4, 7
RNG = np.random.default_rng(0)
HIDDEN, FIXED_HIDDEN = 1.5 * RNG.standard_normal((2, ROWS, LENGTH, WIDTH))
HEAD, FIXED_HEAD = RNG.standard_normal((2, WIDTH, VOCABULARY))
TOKENS = RNG.integers(0, VOCABULARY, (ROWS, LENGTH))
WEIGHTS = dict(zip(QUANTITIES, RNG.standard_normal((4, ROWS, LENGTH))))


def dense(hidden, head):
    """The definitions, over positions × vocabulary."""
    log_p = jax.nn.log_softmax(hidden @ head)
    log_q = jax.nn.log_softmax(FIXED_HIDDEN @ FIXED_HEAD)
    return {
        "logps": jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0],
        "entropies": -jnp.sum(jnp.exp(log_p) * log_p, -1),
        "collisions": jnp.log(jnp.sum(jnp.exp(log_p) ** 2, -1)),
        "kls": jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1),
    }


def weighted(values):
    """A number to which every position counts differently."""
    return sum(jnp.sum(WEIGHTS[name] * x) for name, x in values.items())


@pytest.fixture(scope="module")
def expected():
    """Each figure, and its gradients with respect to hidden states and head, in float64."""
    found = {}
    with jax.enable_x64(True):
        arrays = jnp.asarray(HIDDEN, jnp.float64), jnp.asarray(HEAD, jnp.float64)
        values = dense(*arrays)
        for name in QUANTITIES:
            one = jax.grad(lambda h, w, name=name: weighted({name: dense(h, w)[name]}), (0, 1))
            found[name] = np.asarray(values[name]), *map(np.asarray, one(*arrays))
    return found


def chunked(
    quantities, chunk, hidden=HIDDEN, head=HEAD, kind=jnp.float32, fixed=FIXED_HIDDEN, turn=False
):
    reference = jnp.asarray(fixed, kind), jnp.asarray(FIXED_HEAD, kind)
    hidden, head = jnp.asarray(hidden, kind), jnp.asarray(head, kind)
    head = head.T if turn else head
    tokens = jnp.asarray(TOKENS)
    return head_scores(quantities, chunk, hidden, head, tokens, reference, by_token=turn)


def gradients(quantities, chunk, turn=False):
    run = lambda hidden, head: weighted(  # noqa: E731
        chunked(quantities, chunk, hidden, head, turn=turn)
    )
    return jax.grad(run, (0, 1))(jnp.float32(HIDDEN), jnp.float32(HEAD))


def assert_near(found, wanted):
    """To 1e-5 of the largest entry."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64, None])
def test_values_are_the_dense_ones_whether_the_chunk_divides_or_not(expected, chunk):
    found = chunked(QUANTITIES, chunk)
    for name in QUANTITIES:
        assert found[name].shape == (ROWS, LENGTH)
        assert_near(found[name], expected[name][0])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradient_of_each_figure_is_the_dense_one(expected, quantity):
    to_hidden, to_head = gradients((quantity,), 3)
    assert_near(to_hidden, expected[quantity][1])
    assert_near(to_head, expected[quantity][2])


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 64, None])
def test_gradients_of_several_figures_add_up(expected, chunk, turn):
    to_hidden, to_head = gradients(QUANTITIES, chunk, turn)
    assert_near(to_hidden, sum(expected[name][1] for name in QUANTITIES))
    assert_near(to_head, sum(expected[name][2] for name in QUANTITIES))


def test_frozen_reference_gets_no_gradient():
    def run(reference):
        hidden, head = jnp.float32(HIDDEN), jnp.float32(HEAD)
        return weighted(head_scores(("kls",), 3, hidden, head, jnp.asarray(TOKENS), reference))

    for gradient in jax.grad(run)((jnp.float32(FIXED_HIDDEN), jnp.float32(FIXED_HEAD))):
        np.testing.assert_array_equal(gradient, 0)


def test_kl_of_a_policy_to_itself_is_0_and_so_is_its_gradient():
    itself = jnp.float32(HIDDEN), jnp.float32(HEAD)

    def run(hidden, head):
        return jnp.sum(head_scores(("kls",), 4, hidden, head, jnp.asarray(TOKENS), itself)["kls"])

    value, found = jax.value_and_grad(run, (0, 1))(*itself)
    assert abs(float(value)) < 1e-5
    for gradient in found:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_uniform_distribution_has_its_known_figures():
    found = chunked(QUANTITIES, 3, head=np.zeros((WIDTH, VOCABULARY)))
    log_v = np.log(VOCABULARY)
    np.testing.assert_allclose(found["logps"], -log_v, rtol=1e-6)
    np.testing.assert_allclose(found["entropies"], log_v, rtol=1e-6)
    np.testing.assert_allclose(found["collisions"], -log_v, rtol=1e-6)


def test_bfloat16_states_give_float32_figures_and_gradients_of_their_own_dtype(expected):
    found = chunked(("logps",), 4, kind=jnp.bfloat16)["logps"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected["logps"][0], atol=0.1)
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    run = lambda h, w: weighted(head_scores(("logps",), 4, h, w, jnp.asarray(TOKENS)))  # noqa: E731
    to_hidden, to_head = jax.grad(run, (0, 1))(hidden, head)
    assert to_hidden.dtype == to_head.dtype == jnp.bfloat16
    wanted = expected["logps"][2]
    np.testing.assert_allclose(to_head.astype(np.float32), wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("chunk", [3, None])
def test_large_logits_stay_finite_in_value_and_gradient(chunk):
    found = chunked(QUANTITIES, chunk, hidden=1e3 * HIDDEN)
    run = lambda h: weighted(chunked(QUANTITIES, chunk, h))  # noqa: E731
    assert all(np.isfinite(x).all() for x in found.values())
    assert np.isfinite(jax.grad(run)(jnp.float32(1e3 * HIDDEN))).all()


@pytest.mark.parametrize("chunk", [None, 64])
def test_bfloat16_gradients_of_a_head_as_embeddings_lie_can_be_added_up(chunk):
    # Sizes at which XLA on CPU takes a product of its library, and not a loop of its own.
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((2, 128, 64)), jnp.bfloat16)
    tokens = jnp.asarray(rng.integers(0, 500, (2, 128)))

    @jax.jit
    def gradient(hidden, head, added):
        run = lambda head: jnp.sum(  # noqa: E731
            head_scores(("logps",), chunk, hidden, head, tokens, by_token=True)["logps"]
        )
        return added + jax.grad(run)(head).astype(jnp.float32)

    head = jnp.asarray(rng.standard_normal((500, 64)), jnp.bfloat16)
    found = gradient(hidden, head, jnp.ones((500, 64)))
    exact = gradient(hidden.astype(jnp.float32), head.astype(jnp.float32), jnp.ones((500, 64)))
    assert jnp.max(jnp.abs(found - exact)) < 0.02 * jnp.max(jnp.abs(exact))
