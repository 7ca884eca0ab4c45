"""Three styles that beat one another: what self-play makes of a judge that no reward can stand for.

    paxo run experiments/cyclic_prompts.py --set method=inpo_pairs

Short reviews come in a plain, a warm and a grand style; the judge prefers warm to plain, grand to
warm and plain to grand. A small decoder learns to write all three (SFT, 60 % plain, 30 % warm, 10 %
grand), and self-play goes on from there. Whatever the sequence, only its style counts, so the Nash
policy of the KL-regularised game on texts is that of a game of three actions, which is known
exactly: `styles.json` and `rounds.png` hold the exact gap of the policy's style shares, and how
far they are from the Nash policy, beside the estimates that need no such knowledge.

On other models and prompts the judge prefers what repeats itself less:

    paxo run experiments/cyclic_prompts.py --set model.path=my_llama prompts.path=prompts.jsonl

The files `egpo_prompts.py`, `inpo_prompts.py`, `dno_prompts.py`, `sppo_prompts.py`,
`nash_md_prompts.py` and `online_dpo_prompts.py` are this one with a method and its settings; each
tells what came out.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import paxo
from paxo import loading, rounds, runs
from paxo.data.records import Record
from paxo.data.tokenise import tokenise
from paxo.data.tokenizer import save_word_tokenizer
from paxo.evaluation.report import print_table, write_results
from paxo.experiment import DataSettings, ModelSettings, TrainSettings
from paxo.games import exact
from paxo.games.preference_game import PreferenceGame
from paxo.judges import MatrixJudge, RuleJudge
from paxo.loading import Model
from paxo.online import Draw, Drawer, Prompt, RoundSettings, method
from paxo.online.collect import Judges
from paxo.rounds import EvaluationSettings, SelfPlay
from paxo.sampling import SamplingConfig
from paxo.training.optimizers import AdamW

THINGS = (
    "film", "book", "song", "hotel", "meal", "phone", "game", "show", "cafe", "museum", "camera",
)  # fmt: skip
PARTS = ("start", "end", "sound", "look", "price", "service", "staff", "story", "design", "view")
STYLES = {
    "plain": ("clear", "simple", "short", "direct", "honest", "exact"),
    "warm": ("lovely", "kind", "sweet", "gentle", "bright", "cosy"),
    "grand": ("noble", "vast", "royal", "solemn", "golden", "majestic"),
}
GLUE = ("review", "of", "the", ":", "was", "and", "so")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
NEITHER = len(STYLES)  # the class of a text without a style, which loses to all that have one


@dataclasses.dataclass(frozen=True)
class Cyclic(SelfPlay):
    """Settings of the task, besides those of self-play.

    Attributes:
        win: probability that the better style of a pair wins.
        beta: KL weight of the game by which every method is measured.
        shares: of the styles among the supervised examples.
        num_reviews: supervised examples.
        num_prompts: prompts to be answered, those of the evaluation included.
        sft_steps: of the supervised training.
    """

    win: float = 1.0
    beta: float = 0.2
    shares: tuple[float, ...] = (0.6, 0.3, 0.1)
    num_reviews: int = 2048
    num_prompts: int = 384
    sft_steps: int = 200

    def __post_init__(self):
        super().__post_init__()
        if len(self.shares) != len(STYLES) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares must be {len(STYLES)} that add up to 1; got {self.shares}")


def experiment() -> Cyclic:
    """The settings; any of them can be changed by `--set`."""
    return Cyclic(
        method=method("egpo", beta=0.2),
        optimizer=paxo.adamw(2e-3, warmup_steps=10, schedule="linear", final_fraction=0.05),
        model=ModelSettings(
            config=paxo.ModelConfig(
                vocab_size=len(vocabulary()), hidden_size=64, num_layers=2, num_heads=4,
                num_kv_heads=2, head_dim=16, intermediate_size=160, max_positions=64,
            )
        ),
        rounds=RoundSettings(100, prompts_per_round=96, evaluate_every=2),
        sampling=SamplingConfig(24),
        evaluation=EvaluationSettings(num_prompts=128, completions=2),
        row_length=256,
        checkpoint_every=20,
    )  # fmt: skip


def run(settings: Cyclic, workdir: pathlib.Path) -> None:
    """SFT on the three styles, self-play from it; or self-play of a given model."""
    if settings.model.path is not None:
        rounds.run(settings, workdir, judges=less_repetition)
        return
    mesh = paxo.models.sharding.make_mesh(**dataclasses.asdict(settings.mesh))
    model = first_model(settings, workdir, mesh)
    shares = measured_shares(settings, model, mesh)
    game = style_game(settings, shares[:NEITHER])
    nash = np.asarray(jax.nn.softmax(exact.nash_policy(game)))
    first = exact_figures(game, nash, shares)
    rounds.run(
        settings,
        workdir,
        judges=lambda model: style_judges(settings),
        model=model,
        prompts=some_prompts(settings, model),
        figures=lambda texts: exact_figures(game, nash, shares_of(texts)),
        panels={
            "exact_gap": "exact duality gap of the style game",
            "unregularised_gap": "the same without its KL term",
            "distance": "distance of the styles from the Nash policy (TV)",
            **{f"share_{name}": f"share of {name}" for name in STYLES},
        },
        exact={f"share_{name}": float(p) for name, p in zip(STYLES, nash)},
    )
    history = rounds.evaluations(workdir)
    if not history:  # another process tells
        return
    kept = ("exact_gap", "unregularised_gap", "distance", *(f"share_{name}" for name in STYLES))
    average = np.mean([[row[f"share_{n}"] for n in (*STYLES, "none")] for row in history], axis=0)
    results = {
        "first": {name: first[name] for name in kept},
        "last": {name: history[-1][name] for name in kept},
        "average_policy": {name: exact_figures(game, nash, average)[name] for name in kept},
        "nash": {f"share_{name}": float(p) for name, p in zip(STYLES, nash)},
    }
    write_results(workdir / "styles.json", results)
    columns = ("", "first policy", "last policy", "average policy", "Nash policy")
    rows = [
        (name, *(results[k].get(name, 0.0) for k in ("first", "last", "average_policy", "nash")))
        for name in kept
    ]
    print_table("the style game", columns, rows)


# --- the task ---------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """All tokens: the special ones, then the words."""
    words = [word for style in STYLES.values() for word in style]
    return [*SPECIAL, *GLUE, *words, *THINGS, *PARTS]


def style_of(text: str) -> int:
    """Number of the style of a text's first word that has one; `NEITHER` without any."""
    for word in text.split():
        for number, style in enumerate(STYLES.values()):
            if word in style:
                return number
    return NEITHER


