"""A made model folder and small experiment files, for tests of whole runs."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

from paxo import cli
from paxo.models.config import ModelConfig
from paxo.models.policy import make_policy
from paxo.models.pretrained import export
from paxo.training.writers import TIMING_KEYS

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SAMPLES = PROJECT / "tests" / "samples"
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ 'Human: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
EXPERIMENT = '''"""A small run on made pairs."""

import paxo
from paxo.data.limits import TokenLimits
from paxo.experiment import DataSettings, Experiment, ModelSettings, TrainSettings


def experiment() -> Experiment:
    return Experiment(
        objective={objective},
        optimizer=paxo.adamw(3e-3, warmup_steps=2, schedule="linear"),
        # A rolled scan compiles faster.
        model=ModelSettings(path={model!r}, chat_template={template!r}, unroll=False),
        data=DataSettings(
            path={data!r},
            heldout=0.3,
            on_error="skip",
            limits=TokenLimits(
                max_prompt=24, max_completion=16, long_prompt="keep_end", long_completion="cut"
            ),
            window=8,
        ),
        train=TrainSettings(
            num_steps=4, rows_per_batch=8, evaluate_every=2, checkpoint_every=2, seed=3
        ),
    )
'''


@contextlib.contextmanager
def compiled_quickly(folder: pathlib.Path) -> Iterator[None]:
    """Programs of runs, here and in other processes, are kept in a folder and not optimised.

    An environment that names a folder for them keeps its own.
    """
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder))
    variables = {
        "JAX_COMPILATION_CACHE_DIR": kept,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    cache, plain = "jax_compilation_cache_dir", "jax_disable_most_optimizations"
    before = {cache: jax.config.jax_compilation_cache_dir, plain: jax.config.read(plain)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        jax.config.update(cache, kept)
        jax.config.update(plain, True)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            jax.clear_caches()  # jax would take them for optimised ones


def words() -> list[str]:
    """Every word of the samples, and those that the template writes."""
    found = {"Human:", "Assistant:"}
    for file in SAMPLES.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            found.update(line.translate(str.maketrans('{}[]",', "      ")).split())
    return sorted(found)


def make_model(folder: pathlib.Path, *, seed: int = 0, vocab: list[str] | None = None, **changes):
    """A folder in Hugging Face's layout: a random decoder and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *(words() if vocab is None else vocab)]
    table = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    shape = {
        "vocab_size": len(tokens), "hidden_size": 16, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 32, "max_positions": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    config = ModelConfig(**(shape | changes))
    params = make_policy(config).init(jax.random.key(seed))
    export(params, config, folder, tokenizer_from=fast)
    return config, params


def write_experiment(
    file: pathlib.Path,
    model: pathlib.Path,
    *,
    objective: str = 'paxo.objective("dpo", beta=0.1)',
    data: pathlib.Path = SAMPLES / "pairs.jsonl",
    template: str | None = TEMPLATE,
) -> pathlib.Path:
    """An experiment file like `experiments/dpo_hh.py`, of a few small steps."""
    file.write_text(
        EXPERIMENT.format(objective=objective, model=str(model), template=template, data=str(data))
    )
    return file


def paxo(*arguments: str | pathlib.Path) -> int:
    """Runs a command line in this process."""
    return cli.main([str(argument) for argument in arguments])


def paxo_process(*arguments: str | pathlib.Path, **kwargs) -> subprocess.Popen:
    """Starts a command line in a process of its own."""
    command = [sys.executable, "-m", "paxo.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, **kwargs)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics without those that tell the time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMING_KEYS}
        for line in lines
    ]


def results(workdir: pathlib.Path) -> dict:
    """What a run found, without the seconds it took."""
    found = json.loads((workdir / "results.json").read_text())
    assert found.pop("seconds") > 0
    return found


def weights(workdir: pathlib.Path) -> bytes:
    """The exported parameters, to the bit."""
    return (workdir / "export" / "model.safetensors").read_bytes()
