"""A controlled preference task from nothing: SFT, then DPO, with a judge that is known exactly.

    paxo run experiments/quickstart.py

Short reviews are made from templates; every word has a known sentiment, and the judge prefers the
review with the higher mean sentiment over its words (as in the controlled-sentiment experiment of
Rafailov et al. 2023, arXiv:2305.18290, section 6.1, whose judge is a classifier). A small decoder
learns to write reviews (SFT), draws several for each prompt, the judge labels the best and the
worst of them, and DPO trains on these pairs from the SFT model.

On two CPU cores in 70 to 90 seconds, compilation included: DPO wins 95.0 % (95 % interval 93.1 to
96.8 %) against the SFT model at a sequence KL of 3.5 nats; mean true reward 0.004 → 0.161; the same
bits when run again.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import time

import jax
import numpy as np

import paxo
from paxo import artifacts, loading, metrics, runs
from paxo.data.batching import Batches
from paxo.data.packing import RowShape
from paxo.data.records import Record, TokenGroup
from paxo.data.tokenise import load_tokenizer, tokenise
from paxo.data.tokenizer import save_word_tokenizer
from paxo.evaluation.report import plot_reward_kl, print_table, write_results
from paxo.evaluation.win_rate import win_rate
from paxo.experiment import DataSettings, Experiment, ModelSettings, TrainSettings
from paxo.judges import RuleJudge
from paxo.online import Draw, Prompt
from paxo.online import Drawer as PromptDrawer
from paxo.rows import from_all, from_first, own_rows
from paxo.sampling import SamplingConfig
from paxo.scoring import FixedScorer, attach_logps, make_scorer
from paxo.training.optimizers import AdamW

logger = logging.getLogger(__name__)

THINGS = (
    "film", "book", "song", "hotel", "meal", "phone", "game", "show", "cafe", "museum", "camera",
)  # fmt: skip
PARTS = (
    "start", "end", "sound", "look", "price", "service", "staff", "story", "design", "view",
)  # fmt: skip
SENTIMENT = {
    "superb": 1.0, "lovely": 1.0, "great": 1.0, "good": 0.5, "nice": 0.5, "fine": 0.5,
    "plain": 0.0, "long": 0.0, "new": 0.0, "small": 0.0, "usual": 0.0, "quiet": 0.0,
    "dull": -0.5, "weak": -0.5, "poor": -0.5, "awful": -1.0, "ugly": -1.0, "horrid": -1.0,
}  # fmt: skip
GLUE = ("review", "of", "the", ":", "was", "and", "but", "very", "a", "with", "i", "found")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@dataclasses.dataclass(frozen=True)
class Quickstart(Experiment):
    """Settings of both trainings; `train`, `objective` and `optimizer` are those of DPO.

    Attributes:
        sft_train: how long the supervised training is.
        sft_optimizer: its optimiser.
        num_reviews: reviews that are made for it.
        num_prompts: prompts for which pairs are drawn.
        num_candidates: completions drawn for each.
        num_eval_prompts: prompts of an evaluation, other ones.
        max_new_tokens: longest completion.
    """

    sft_train: TrainSettings = dataclasses.field(default_factory=lambda: TrainSettings(1))
    sft_optimizer: AdamW = dataclasses.field(default_factory=lambda: paxo.adamw(1e-3))
    num_reviews: int = 4096
    num_prompts: int = 2048
    num_candidates: int = 4
    num_eval_prompts: int = 512
    max_new_tokens: int = 32


def experiment() -> Quickstart:
    """The settings; any of them can be changed by `--set`."""
    return Quickstart(
        objective=paxo.objective("dpo", beta=0.2),
        optimizer=paxo.adamw(1e-3, warmup_steps=10, schedule="linear"),
        model=ModelSettings(
            config=paxo.ModelConfig(
                vocab_size=len(vocabulary()), hidden_size=96, num_layers=3, num_heads=4,
                num_kv_heads=2, head_dim=24, intermediate_size=256, max_positions=64,
            )
        ),
        data=DataSettings(row_length=256),
        train=TrainSettings(
            150, rows_per_batch=8, log_every=10, evaluate_every=25, checkpoint_every=50
        ),
        sft_optimizer=paxo.adamw(3e-3, warmup_steps=20, schedule="cosine"),
        sft_train=TrainSettings(200, rows_per_batch=8, log_every=10),
    )  # fmt: skip


def run(settings: Quickstart, workdir: pathlib.Path) -> None:
    """SFT, pairs from its samples, DPO; then the figures before and after."""
    start = time.perf_counter()
    mesh = paxo.models.sharding.make_mesh(**dataclasses.asdict(settings.mesh))
    model = make_model(settings, workdir, mesh)
    prompts = [model.tokenizer.encode_prompt(p).tolist() for p in some_prompts(settings)]
    pair_prompts, eval_prompts = prompts[: settings.num_prompts], prompts[settings.num_prompts :]

    sft = runs.train(
        model.policy,
        model.params,
        paxo.objective("nll"),
        settings.sft_optimizer,
        rows_of(
            tokenise(reviews(settings), model.tokenizer).groups, settings, settings.sft_train, mesh
        ),
        settings.sft_train,
        mesh,
        workdir / "sft",
        name="SFT",
    )
    reference = paxo.snapshot(sft.params)
    draw = Drawer(model, settings, mesh, jax.random.key(settings.train.seed + 1))
    pairs = labelled_pairs(draw, reference, pair_prompts, settings.num_candidates)
    logger.info("%d of %d prompts gave a pair", len(pairs), len(pair_prompts))
    scorer = make_scorer(model.policy, reference, mesh=mesh)
    # What the win rate is against; the SFT model's own, other draws score about 0.5 against it.
    opponent = evaluate(draw, reference, scorer, eval_prompts, salt=1)
    figures = functools.partial(evaluate, draw, reference=scorer, prompts=eval_prompts, salt=2)

    def measure(state: paxo.TrainState) -> dict[str, float]:
        found = figures(params=state.params)
        return {"eval/true_reward": found.reward, "eval/kl": found.kl}

    state = runs.train(
        model.policy,
        reference,
        settings.objective,
        settings.optimizer,
        rows_of(pairs, settings, settings.train, mesh),
        settings.train,
        mesh,
        workdir,
        attach=lambda batch: attach_logps(batch, "reference", scorer),
        evaluate=measure,
        name="DPO",
    )
    before, after = figures(params=reference), figures(params=state.params)
    from_first(lambda: report(workdir, draw, opponent, before, after, start))
    artifacts.export_model(
        state.params, model.config, workdir / "export", model.tokenizer, model.folder
    )


# --- the task ---------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """All tokens: the special ones, then the words."""
    return [*SPECIAL, *GLUE, *SENTIMENT, *THINGS, *PARTS]


def true_reward(words: list[str]) -> float:
    """Mean sentiment over the words of a review; that of an empty one is 0."""
    return sum(SENTIMENT.get(word, 0.0) for word in words) / max(len(words), 1)


def some_prompts(settings: Quickstart) -> list[str]:
    """Prompts for pairs, then those for evaluation; there are few, each is asked several times."""
    rng = np.random.default_rng(settings.train.seed)
    return [prompt_of(rng) for _ in range(settings.num_prompts + settings.num_eval_prompts)]


def prompt_of(rng: np.random.Generator) -> str:
    """One prompt, such as "review of the film with a new story :"."""
    neutral = [word for word, value in SENTIMENT.items() if value == 0]
    aside = f" with a {rng.choice(neutral)} {rng.choice(PARTS)}" if rng.random() < 0.5 else ""
    return f"review of the {rng.choice(THINGS)}{aside} :"


def review_of(rng: np.random.Generator) -> str:
    """One review of one to four clauses whose words have all sentiments."""
    adjectives = list(SENTIMENT)

    def clause() -> str:
        very = "very " if rng.random() < 0.3 else ""
        adjective, part = rng.choice(adjectives), rng.choice(PARTS)
        if rng.random() < 0.5:
            return f"the {part} was {very}{adjective}"
        return f"i found the {part} {very}{adjective}"

    clauses = [clause() for _ in range(1 + rng.integers(4))]
    text = clauses[0]
    for other in clauses[1:]:
        text += f" {rng.choice(['and', 'but'])} {other}"
    return text


def reviews(settings: Quickstart) -> list[Record]:
    """Supervised examples."""
    rng = np.random.default_rng([settings.train.seed, 1])
    return [
        Record(prompt_of(rng), (" " + review_of(rng),), (1.0,), source=f"review {i + 1}")
        for i in range(settings.num_reviews)
    ]


def records(settings: Quickstart) -> tuple[list[Record], paxo.data.tokenizer.TextTokenizer]:
    """For `paxo inspect`: the supervised examples and the tokenizer."""
    import tempfile

    folder = pathlib.Path(tempfile.mkdtemp())
    save_word_tokenizer(folder, vocabulary())
    return reviews(settings), load_tokenizer(folder)


# --- models, samples, pairs -------------------------------------------------------------------


def make_model(
    settings: Quickstart, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> loading.Model:
    """The decoder with random parameters, and the word tokenizer."""
    folder = workdir / "tokenizer"
    save_word_tokenizer(folder, vocabulary())
    model = dataclasses.replace(settings.model, tokenizer=str(folder))
    made = loading.load_model(model, mesh, settings.train.seed)
    prompts = tokenise(reviews(settings)[:4], made.tokenizer).groups
    artifacts.save_model_card(workdir, made.config, made.tokenizer, folder, prompts)
    return made


def rows_of(
    groups: list[TokenGroup], settings: Quickstart, train: TrainSettings, mesh: jax.sharding.Mesh
) -> Batches:
    """The groups as packed batches, this process's rows of them."""
    shape = loading.row_shape(groups, settings.data, settings.model.config)
    return loading.batches(loading.Data(groups, [], shape), settings.data, train, mesh)


