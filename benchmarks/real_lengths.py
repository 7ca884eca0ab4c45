"""The pairs of a real data set as lists of tokens, for paxo and its peers alike.

Text is cut into tokens by GPT-2's tokenizer, prompts to their last 384 tokens and completions to
their first 256; ids are then folded into the vocabulary of W1's model. Data sets lie in `PAXO_DATA`
(default `../shared/data` beside the project).
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# The form of Anthropic's transcripts.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
    "{% else %}{{ '\n\nAssistant: ' + message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
MAX_PROMPT, MAX_COMPLETION = 384, 256
FIRST_ID = 3  # 0 is padding, 1 begins and 2 ends a text


def data_folder() -> pathlib.Path:
    """Where the real data sets are."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    return pathlib.Path(os.environ.get("PAXO_DATA", beside))


def missing_data(name: str) -> bool:
    """Whether there is no such data set, which is then said."""
    if (data_folder() / name).is_dir():
        return False
    print(f"{data_folder() / name}: no data set there; set PAXO_DATA", file=sys.stderr)
    return True


def groups_of(name: str, vocabulary: int, limit: int | None = None) -> list[Any]:
    """The groups of a data set, every one that has tokens in all its completions."""
    from paxo.data.limits import TokenLimits
    from paxo.data.sources import load_records
    from paxo.data.tokenise import load_tokenizer, tokenise

    folder = data_folder()
    tokenizer = load_tokenizer(folder / "tokenizers" / "gpt2", chat_template=TEMPLATE)
    records, _ = load_records(str(folder / name), on_error="skip", limit=limit)
    limits = TokenLimits(
        max_prompt=MAX_PROMPT,
        max_completion=MAX_COMPLETION,
        long_prompt="keep_end",
        long_completion="cut",
    )
    groups = tokenise(records, tokenizer, limits, on_error="skip").groups
    return [folded(group, vocabulary) for group in groups]


def folded(group: Any, vocabulary: int) -> Any:
    """The group with ids below `vocabulary`; lengths stay."""
    import dataclasses

    fold = lambda ids: (FIRST_ID + ids % (vocabulary - FIRST_ID)).astype(np.int32)  # noqa: E731
    return dataclasses.replace(
        group, prompt=fold(group.prompt), completions=tuple(map(fold, group.completions))
    )


def write_pairs(groups: Sequence[Any], path: pathlib.Path) -> None:
    """The token lists as JSON, which the peers' Pythons read: `[[prompt, chosen, rejected], ...]`.

    Trainers that take text add the EOS themselves, so the last token of a completion is left out.
    """
    rows = [
        [group.prompt.tolist(), *(c[:-1].tolist() for c in group.completions)] for group in groups
    ]
    path.write_text(json.dumps(rows))
