"""What became of the records of a set, in one part or several: token groups, counts, reasons."""

import collections
import dataclasses
import logging
from collections.abc import Sequence

from paxo.data.limits import TokenLimits
from paxo.data.records import DataError, Skipped, TokenGroup

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenisedSet:
    """Token groups, and counts of what happened on the way.

    Attributes:
        groups: one for each record that is left, in order.
        counts: `records` that came in; and over those left: `completions`, `prompts_cut`,
            `completions_cut`, `boundary_retokenised` (completions tokenised apart from their
            prompt), `eos_text_removed` (an EOS written out at the end of a text),
            `first_token_unscored` (plain text under a tokenizer without BOS).
        dropped: reason -> records left out by a policy of `TokenLimits`.
        skipped: reason -> bad records left out by `on_error="skip"`.
    """

    groups: list[TokenGroup]
    counts: dict[str, int]
    dropped: dict[str, int]
    skipped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class TokenisedPart:
    """What became of some records, before anything is said about the set.

    Attributes:
        groups: one for each record that is left, in order; maybe none.
        records: how many came in.
        counts: those of `TokenisedSet`.
        dropped: reason -> places of the records left out by a policy.
        skipped: the bad records left out.
    """

    groups: list[TokenGroup]
    records: int
    counts: collections.Counter
    dropped: dict[str, list[str]]
    skipped: Skipped


def joined(parts: Sequence[TokenisedPart], limits: TokenLimits) -> TokenisedSet:
    """The set whose parts these are, in order; every change is logged.

    Raises:
        DataError: no record is left.
    """
    total = sum(part.records for part in parts)
    counts: collections.Counter = collections.Counter()
    skipped = Skipped.joined(part.skipped for part in parts)
    dropped: dict[str, list[str]] = {}
    for part in parts:
        counts.update(part.counts)
        for reason, places in part.dropped.items():
            dropped.setdefault(reason, []).extend(places)
    skipped.log(LOG, total)
    _log(total, counts, dropped, limits)
    groups = [group for part in parts for group in part.groups]
    if not groups:
        first = skipped.first_error() or next(iter(dropped), "there was none to begin with")
        raise DataError(f"none of {total} records is left after tokenising; first: {first}")
    numbers = {reason: len(places) for reason, places in dropped.items()}
    return TokenisedSet(groups, {"records": total, **counts}, numbers, skipped.counts)


def _log(
    total: int, counts: collections.Counter, dropped: dict[str, list[str]], limits: TokenLimits
) -> None:
    for reason, places in dropped.items():
        LOG.warning("dropped %d of %d records: %s (%s)", len(places), total, reason, places[0])
    within = "" if limits.max_sequence is None else f", {limits.max_sequence} with the other part"
    for name, text in (
        ("prompts_cut", f"cut %d prompts to their last {limits.max_prompt or ''} tokens{within}"),
        (
            "completions_cut",
            f"cut %d completions to their first {limits.max_completion or ''} tokens{within}",
        ),
        ("eos_text_removed", "removed the EOS written in the text of %d completions"),
        ("first_token_unscored", "%d texts have no BOS: their first token is not scored"),
        ("boundary_retokenised", "tokenised %d completions apart from their prompts"),
    ):
        if counts[name]:
            LOG.info(text.replace("  ", " "), counts[name])