class Drawer:
    """Draws completions, each process for its share of the prompts, and reads them as words."""

    def __init__(
        self,
        model: loading.Model,
        settings: Quickstart,
        mesh: jax.sharding.Mesh,
        key: jax.Array,
    ):
        self.model, self.settings, self.key = model, settings, key
        config = SamplingConfig(settings.max_new_tokens)
        self._draw = PromptDrawer(
            model.policy, config, model.tokenizer.stop_ids, mesh=mesh, batch_size=128
        )

    def __call__(
        self, params, prompts: list[list[int]], candidates: int, salt: int
    ) -> list[TokenGroup]:
        """A group of `candidates` completions for each prompt; another `salt`, other draws."""
        asked = [Prompt(np.array(ids, np.int32), i) for i, ids in enumerate(prompts)]
        key = jax.random.fold_in(self.key, salt)
        drawn = self._draw(Draw("policy", candidates), {"policy": params}, asked, key)
        return list(map(self._group, asked, drawn.tokens, drawn.finished))

    def words(self, tokens: np.ndarray) -> list[str]:
        """Words of a completion, without its stop token."""
        return self.model.tokenizer.tokenizer.decode(tokens, skip_special_tokens=True).split()

    def _group(
        self, prompt: Prompt, completions: list[np.ndarray], finished: np.ndarray
    ) -> TokenGroup:
        return TokenGroup(
            prompt.ids,
            tuple(completions),
            tuple(map(bool, finished)),
            tuple(true_reward(self.words(c)) for c in completions),
            {},
            prompt.index,
            f"sample {prompt.index + 1}",
        )


