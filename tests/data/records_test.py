import numpy as np
import pytest

from paxo.data.layouts import parse_prompt, parse_record
from paxo.data.records import DataError, Message, RecordError, TokenGroup
from paxo.data.sources import load_records

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
OTHER = {"role": "assistant", "content": "Go away."}
SYSTEM = {"role": "system", "content": "Be kind."}


def parse(**row):
    return parse_record(row, "pairs.jsonl:17")


def as_message(message):
    return Message(message["role"], message["content"])


def test_a_pair_of_strings_is_graded_one_and_zero():
    record = parse(prompt="Hi", chosen="Hello.", rejected="Go away.")
    assert record.prompt == "Hi"
    assert record.completions == ("Hello.", "Go away.")
    assert record.labels == (1.0, 0.0)
    assert record.source == "pairs.jsonl:17"


def test_a_pair_of_messages_keeps_its_messages():
    record = parse(prompt=[SYSTEM, USER], chosen=[REPLY], rejected=[OTHER])
    assert record.prompt == (as_message(SYSTEM), as_message(USER))
    assert record.completions == ((as_message(REPLY),), (as_message(OTHER),))


def test_string_answers_to_messages_are_turns_of_the_assistant():
    record = parse(prompt=[USER], chosen="Hello.", rejected="Go away.")
    assert record == parse(prompt=[USER], chosen=[REPLY], rejected=[OTHER])


def test_whole_conversations_share_their_prompt():
    record = parse(chosen=[SYSTEM, USER, REPLY], rejected=[SYSTEM, USER, OTHER])
    assert record == parse(prompt=[SYSTEM, USER], chosen=[REPLY], rejected=[OTHER])


def test_a_shared_first_assistant_turn_belongs_to_the_completions():
    record = parse(chosen=[USER, REPLY, OTHER], rejected=[USER, REPLY])
    assert record.prompt == (as_message(USER),)
    assert record.completions == ((as_message(REPLY), as_message(OTHER)), (as_message(REPLY),))


def test_a_string_prompt_beside_whole_conversations_is_the_one_inside_them():
    record = parse(prompt="Hi", chosen=[USER, REPLY], rejected=[USER, OTHER])
    assert record == parse(prompt=[USER], chosen=[REPLY], rejected=[OTHER])


def test_transcripts_are_read_as_conversations():
    head = "\n\nHuman: Hi\n\nAssistant: Yes? Human: is a word here.\n\nHuman: Go\n\nAssistant:"
    record = parse(chosen=f"{head} No.", rejected=f"{head} Never.")
    assert [m.role for m in record.prompt] == ["user", "assistant", "user"]
    assert record.prompt[1].content == "Yes? Human: is a word here."
    assert record.completions == ((Message("assistant", "No."),), (Message("assistant", "Never."),))


@pytest.mark.parametrize(("label", "grade"), [(True, 1.0), (False, -1.0), (1, 1.0), (0, -1.0)])
def test_unpaired_feedback_is_plus_or_minus_one(label, grade):
    record = parse(prompt="Hi", completion="Hello.", label=label)
    assert (record.completions, record.labels) == (("Hello.",), (grade,))


def test_demonstrations_come_in_three_forms():
    assert parse(prompt="Hi", completion="Hello.").completions == ("Hello.",)
    conversation = parse(messages=[USER, REPLY, USER, OTHER])
    assert conversation.prompt == tuple(map(as_message, (USER, REPLY, USER)))
    assert conversation.completions == ((as_message(OTHER),),)
    text = parse(text="Once upon a time.")
    assert (text.prompt, text.completions, text.labels) == ("", ("Once upon a time.",), (1.0,))


def test_lists_take_scores_or_ranks_of_which_zero_is_the_best():
    scored = parse(prompt="Hi", responses=["a", "b", "c"], scores=[0.5, 1, 0.25])
    assert scored.labels == (0.5, 1.0, 0.25)
    ranked = parse(prompt="Hi", completions=["a", "b", "c"], ranks=[1, 0, 2])
    assert ranked.labels == (1.0, 2.0, 0.0)


def test_token_ids_are_taken_as_they_are():
    record = parse(prompt_ids=[1, 5], chosen_ids=[6, 2], rejected_ids=[7, 2])
    assert (record.prompt, record.completions) == ((1, 5), ((6, 2), (7, 2)))


