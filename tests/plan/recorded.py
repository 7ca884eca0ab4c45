"""Self-play runs of a small model, and what their programs were given and found beside them."""

import collections
import dataclasses
import gc

import jax
import numpy as np

from paxo import loading, rounds
from paxo.data.tokenizer import save_word_tokenizer
from paxo.experiment import MeshSettings, ModelSettings
from paxo.judges import RuleJudge
from paxo.online import Prompt, RoundSettings, method
from paxo.online.collect import Judges
from paxo.prompts import PromptSettings
from paxo.round_evaluation import EvaluationSettings
from paxo.rounds import SelfPlay
from paxo.sampling import SamplingConfig, sampler
from paxo.scoring import FixedScorer
from paxo.training.optimizers import AdamW
from paxo.training.step import CompiledStep
from tests.plan.planned import CONFIG

PROMPT, COMPLETION = 16, 8
SMALL = dataclasses.replace(
    CONFIG, vocab_size=128, hidden_size=32, num_layers=1, head_dim=8, intermediate_size=64
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(SMALL.vocab_size - 4))]


def made_play(row="inpo_pairs", *, mesh=(4, 2, 1), model=None, **changes):
    """Settings of a small self-play run: prompts of 16 tokens, completions of 8, rows of 128."""
    chosen = method(row) if isinstance(row, str) else row
    defaults = {
        "rounds": RoundSettings(2, prompts_per_round=8),
        "sampling": SamplingConfig(COMPLETION),
        "prompts": PromptSettings(max_tokens=PROMPT),
        "evaluation": EvaluationSettings(num_prompts=0),
        "sample_batch": 8,
        "row_length": 128,
        "export": False,
    }
    return SelfPlay(
        method=chosen,
        optimizer=AdamW(1e-3),
        model=ModelSettings(config=SMALL) if model is None else model,
        mesh=MeshSettings(*mesh),
        **(defaults | changes),
    )


def record(settings, workdir, monkeypatch):
    """Name of each kind of program -> what its calls were given, as shapes, and the bytes beside.

    Bytes are those of one device that lay there when a program was called, its inputs included.
    """
    folder = workdir / "tokenizer"
    save_word_tokenizer(folder, WORDS)
    calls = collections.defaultdict(list)
    gc.collect()
    before = jax.live_arrays()  # kept, so that no other array takes their place
    known = {id(x) for x in before}

    def note(name, given):
        own = [x for x in jax.live_arrays() if id(x) not in known and not x.is_deleted()]
        calls[name].append((shapes_of(given), device_bytes(own)))

    step, score, sample = CompiledStep.__call__, FixedScorer._run, sampler._sample

    def stepped(self, state, batch):
        note("half step" if self.keeps else "step", (state, batch))
        return step(self, state, batch)

    def scored(self, function, batch):
        note("scorer", (self.params, batch))
        return score(self, function, batch)

    def sampled(models, config, stops, params, weights, prompts, key):
        note((config, len(models.policies)), (params, prompts))
        return sample(models, config, stops, params, weights, prompts, key)

    build = CompiledStep.__init__

    def built(self, *given, donate=True):
        self.keeps = not donate
        build(self, *given, donate=donate)

    monkeypatch.setattr(CompiledStep, "__init__", built)
    monkeypatch.setattr(CompiledStep, "__call__", stepped)
    monkeypatch.setattr(FixedScorer, "_run", scored)
    monkeypatch.setattr(sampler, "_sample", sampled)
    longer = RuleJudge(lambda _, text: sum(text) % 97)
    chosen = dataclasses.replace(
        settings, model=dataclasses.replace(settings.model, tokenizer=str(folder))
    )
    mesh = rounds.make_mesh(**dataclasses.asdict(settings.mesh))
    needed = [n for n in ("values",) if settings.method.objective.arrays.get(n, False)]
    model = loading.load_model(chosen.model, mesh, 0, needed)
    rng = np.random.default_rng(0)
    # The median is half of the limit, as plans have it.
    lengths = [PROMPT if i % 4 == 0 else PROMPT // 2 for i in range(16)]
    prompts = [
        Prompt(rng.integers(4, SMALL.vocab_size, n).astype(np.int32), i)
        for i, n in enumerate(lengths)
    ]
    rounds.run(
        chosen,
        workdir,
        judges=lambda _: Judges(judge=longer, rewards={"reward": longer.scores}),
        model=model,
        prompts=prompts,
    )
    del before
    return dict(calls)


def shapes_of(tree):
    """Shape and dtype of every leaf, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in leaves}


def device_bytes(arrays):
    """Bytes of arrays on their first device; a typed key is two words."""
    found = 0
    for x in arrays:
        shape = x.sharding.shard_shape(x.shape)
        size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        found += int(np.prod(shape)) * size
    return found
