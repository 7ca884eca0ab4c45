"""Every objective, trained for a few dozen steps on the quickstart's task, does what it promises.

    pytest -n 2 --dist=load -m slow tests/methods

The mean true reward of the policy's own completions goes up (the same prompts and random numbers
before and after, so that the difference is paired), or a head tells held-out completions apart.
"""

import fcntl
import json
import logging
import os

import numpy as np
import pytest
from scipy import stats

import paxo
from paxo.losses import general_preference_scores
from paxo.objectives import LOSSES
from tests.methods.recipes import RECIPES, Recipe, stepwise
from tests.methods.task import head_outputs, make_task, train

pytestmark = pytest.mark.slow
logger = logging.getLogger(__name__)
FIGURES: dict[str, dict] = {}
CHANCE = 1e-3  # greatest probability of the figure if nothing had been learnt


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    made = make_task(tmp_path_factory.mktemp("sft"))
    yield made
    report()


def report():
    """The table, in the log, and added to the JSON file that PAXO_FIGURES names."""
    lines = [
        f"{name:22} {f['promise']:9} {f['before']:+.3f} -> {f['after']:+.3f}"
        for name, f in sorted(FIGURES.items())
    ]
    logger.info("%d methods\n%s", len(lines), "\n".join(lines))
    if "PAXO_FIGURES" in os.environ:
        with open(os.environ["PAXO_FIGURES"], "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several processes share the methods
            file.seek(0)
            known = json.loads(file.read() or "{}")
            file.truncate(0)
            json.dump(dict(sorted({**known, **FIGURES}.items())), file, indent=1)


@pytest.mark.parametrize("name", LOSSES)
def test_method_keeps_its_promise(name, task):
    recipe = RECIPES.get(name, Recipe())
    objective = paxo.objective(name, **recipe.hyper)
    wanted = frozenset(objective.arrays)
    made = [recipe.groups(s, task.sampled, wanted) for s in task.sampled]
    groups = [g for x in made for g in (x if isinstance(x, list) else [x])]
    trained = train(task, objective, groups, lr=recipe.lr, steps=recipe.steps)
    assert np.isfinite(trained.losses).all()
    if recipe.promise == "reward":
        after = task.rewards(trained.params)
        before, chance = task.before, stats.ttest_rel(after, task.before, alternative="greater")
    else:
        after = accuracy(task, trained, recipe.head)
        before = np.full(len(after), 0.5)
        chance = stats.binomtest(int(after.sum()), len(after), alternative="greater")
    FIGURES[name] = {
        "promise": recipe.promise,
        "before": round(float(before.mean()), 4),
        "after": round(float(after.mean()), 4),
    }
    assert chance.pvalue < CHANCE, FIGURES[name]


def accuracy(task, trained, head):
    """`[N]` per held-out prompt whether the head puts the best sample above the worst."""
    if head == "step_scores":
        return steps_told_apart(task, trained)
    pairs = [s.choose((0, 5), (1, 0)) for s in task.heldout]
    outputs = head_outputs(trained, pairs, head)
    if head == "scores":
        return np.array([float(x[0] > x[1]) for x in outputs])
    if head == "embeddings":
        return np.array([float(general_preference_scores(x)[0, 1] > 0) for x in outputs])
    last = [[y[len(c) - 1] for y, c in zip(x, p.completions)] for x, p in zip(outputs, pairs)]
    return np.array([float(a > b) for a, b in last])


def steps_told_apart(task, trained):
    """`[N]` for kind and unkind clauses, put side by side, whether the kind one scores higher."""
    wanted = frozenset({"step_mask", "step_labels"})
    groups = [stepwise(s, task.heldout, wanted) for s in task.heldout]
    found = {True: [], False: []}
    for group, scores in zip(groups, head_outputs(trained, groups, "step_scores")):
        for k, completion in enumerate(group.completions):
            ends = group.extras["step_mask:KT"][k] > 0
            for score, kind in zip(
                scores[k, : len(completion)][ends], group.extras["step_labels:KT"][k][ends]
            ):
                found[bool(kind)].append(score)
    return np.array([float(a > b) for a, b in zip(found[True], found[False])])
