"""What a run leaves behind besides metrics: its model's card, exports and samples.

The card (`<workdir>/model`) is an export without weights, written when a run starts, so that any
checkpoint can later be exported or sampled from without the experiment file. Checkpoints of a run
with adapters hold these alone: `lora.json` beside the card says what they were made for.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from paxo.data.records import TokenGroup
from paxo.data.tokenise import TextTokenizer, load_tokenizer
from paxo.models.config import LoraSettings, ModelConfig
from paxo.models.heads import without_heads
from paxo.models.hf_export import export, export_config
from paxo.models.lora import merge_lora
from paxo.models.policy import make_policy
from paxo.models.pretrained import load_params, read_config, resolve_model
from paxo.sampling import SamplingConfig, make_sampler
from paxo.scoring import params_fingerprint
from paxo.training.checkpoint import checkpoint_folder, read_frozen, read_params
from paxo.types import Params, PromptBatch

logger = logging.getLogger(__name__)

CARD = "model"
LORA = "lora.json"
PROMPTS = "prompts.json"
PROMPTS_KEPT = 4


def save_model_card(
    workdir: pathlib.Path,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    folder: pathlib.Path,
    groups: Sequence[TokenGroup],
    lora: LoraSettings | None = None,
    base: str = "",
) -> None:
    """Writes config, tokenizer and a few prompts to `<workdir>/model` (process 0).

    Args:
        workdir: of the run.
        config: of the model.
        tokenizer: of the model.
        folder: where the tokenizer's files lie.
        groups: whose prompts are kept.
        lora: the adapters, if only these are trained.
        base: folder or hub name of the weights that they are trained for.
    """
    if jax.process_index() != 0:
        return
    export_config(
        config, workdir / CARD, tokenizer_from=folder, chat_template=tokenizer.chat_template
    )
    prompts = [group.prompt.tolist() for group in groups[:PROMPTS_KEPT]]
    (workdir / PROMPTS).write_text(json.dumps(prompts))
    if lora is not None:
        here = pathlib.Path(base).absolute()  # a later command may be given somewhere else
        found = {"base": str(here) if here.is_dir() else base, **dataclasses.asdict(lora)}
        (workdir / LORA).write_text(json.dumps(found, indent=2) + "\n")


def export_model(
    params: Params,
    config: ModelConfig,
    out: pathlib.Path,
    tokenizer: TextTokenizer,
    folder: Any,
    *,
    lora: LoraSettings | None = None,
) -> None:
    """Writes a model that transformers loads, without extra heads; every process calls it.

    With `lora`, the adapters in `params` are added to the weights.
    """
    decoder = without_heads(params) if lora is None else merge_lora(params, config, lora)
    export(decoder, config, out, tokenizer_from=folder, chat_template=tokenizer.chat_template)
    logger.info("exported to %s", out)


def export_checkpoint(workdir: pathlib.Path, step: int | None, out: pathlib.Path) -> None:
    """Exports a checkpoint of a run: the last, or that of `step`.

    Raises:
        FileNotFoundError: if the run has no such checkpoint or no card.
    """
    config, params = _checkpoint(workdir, step)
    tokenizer = load_tokenizer(workdir / CARD)
    export_model(params, config, out, tokenizer, workdir / CARD)
    print(out)


def print_samples(
    source: str | pathlib.Path,
    prompts: Sequence[str],
    *,
    num: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Prints `num` completions of each prompt by a run's last checkpoint or a model folder.

    Args:
        source: run folder, model folder or hub name.
        prompts: texts; with none, prompts of the run's own data.
        num: completions of each.
        max_tokens: longest completion.
        temperature: 0 takes the most likely token.
        seed: of the draws.
    """
    from rich.console import Console
    from rich.text import Text

    run = pathlib.Path(source)
    if (run / CARD).is_dir():
        config, params = _checkpoint(run, None)
        folder = run / CARD
    else:
        folder = resolve_model(source)
        config = read_config(folder)
        params = load_params(folder, config)
    tokenizer = load_tokenizer(folder)
    encoded = [tokenizer.encode_prompt(_as_prompt(text, tokenizer)).tolist() for text in prompts]
    if not encoded:
        if not (run / PROMPTS).exists():
            raise ValueError(f"{source} is no run folder: give prompts, --prompt TEXT")
        encoded = json.loads((run / PROMPTS).read_text())
    _check_room(encoded, max_tokens, config)
    sampling = SamplingConfig(
        max_new_tokens=max_tokens, num_candidates=num, temperature=temperature
    )
    sampler = make_sampler(make_policy(config), sampling, tokenizer.stop_ids)
    drawn = sampler(params, prompt_batch(encoded), jax.random.key(seed))
    console = Console()
    for b, prompt in enumerate(encoded):
        for k in range(num):
            tokens = np.asarray(drawn.tokens[b, k])[np.asarray(drawn.mask[b, k])]
            text = Text(tokenizer.decode(prompt), style="dim")
            text.append(
                tokenizer.decode([*prompt, *tokens.tolist()])[len(text.plain) :],
                style="not dim bold",
            )
            console.print(text)
            console.print(
                Text(
                    "finished" if drawn.finished[b, k] else "cut at --max-tokens",
                    style="dim italic",
                )
            )


def prompt_batch(prompts: Sequence[Sequence[int]], multiple: int = 16) -> PromptBatch:
    """Token lists as one right-padded batch; its width is a multiple, so that few shapes occur."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return PromptBatch(tokens, lengths, np.arange(len(prompts), dtype=np.int32))


def _as_prompt(text: str, tokenizer: TextTokenizer) -> Any:
    """A chat model is asked in its template, as a user's message; others go on with the text."""
    return ({"role": "user", "content": text},) if tokenizer.chat_template else text


def _checkpoint(workdir: pathlib.Path, step: int | None) -> tuple[ModelConfig, Params]:
    """A checkpoint's model, adapters added to the weights they were trained for."""
    if not (workdir / CARD).is_dir():
        raise FileNotFoundError(
            f"{workdir}: no run folder, it has no {CARD}/ written by `paxo run`"
        )
    config, trained = read_config(workdir / CARD), read_params(checkpoint_folder(workdir), step)
    if not (workdir / LORA).exists():
        return config, trained
    told = json.loads((workdir / LORA).read_text())
    lora = LoraSettings(
        **{field.name: told[field.name] for field in dataclasses.fields(LoraSettings)}
    )
    base = load_params(resolve_model(told["base"]), config, dtype=lora.base_dtype)
    before = read_frozen(checkpoint_folder(workdir), step)
    changed = [name for name, x in base.items() if params_fingerprint(x) != before[name]]
    if changed:
        raise ValueError(
            f"{told['base']}: the weights ({', '.join(changed)}) are not those for which the "
            f"adapters in {workdir} were trained; put these back there"
        )
    return config, merge_lora(trained | base, config, lora)


def _check_room(prompts: Sequence[Sequence[int]], max_tokens: int, config: ModelConfig) -> None:
    longest = max(map(len, prompts))
    if longest + max_tokens > config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and --max-tokens {max_tokens} exceed the model's "
            f"{config.max_positions} positions; lower --max-tokens"
        )
