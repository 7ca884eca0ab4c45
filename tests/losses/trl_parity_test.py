"""Losses against TRL's own code: value, and gradient with respect to the trained log-probs.

Whether a pair is equal is read from `paxo.losses.peers`, so that a false claim there fails here.
TRL 1.16 has the XPO, Nash-MD, BCO and PRM trainers no longer: their cases are skipped there, and
run with `trl==1.13.0`, the last version that has them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from paxo.losses.peers import comparison

pytest.importorskip("torch", reason="needs torch and trl: pip install -e '.[parity]'")
pytest.importorskip("trl", reason="needs trl: pip install -e '.[parity]'")

import torch
import transformers
from trl.trainer import utils

from tests.losses import trl_trainers as trl
from tests.losses.trl_cases import CASES

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = {"float64": 1e-6, "float32": 1e-5}
CLAIMS = {(row.name, row.peer_name): row.equal for row in comparison("TRL")}


def by_trl(case, made):
    """Loss and gradient by TRL's code."""
    leaf = torch.tensor(getattr(made, case.leaf), requires_grad=True)
    loss = case.theirs(made, leaf)
    loss.backward()
    return loss.detach().numpy(), leaf.grad.numpy()


def by_us(case, loss):
    """A function of the made numbers: loss and gradient by ours, compiled once."""
    numbers = lambda arrays, leaf: loss(trl.Made(**arrays), leaf)  # noqa: E731
    run = jax.jit(jax.value_and_grad(numbers, argnums=1))
    return lambda made: run(vars(made), getattr(made, case.leaf))


def off_by(found, expected):
    """The larger of the relative errors of loss and gradient.

    The gradient's is relative to its largest number. So is the loss's where the loss is smaller: a
    policy gradient's is a small difference of larger numbers.
    """
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    loss, gradient = (np.max(np.abs(f - e)) for f, e in zip(found, expected))
    largest = np.max(np.abs(expected[1]))
    return max(loss / max(abs(expected[0]), largest), gradient / largest)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.name}, {case.peer_name}, {dtype}")
        for case in CASES
        for dtype in case.dtypes
    ],
)
def test_value_and_gradient_are_as_the_table_of_peers_says(case, dtype):
    mine, instead = by_us(case, case.mine), case.instead and by_us(case, case.instead)
    for seed in range(4):
        made = trl.Made.of(case.candidates, seed, dtype)
        theirs = by_trl(case, made)
        with jax.enable_x64(dtype == "float64"):
            if CLAIMS[case.name, case.peer_name]:
                assert off_by(mine(made), theirs) < TOLERANCE[dtype]
            else:
                assert off_by(mine(made), theirs) > 1e-3
            if instead:
                assert off_by(instead(made), theirs) < TOLERANCE[dtype]


def test_nash_md_pg_equals_trl_on_completions_of_one_token():
    case = next(case for case in CASES if case.name == "nash_md_pg")
    made = trl.Made.of(1, 0, "float64")
    made = dataclasses.replace(
        made, mask=np.broadcast_to(np.arange(trl.TOKENS) == 0, made.mask.shape)
    )
    theirs = by_trl(case, made)
    with jax.enable_x64(True):
        assert off_by(by_us(case, case.mine)(made), theirs) < 1e-6


def test_the_stand_in_for_a_model_says_what_trls_fused_head_does():
    wanted = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=2, num_hidden_layers=1, eos_token_id=1, initializer_range=1.0, **size
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(3, trl.PROMPT + trl.TOKENS, dtype=torch.long)
    ids[1, 0] = ids[2, 1] = 1  # prompts that differ
    labels = ids.clone()
    labels[:, : trl.PROMPT] = labels[0, -2:] = -100
    plain = model(ids).logits.log_softmax(-1)[:, trl.PROMPT - 1 : -1, 0]
    utils.add_fused_lm_head(model, outputs=wanted)
    theirs = model(ids, labels=labels, fused_lm_head=True)
    ours = trl.TwoTokens(plain)(ids, labels=labels)
    there = labels[:, 1:] != -100
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)
    torch.testing.assert_close(
        ours.log_sum_sq_probs[there], theirs.log_sum_sq_probs[there], rtol=1e-5, atol=1e-5
    )


def test_every_claim_about_trl_has_its_case():
    assert {(case.name, case.peer_name) for case in CASES} == set(CLAIMS)
