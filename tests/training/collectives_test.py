"""What the compiled step moves between devices, read from its instructions.

Every size below is another number, so that a shape tells what an array is.
"""

import re
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from paxo import scoring
from paxo.models.config import ModelConfig
from paxo.models.policy import make_policy
from paxo.models.sharding import make_mesh, param_shardings
from paxo.objectives import objective
from paxo.training.state import init_state, state_shardings
from paxo.training.step import compile_step, make_train_step
from tests.compiling import quick_compiles  # noqa: F401
from tests.made import made_batch

LAYERS, WIDTH, VOCABULARY, ROWS, LENGTH = 5, 48, 104, 16, 32
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
INSTRUCTION = re.compile(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class Moved(NamedTuple):
    """An array that a collective brings to each device."""

    what: str
    shape: tuple[int, ...]
    in_loop: bool
    instruction: str


def moved(text):
    """All arrays that the program's collectives bring."""
    found, in_loop = [], True
    for line in text.splitlines():
        if line.endswith("{"):
            in_loop = not line.startswith("ENTRY")
        if match := INSTRUCTION.search(line):
            for shape in SHAPE.findall(match[1]):
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found.append(Moved(match[2], sizes, in_loop, line.strip()))
    return found


@pytest.fixture(scope="module")
def collectives(quick_compiles):  # noqa: F811
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=8, num_kv_heads=4,
        head_dim=6, intermediate_size=88, max_positions=64, unroll=False, remat="full",
    )  # fmt: skip
    policy, goal, optimizer = make_policy(config), objective("dpo"), optax.sgd(0.1)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    batch = made_batch(24, rows=ROWS, length=LENGTH, longest=5)
    batch = batch.replace(fixed_logps={"reference": np.zeros(batch.where.shape, np.float32)})
    state = jax.eval_shape(lambda p: init_state(p, goal, optimizer, jax.random.key(1)), params)
    mesh = make_mesh(2, 2, 2)
    placed = param_shardings(policy.logical_axes, params, mesh)
    step = compile_step(
        make_train_step(policy, goal, optimizer), mesh, state_shardings(state, placed, optimizer)
    )
    with pytest.MonkeyPatch.context() as patch:
        # So that the logits are made in several portions.
        patch.setattr(scoring, "CHUNK_ENTRIES", 0)
        patch.setattr(scoring, "MIN_CHUNK_TOKENS", {"cpu": 16})
        return moved(step.lower(state, batch).compile().as_text())


def test_layers_are_brought_together_one_at_a_time(collectives):
    gathered = [x.shape for x in collectives if x.what == "all-gather" and x.in_loop]
    # The four kernels of a layer, split over `tensor` alone.
    for kernel in ((WIDTH, 2, 4, 6), (2, 2, 6, WIDTH), (WIDTH, 2, 44), (44, WIDTH)):
        assert kernel in gathered
    assert [x.instruction for x in collectives if LAYERS in x.shape] == []


def test_logits_stay_where_they_are(collectives):
    of_vocabulary = [x for x in collectives if {VOCABULARY, VOCABULARY // 2} & set(x.shape)]
    widths = {WIDTH, WIDTH // 2}
    assert [x.instruction for x in of_vocabulary if not widths & set(x.shape)] == []
    # Of head and embeddings no device sees the whole vocabulary.
    assert [x.instruction for x in of_vocabulary if VOCABULARY in x.shape] == []


def test_the_gradient_of_the_head_is_summed_behind_the_last_portion_of_logits(collectives):
    of_head = [x for x in collectives if VOCABULARY // 2 in x.shape]
    assert any(x.what in ("all-reduce", "reduce-scatter") for x in of_head)
    assert [x.instruction for x in of_head if x.in_loop] == []


def test_no_device_sees_the_states_of_all_rows(collectives):
    states = [x for x in collectives if {WIDTH, WIDTH // 2} & set(x.shape) and len(x.shape) == 3]
    assert any(x.what == "all-to-all" for x in states)  # embeddings that were looked up
    assert [x.instruction for x in states if ROWS in x.shape] == []
