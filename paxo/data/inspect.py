"""A look at a data set before it costs anything: its tokens, and what is odd about them."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from paxo.data.records import Record, TokenGroup
from paxo.data.tokenised import TokenisedSet
from paxo.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class InspectReport:
    """Figures about a tokenised data set; ranges are (least, greatest), None where there is none.

    Attributes:
        records: rows of the source, bad ones included.
        groups: records left after tokenising.
        completions: candidates of these groups.
        skipped: reason -> bad records, those found while reading included.
        dropped: reason -> records left out by the length policies.
        bos: BOS tokens in a sequence (prompt and completion).
        eos_finished: scored stop tokens of a finished completion; should be (1, 1).
        eos_cut: scored stop tokens of a cut completion; should be (0, 0).
        finished: finished completions.
        prompts_cut: prompts of which the start was cut.
        completions_cut: completions of which the end was cut.
        duplicate_prompts: groups whose prompt an earlier one has.
        duplicate_records: groups that an earlier one equals in all tokens.
        identical_pairs: pairs with chosen equal to rejected.
        empty_completions: records with an empty completion.
        longer_wins: probability that the better of two completions is the longer one, ties half:
            0.5 is no length bias; None without grades that differ.
        boundary_retokenised: share of completions tokenised apart from their prompts.
        padding_share: share of padding in the packed rows, if it was given.
        prompt_tokens: quantile -> tokens of a prompt.
        completion_tokens: quantile -> tokens of a completion.
    """

    records: int
    groups: int
    completions: int
    skipped: Mapping[str, int]
    dropped: Mapping[str, int]
    bos: tuple[int, int] | None
    eos_finished: tuple[int, int] | None
    eos_cut: tuple[int, int] | None
    finished: int
    prompts_cut: int
    completions_cut: int
    duplicate_prompts: int
    duplicate_records: int
    identical_pairs: int
    empty_completions: int
    longer_wins: float | None
    boundary_retokenised: float
    padding_share: float | None
    prompt_tokens: Mapping[float, int]
    completion_tokens: Mapping[float, int]


def inspect(
    records: Sequence[Record],
    tokenised: TokenisedSet,
    tokenizer: TextTokenizer,
    *,
    skipped: Mapping[str, int] | None = None,
    padding_share: float | None = None,
) -> InspectReport:
    """Counts what is usual and what is odd in a data set.

    Args:
        records: what was tokenised.
        tokenised: the result of `tokenise` on them, with `on_error="skip"`.
        tokenizer: the one that was used.
        skipped: the counts of `load_records`.
        padding_share: of the packed rows.
    """
    groups = tokenised.groups
    bad = collections.Counter(skipped or {}) + collections.Counter(tokenised.skipped)
    sequences = [(group, k) for group in groups for k in range(len(group.completions))]
    return InspectReport(
        records=len(records) + sum((skipped or {}).values()),
        groups=len(groups),
        completions=len(sequences),
        skipped=dict(bad),
        dropped=tokenised.dropped,
        bos=_range(
            _count(np.concatenate([g.prompt, g.completions[k]]), [tokenizer.bos_id])
            for g, k in sequences
        )
        if tokenizer.bos_id is not None
        else None,
        eos_finished=_range(
            _count(g.completions[k], tokenizer.stop_ids) for g, k in sequences if g.finished[k]
        ),
        eos_cut=_range(
            _count(g.completions[k], tokenizer.stop_ids) for g, k in sequences if not g.finished[k]
        ),
        finished=sum(sum(group.finished) for group in groups),
        prompts_cut=tokenised.counts.get("prompts_cut", 0),
        completions_cut=tokenised.counts.get("completions_cut", 0),
        duplicate_prompts=_duplicates(group.prompt.tobytes() for group in groups),
        duplicate_records=_duplicates(_content(group) for group in groups),
        identical_pairs=_matching(bad, tokenised.dropped, "chosen equals rejected"),
        empty_completions=_matching(bad, tokenised.dropped, "empty completion"),
        longer_wins=length_bias(groups),
        boundary_retokenised=tokenised.counts.get("boundary_retokenised", 0) / len(sequences),
        padding_share=padding_share,
        prompt_tokens=_quantiles([len(group.prompt) for group in groups]),
        completion_tokens=_quantiles([len(g.completions[k]) for g, k in sequences]),
    )


def length_bias(groups: Sequence[TokenGroup]) -> float | None:
    """Probability that the better of two completions has more tokens, ties half: an AUC.

    Completions are compared within their groups; if all are alone (unpaired feedback), over the
    whole set.

    Returns:
        0.5 for no bias, 1 if the longer always wins; None if no two grades differ.
    """
    if all(len(group.labels) == 1 for group in groups):
        lengths = np.array([len(group.completions[0]) for group in groups])
        liked = np.array([group.labels[0] > 0 for group in groups])
        return _auc(lengths[liked], lengths[~liked])
    counted = [
        _longer_wins(np.array(group.labels), np.array([len(c) for c in group.completions]))
        for group in groups
    ]
    wins, pairs = np.sum(counted, axis=0)
    return float(wins / pairs) if pairs else None


def print_report(
    report: InspectReport,
    examples: Sequence[TokenGroup],
    tokenizer: TextTokenizer,
    console: "Console | None" = None,
) -> None:
    """Prints example groups with their parts told apart by colour, then the figures."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    for group in examples:
        console.print(render_group(group, tokenizer))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(report):
        table.add_row(name, value)
    console.print(table)


