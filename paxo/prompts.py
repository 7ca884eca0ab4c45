"""Prompts of self-play, tokenised, with the completions that their source has."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxo.data.layouts import parse_prompt, parse_record
from paxo.data.limits import TokenLimits
from paxo.data.records import Record, RecordError, Skipped
from paxo.data.sources import open_source
from paxo.data.tokenise import TextTokenizer, tokenise
from paxo.online import Prompt
from paxo.overrides import SettingsError

logger = logging.getLogger(__name__)


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
