import io

import numpy as np
import pytest

from paxo.data.inspect import inspect, length_bias, print_report, render_group
from paxo.data.records import Record, TokenGroup
from paxo.data.sources import load_records
from paxo.data.tokenise import TokenLimits, load_tokenizer, tokenise


def group(lengths, labels):
    ids = tuple(np.full(n, 5, np.int32) for n in lengths)
    return TokenGroup(ids[0], ids, (True,) * len(ids), labels, {}, 0, "x:1")


def pair(prompt, chosen, rejected, line=1):
    return Record(prompt, (chosen, rejected), (1.0, 0.0), {}, f"pairs.jsonl:{line}")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group((3, 1), (1.0, 0.0))], 1.0),
        ([group((1, 3), (1.0, 0.0))], 0.0),
        ([group((2, 2), (1.0, 0.0))], 0.5),
        ([group((3, 1), (0.0, 1.0)), group((3, 1), (1.0, 0.0)), group((2, 2), (1.0, 0.0))], 0.5),
        # Grades 2 > 1 and 2 > 0 are won by the longer one, 1 > 0 by the shorter.
        ([group((3, 1, 2), (2.0, 1.0, 0.0))], 2 / 3),
        ([group((3, 1), (1.0, 1.0))], None),
        ([group((3,), (1.0,))], None),
        # Liked: 4 and 2, disliked: 2 and 1. Of four pairs three are won and one is tied.
        ([group((n,), (y,)) for n, y in ((4, 1.0), (2, 1.0), (2, -1.0), (1, -1.0))], 3.5 / 4),
    ],
)
def test_length_bias_is_how_often_the_longer_wins(groups, expected):
    assert length_bias(groups) == (None if expected is None else pytest.approx(expected))


def test_unpaired_length_bias_equals_the_count_over_all_pairs():
    rng = np.random.default_rng(0)
    groups = [
        group((n,), (y,)) for n, y in zip(rng.integers(1, 9, 60), rng.choice([1.0, -1.0], 60))
    ]
    liked = [len(g.completions[0]) for g in groups if g.labels[0] > 0]
    other = [len(g.completions[0]) for g in groups if g.labels[0] < 0]
    wins = sum((a > b) + (a == b) / 2 for a in liked for b in other)
    assert length_bias(groups) == pytest.approx(wins / (len(liked) * len(other)))


@pytest.fixture
def tokenizer(byte_tokenizer_folder):
    return load_tokenizer(byte_tokenizer_folder(bos="<s>", merges=[("a", "b")]))


@pytest.fixture
def inspected(tokenizer):
    records = [
        pair("2+2=", "4", "five", 1),
        pair("2+2=", "four", "five", 2),
        pair("2+2=", "4", "five", 3),
        pair("xa", "bc", "a very long answer", 4),
        pair("a very long prompt", "4", "five", 5),
        pair("2+2=", "4", "4</s>", 6),
    ]
    limits = TokenLimits(
        max_prompt=8, max_completion=6, long_prompt="keep_end", long_completion="cut"
    )
    done = tokenise(records, tokenizer, limits, on_error="skip")
    skipped = {"empty completion": 2}
    return done, inspect(records, done, tokenizer, skipped=skipped, padding_share=0.125)


def test_the_report_counts_what_is_there(inspected):
    _, report = inspected
    assert (report.records, report.groups, report.completions) == (8, 5, 10)
    assert report.skipped == {"empty completion": 2, "chosen equals rejected": 1}
    assert (report.empty_completions, report.identical_pairs) == (2, 1)
    assert (report.duplicate_prompts, report.duplicate_records) == (2, 1)
    assert (report.prompts_cut, report.completions_cut, report.finished) == (1, 1, 9)
    assert report.boundary_retokenised == pytest.approx(1 / 10)
    assert report.padding_share == 0.125


