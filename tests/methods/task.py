"""The quickstart's task, made small: one SFT model, its samples with true rewards, one training.

Every method is trained from the same model on the same samples, of which a recipe makes groups.
"""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

import paxo
from experiments import quickstart
from paxo import runs, scoring
from paxo.data.batching import Batches
from paxo.data.packing import RowShape, choose_shape, pack_groups
from paxo.data.records import TokenGroup
from paxo.data.unpaired import Mismatch
from paxo.experiment import DataSettings, ModelSettings, TrainSettings
from paxo.head_outputs import head_outputs as read_heads
from paxo.models.heads import HEADS, with_heads
from paxo.models.sharding import make_mesh
from paxo.objectives import Objective
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state
from paxo.training.step import make_train_step

CANDIDATES, ROWS, ROW_LENGTH, WIDTH = 6, 8, 256, 64
STRENGTH = 10.0  # P(i beats j) = sigmoid(STRENGTH * (reward_i - reward_j))


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Completions of a prompt, best first.

    Attributes:
        group: the tokens; its labels are the true rewards.
        index: number of the group among all.
    """

    group: TokenGroup
    index: int

    @property
    def rewards(self) -> np.ndarray:
        """`[6]` true rewards, falling."""
        return np.asarray(self.group.labels, np.float32)

    def choose(self, places, labels, **extras) -> TokenGroup:
        """The completions at these places as a group with these labels."""
        pick = lambda x: tuple(x[i] for i in places)  # noqa: E731
        return dataclasses.replace(
            self.group,
            completions=pick(self.group.completions),
            finished=pick(self.group.finished),
            labels=tuple(float(x) for x in labels),
            extras={name: np.asarray(x, np.float32) for name, x in extras.items()},
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trainings share.

    Attributes:
        draw: draws completions of `params`, of any policy with that decoder.
        params: the SFT model's.
        sampled: its samples on the prompts that are trained on.
        heldout: its samples on others.
        prompts: prompts on which a policy is judged.
        before: `[N]` true rewards of the SFT model's own completions of them.
    """

    draw: quickstart.Drawer
    params: dict
    sampled: list[Sampled]
    heldout: list[Sampled]
    prompts: list[list[int]]
    before: np.ndarray

    def rewards(self, params) -> np.ndarray:
        """`[N]` true rewards of one completion of each prompt; the same draws for every policy."""
        groups = self.draw(params, self.prompts, 1, salt=2)
        return np.array([group.labels[0] for group in groups])


def settings() -> quickstart.Quickstart:
    """The quickstart's, with a smaller model and fewer steps."""
    config = paxo.ModelConfig(
        vocab_size=len(quickstart.vocabulary()), hidden_size=WIDTH, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, intermediate_size=160, max_positions=64,
        unroll=False,  # compiles faster
    )  # fmt: skip
    return dataclasses.replace(
        quickstart.experiment(),
        model=ModelSettings(config=config),
        data=DataSettings(row_length=ROW_LENGTH),
        sft_train=TrainSettings(200, rows_per_batch=ROWS, log_every=100),
        num_reviews=3072,
    )


def make_task(folder: pathlib.Path) -> Task:
    """SFT, then samples; about half a minute."""
    chosen = settings()
    mesh = make_mesh(devices=jax.devices()[:1])
    model = quickstart.make_model(chosen, folder, mesh)
    groups = quickstart.tokenise(quickstart.reviews(chosen), model.tokenizer).groups
    state = runs.train(
        model.policy,
        model.params,
        paxo.objective("nll"),
        chosen.sft_optimizer,
        quickstart.rows_of(groups, chosen, chosen.sft_train, mesh),
        chosen.sft_train,
        mesh,
        folder,
        name="SFT",
    )
    params = paxo.snapshot(state.params)
    draw = quickstart.Drawer(model, chosen, mesh, jax.random.key(1))
    prompts = [model.tokenizer.encode_prompt(p).tolist() for p in quickstart.some_prompts(chosen)]
    sampled = [
        Sampled(_sorted(group), i)
        for i, group in enumerate(draw(params, prompts[:640], CANDIDATES, salt=0))
    ]
    # Groups whose samples are all as good say nothing to a method that compares.
    sampled = [x for x in sampled if x.rewards[0] - x.rewards[-1] > 0.1]
    task = Task(draw, params, sampled[:-128], sampled[-128:], prompts[-512:], np.zeros(0))
    return dataclasses.replace(task, before=task.rewards(params))


def _sorted(group: TokenGroup) -> TokenGroup:
    order = np.argsort(-np.asarray(group.labels), kind="stable")
    return Sampled(group, 0).choose(order, np.asarray(group.labels)[order])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A policy with the heads its objective names, and its parameters after training."""

    policy: paxo.Policy
    params: dict
    losses: list[float]


def train(task: Task, objective: Objective, groups: list[TokenGroup], *, lr, steps) -> Trained:
    """Adam with a short warm-up; every frozen role is the SFT model, `previous` too."""
    policy = task.draw.model.policy
    policy = with_heads(policy, WIDTH, [name for name in HEADS if name in objective.arrays])
    params = policy.init(jax.random.key(0)) | task.params
    optimizer = paxo.adamw(lr, warmup_steps=5, schedule="linear", weight_decay=0.0).build(steps)
    state = init_state(params, objective, optimizer, jax.random.key(3))
    frozen = {}
    if "token_kls" in objective.arrays:
        frozen = {"reference_head": task.draw.model.policy.unembed(task.params)}
    state = state.replace(frozen=frozen)
    step = jax.jit(make_train_step(policy, objective, optimizer))
    scorer = make_scorer(task.draw.model.policy, task.params)
    groups = [group for group in groups if group.num_tokens <= ROW_LENGTH]
    mismatch = Mismatch() if objective.mismatched else None
    shape = choose_shape(groups, row_length=ROW_LENGTH, mismatch=mismatch)
    batches = Batches(groups, shape, ROWS, seed=0, prefetch=0, mismatch=mismatch)
    losses = []
    for _ in range(steps):
        batch = next(batches)
        for role in {*objective.roles, *objective.token_roles}:
            batch = attach_logps(
                batch,
                role,
                scorer,
                tokens=role in objective.token_roles,
                hidden="token_kls" in objective.arrays,
            )
        state, report = step(state, batch)
        losses.append(report["loss"])
    return Trained(policy, state.params, [float(x) for x in losses])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _outputs(policy, params, batch, name):
    hidden = scoring.all_hidden(policy, params, batch)
    return read_heads(policy, params, batch, [name], hidden)[name]


def head_outputs(trained: Trained, groups: list[TokenGroup], name: str):
    """Per group what a head says of its candidates, `[K, ...]` each."""
    length = max(group.num_tokens for group in groups)
    shape = RowShape(length, length, 1, max(len(g.completions) for g in groups), 32)
    batch, index = pack_groups([dataclasses.replace(g, extras={}) for g in groups], shape)
    found = np.asarray(_outputs(trained.policy, trained.params, batch, name))
    out = [None] * len(groups)
    for row in range(len(index)):
        if index[row, 0] >= 0:
            out[index[row, 0]] = found[row, 0]
    return out