def render_group(group: TokenGroup, tokenizer: TextTokenizer) -> "Text":
    """The group as text: the prompt dim, scored tokens green for the best grade and red for others,
    underlined, and special tokens written out in reverse."""
    from rich.text import Text

    text = Text(f"{group.source}\n", style="bold")
    reserved = {*tokenizer.stop_ids, tokenizer.bos_id}
    _append(text, group.prompt, tokenizer, "dim", reserved)
    for k, completion in enumerate(group.completions):
        ending = "" if group.finished[k] else ", cut"
        head = f"\n[{k + 1}] grade {group.labels[k]:g}, {len(completion)} scored tokens{ending}\n"
        text.append(head, style="bold")
        _append(text, group.context(k), tokenizer, "dim", reserved)
        best = group.labels[k] == max(group.labels) and group.labels[k] > 0
        _append(text, completion, tokenizer, f"underline {'green' if best else 'red'}", reserved)
    return text.append("\n")


def _append(text: "Text", ids: np.ndarray, tokenizer: TextTokenizer, style: str, reserved: set):
    # Tokens of one kind are decoded together: single byte tokens are not characters.
    run: list[int] = []
    for token in [*ids.tolist(), None]:
        if token is not None and token not in reserved:
            run.append(token)
            continue
        text.append(tokenizer.decode(run), style=style)
        run = []
        if token is not None:
            text.append(tokenizer.decode([token]), style=f"{style} reverse")


def _lines(report: InspectReport) -> list[tuple[str, str]]:
    lines = [("records", f"{report.records}, of which {report.groups} are used")]
    lines += [(f"  skipped: {reason}", str(n)) for reason, n in report.skipped.items()]
    lines += [(f"  dropped: {reason}", str(n)) for reason, n in report.dropped.items()]
    longer = "no grades that differ" if report.longer_wins is None else f"{report.longer_wins:.3f}"
    lines += [
        ("completions", f"{report.completions}, of which {report.finished} are finished"),
        ("BOS in a sequence", _span(report.bos)),
        ("scored EOS if finished", _span(report.eos_finished)),
        ("scored EOS if cut", _span(report.eos_cut)),
        ("prompts cut", str(report.prompts_cut)),
        ("completions cut", str(report.completions_cut)),
        ("duplicate prompts", str(report.duplicate_prompts)),
        ("duplicate records", str(report.duplicate_records)),
        ("identical pairs", str(report.identical_pairs)),
        ("empty completions", str(report.empty_completions)),
        ('AUC of "longer wins"', longer),
        ("tokenised apart from prompt", f"{report.boundary_retokenised:.2%} of completions"),
        ("prompt tokens", _spread(report.prompt_tokens)),
        ("completion tokens", _spread(report.completion_tokens)),
    ]
    if report.padding_share is not None:
        lines.append(("padding share of packed rows", f"{report.padding_share:.2%}"))
    return lines


def _span(span: tuple[int, int] | None) -> str:
    if span is None:
        return "-"
    return str(span[0]) if span[0] == span[1] else f"{span[0]} to {span[1]}"


def _spread(quantiles: Mapping[float, int]) -> str:
    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    return ", ".join(f"{names.get(q, f'{q:.0%}')} {n}" for q, n in quantiles.items())


def _count(ids: np.ndarray, wanted: Sequence[int]) -> int:
    return int(np.isin(ids, wanted).sum())


def _range(counts) -> tuple[int, int] | None:
    counts = list(counts)
    return (min(counts), max(counts)) if counts else None


def _duplicates(keys) -> int:
    keys = list(keys)
    return len(keys) - len(set(keys))


def _content(group: TokenGroup) -> tuple:
    parts = (group.prompt, *group.contexts, *group.completions)
    return (*(part.tobytes() for part in parts), group.labels)


def _matching(skipped: Mapping[str, int], dropped: Mapping[str, int], reason: str) -> int:
    found = [*skipped.items(), *dropped.items()]
    return sum(count for name, count in found if name.startswith(reason))


def _quantiles(lengths: Sequence[int]) -> dict[float, int]:
    values = np.quantile(lengths, QUANTILES, method="nearest")
    return {q: int(value) for q, value in zip(QUANTILES, values)}


def _longer_wins(grades: np.ndarray, lengths: np.ndarray) -> tuple[float, int]:
    """How often the better one is longer (ties half), and in how many pairs."""
    better = grades[:, None] > grades[None, :]
    longer = np.sign(lengths[:, None] - lengths[None, :]) / 2 + 0.5
    return float(longer[better].sum()), int(better.sum())


def _auc(better: np.ndarray, worse: np.ndarray) -> float | None:
    """Probability that a value of `better` is above one of `worse`, ties half, by their ranks."""
    worse = np.sort(worse)
    below, not_above = (np.searchsorted(worse, better, side) for side in ("left", "right"))
    pairs = len(better) * len(worse)
    return float((below + not_above).sum() / 2 / pairs) if pairs else None
