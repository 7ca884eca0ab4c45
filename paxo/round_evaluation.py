"""What self-play is measured by after a round, on prompts of its own."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from paxo.evaluation.self_play import policy_figures, preference_figures, wanted_comparisons
from paxo.judges.checks import JudgeError
from paxo.online import Draw, Group, RoundError
from paxo.online.collect import Judges
from paxo.rows import everywhere, own_part, place_rows
from paxo.scoring import make_scorer
from paxo.types import Params

EVALUATION_SALT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is measured after a round, on prompts of its own.

    Attributes:
        num_prompts: prompts set apart; 0 measures nothing.
        completions: E drawn for each of them; the duality gap's estimate needs 2.
    """

    num_prompts: int = 64
    completions: int = 2

    def __post_init__(self):
        if self.num_prompts < 0 or self.completions < 1:
            raise ValueError(
                "evaluation.num_prompts must not be negative and evaluation.completions at least "
                f"1; got {self.num_prompts} and {self.completions}"
            )


class Evaluator:
    """Measures the policy of a round on held-out prompts, against the first and the last one."""

    def __init__(self, settings, prompts, drawer, judges: Judges, pack, mesh, first, figures):
        self.settings, self.prompts, self.drawer, self.judges = settings, prompts, drawer, judges
        self.pack, self.mesh, self.first, self.figures = pack, mesh, first, figures
        self.key = jax.random.fold_in(jax.random.key(settings.rounds.seed), EVALUATION_SALT)

    def __call__(self, params: Params, last: Params, number: int) -> dict[str, float]:
        """Figures of `params` after a round.

        Raises:
            RoundError: the judge or a reward failed.
        """
        try:
            return self._figures(params, last, number)
        except JudgeError as error:
            raise RoundError(
                f"the evaluation after round {number}: {error}; what the round was trained on is "
                "kept: run the same command again once the judge works"
            ) from error

    def _figures(self, params: Params, last: Params, number: int) -> dict[str, float]:
        num = self.settings.evaluation.completions
        drawn = [
            self._drawn(params, jax.random.fold_in(self.key, 2 * number)),
            self._against,
            self._drawn(last, jax.random.fold_in(self.key, 2 * number + 1)),
        ]
        ours, decode = drawn[0], self.judges.decode
        shown = [
            [decode(t.tolist()) for part in drawn for t in part.tokens[b]]
            for b in range(len(self.prompts))
        ]
        asked = [decode(p.ids.tolist()) if p.shown is None else p.shown for p in self.prompts]
        found = self._policy_figures(params, ours)
        if self.judges.judge is not None:
            wanted = wanted_comparisons(num)
            table = self.judges.ask(lambda: self.judges.judge(asked, shown, wanted=wanted))
            kept = ~np.isnan(table[:, :, :num]).any((1, 2))
            if kept.any():
                found |= preference_figures(np.asarray(table)[kept], num)
            found["unjudged_prompts"] = float((~kept).sum())
        own = [row[:num] for row in shown]
        for name, reward in self.judges.of_policy(params, self.key).rewards.items():
            rewards = self.judges.ask(lambda reward=reward: np.asarray(reward(asked, own)))
            found[f"reward/{name}"] = float(np.nanmean(rewards))
        return found | dict(self.figures(own) if self.figures is not None else {})

    @functools.cached_property
    def _against(self):
        """The first policy's completions, drawn once."""
        return self._drawn(self.first, self.key)

    def _drawn(self, params: Params, key: jax.Array):
        draw = Draw("policy", self.settings.evaluation.completions, temperature=1.0)
        return self.drawer(draw, {"policy": params}, self.prompts, key)

    def _policy_figures(self, params: Params, ours) -> dict[str, float]:
        """KL to the first policy, entropy, lengths: over one completion of each prompt."""
        groups = [
            Group(p.ids, (ours.tokens[b][0],), (bool(ours.finished[b, 0]),), (0.0,), {}, b, "")
            for b, p in enumerate(self.prompts)
        ]
        batch = self.pack(groups)
        rows = place_rows(own_part(batch, self.mesh), self.mesh)
        of, first = (
            everywhere(make_scorer(self.drawer.policy, x, mesh=self.mesh)(rows))
            for x in (params, self.first)
        )
        there = np.asarray(batch.where)
        lengths = np.array([len(t) for row in ours.tokens for t in row])
        return policy_figures(of[there] - first[there], of[there], lengths, ours.finished)


def evaluations(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The evaluations of a run, over all attempts, read back from its metrics by process 0."""
    found: list[dict[str, float]] = []
    if jax.process_index() != 0:
        return found
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores = {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        if scores:
            found.append(
                {"round": row["round"]} | {k: v for k, v in scores.items() if v is not None}
            )
    return found