def labelled_pairs(
    draw: Drawer, params, prompts: list[list[int]], candidates: int
) -> list[TokenGroup]:
    """For each prompt the completions that the judge finds best and worst, if they differ."""
    judge = RuleJudge(lambda _, completion: true_reward(draw.words(completion)))
    groups = draw(params, prompts, candidates, salt=0)
    wins = judge([g.prompt for g in groups], [g.completions for g in groups]).sum(-1)
    pairs = []
    for group, won in zip(groups, wins):
        best, worst = int(np.argmax(won)), int(np.argmin(won))
        if won[best] > won[worst]:
            two = tuple(group.completions[i] for i in (best, worst))
            finished = tuple(group.finished[i] for i in (best, worst))
            pairs.append(
                dataclasses.replace(group, completions=two, finished=finished, labels=(1.0, 0.0))
            )
    return pairs


# --- figures ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figures:
    """One evaluation: a completion for each prompt, and averages over them."""

    groups: list[TokenGroup]
    rewards: np.ndarray
    reward: float
    kl: float
    length: float
    finished: float


def evaluate(
    draw: Drawer, params, reference: FixedScorer, prompts: list[list[int]], salt: int
) -> Figures:
    """True reward and sequence KL to the SFT model, a Monte-Carlo mean over drawn completions."""
    groups = draw(params, prompts, 1, salt)
    kls = []
    # One shape for all evaluations, so that the scorer compiles once.
    length = draw.settings.data.row_length
    shape = RowShape(length, length, length // 8, 1, draw.settings.max_new_tokens)
    mesh = reference.mesh
    scorer = make_scorer(draw.model.policy, params, mesh=mesh)
    rows = draw.settings.train.rows_per_batch
    for batch in loading.heldout_batches(loading.Data([], groups, shape), rows, mesh):
        ratio = own_rows(scorer(batch), mesh) - own_rows(reference(batch), mesh)
        kls.append(ratio[batch.where])
    rewards = np.array([group.labels[0] for group in groups])
    return Figures(
        groups,
        rewards,
        float(rewards.mean()),
        float(from_all(np.concatenate(kls), mesh).mean()),
        float(np.mean([len(g.completions[0]) for g in groups])),
        float(np.mean([g.finished[0] for g in groups])),
    )


def report(
    workdir: pathlib.Path,
    draw: Drawer,
    opponent: Figures,
    before: Figures,
    after: Figures,
    start: float,
) -> None:
    """Prints the table and three texts, draws the plot, writes results.json."""
    wins = {
        "before": win_rate(wins_over(before, opponent)),
        "after": win_rate(wins_over(after, opponent)),
    }
    results = {
        "win_rate": {name: w.value for name, w in wins.items()},
        "win_rate_interval": {name: [w.low, w.high] for name, w in wins.items()},
        "true_reward": {"before": before.reward, "after": after.reward},
        "kl": {"before": before.kl, "after": after.kl},
        "mean_length": {"before": before.length, "after": after.length},
        "finished": {"before": before.finished, "after": after.finished},
        "seconds": time.perf_counter() - start,
    }
    plot_training(workdir, before)
    write_results(workdir / "results.json", results)
    for i in range(3):
        prompt = " ".join(draw.words(before.groups[i].prompt))
        print(f"\n{prompt}")
        print("  SFT:", " ".join(draw.words(before.groups[i].completions[0])))
        print("  DPO:", " ".join(draw.words(after.groups[i].completions[0])))
    rows = [
        ("mean true reward", before.reward, after.reward),
        ("win rate against SFT", wins["before"].value, wins["after"].value),
        ("  95 % interval", *(f"[{w.low:.3f}, {w.high:.3f}]" for w in wins.values())),
        ("sequence KL to SFT (nats)", before.kl, after.kl),
        ("mean length (tokens)", before.length, after.length),
        ("finished share", before.finished, after.finished),
    ]
    print()
    print_table(f"{len(before.groups)} prompts", ("", "SFT", "DPO"), rows)
    print(f"{results['seconds']:.0f} s; plot, metrics and results.json in {workdir}")


def plot_training(workdir: pathlib.Path, before: Figures) -> None:
    """Draws the evaluations of the run, those before an interruption too, from its metrics file."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval/kl" in line]
    plot_reward_kl(
        workdir / "reward_kl.png",
        [0, *(line["step"] for line in measured)],
        [before.kl, *(line["eval/kl"] for line in measured)],
        [before.reward, *(line["eval/true_reward"] for line in measured)],
    )


def wins_over(ours: Figures, theirs: Figures) -> np.ndarray:
    """`[B]` 1 where our completion has the higher true reward, 1/2 where they tie."""
    return metrics.accuracies(ours.rewards, theirs.rewards)
