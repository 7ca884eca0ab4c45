"""One round's data: prompts -> candidates -> verdicts -> groups with their targets."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paxo.online.drawing import Drawer, Drawn
from paxo.online.groups import Group, Prompt
from paxo.online.judging import Bench, Reward
from paxo.online.method import ANY_REWARD, Draw, Method
from paxo.online.pairing import UNJUDGED, Chosen
from paxo.rows import from_first
from paxo.types import Array, Judge, Params

logger = logging.getLogger(__name__)


class RoundError(RuntimeError):
    """A round cannot be trained on; nothing of it was kept, and the same command tries it again."""


class Collected(NamedTuple):
    """What a round is trained on.

    Attributes:
        groups: at least one.
        figures: averages over what was drawn: "tokens" (a completion), "finished" (share),
            "entropy_nats" (of the policy, estimated: minus the mean log-prob of its completions),
            "reward/..." (means), "groups", "count/comparisons" and "skipped/..." by reason.
    """

    groups: list[Group]
    figures: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Judges:
    """Who judges, and what is shown.

    Attributes:
        judge: compares completions; None where the method asks none. Its answers should be checked
            (`paxo.judges.CheckedJudge(judge, missing="keep")`).
        rewards: name -> reward function. One with a method `of_policy(params, key) -> reward
            function` is asked for that of each round's policy (`paxo.online.SelfReward`).
        decode: token ids -> what judges are shown; by default the ids themselves.
        allow_unfinished: whether completions that the length limit cut are trained on.
        everywhere: of several processes all ask, as is needed where a judge is a model on the mesh;
            by default the first one asks and tells the others.
    """

    judge: Judge | None = None
    rewards: Mapping[str, Reward] = dataclasses.field(default_factory=dict)
    decode: Callable[[Sequence[int]], Any] = tuple
    allow_unfinished: bool = True
    everywhere: bool = False

    def check(self, method: Method) -> None:
        """Raises ValueError where a method lacks its judge or a reward function."""
        if method.judged and self.judge is None:
            raise ValueError(f"method {method.name!r} needs a judge: give judge=...")
        for name in method.rewards:
            if name == ANY_REWARD and not self.rewards:
                raise ValueError(f"method {method.name!r} needs rewards: give rewards={{...}}")
            if name != ANY_REWARD and name not in self.rewards:
                raise ValueError(
                    f"method {method.name!r} needs the reward function {name!r}; given are "
                    f"{sorted(self.rewards)}: give rewards={{{name!r}: function}}"
                )

    def ask(self, call: Callable[[], Any]) -> Any:
        """What a call of the judges gives: on every process, or on the first, which tells all."""
        return call() if self.everywhere else from_first(call)

    def of_policy(self, params: Params, key: Array) -> "Judges":
        """These judges with the rewards that the policy gives itself."""
        bound = {
            name: reward.of_policy(params, key) if hasattr(reward, "of_policy") else reward
            for name, reward in self.rewards.items()
        }
        return dataclasses.replace(self, rewards=bound)


def collect(
    method: Method,
    prompts: Sequence[Prompt],
    policies: Mapping[str, Params],
    draw: Drawer,
    judges: Judges,
    key: Array,
    *,
    name: str = "round",
    opponents: Mapping[str, Params] | None = None,
    least: int = 1,
) -> Collected:
    """Draws, judges and pairs the candidates of one round.

    Args:
        method: the row.
        prompts: of the round.
        policies: "policy", "reference" and, where the method draws from it, "average".
        draw: draws completions.
        judges: who judges.
        key: of the round; all draws are made from it.
        name: of the round, for errors and `Group.source`.
        opponents: policies that opponents are drawn from, where they are other ones (EGPO's second
            half).
        least: groups that there must be, one for each step that they are dealt out to.

    Raises:
        RoundError: if the judge fails, or fewer prompts give a group; counts and reasons are named.
    """
    for_draws, for_opponents, for_pairing, for_resets = jax.random.split(key, 4)
    asked, prefixes = _reset(method, prompts, for_resets)
    drawn = [
        _drawn(d, asked, policies, draw, jax.random.fold_in(for_draws, i), method.mix)
        for i, d in enumerate(method.draws)
    ]
    others = [
        _drawn(d, asked, opponents or policies, draw, for_opponents, method.mix)
        for d in method.opponents
    ]
    judges = judges.of_policy(policies["policy"], jax.random.fold_in(key, 4))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(for_pairing)))
    judged = functools.partial(
        _judged, method, prompts, asked, prefixes, drawn, others, judges, rng, name, least
    )
    return judges.ask(judged)


def _judged(
    method, prompts, asked, prefixes, drawn, others, judges: Judges, rng, name: str, least: int
) -> Collected:
    """What the judges and the pairing make of the candidates."""
    bench = _bench(method, prompts, prefixes, drawn, others, judges)
    try:
        chosen = method.pairing(bench, rng)
        values = _targets(method, bench, chosen) if len(chosen.prompt) else {}
    except Exception as error:
        raise RoundError(
            f"{name}: {len(prompts)} prompts were answered, but not judged "
            f"({type(error).__name__}: {error}); nothing of the round was kept: run the same "
            "command again once the judge works"
        ) from error
    kept, skipped = _without_nan(chosen, values)
    counts = chosen.skipped + skipped
    if len(kept) < least:
        raise RoundError(_too_few(name, len(kept), len(prompts), least, counts))
    groups = [_group(name, prompts, asked, drawn, chosen, values, m) for m in kept]
    if counts:
        logger.info("%s: %d groups; left out: %s", name, len(groups), _told(counts))
    return Collected(groups, _figures(method, bench, drawn, others, len(groups), counts))


def _too_few(name: str, groups: int, prompts: int, least: int, counts: Mapping[str, int]) -> str:
    found = f"{groups or 'none'} of {prompts} prompts gave a group to train on ({_told(counts)})"
    if groups:
        found = f"{groups} groups of {prompts} prompts ({_told(counts)}) cannot be dealt out to "
        found += f"rounds.minibatches={least} steps"
    more = "prompts, or lower minibatches" if groups else "candidates"
    return (
        f"{name}: {found}; nothing of the round was kept. The same command draws the same "
        "completions: run it again once the judge answers otherwise, or export this run's last "
        "policy and start from it in another folder, after you raise the temperature, "
        f"max_new_tokens or the number of {more}"
    )


def _reset(
    method: Method, prompts: Sequence[Prompt], key: Array
) -> tuple[list[Prompt], list[np.ndarray]]:
    """The prompts as they are drawn for, and what of their answers stands at their ends.

    With probability `method.reset` a prompt is followed by a random part, not all, of its first
    completion in the data set (DR-PO, arXiv:2404.08495).
    """
    nothing = np.zeros(0, np.int32)
    if not method.reset:
        return list(prompts), [nothing] * len(prompts)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    asked, prefixes = [], []
    for prompt in prompts:
        answer = prompt.completions[0]
        resets, length = rng.random() < method.reset, int(rng.integers(1, max(len(answer), 2)))
        prefix = answer[:length] if resets and len(answer) > 1 else nothing
        asked.append(dataclasses.replace(prompt, ids=np.concatenate([prompt.ids, prefix])))
        prefixes.append(prefix)
    return asked, prefixes


def _drawn(draw: Draw, prompts, policies, drawer: Drawer, key: Array, mix: float) -> Drawn:
    if draw.source != "data":
        return drawer(draw, policies, prompts, key, mix=mix)
    tokens = [[np.asarray(c, np.int32) for c in p.completions[: draw.count]] for p in prompts]
    finished = np.array([p.finished[: draw.count] for p in prompts], bool)
    return Drawn(tokens, finished, np.zeros(finished.shape, np.float32))


def _bench(method, prompts, prefixes, drawn, others, judges: Judges) -> Bench:
    parts = [*drawn, *others]
    draws = [*method.draws, *method.opponents]
    tokens = [
        [np.concatenate([prefix, t]) for part in parts for t in part.tokens[b]]
        for b, prefix in enumerate(prefixes)
    ]
    return Bench(
        prompts,
        tokens,
        np.concatenate([part.finished for part in parts], 1),
        [draw.source for draw in draws for _ in range(draw.count)],
        num_opponents=sum(draw.count for draw in method.opponents),
        judge=judges.judge,
        rewards=judges.rewards,
        decode=judges.decode,
        allow_unfinished=judges.allow_unfinished,
    )


def _targets(method: Method, bench: Bench, chosen: Chosen) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for target in method.targets:
        values |= target(bench, chosen)
    return values


def _without_nan(
    chosen: Chosen, values: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, collections.Counter]:
    """Groups whose numbers are all there, and how many are not."""
    there = chosen.indices >= 0
    bad = np.zeros(len(chosen.prompt), bool)
    for value in values.values():
        missing = np.isnan(value).reshape(*there.shape, -1).any(-1)
        bad |= (missing & there).any(-1)
    skipped = collections.Counter({UNJUDGED: int(bad.sum())}) if bad.any() else {}
    return np.flatnonzero(~bad), collections.Counter(skipped)


def _group(name, prompts, asked, drawn: list[Drawn], chosen: Chosen, values, m: int) -> Group:
    b = int(chosen.prompt[m])
    kept = chosen.indices[m][chosen.indices[m] >= 0]
    tokens = [t for part in drawn for t in part.tokens[b]]
    finished = np.concatenate([part.finished[b] for part in drawn])
    of_group = {key: value[m][: len(kept)] for key, value in values.items()}
    labels = of_group.pop("labels", np.zeros(len(kept)))
    return Group(
        prompt=np.asarray(asked[b].ids, np.int32),
        completions=tuple(tokens[k] for k in kept),
        finished=tuple(bool(finished[k]) for k in kept),
        labels=tuple(float(label) for label in labels),
        extras=of_group,
        index=prompts[b].index,
        source=f"{name}, prompt {prompts[b].index}",
    )


def _figures(method: Method, bench: Bench, drawn, others, groups, counts) -> dict[str, float]:
    parts = [*zip(drawn, method.draws), *zip(others, method.opponents)]
    own = [part for part, draw in parts[: len(drawn)] if draw.source == "policy"] or drawn
    lengths = [len(t) for part in own for row in part.tokens for t in row]
    figures = {
        "tokens": float(np.mean(lengths)),
        "finished": float(np.mean([part.finished.mean() for part in own])),
        "groups": float(groups),
    }
    plain = [part.logps.mean() for part, draw in parts if draw.is_plain]
    if plain:
        figures["entropy_nats"] = float(-np.mean(plain))
    size = bench.num_candidates
    for reward in bench.computed_rewards:
        figures[f"reward/{reward}"] = float(np.nanmean(bench.rewards(reward)[:, :size]))
    figures |= {f"count/{reason}": float(n) for reason, n in bench.counts.items()}
    return figures | {f"skipped/{reason}": float(n) for reason, n in counts.items()}


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in sorted(counts.items())) or "no reason"
