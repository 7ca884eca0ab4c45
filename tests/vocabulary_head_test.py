"""Log-probs made a chunk of the vocabulary at a time, against dense float64 logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.vocabulary_head import vocabulary_logps

POSITIONS, WIDTH, VOCABULARY = (3, 5), 4, 11
RNG = np.random.default_rng(0)
HIDDEN = 1.5 * RNG.standard_normal((*POSITIONS, WIDTH))
HEAD = RNG.standard_normal((WIDTH, VOCABULARY))
TOKENS = RNG.integers(0, VOCABULARY, POSITIONS)
WEIGHTS = RNG.standard_normal(POSITIONS)


@pytest.fixture(scope="module")
def expected():
    """The log-probs, and gradients of a weighted sum of them, in float64."""

    def total(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head)
        logps = jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
        return jnp.sum(WEIGHTS * logps), logps

    with jax.enable_x64(True):
        arrays = jnp.asarray(HIDDEN), jnp.asarray(HEAD)
        (_, logps), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
        return jax.tree.map(np.asarray, (logps, gradients))


def found(chunk, turn, scale=1.0):
    def total(hidden, head):
        head = head.T if turn else head
        logps = vocabulary_logps(chunk, hidden, head, jnp.asarray(TOKENS), by_token=turn)
        return jnp.sum(WEIGHTS * logps), logps

    arrays = jnp.float32(scale * HIDDEN), jnp.float32(HEAD)
    (_, logps), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
    return logps, gradients


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])  # 4: the last chunk reaches back over the second
def test_value_and_gradient_are_the_dense_ones(expected, chunk, turn):
    logps, (to_hidden, to_head) = found(chunk, turn)
    wanted, (wanted_hidden, wanted_head) = expected
    assert logps.shape == POSITIONS
    for x, y in ((logps, wanted), (to_hidden, wanted_hidden), (to_head, wanted_head)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_large_logits_stay_finite():
    logps, gradients = found(4, True, scale=1e3)
    assert np.isfinite(logps).all()
    assert all(np.isfinite(x).all() for x in gradients)


def test_no_array_over_positions_times_vocabulary_exists():
    positions, vocabulary, chunk = 256, 4096, 128
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((positions, 8), (vocabulary, 8))]
    tokens = jax.ShapeDtypeStruct((positions,), jnp.int32)

    def temporaries(chunk):
        def run(hidden, head, tokens):
            return vocabulary_logps(chunk, hidden, head, tokens, by_token=True).sum()

        compiled = jax.jit(jax.grad(run, (0, 1))).lower(*shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunk) < positions * vocabulary * 4 / 8
    assert temporaries(vocabulary) >= positions * vocabulary * 4