def test_lists_of_token_ids_are_taken_as_they_are():
    row = {"prompt_ids": [1, 5], "completions_ids": [[6, 2], [7], [8, 9, 2]], "scores": [1, 0, 0.5]}
    record = parse(**row, source="round 0000, prompt 3", win_rates=[0.9, 0.1, 0.5])
    assert (record.prompt, record.completions) == ((1, 5), ((6, 2), (7,), (8, 9, 2)))
    assert record.labels == (1.0, 0.0, 0.5)
    assert record.extras == {}
    # Unlike pairs, two equal answers may stand in a list.
    assert (
        parse(prompt_ids=[1], completions_ids=[[2], [2]], scores=[1, 0]).completions == ((2,),) * 2
    )


def test_margins_are_extras_and_other_numbers_are_on_request():
    row = {"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 0], "w": [0.5, 2], "id": 7}
    assert parse_record(row, "x:1").extras == {}
    np.testing.assert_array_equal(parse_record(row, "x:1", extras=("w",)).extras["w"], [0.5, 2])
    pair = parse(prompt="Hi", chosen="a", rejected="b", margin=2, id="xyz")
    assert pair.extras == {"margin": np.float32(2)}
    assert pair.extras["margin"].dtype == np.float32


def test_null_columns_count_as_absent():
    record = parse(prompt="Hi", completion="Hello.", label=None, margin=None)
    assert record.labels == (1.0,)
    assert record.extras == {}


PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
BAD = [
    ({"prompt": "Hi", "chosen": "a"}, "'rejected'", "missing column rejected"),
    ({"question": "Hi"}, "columns question", "missing column"),
    (PAIR | {"prompt": ""}, "'prompt'", "empty prompt"),
    (PAIR | {"prompt": " \n"}, "'prompt'", "empty prompt"),
    (PAIR | {"prompt": []}, "'prompt'", "empty prompt"),
    (PAIR | {"prompt": 3}, "'prompt'", "wrong type"),
    (PAIR | {"chosen": ""}, "'chosen'", "empty completion"),
    (PAIR | {"chosen": 3.5}, "'chosen'", "wrong type"),
    (PAIR | {"chosen": [REPLY]}, "write the prompt as messages too", "wrong type"),
    (PAIR | {"chosen": "Go away."}, "'rejected'", "chosen equals rejected"),
    (PAIR | {"margin": float("nan")}, "'margin'", "value is not finite"),
    (PAIR | {"tools": ["search"]}, "'tools'", "unsupported column tools"),
    (PAIR | {"prompt": [{"role": "human", "content": "x"}]}, "'prompt[0].role'", "unknown role"),
    (PAIR | {"prompt": [{"from": "human", "value": "x"}]}, "'prompt[0]'", "wrong type"),
    (PAIR | {"prompt": [{"role": "user", "content": None}]}, "'prompt[0].content'", "wrong type"),
    (PAIR | {"prompt": [USER, REPLY]}, "'prompt[1].role'", "prompt ends with an assistant turn"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [REPLY]}, "'chosen[0].role'", "completion"),
    ({"chosen": "a", "rejected": "b"}, r"\n\nHuman:", "not a conversation"),
    ({"chosen": [USER, REPLY], "rejected": [SYSTEM, REPLY]}, "'chosen'", "share no prompt"),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "'rejected'", "chosen equals rejected"),
    ({"prompt": "Hi", "completion": "a", "label": "good"}, "'label'", "wrong type"),
    ({"prompt": "Hi", "completion": "a", "label": 0.5}, "'label'", "wrong type"),
    ({"prompt": "Hi", "responses": ["a", "b"]}, "'scores'", "missing column scores"),
    ({"prompt": "Hi", "responses": ["a"], "scores": [1, 2]}, "'scores'", "differ in number"),
    ({"prompt": "Hi", "responses": ["a"], "scores": [float("nan")]}, "'scores[0]'", "not finite"),
    ({"prompt": "Hi", "responses": ["a"], "scores": ["1"]}, "'scores[0]'", "wrong type"),
    ({"prompt": "Hi", "responses": [], "scores": []}, "'responses'", "wrong type"),
    (
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []},
        "rejected_ids",
        "empty completion",
    ),
    ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": ["3"]}, "rejected_ids", "wrong type"),
    (
        {"prompt_ids": [1], "completions_ids": [2, 3], "scores": [1, 0]},
        "'completions_ids[0]'",
        "wrong type",
    ),
    ({"prompt_ids": [1], "completions_ids": [], "scores": []}, "'completions_ids'", "wrong type"),
    (
        {"prompt_ids": [1], "completions_ids": [[2], []], "scores": [1, 0]},
        "'completions_ids[1]'",
        "empty completion",
    ),
    (
        {"prompt_ids": [1], "completions_ids": [[2]], "scores": [1, 0]},
        "'scores'",
        "differ in number",
    ),
    ({"messages": [USER]}, "'messages'", "empty completion"),
    ({"messages": [REPLY]}, "'messages'", "empty prompt"),
    ({"text": ["a"]}, "'text'", "wrong type"),
    (["Hi"], "'row'", "row is not an object"),
]


