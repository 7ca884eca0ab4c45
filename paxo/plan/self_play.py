"""A self-play run, a `SelfPlay`, as plans ask for it.

What a round's groups are made of is not guessed: `paxo.online.collect` runs once, on a few made
prompts, with made answers and judges, and tells how many groups a prompt gives, of how many
candidates, with which further arrays.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxo import rounds
from paxo.data.row_shape import RowShape
from paxo.experiment import MeshSettings, ModelSettings
from paxo.models.config import ModelConfig
from paxo.objectives import Objective
from paxo.online import Prompt, anchors
from paxo.online.collect import Judges, RoundError, collect
from paxo.online.drawing import PROMPT_MULTIPLE, Drawn, padded_size, sampling_config
from paxo.online.groups import Group
from paxo.online.method import ANY_REWARD, Draw, Method
from paxo.online.settings import OWN_ROLES
from paxo.online.shaping import Tools
from paxo.overrides import SettingsError
from paxo.plan.layout import Layout, Lengths
from paxo.plan.rounds import Drawing, Round
from paxo.types import Params, Policy, PreferenceBatch

# Prompts of the round that is tried out.
TRIED = 4
# Of a reward: such points as DNO's judge gives.
MOST = 6.0


@dataclasses.dataclass(frozen=True, eq=False)
class Online:
    """What plans ask of the settings of a self-play run.

    Attributes:
        settings: of the run.

    Raises:
        SettingsError: for settings that cannot be run, or whose steps grow from round to round.
    """

    settings: rounds.SelfPlay

    def __post_init__(self):
        method, chosen = self.settings.method, self.settings.rounds
        if method.schedule.replay == "all" and chosen.num_rounds > 1:
            raise SettingsError(
                f"method {method.name!r} trains on the groups of all earlier rounds too, so that "
                "its rounds grow and no one plan holds for them; --set rounds.num_rounds=1 plans "
                "the first"
            )
        some = [_made_prompt(method, i) for i in range(chosen.prompts_per_round)]
        try:
            chosen.check(method, some, self._own_roles)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.settings.method.objective

    @property
    def model(self) -> ModelSettings:
        """What is trained."""
        return self.settings.model

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the run."""
        chosen = self.settings.rounds
        return chosen.num_rounds * chosen.steps_per_round(self.settings.method)

    @property
    def microbatches(self) -> int:
        """Parts in which a step's rows are run."""
        return self.settings.microbatches

    @property
    def fixed_rows(self) -> bool:
        """Whether a row can have no other length."""
        return False

    @property
    def candidates(self) -> int:
        """K of a group that is trained on, not of those that are drawn."""
        return self.settings.method.group_size

    def mesh_of(self, role: str) -> None:
        """All policies lie as the one that is trained."""

    def anywhere(self, mesh: MeshSettings) -> rounds.SelfPlay:
        """The settings on another mesh, in one part."""
        return dataclasses.replace(self.settings, mesh=mesh, microbatches=1)

    def flags(self, layout: Layout) -> str:
        """The settings that choose a layout; the number of rows follows from them."""
        return layout.flags(rows=None, microbatches="microbatches", row_length="row_length")

    def lengths(self, config: ModelConfig) -> Lengths:
        """Half of the limits on average; answers of the data are no longer than those drawn.

        Raises:
            SettingsError: if the model has no positions left for a prompt.
        """
        chosen, completion = self.settings.prompts, self.settings.sampling.max_new_tokens
        # A prompt that is continued from a prefix of its answer has all but one of its tokens.
        prefix = completion - 1 if self.settings.method.reset else 0
        room = config.max_positions - completion - prefix
        if room < 1:
            raise SettingsError(
                f"sampling.max_new_tokens={completion} leaves no room for a prompt in the model's "
                f"{config.max_positions} positions: lower it"
            )
        prompt = min(chosen.max_tokens, room)
        longest = prompt + (completion if self.settings.method.reset else 0)
        return Lengths(longest / 2, completion / 2, longest, completion)

    def row_length(self, lengths: Lengths) -> int:
        """L that the settings ask for."""
        return self.row(lengths, self.settings.row_length).length

    def row(self, lengths: Lengths, length: int | None) -> RowShape:
        """The sizes of a row, as `paxo run` chooses them."""
        return rounds.row_shape(
            length,
            self.candidates,
            prompt=lengths.max_prompt,
            usual_prompt=math.ceil(lengths.prompt),
            completion=lengths.max_completion,
        )

    def first_rows(self, lengths: Lengths, length: int, ways: int) -> int:
        """R of a step, padded as `paxo run` pads it."""
        return self.rows(0, lengths, length, ways, self.microbatches)

    def rows(self, tokens: int, lengths: Lengths, length: int, ways: int, parts: int) -> int:
        """R that hold a step's groups, padded as `paxo run` pads them."""
        row = self.row(lengths, length)
        scored = self.candidates * lengths.completion
        held = min(row.groups, length // (lengths.prompt + scored), row.slots // scored)
        needed = math.ceil(self.step_groups / max(held, 1))
        return padded_size(needed, rounds.row_multiple(ways, parts))

    def groups(self, lengths: Lengths, length: int, rows: int) -> float:
        """Groups that a row holds on average."""
        return self.step_groups / rows

    @property
    def step_groups(self) -> int:
        """Groups of a step."""
        chosen, replay = self.settings.rounds, self.settings.method.schedule.replay
        shares = 0 if replay == "all" else sum(replay)
        of_round = chosen.prompts_per_round * len(self._tried) / TRIED * (1 + shares)
        return math.ceil(of_round / chosen.minibatches)

    def references(
        self, config: ModelConfig, params: Params
    ) -> tuple[dict[str, Params], tuple[str, ...]]:
        """Role -> shapes, and the roles with weights of their own; the others are anchors."""
        return dict.fromkeys(self._roles, params), self._own_roles

    def scorings(self, references: Mapping[str, Params]) -> int:
        """Passes of a scorer over a step's rows: one more for log-probs of single tokens."""
        return len(self._roles) + len(self._by_token)

    def frozen_policy(self, policy: Policy, config: ModelConfig) -> Policy:
        """The model of the frozen policies: the run's own, adapters included."""
        return policy

    def batch(
        self,
        config: ModelConfig,
        policy: Policy,
        params: Params,
        rows: int,
        row: RowShape,
        references: Mapping[str, Params],
    ) -> PreferenceBatch:
        """A step's batch with all that is attached to it."""
        if row not in self._batches:
            self._batches[row] = self._one_row(policy, params, row)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), self._batches[row]
        )

    def round(
        self, config: ModelConfig, lengths: Lengths, layout: Layout, groups: float, processes: int
    ) -> Round:
        """A round as `paxo run` plays it: each process draws for its share of the prompts."""
        settings, method = self.settings, self.settings.method
        shares = math.gcd(processes, layout.data * layout.fsdp)
        ways = layout.data * layout.fsdp // shares
        own = math.ceil(settings.rounds.prompts_per_round / shares)
        turns = 2 if method.schedule.extragradient else 1

        def drawings(draws: Sequence[Draw]) -> tuple[Drawing, ...]:
            return tuple(
                Drawing(sampling_config(settings.sampling, d), 2 if d.source == "mixture" else 1)
                for d in draws
                if d.source != "data"
            )

        room = config.max_positions - settings.sampling.max_new_tokens
        return Round(
            prompts=settings.rounds.prompts_per_round,
            batch=shares * math.ceil(settings.sample_batch / ways) * ways,
            width=min(padded_size(lengths.max_prompt, PROMPT_MULTIPLE), room),
            calls=math.ceil(own / settings.sample_batch),
            draws=drawings(method.draws),
            opponents=drawings(method.opponents),
            steps=settings.rounds.steps_per_round(method),
            turns=turns,
            batches=settings.rounds.steps_per_fit,
            anchors=self._copies,
            number=settings.rounds.num_rounds,
        )

    @property
    def _copies(self) -> tuple[str, ...]:
        """The first policy, the anchors, and what a round began with where its fits begin anew."""
        schedule = self.settings.method.schedule
        before = ("before",) if schedule.optimistic else ()
        return ("first", *anchors.names(schedule), *before)

    @functools.cached_property
    def _batches(self) -> dict[RowShape, PreferenceBatch]:
        """Shapes of a batch of one row, by its sizes."""
        return {}

    @property
    def _roles(self) -> tuple[str, ...]:
        return self.settings.method.roles

    @property
    def _by_token(self) -> tuple[str, ...]:
        """Those whose log-probs are attached token by token as well."""
        reads = self.objective.reads_tokens
        return tuple(r for r in self._roles if reads(r) or self.settings.method.by_token)

    @property
    def _own_roles(self) -> tuple[str, ...]:
        """Roles of policies that the loop itself does not have."""
        return tuple(role for role in self._roles if role not in OWN_ROLES)

    @functools.cached_property
    def _tried(self) -> list[Group]:
        """The groups of a round on made prompts.

        Raises:
            SettingsError: if it gives none.
        """
        method = self.settings.method
        prompts = [_made_prompt(method, i) for i in range(TRIED)]
        names = [name for name in method.rewards if name != ANY_REWARD] or ["reward"]
        judges = Judges(judge=_made_judge, rewards=dict.fromkeys(names, _made_rewards))
        try:
            return collect(
                method, prompts, {"policy": {}}, _MadeDrawer(), judges, jax.random.key(0)
            ).groups
        except RoundError as error:
            raise SettingsError(
                f"method {method.name!r} cannot be planned: tried out on made answers, {error}"
            ) from error

    def _one_row(self, policy: Policy, params: Params, row: RowShape) -> PreferenceBatch:
        method = self.settings.method
        first = jax.tree.map(lambda x: x[:1], rounds.packed(self._tried, row))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, first))
        per_slot = jax.ShapeDtypeStruct((1, row.slots), jnp.float32)
        batch = batch.replace(
            fixed_logps=dict.fromkeys(self._roles, batch.labels),
            fixed_token_logps=dict.fromkeys(self._by_token, per_slot),
        )
        if method.shape is None:
            return batch

        def shaped(batch: PreferenceBatch, params: Params) -> PreferenceBatch:
            return method.shape([batch], Tools(policy, params))[0]

        return jax.eval_shape(shaped, batch, params)


