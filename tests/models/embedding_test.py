"""The split lookup of embeddings is that of one device, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxo.models.embedding import embed
from paxo.models.sharding import make_mesh, partition_spec
from tests.compiling import quick_compiles  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
    ("sizes", "vocabulary", "rows"),
    [
        ((2, 2, 2), 40, 8),
        ((1, 8, 1), 40, 8),
        ((1, 1, 8), 40, 3),
        ((8, 1, 1), 41, 8),
        ((1, 2, 4), 41, 2),  # no one splits the vocabulary
        ((2, 2, 2), 40, 3),  # nor the rows
    ],
)
def test_lookup_and_gradient_are_those_of_one_device(sizes, vocabulary, rows):
    mesh = make_mesh(*sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (vocabulary, 16))
    tokens = jax.random.randint(keys[1], (rows, 5), 0, vocabulary)
    weights = jax.random.normal(keys[2], (rows, 5, 16))

    def both(table, tokens):
        found, back = jax.vjp(lambda table: embed(table, tokens, jnp.float32), table)
        return found, back(weights)[0]

    def placed(x, axes):
        spec = partition_spec(axes, x.shape, mesh.shape)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        table_here = placed(table, ("vocab", "embed"))
        found, gradient = jax.jit(both)(table_here, placed(tokens, ("batch", "length")))
    np.testing.assert_array_equal(found, table[tokens])
    wanted = np.zeros(table.shape, np.float32)
    np.add.at(wanted, np.asarray(tokens), np.asarray(weights))
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_a_dtype_of_fewer_bits_is_that_of_the_result_and_not_of_the_gradient():
    table = jnp.ones((2, 4))
    tokens = jnp.zeros(1000, jnp.int32)

    def total(table):
        return jnp.sum(embed(table, tokens, jnp.bfloat16).astype(jnp.float32))

    # In bfloat16 a sum of ones stands still at 256.
    assert jax.grad(total)(table)[0, 0] == 1000