@pytest.mark.parametrize(("row", "text", "reason"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_gives_one_line_with_place_field_and_way_out(row, text, reason):
    with pytest.raises(RecordError) as caught:
        parse_record(row, "pairs.jsonl:17")
    message = str(caught.value)
    assert message.startswith("pairs.jsonl:17: field '")
    assert text in message
    assert "expected" in message
    assert "; " in message
    assert "\n" not in message
    assert reason in caught.value.reason


def test_an_extra_that_is_not_there_is_named():
    with pytest.raises(RecordError, match="'agreement'"):
        parse_record(PAIR, "pairs.jsonl:17", extras=("agreement",))


def test_errors_are_value_errors():
    assert issubclass(RecordError, DataError)
    assert issubclass(DataError, ValueError)


def test_prompts_may_be_parsed_alone():
    assert parse_prompt("Hi", "prompts.jsonl:1") == "Hi"
    assert parse_prompt([USER], "prompts.jsonl:1") == (as_message(USER),)


def test_a_group_counts_its_prompt_once():
    ids = [np.arange(n, dtype=np.int32) for n in (3, 2, 4)]
    group = TokenGroup(ids[0], (ids[1], ids[2]), (True, True), (1.0, 0.0), {}, 0, "x:1")
    assert group.num_tokens == 3 + 2 + 4


def test_the_original_transcripts_of_hh_are_the_same_records_as_its_messages(shared_data):
    folder = shared_data / "pairs_hh_harmless"
    pairs, skipped = load_records(folder / "pairs.jsonl.gz", on_error="skip")
    original, skipped_too = load_records(folder / "original.jsonl.gz", on_error="skip")
    assert skipped == skipped_too == {"empty completion": 4}
    assert len(pairs) == len(original) == 1849 - 4
    for one, other in zip(pairs, original):
        assert one.index == other.index
        assert one.prompt == other.prompt
        assert one.completions == other.completions


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("x:KT", [[1, 2, 3], [4]], ([1, 2, 3], [4])),
        ("x:KK", [[0.5, 1], [0, 0.5]], [[0.5, 1], [0, 0.5]]),
        ("x:KD", [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        ("x:D", [1, 2, 3], [1, 2, 3]),
        ("x:K", [1, 2], [1, 2]),
    ],
)
def test_axes_after_the_name_of_an_extra_tell_its_shape(name, value, expected):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "x": value}
    found = parse_record(row, "x:1", extras=(name,)).extras
    assert found.keys() == {name}
    for one, other in zip(found[name], expected, strict=True):
        np.testing.assert_array_equal(one, np.float32(other))
    parts = found[name] if name.endswith("KT") else (found[name],)
    assert all(part.dtype == np.float32 for part in parts)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", [[1], [2]], r"field 'x': expected a number.*tell the axes .*'x:KT'"),
        ("x:KT", [[1]], r"field 'x': expected 2 lists, one for each completion"),
        ("x:KT", [[1], 2], r"field 'x\[1\]': expected a list of numbers"),
        ("x:KT", [[1], ["b"]], r"field 'x\[1\]\[0\]': expected a number"),
        ("x:KK", [[1, 2], [3]], r"field 'x\[1\]': expected 2 values"),
        ("x:KD", [[1, 2, 3], [3]], r"field 'x\[1\]': expected 3 values"),
        ("x:D", 3, r"field 'x': expected a list of numbers"),
        ("y:KT", [[1], [2]], r"field 'y': expected a column of that name"),
    ],
)
def test_extras_of_another_shape_are_refused_by_record(name, value, message):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "x": value}
    with pytest.raises(RecordError, match=f"pairs.jsonl:3: {message}"):
        parse_record(row, "pairs.jsonl:3", extras=(name,))


LIST = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}


def test_contexts_are_kept_for_each_completion():
    record = parse_record(LIST | {"contexts": ["draft: b.", ""]}, "lists.jsonl:1")
    assert record.contexts == ("draft: b.", "")
    assert parse_record(LIST, "lists.jsonl:1").contexts == ()
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert parse_record(ids | {"contexts": [[7, 8], []]}, "x:1").contexts == ((7, 8), ())


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (["only one"], "field 'contexts': expected 2 texts, one for each completion"),
        ("draft", "field 'contexts': expected 2 texts"),
        (["draft", 3], r"field 'contexts\[1\]': expected a string, got 3"),
    ],
)
def test_contexts_of_another_number_or_kind_are_refused(contexts, message):
    with pytest.raises(RecordError, match=message):
        parse_record(LIST | {"contexts": contexts}, "lists.jsonl:1")