def style_matrix(win: float) -> np.ndarray:
    """`[4, 4]` P(a style beats another): a circle of three, and a class that loses to all."""
    matrix = np.full((NEITHER + 1,) * 2, 0.5)
    for i in range(NEITHER):
        matrix[i, (i + 1) % NEITHER], matrix[(i + 1) % NEITHER, i] = 1 - win, win
        matrix[i, NEITHER], matrix[NEITHER, i] = 1.0, 0.0
    return matrix


def style_judges(settings: Cyclic) -> Judges:
    """The cyclic judge; the reward, for methods that want one, likes grand best."""
    judge = MatrixJudge(style_matrix(settings.win), lambda _, text: style_of(text), name="styles")
    values = np.array([*range(NEITHER), -1.0])
    reward = lambda _, rows: values[[[style_of(text) for text in row] for row in rows]]  # noqa: E731
    return Judges(judge=judge, rewards={"reward": reward}, decode=lambda ids: words_of(ids))


def words_of(ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens."""
    known = vocabulary()
    return " ".join(known[i] for i in ids if i >= len(SPECIAL))


def style_game(settings: Cyclic, shares: np.ndarray) -> PreferenceGame:
    """The game of three actions that the task is; a style that nobody drew is very rare."""
    return PreferenceGame(
        preferences=jnp.asarray(style_matrix(settings.win)[:NEITHER, :NEITHER]),
        reference_logps=jnp.log(jnp.maximum(jnp.asarray(shares), 1e-6)),
        beta=jnp.asarray(settings.beta),
    )


def shares_of(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Share of each style, and of none, among the texts."""
    found = np.bincount([style_of(t) for row in texts for t in row], minlength=NEITHER + 1)
    return found / found.sum()


def exact_figures(game: PreferenceGame, nash: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """What is known of a policy with these shares of styles: as a policy of the style game."""
    styles = np.maximum(shares[:NEITHER], 1e-6)
    logits = jnp.log(jnp.asarray(styles / styles.sum()))
    return {
        "exact_gap": float(exact.duality_gap(game, logits)),
        "unregularised_gap": float(exact.unregularised_gap(game, logits)),
        "distance": float(np.abs(np.exp(logits) - nash).sum() / 2),
        **{f"share_{name}": float(p) for name, p in zip((*STYLES, "none"), shares)},
    }


def less_repetition(model: Model) -> Judges:
    """Prefers the completion with more different words among its first fifty.

    As a reward it is their number; in points, 6 for twenty or more.
    """
    judge = RuleJudge(lambda _, text: len(set(text.lower().split()[:50])))
    rewards = {
        "reward": judge.scores,
        "points": lambda prompts, rows: np.minimum(judge.scores(prompts, rows) * 6 / 20, 6),
    }
    return Judges(judge=judge, rewards=rewards, decode=model.tokenizer.decode)


# --- its model and prompts --------------------------------------------------------------------


def review_of(rng: np.random.Generator, shares: Sequence[float]) -> str:
    """One to three clauses in one style."""
    style = list(STYLES.values())[rng.choice(len(STYLES), p=shares)]
    clauses = []
    for _ in range(1 + rng.integers(3)):
        so = "so " if rng.random() < 0.3 else ""
        clauses.append(f"the {rng.choice(PARTS)} was {so}{rng.choice(style)}")
    return " and ".join(clauses)


def prompt_of(number: int) -> str:
    """Such as "review of the film :"."""
    return f"review of the {THINGS[number % len(THINGS)]} :"


def first_model(settings: Cyclic, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Model:
    """The decoder after supervised training, which is done once in a run folder."""
    folder = workdir / "tokenizer"
    save_word_tokenizer(folder, vocabulary())
    chosen = dataclasses.replace(settings.model, tokenizer=str(folder))
    made = loading.load_model(chosen, mesh, settings.rounds.seed)
    rng = np.random.default_rng([settings.rounds.seed, 1])
    records = [
        Record(prompt_of(i), (" " + review_of(rng, settings.shares),), (1.0,), source=f"review {i}")
        for i in range(settings.num_reviews)
    ]
    groups = tokenise(records, made.tokenizer).groups
    train = TrainSettings(settings.sft_steps, rows_per_batch=8, log_every=40)
    data = DataSettings(row_length=256)
    shape = loading.row_shape(groups, data, made.config)
    sft = runs.train(
        made.policy,
        made.params,
        paxo.objective("nll"),
        AdamW(3e-3, warmup_steps=10, schedule="cosine"),
        loading.batches(loading.Data(groups, [], shape), data, train, mesh),
        train,
        mesh,
        workdir / "sft",
        name="SFT",
    )
    return dataclasses.replace(made, params=sft.params)


def some_prompts(settings: Cyclic, model: Model) -> list[Prompt]:
    """Prompts to train on, then those of the evaluation."""
    ids = [model.tokenizer.encode_prompt(prompt_of(i)) for i in range(len(THINGS))]
    return [
        Prompt(np.asarray(ids[i % len(THINGS)], np.int32), i, prompt_of(i))
        for i in range(settings.num_prompts + settings.evaluation.num_prompts)
    ]


def measured_shares(settings: Cyclic, model: Model, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Styles of the first policy, counted over 8,192 of its texts."""
    ids = np.asarray(model.tokenizer.encode_prompt(prompt_of(0)), np.int32)
    drawer = Drawer(
        model.policy, settings.sampling, model.tokenizer.stop_ids, mesh=mesh, batch_size=128
    )
    prompts = [Prompt(ids, i) for i in range(128)]
    drawn = drawer(Draw("policy", 64), {"policy": model.params}, prompts, jax.random.key(17))
    return shares_of([[words_of(t) for t in row] for row in drawn.tokens])