class _MadeDrawer:
    """Answers of one token, each larger than those drawn before."""

    def __init__(self):
        self._tokens = itertools.count(1)

    def __call__(
        self, draw: Draw, policies: Any, prompts: Sequence[Prompt], key: Any, *, mix: float = 0.0
    ) -> Drawn:
        tokens = [
            [np.array([next(self._tokens)], np.int32) for _ in range(draw.count)] for _ in prompts
        ]
        shape = len(prompts), draw.count
        return Drawn(tokens, np.ones(shape, bool), np.zeros(shape, np.float32))


def _made_prompt(method: Method, number: int) -> Prompt:
    """With as many answers as the method takes from the data, smaller than any that are drawn."""
    count = method.num_completions
    answers = tuple(np.array([-k, -k], np.int32) for k in range(1, count + 1))
    return Prompt(np.ones(1, np.int32), number, completions=answers, finished=(True,) * count)


def _made_rewards(prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> np.ndarray:
    """`[B, N]` from 0 to `MOST` by the order of the last tokens."""
    last = np.array([[answer[-1] for answer in row] for row in completions])
    return MOST * np.argsort(np.argsort(last, -1), -1) / max(last.shape[1] - 1, 1)


def _made_judge(
    prompts: Sequence[Any], completions: Sequence[Sequence[Any]], wanted: Any = None
) -> np.ndarray:
    """`[B, N, N]` by the same order, never sure."""
    rewards = _made_rewards(prompts, completions)
    return 1 / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))
