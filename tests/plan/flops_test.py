"""Operations in closed form."""

import dataclasses

import numpy as np

from paxo.plan.flops import Work, mean_keys, scorer_flops, step_flops, useful_flops
from tests.plan.planned import CONFIG


def test_mean_keys_counts_the_pairs_of_the_attention_mask():
    prompt, completion, candidates = 40, 24, 3
    branch = np.repeat(np.arange(candidates + 1), [prompt, *[completion] * candidates])
    sees = np.tril(np.ones((branch.size, branch.size), bool))
    sees &= (branch == 0) | (branch == branch[:, None])
    # A token sees itself too: half a key more than the continuous count.
    assert mean_keys(prompt, completion, candidates) + 0.5 == sees.sum() / branch.size


def test_a_step_is_three_forward_passes_and_remat_adds_less_than_one():
    work = Work(tokens=1e3, scored=0, keys=0, needed_keys=0)
    forward = scorer_flops(CONFIG, work)
    plain, full = (
        step_flops(dataclasses.replace(CONFIG, remat=remat), work) for remat in ("none", "full")
    )
    assert plain == 3 * forward == useful_flops(CONFIG, work)
    assert 3.5 * forward < full < 4 * forward


def test_adapters_on_a_frozen_base_save_a_third_of_its_operations():
    work = Work(tokens=1e3, scored=1e3, keys=0, needed_keys=0, in_chunks=False)
    adapted = dataclasses.replace(work, adapter_params=10)
    base = 2 * scorer_flops(CONFIG, work)
    assert step_flops(CONFIG, adapted) == base + 3 * 2 * 1e3 * 10