def test_the_report_gives_ranges_of_bos_and_eos_and_quantiles(inspected):
    _, report = inspected
    assert report.bos == (1, 1)
    assert report.eos_finished == (1, 1)
    assert report.eos_cut == (0, 0)
    # Prompts with BOS: 5, 5, 5, 3 and 8, cut; completions with EOS: 2 to 6, cut.
    assert [report.prompt_tokens[q] for q in (0.0, 0.5, 1.0)] == [3, 5, 8]
    assert (report.completion_tokens[0.0], report.completion_tokens[1.0]) == (2, 6)
    # Chosen against rejected: 2:5, 5:5, 2:5, 3:6, 2:5.
    assert report.longer_wins == pytest.approx(0.5 / 5)


def test_an_eos_inside_a_completion_shows(tokenizer):
    stop = tokenizer.eos_id
    record = Record((9, 8), ((stop, 7, stop), (6, 5)), (1.0, 0.0), {}, "ids.jsonl:1")
    report = inspect([record], tokenise([record], tokenizer), tokenizer)
    assert report.eos_finished == (2, 2)
    assert report.bos == (0, 0)


def test_a_tokenizer_without_bos_has_no_bos_count(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder())
    record = pair("2+2=", "4", "five")
    assert inspect([record], tokenise([record], tokenizer), tokenizer).bos is None


def test_examples_show_prompt_dim_scored_tokens_underlined_and_eos(inspected, tokenizer):
    done, _ = inspected
    text = render_group(done.groups[0], tokenizer)
    assert "pairs.jsonl:1" in text.plain
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["2+2="] == "dim"
    assert "reverse" in styles["<s>"]
    assert styles["4"] == "underline green"
    assert styles["five"] == "underline red"
    assert "</s>" in text.plain
    assert "cut" in render_group(done.groups[3], tokenizer).plain


def test_the_report_is_printed_with_every_figure(inspected, tokenizer):
    from rich.console import Console

    done, report = inspected
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    print_report(report, done.groups[:2], tokenizer, console)
    printed = " ".join(stream.getvalue().split())
    for line in (
        "2+2=",
        "records 8, of which 5 are used",
        "skipped: empty completion 2",
        "completions 10, of which 9 are finished",
        "BOS in a sequence 1",
        "scored EOS if cut 0",
        "duplicate prompts 2",
        "identical pairs 1",
        'AUC of "longer wins" 0.100',
        "prompt tokens least 3",
        "padding share of packed rows 12.50%",
    ):
        assert line in printed


def test_markup_in_the_data_is_printed_as_it_is(tokenizer):
    from rich.console import Console

    record = pair("[bold]x[/bold]", "[red]4", "five")
    done = tokenise([record], tokenizer)
    stream = io.StringIO()
    report = inspect([record], done, tokenizer)
    print_report(report, done.groups, tokenizer, Console(file=stream, width=100))
    assert "[bold]x[/bold]" in stream.getvalue()
    assert "[red]4" in stream.getvalue()


def test_hh_prefers_the_shorter_reply(shared_data, plain_template):
    tokenizer = load_tokenizer(shared_data / "model_stories260k", chat_template=plain_template)
    records, skipped = load_records(shared_data / "pairs_hh_harmless", on_error="skip", limit=600)
    report = inspect(records, tokenise(records, tokenizer), tokenizer, skipped=skipped)
    assert report.records == 600
    assert report.bos == (1, 1)
    assert report.eos_finished == (1, 1)
    assert report.longer_wins < 0.5


def test_known_duplicates_of_a_real_set_are_found(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/gpt2", chat_template="{{ messages }}")
    records, _ = load_records(shared_data / "pairs_llamafactory_dpo_en")
    seen = {(record.prompt, record.completions) for record in records}
    prompts = {record.prompt for record in records}
    texts = [
        Record(str(r.prompt), tuple(map(str, r.completions)), r.labels, {}, r.source)
        for r in records
    ]
    report = inspect(texts, tokenise(texts, tokenizer), tokenizer)
    assert report.duplicate_records == len(records) - len(seen) >= 3
    assert report.duplicate_prompts == len(records) - len(prompts)
