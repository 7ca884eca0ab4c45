"""A self-play run from settings: prompts, model, judges, rounds, evaluation, plots, export.

An experiment file gives the settings and says who judges:

    def experiment(): return SelfPlay(method=paxo.online.method("egpo"), ...)
    def run(settings, workdir): rounds.run(settings, workdir, judges=lambda model: Judges(...))
"""

import dataclasses
import functools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from paxo import artifacts
from paxo.data.layouts import parse_prompt, parse_record
from paxo.data.limits import TokenLimits
from paxo.data.packing import pack_groups, pad_rows
from paxo.data.records import Record, RecordError, Skipped, TokenGroup
from paxo.data.row_shape import RowShape
from paxo.data.sources import open_source
from paxo.data.tokenise import TextTokenizer, tokenise
from paxo.evaluation.report import print_table, write_results
from paxo.evaluation.self_play import (
    plot_rounds,
    policy_figures,
    preference_figures,
    wanted_comparisons,
)
from paxo.experiment import MeshSettings, ModelSettings
from paxo.judges.checks import CheckedJudge
from paxo.loading import Model, load_model
from paxo.models.heads import HEADS
from paxo.models.sharding import make_mesh, param_shardings
from paxo.online import Draw, Drawer, Group, Method, PlayResult, Prompt, RoundSettings, play
from paxo.online.collect import Judges
from paxo.online.drawing import padded_size
from paxo.overrides import SettingsError
from paxo.rows import everywhere, own_part, place_rows
from paxo.sampling import SamplingConfig
from paxo.scoring import make_scorer, params_fingerprint
from paxo.training.checkpoint import Checkpointer, checkpoint_folder
from paxo.training.optimizers import AdamW
from paxo.training.writers import make_writer
from paxo.types import Params

logger = logging.getLogger(__name__)

