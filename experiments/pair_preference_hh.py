"""A pairwise preference model: it reads both replies, and says A or B.

    paxo run experiments/pair_preference_hh.py --set data.path=lists_alpaca_eval \\
        data.max_records=100 data.limits.max_prompt=256 data.row_length=512 \\
        model.path=model_stories260k optimizer.learning_rate=1e-3 train.num_steps=150

Each pair, of a list each of unequal grades, is shown in both orders (Dong et al. 2024,
arXiv:2405.07863), so that a model which minds the order alone is right half of the time. Prompts
are set apart before that. A linear head on the verdict's token gives its logit; as a judge, which
asks in both orders too:

    scorer = CompletionScorer(policy, load_heads(params, "heads.safetensors"), tokenizer, shape)
    judge = PairModelJudge(VerdictScorer(scorer))

These flags, a 260K-parameter model that knew only children's stories, 720 held-out comparisons of
nine replies to each of ten prompts, minutes on two CPU cores: accuracy 0.493 before and 0.636 after
(95 % interval 0.601 to 0.674, were they independent). On `pairs_hh_harmless`, without
`data.max_records`, 0.500 before and 0.527 after (0.476 to 0.578): no better than chance.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import paxo
from paxo import distributed, runs
from paxo.data.records import Record, plain_text
from paxo.data.sources import load_records
from paxo.experiment import Experiment, load
from paxo.reward_scoring import PAIR_TEMPLATE

REWARD = pathlib.Path(__file__).with_name("reward_model_hh.py")


def experiment() -> Experiment:
    """Settings of the reward model; a prompt holds the dialogue and both replies."""
    settings = load(REWARD).experiment()
    limits = dataclasses.replace(settings.data.limits, max_prompt=896, max_completion=8)
    return dataclasses.replace(
        settings,
        objective=paxo.objective("pair_preference"),
        data=dataclasses.replace(settings.data, limits=limits),
    )


def run(settings: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Writes the pairs as they are shown, and trains on them."""
    data, files = settings.data, [workdir / "shown.jsonl", workdir / "shown_heldout.jsonl"]

    def write() -> None:
        records, _ = load_records(data.path, on_error=data.on_error, limit=data.max_records)
        prompts = list(dict.fromkeys(dialogue(record) for record in records))
        apart = set(prompts[:: round(1 / data.heldout)]) if data.heldout else set()
        for file, heldout in zip(files, (False, True)):
            with file.open("w", encoding="utf-8") as out:
                for record in records:
                    if (dialogue(record) in apart) == heldout:
                        out.writelines(json.dumps(row) + "\n" for row in shown(record))

    distributed.on_first(write)
    data = dataclasses.replace(
        data, path=str(files[0]), heldout_path=str(files[1]) if data.heldout else None, heldout=0.0,
        on_error="raise", max_records=None,
    )  # fmt: skip
    return runs.run(dataclasses.replace(settings, data=data), workdir)


def shown(record: Record) -> Iterator[dict[str, str]]:
    """Both orders of each pair of unequal grades: what shows two replies, and the right verdict.

    >>> rows = list(shown(Record("2+2?", ("4", "5"), (1.0, 0.0))))
    >>> [(row["chosen"], row["rejected"], row["prompt"].find("4")) for row in rows]
    [('A', 'B', 19), ('B', 'A', 35)]
    """
    prompt, replies = dialogue(record), list(map(plain_text, record.completions))
    for (a, grade), (b, other) in itertools.permutations(zip(replies, record.labels), 2):
        if grade != other:
            right, wrong = ("A", "B") if grade > other else ("B", "A")
            text = PAIR_TEMPLATE.format(prompt=prompt, a=a, b=b)
            yield {"prompt": text, "chosen": right, "rejected": wrong}


def dialogue(record: Record) -> str:
    """The prompt as one text."""
    if isinstance(record.prompt, str):
        return record.prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in record.prompt)
