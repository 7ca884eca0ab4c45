"""What a step holds at a time, read from the compiled program; nothing is run."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from paxo import scoring
from paxo.models.policy import make_policy
from paxo.objectives import objective
from paxo.training import one_pass
from paxo.training.state import init_state
from paxo.training.step import make_train_step
from paxo.types import PreferenceBatch
from tests.made import TINY

VOCABULARY, LENGTH = 4096, 32


def compiled_step(rows, vocabulary=VOCABULARY, width=TINY.hidden_size):
    """Peak of the temporaries in bytes and entries of the largest array of a DPO step."""
    config = dataclasses.replace(
        TINY,
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=8,
    )
    policy, goal, optimizer = make_policy(config), objective("dpo"), optax.sgd(0.1)
    state = jax.eval_shape(
        lambda key: init_state(policy.init(key), goal, optimizer, key), jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    figures = jax.ShapeDtypeStruct((rows, 2, 2), jnp.float32)
    batch = PreferenceBatch(
        *(tokens,) * 7,
        labels=figures,
        where=jax.ShapeDtypeStruct(figures.shape, bool),
        fixed_logps={"reference": figures},
        max_completion=LENGTH,
    )
    compiled = jax.jit(make_train_step(policy, goal, optimizer)).lower(state, batch).compile()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    return compiled.memory_analysis().temp_size_in_bytes, largest


@pytest.mark.parametrize(
    "most_logits", [2**25, 0]
)  # made once, or twice, of the vocabulary a chunk
def test_no_step_holds_positions_times_vocabulary(monkeypatch, most_logits):
    monkeypatch.setattr(one_pass, "MOST_LOGITS", most_logits)
    # A chunk of the size that is used, 16 MB, would fill most of so small a program.
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 2**19)
    monkeypatch.setattr(scoring, "MIN_CHUNK_VOCABULARY", 2**6)
    monkeypatch.setattr(scoring, "VOCABULARY_ENTRIES", 2**19)
    few, many = 64 * LENGTH, 256 * LENGTH
    (peak_few, _), (peak_many, largest) = compiled_step(64), compiled_step(256)
    assert largest <= many * VOCABULARY / 16
    assert peak_many < many * VOCABULARY * 4 / 4
    assert peak_many - peak_few < (many - few) * VOCABULARY * 4 / 4
    # With all logits at once the same step is as large as this test would notice.
    for name in ("CHUNK_ENTRIES", "VOCABULARY_ENTRIES"):
        monkeypatch.setattr(scoring, name, 2**40)
    peak_dense, largest_dense = compiled_step(64)
    assert largest_dense >= few * VOCABULARY
    assert peak_dense >= few * VOCABULARY * 4


def test_one_pass_holds_the_head_once_beside_its_gradient(monkeypatch):
    """Tied embeddings are read as they lie: no transposed copy of them, or of their gradient."""
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 1)
    monkeypatch.setitem(scoring.MIN_CHUNK_TOKENS, "cpu", 1)
    vocabulary, width = 2**14, 64
    peak, largest = compiled_step(2, vocabulary, width)
    assert largest == vocabulary * width  # the head, its gradient, and no logits of both rows
    logits = LENGTH * vocabulary * 4
    # The gradient, a row's logits and their gradient; a head that is transposed needs 2 MB more.
    assert peak < 1.25 * vocabulary * width * 4 + 2.25 * logits