EVALUATION_SALT = 2**31 - 1
FEWEST_ROWS = 4  # numbers of rows are multiples of it: each number compiles a step


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Prompts that are answered.

    Attributes:
        path: JSONL or another source with a column `prompt`; columns of completions (`chosen`,
            `rejected`; `completions`, `scores`; `completion` or `reference`) come along for methods
            that train on them or start from them.
        max_tokens: longer prompts are left out, and counted.
        max_records: read only so many; None reads all.
        on_error: "raise" at the first bad row, or "skip" and count.
    """

    path: str | None = None
    max_tokens: int = 256
    max_records: int | None = None
    on_error: str = "raise"


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


@dataclasses.dataclass(frozen=True)
class SelfPlay:
    """All settings of a self-play run.

    Attributes:
        method: a row of `paxo.online.METHODS`.
        optimizer: from `paxo.adamw`, built for all steps of the run.
        model: the policy that is trained, and the first reference.
        rounds: how many rounds, of what.
        sampling: how completions are drawn; `num_candidates` is the method's business.
        prompts: what is answered.
        evaluation: what is measured.
        allow_unfinished: whether completions that the length limit cut are trained on.
        sample_batch: prompts drawn for at a time.
        row_length: L, tokens of a packed row; None takes 512, or more where a group needs it.
        microbatches: parts in which a step's rows are run.
        log_every: steps between lines of metrics of single steps; 0 for none.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that are kept.
        mesh: devices.
        export: whether `<workdir>/export` is written at the end.
    """

    method: Method
    optimizer: AdamW
    model: ModelSettings
    rounds: RoundSettings
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(64))
    prompts: PromptSettings = dataclasses.field(default_factory=PromptSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    allow_unfinished: bool = True
    sample_batch: int = 64
    row_length: int | None = None
    microbatches: int = 1
    log_every: int = 0
    checkpoint_every: int = 20
    keep: int = 2
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    export: bool = True

    def __post_init__(self):
        if self.microbatches < 1 or self.checkpoint_every < 1 or self.keep < 1:
            raise ValueError(
                "microbatches, checkpoint_every and keep must be at least 1; got "
                f"{self.microbatches}, {self.checkpoint_every}, {self.keep}"
            )


def run(
    settings: SelfPlay,
    workdir: pathlib.Path,
    *,
    judges: Callable[[Model], Judges],
    model: Model | None = None,
    prompts: Sequence[Prompt] | None = None,
    frozen: Mapping[str, Params] | None = None,
    figures: Callable[[Sequence[Sequence[Any]]], Mapping[str, float]] | None = None,
    panels: Mapping[str, str] | None = None,
    exact: Mapping[str, float] | None = None,
) -> PlayResult:
    """One self-play run: rounds, evaluation, `rounds.png`, `results.json`, an export.

    Args:
        settings: all of them.
        workdir: the run folder; the same again goes on with what is there.
        judges: `(model) -> Judges`; answers of its judge are checked here.
        model: the first policy, where it is not loaded from the settings.
        prompts: to train on and, the last ones, to evaluate on; read from `prompts.path` otherwise.
        frozen: role -> further frozen policies.
        figures: `(completions as judges see them [B][E]) -> figures` of an evaluation, besides the
            usual ones.
        panels: further figure -> title for the plot.
        exact: figure -> value to be reached, for the plot.

    Returns:
        The state after the last round, the anchors, and the evaluations.
    """
    start = time.perf_counter()
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    if model is None:
        needed = [n for n in HEADS if settings.method.objective.arrays.get(n, False)]
        model = load_model(settings.model, mesh, settings.rounds.seed, needed)
    if prompts is None:
        prompts = read_prompts(settings.prompts, model.tokenizer)
    count = settings.evaluation.num_prompts
    if len(prompts) <= count:
        raise SettingsError(
            f"evaluation.num_prompts={count} leaves none of {len(prompts)} prompts to train on"
        )
    train, held_out = prompts[: len(prompts) - count], prompts[len(prompts) - count :]
    told = judges(model)
    if told.judge is not None and not isinstance(told.judge, CheckedJudge):
        told = dataclasses.replace(told, judge=CheckedJudge(told.judge, missing="keep"))
    told = dataclasses.replace(told, allow_unfinished=settings.allow_unfinished)
    drawer = Drawer(
        model.policy,
        settings.sampling,
        model.tokenizer.stop_ids,
        mesh=mesh,
        batch_size=settings.sample_batch,
    )
    pack = make_pack(settings, prompts, mesh)
    groups = [_plain_group(p) for p in (held_out or train)[:4]]
    artifacts.save_model_card(
        workdir,
        model.config,
        model.tokenizer,
        model.folder,
        groups,
        lora=model.lora,
        base=settings.model.path or "",
    )
    first, (_, base) = model.params, model.policy.split(model.params)
    evaluate = None
    if held_out:
        drawer.check(held_out)
        evaluate = Evaluator(
            settings, held_out, drawer, told, make_pack(settings, held_out, mesh, 1), mesh, first,
            figures,
        )  # fmt: skip
    steps = settings.rounds.num_rounds * settings.rounds.steps_per_round(settings.method)
    with Checkpointer(
        checkpoint_folder(workdir),
        every=settings.checkpoint_every,
        keep=settings.keep,
        frozen={name: params_fingerprint(x) for name, x in base.items()},
    ) as checkpointer:
        result = play(
            model.policy,
            first,
            settings.method,
            settings.optimizer,
            train,
            settings.rounds,
            draw=drawer,
            judges=told,
            pack=pack,
            mesh=mesh,
            param_shardings=param_shardings(model.policy.logical_axes, first, mesh),
            workdir=workdir,
            microbatches=settings.microbatches,
            frozen=frozen,
            evaluate=evaluate,
            checkpointer=checkpointer,
            make_writer=lambda step, number: make_writer(
                workdir, steps, step, settings.method.name, resume_round=number
            ),
            log_every=settings.log_every,
        )
    history = evaluations(workdir)
    if settings.export:
        artifacts.export_model(
            model.policy.join(result.state.params, result.state.frozen),
            model.config,
            workdir / "export",
            model.tokenizer,
            model.folder,
            lora=model.lora,
        )
    _report(settings, workdir, history, time.perf_counter() - start, panels or {}, exact or {})
    return result


def read_prompts(settings: PromptSettings, tokenizer: TextTokenizer) -> list[Prompt]:
    """Prompts of a source, tokenised as at generation time, with the completions that it has.

    Raises:
        SettingsError: without a path, or where no prompt is short enough.
        RecordError: for a bad row, with `on_error="raise"`.
    """
    if settings.path is None:
        raise SettingsError("prompts.path is not set: name prompts, --set prompts.path=...")
    source, skipped = open_source(settings.path), Skipped(settings.on_error)
    total = len(source)
    if settings.max_records is not None:
        total = min(total, settings.max_records)
    records: list[Record] = []
    for i in range(total):
        with skipped:
            row, place = source[i]
            records.append(_prompt_record(row, place, i))
    skipped.log(logger, total)
    kept = _tokenised(records, tokenizer, settings)
    if not kept:
        raise SettingsError(
            f"{settings.path}: none of {total} prompts has at most prompts.max_tokens="
            f"{settings.max_tokens} tokens"
        )
    if len(kept) < len(records):
        logger.info(
            "left out %d of %d prompts of more than %d tokens",
            len(records) - len(kept), len(records), settings.max_tokens,
        )  # fmt: skip
    return kept


def _prompt_record(row: Mapping[str, Any], place: str, index: int) -> Record:
    """A row with its completions, or its prompt alone."""
    if isinstance(row, Mapping) and isinstance(row.get("reference"), str):
        row = {"prompt": row.get("prompt"), "completion": row["reference"]}
    try:
        return parse_record(row, place, index=index)
    except RecordError:
        if not isinstance(row, Mapping) or row.get("prompt") is None or "chosen" in row:
            raise
        return Record(parse_prompt(row["prompt"], place), (), (), {}, place, index)


def _tokenised(
    records: Sequence[Record], tokenizer: TextTokenizer, settings: PromptSettings
) -> list[Prompt]:
    answered = [r for r in records if r.completions]
    limits = TokenLimits(max_prompt=None, max_completion=None)
    groups = tokenise(answered, tokenizer, limits, on_error="skip").groups if answered else []
    answers = {group.index: group for group in groups}
    prompts = []
    for record in records:
        ids = np.asarray(tokenizer.encode_prompt(record.prompt), np.int32)
        if len(ids) > settings.max_tokens:
            continue
        group = answers.get(record.index)
        labels = () if group is None else group.labels
        order = sorted(range(len(labels)), key=lambda k: -labels[k])  # the best answer first
        prompts.append(
            Prompt(
                ids,
                int(record.index or 0),
                tokenizer.prompt_text(record.prompt),
                tuple(group.completions[k] for k in order),
                tuple(group.finished[k] for k in order),
            )
        )
    return prompts


def make_pack(
    settings: SelfPlay, prompts: Sequence[Prompt], mesh: jax.sharding.Mesh, size: int | None = None
) -> Callable[[Sequence[Group]], Any]:
    """`groups -> PreferenceBatch`, in rows of one shape and few different numbers.

    The shape follows from the settings and prompts alone, so that a run that is resumed packs the
    same.

    Args:
        settings: the method's number of candidates, the longest completion, the row length.
        prompts: all that groups will be made of.
        mesh: the number of rows is a multiple of the ways in which it splits them.
        size: candidates of a group; the method's where None.
    """
    data = settings.method.uses("data") or settings.method.reset > 0
    answers = [len(c) for p in prompts for c in p.completions] if data else []
    longest = max([settings.sampling.max_new_tokens, *answers])
    prompt = [
        len(p.ids) + (max(answers, default=0) if settings.method.reset else 0) for p in prompts
    ]
    size = settings.method.group_size if size is None else size
    needed = max(prompt) + size * longest
    length = settings.row_length or max(512, needed)
    if length < needed and size <= 2:
        raise SettingsError(
            f"row_length={length} is shorter than a group may be: {max(prompt)} prompt tokens and "
            f"{size} completions of {longest} tokens; raise it to {needed}"
        )
    usual = int(np.median(prompt))
    share = size * longest / (size * longest + usual)
    shape = RowShape(
        length=length,
        slots=min(length, -(-int(length * share) // 8) * 8),
        groups=max(1, length // (usual + size * max(longest // 4, 1))),
        candidates=size,
        max_completion=longest,
    )
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * settings.microbatches
    multiple *= -(-FEWEST_ROWS // multiple)

    def pack(groups: Sequence[Group]):
        fields = [TokenGroup(**{k: getattr(g, k) for k in GROUP_FIELDS}) for g in groups]
        batch, _ = pack_groups(fields, shape)
        return pad_rows(batch, padded_size(len(batch.tokens), multiple))

    return pack


GROUP_FIELDS = tuple(field.name for field in dataclasses.fields(Group))


class Evaluator:
    """Measures the policy of a round on held-out prompts, against the first and the last one."""

    def __init__(self, settings, prompts, drawer, judges: Judges, pack, mesh, first, figures):
        self.settings, self.prompts, self.drawer, self.judges = settings, prompts, drawer, judges
        self.pack, self.mesh, self.first, self.figures = pack, mesh, first, figures
        self.key = jax.random.fold_in(jax.random.key(settings.rounds.seed), EVALUATION_SALT)

    def __call__(self, params: Params, last: Params, number: int) -> dict[str, float]:
        """Figures of `params` after a round."""
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


def _plain_group(prompt: Prompt) -> TokenGroup:
    return TokenGroup(prompt.ids, (), (), (), {}, prompt.index, f"prompt {prompt.index}")


def _report(settings, workdir, history, seconds, panels, exact) -> None:
    """`results.json`, `rounds.png`, a table."""
    if jax.process_index() != 0:
        return
    results = {
        "method": settings.method.name,
        "num_rounds": settings.rounds.num_rounds,
        "last": history[-1] if history else {},
        "history": history,
        "exact": dict(exact),
        "seconds": seconds,
    }
    write_results(workdir / "results.json", results)
    if history:
        from paxo.evaluation.self_play import PANELS

        plot_rounds(workdir / "rounds.png", history, panels=PANELS | panels, exact=exact)
        rows = [
            (title, row[name], _interval(row, name))
            for row in history[-1:]
            for name, title in (PANELS | panels).items()
            if name in row
        ]
        title = f"{settings.method.name} after {settings.rounds.num_rounds} rounds"
        print_table(title, ("", "mean", "95 % interval"), rows)
    logger.info("finished in %.0f s; results in %s", seconds, workdir)


def _interval(row: Mapping[str, float], name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None else f"[{low:.3f}, {high:.3f}]"
