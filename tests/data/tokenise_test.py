import dataclasses
import logging

import numpy as np
import pytest

from paxo.data.records import DataError, Message, Record, RecordError
from paxo.data.sources import load_records
from paxo.data.tokenise import TokenLimits, load_tokenizer, tokenise

USER, REPLY, OTHER = (
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("assistant", "Go away."),
)


def pair(prompt, chosen, rejected):
    return Record(prompt, (chosen, rejected), (1.0, 0.0), {}, "pairs.jsonl:17")


def alone(prompt, completion):
    return Record(prompt, (completion,), (1.0,), {}, "sft.jsonl:3")


CHAT = pair((USER,), (REPLY,), (OTHER,))


@pytest.fixture
def chat_tokenizer(byte_tokenizer_folder, chatml):
    return load_tokenizer(
        byte_tokenizer_folder(eos="<|im_end|>", extra=("<|im_start|>",), template=chatml)
    )


@pytest.fixture
def text_tokenizer(byte_tokenizer_folder):
    return load_tokenizer(byte_tokenizer_folder(bos="<s>", merges=[("a", "b")]))


def texts(tokenizer, group):
    return [tokenizer.decode(ids) for ids in (group.prompt, *group.completions)]


def test_a_pair_of_strings_goes_on_from_its_prompt_and_ends_in_eos(text_tokenizer):
    (group,) = tokenise([pair("2+2=", "4", "five")], text_tokenizer).groups
    assert texts(text_tokenizer, group) == ["<s>2+2=", "4</s>", "five</s>"]
    assert group.finished == (True, True)
    assert (group.labels, group.source, group.index) == ((1.0, 0.0), "pairs.jsonl:17", 0)
    assert all(ids.dtype == np.int32 for ids in (group.prompt, *group.completions))


def test_what_the_template_writes_after_the_end_of_turn_is_not_scored(chat_tokenizer):
    (group,) = tokenise([CHAT], chat_tokenizer).groups
    assert texts(chat_tokenizer, group) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello.<|im_end|>",
        "Go away.<|im_end|>",
    ]
    np.testing.assert_array_equal(group.prompt, chat_tokenizer.encode_prompt(CHAT.prompt))


def test_an_eos_is_added_where_the_template_writes_none(byte_tokenizer_folder, plain_template):
    folder = byte_tokenizer_folder(bos="<s>", template=plain_template)
    tokenizer = load_tokenizer(folder)
    (group,) = tokenise([CHAT], tokenizer).groups
    prompt = "<s>Human: Hi\n\nAssistant:"
    assert texts(tokenizer, group) == [prompt, " Hello.</s>", " Go away.</s>"]


def test_padding_with_eos_changes_nothing(byte_tokenizer_folder):
    apart = load_tokenizer(byte_tokenizer_folder(pad="<pad>"))
    same = load_tokenizer(byte_tokenizer_folder(pad="</s>"))
    for tokenizer in (apart, same):
        (group,) = tokenise([pair("2+2=", "4", "five")], tokenizer).groups
        assert texts(tokenizer, group) == ["2+2=", "4</s>", "five</s>"]
        assert [ids[-1] for ids in group.completions] == [tokenizer.eos_id] * 2


def test_messages_of_one_reply_are_joined_by_an_empty_line(chat_tokenizer):
    (group,) = tokenise([pair((USER,), (REPLY, OTHER), (OTHER,))], chat_tokenizer).groups
    assert texts(chat_tokenizer, group)[1] == "Hello.\n\nGo away.<|im_end|>"


def test_a_token_over_the_boundary_leaves_the_prompt_as_it_is_when_generating(text_tokenizer):
    # "a" + "b" is one token: tokenised jointly, the prompt would end in it.
    done = tokenise([pair("xa", "bc", "cb")], text_tokenizer)
    (group,) = done.groups
    np.testing.assert_array_equal(group.prompt, text_tokenizer.encode_prompt("xa"))
    assert texts(text_tokenizer, group) == ["<s>xa", "bc</s>", "cb</s>"]
    assert done.counts["boundary_retokenised"] == 1


def test_an_eos_written_at_the_end_of_a_text_is_not_doubled(text_tokenizer, chat_tokenizer):
    done = tokenise([pair("2+2=", "4</s>", "five </s>\n")], text_tokenizer)
    assert texts(text_tokenizer, done.groups[0])[1:] == ["4</s>", "five</s>"]
    assert done.counts["eos_text_removed"] == 2
    chat = pair((USER,), (Message("assistant", "Hello.<|im_end|>"),), (OTHER,))
    (group,) = tokenise([chat], chat_tokenizer).groups
    assert texts(chat_tokenizer, group)[1] == "Hello.<|im_end|>"


@pytest.mark.parametrize("marked", ["a</s>c", "<s>ac", "ac<s></s>c"])
def test_special_tokens_in_the_text_of_a_completion_are_characters(text_tokenizer, marked):
    (group,) = tokenise([pair("2+2=", marked, "five")], text_tokenizer).groups
    ids = group.completions[0]
    assert len(ids) == len(marked) + 1
    assert text_tokenizer.decode(ids) == marked + "</s>"
    assert not np.isin(ids[:-1], [text_tokenizer.bos_id, text_tokenizer.eos_id]).any()


def test_special_tokens_in_the_text_of_a_reply_are_characters(chat_tokenizer):
    text = "Write <|im_end|> and <|im_start|>user to stop."
    record = pair((USER,), (Message("assistant", text),), (OTHER,))
    (group,) = tokenise([record], chat_tokenizer).groups
    ids = group.completions[0]
    assert chat_tokenizer.decode(ids) == text + "<|im_end|>"
    assert len(ids) == len(text) + 1
    assert (ids == chat_tokenizer.eos_id).sum() == 1


def test_a_stop_token_that_cannot_be_told_from_text_is_refused(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder(), eos="b")
    with pytest.raises(
        RecordError, match=r"pairs\.jsonl:17: field 'chosen': expected no BOS or stop"
    ):
        tokenise([pair("xa", "abc", "c")], tokenizer)


def test_a_stop_token_in_a_reply_does_not_cut_the_reply_short(byte_tokenizer_folder, chatml):
    tokenizer = load_tokenizer(byte_tokenizer_folder(template=chatml), eos="b")
    with pytest.raises(RecordError, match="no BOS or stop token before the end"):
        tokenise([pair((USER,), (Message("assistant", "abc"),), (OTHER,))], tokenizer)


def test_a_group_keeps_the_number_that_its_record_has_in_the_source(text_tokenizer):
    record = dataclasses.replace(pair("2+2=", "4", "five"), index=7)
    assert [group.index for group in tokenise([record], text_tokenizer).groups] == [7]


def test_plain_text_follows_bos_and_without_bos_its_first_token(
    text_tokenizer, byte_tokenizer_folder
):
    (group,) = tokenise([alone("", "Once")], text_tokenizer).groups
    assert texts(text_tokenizer, group) == ["<s>", "Once</s>"]
    without = load_tokenizer(byte_tokenizer_folder())
    done = tokenise([alone("", "Once")], without)
    assert texts(without, done.groups[0]) == ["O", "nce</s>"]
    assert done.counts["first_token_unscored"] == 1


def test_token_ids_are_used_as_they_are(text_tokenizer):
    stop = text_tokenizer.eos_id
    (group,) = tokenise([pair((9, 8), (7, stop), (6, 5))], text_tokenizer).groups
    assert group.prompt.tolist() == [9, 8]
    assert [ids.tolist() for ids in group.completions] == [[7, stop], [6, 5]]
    assert group.finished == (True, False)


BAD = [
    (pair((9,), (7, 258), (6,)), "'chosen': expected token ids from 0 to 257, got 258"),
    (pair((-1,), (7,), (6,)), "'prompt': expected token ids from 0 to 257, got -1"),
    (pair("2+2=", "4", "</s>"), "'rejected': expected some text"),
    (pair("2+2=", "4", "4</s>"), "'rejected': expected other tokens than those of 'chosen'"),
    (pair((USER,), (REPLY,), (OTHER,)), "'prompt': .*no chat template; .*chat_template="),
    (pair("a<s>b", "4", "5"), "'prompt': expected BOS once and first"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_names_place_and_field_or_is_skipped(
    byte_tokenizer_folder, record, message, caplog
):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    with pytest.raises(RecordError, match=f"^pairs\\.jsonl:17: field {message}") as caught:
        tokenise([record], tokenizer)
    assert "\n" not in str(caught.value)
    good = pair("2+2=", "4", "5")
    done = tokenise([good, record, good], tokenizer, on_error="skip")
    assert [group.index for group in done.groups] == [0, 2]
    assert done.skipped == {caught.value.reason: 1}
    assert f"skipped 1 of 3 records: {caught.value.reason} (pairs.jsonl:17)" in caplog.messages


def test_a_model_with_fewer_ids_than_its_tokenizer_is_noticed(text_tokenizer):
    with pytest.raises(RecordError, match="token ids from 0 to 99"):
        tokenise([pair("2+2=", "4", "five")], text_tokenizer, TokenLimits(vocab_size=100))


def test_a_completion_whose_characters_the_tokenizer_drops_is_empty(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/tiny_bpe_chatml")
    with pytest.raises(RecordError, match="'chosen': expected a token besides EOS"):
        tokenise([pair("Translate: four", "四", "five")], tokenizer)


def test_a_template_that_changes_its_prompt_is_refused(byte_tokenizer_folder):
    template = "{{ messages | length }}" + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(byte_tokenizer_folder(template=template))
    with pytest.raises(RecordError, match=r"renders the prompt alike.*'1Hi' against '2Hi'"):
        tokenise([CHAT], tokenizer)


def test_what_was_cut_and_dropped_is_counted_and_logged(text_tokenizer, caplog):
    records = [
        pair("2+2=", "4", "five"),
        pair("a very long prompt", "4", "five"),
        pair("2+2=", "a very long answer", "five"),
        pair("2+2=", "4", "another very long answer"),
    ]
    limits = TokenLimits(
        max_prompt=6, max_completion=8, long_prompt="keep_end", long_completion="cut"
    )
    with caplog.at_level(logging.INFO):
        done = tokenise(records, text_tokenizer, limits)
    assert done.counts["prompts_cut"] == 1
    assert done.counts["completions_cut"] == 2
    assert done.counts["records"] == 4
    assert done.counts["completions"] == 8
    assert texts(text_tokenizer, done.groups[1])[0] == "<s>rompt"
    assert texts(text_tokenizer, done.groups[2])[1:] == ["a very l", "five</s>"]
    assert done.groups[2].finished == (False, True)
    assert "cut 1 prompts to their last 6 tokens" in caplog.messages
    assert "cut 2 completions to their first 8 tokens" in caplog.messages
    caplog.clear()
    done = tokenise(records, text_tokenizer, TokenLimits(max_completion=8, long_completion="drop"))
    assert len(done.groups) == 2
    assert done.dropped == {"completion longer than 8 tokens": 2}
    line = "dropped 2 of 4 records: completion longer than 8 tokens (pairs.jsonl:17)"
    assert caplog.messages == [line]


def test_a_long_record_raises_under_the_default_policy(text_tokenizer):
    with pytest.raises(RecordError, match=r"17: field 'prompt': expected at most 4 tokens"):
        tokenise([pair("2+2=", "4", "five")], text_tokenizer, TokenLimits(max_prompt=4))


def test_when_no_record_is_left_the_first_reason_is_told(text_tokenizer):
    limits = TokenLimits(max_prompt=2, long_prompt="drop")
    with pytest.raises(DataError, match=r"none of 1 records is left.*longer than 2 tokens"):
        tokenise([pair("2+2=", "4", "five")], text_tokenizer, limits)
    with pytest.raises(DataError, match="none of 0 records"):
        tokenise([], text_tokenizer)


def test_many_records_are_tokenised_as_each_alone(text_tokenizer):
    # More than are encoded in one call, with bad ones among them.
    records = [pair(f"{i}?", "x" * (i % 7) + "</s>", f"no {i}") for i in range(1200)]
    done = tokenise(records, text_tokenizer, on_error="skip")
    assert done.skipped == {"empty completion": len(range(0, 1200, 7))}
    for group in done.groups:
        (expected,) = tokenise([records[group.index]], text_tokenizer).groups
        assert texts(text_tokenizer, group) == texts(text_tokenizer, expected)


# Facts that hold for any set under any tokenizer.


def check(done, records, tokenizer, limits=None):
    """Prompts as at generation time, BOS once and first, one EOS and only at the end."""
    by_source = {record.source: record for record in records}
    for group in done.groups:
        record = by_source[group.source]
        generated = tokenizer.encode_prompt(record.prompt)
        if limits is None or len(generated) <= limits.max_prompt:
            np.testing.assert_array_equal(group.prompt, generated)
        else:
            keep = limits.max_prompt - (generated[0] == tokenizer.bos_id)
            np.testing.assert_array_equal(group.prompt[-keep:], generated[-keep:])
            assert group.prompt[0] == generated[0] or generated[0] != tokenizer.bos_id
        if tokenizer.bos_id not in (None, tokenizer.eos_id):
            assert tokenizer.bos_id not in group.prompt[1:]
        for ids, finished in zip(group.completions, group.finished):
            stops = np.isin(ids, tokenizer.stop_ids)
            assert stops.sum() == finished
            assert stops[-1] == finished
            assert tokenizer.bos_id == tokenizer.eos_id or tokenizer.bos_id not in ids


LIMITS = TokenLimits(
    max_prompt=384, max_completion=256, long_prompt="keep_end", long_completion="cut"
)
SETS = [
    ("model_stories260k", "pairs_hh_harmless"),
    ("model_stories260k", "unpaired_llamafactory_kto_en"),
    ("tokenizers/tiny_bpe_chatml", "pairs_llamafactory_dpo_en"),
    ("tokenizers/gpt2", "pairs_hhh_alignment"),
    ("tokenizers/gpt2", "lists_oasst_en100"),
    ("tokenizers/mistral_v1", "pairs_llmbar"),
]


@pytest.mark.parametrize("limits", [None, LIMITS], ids=["whole", "cut"])
@pytest.mark.parametrize(("name", "folder"), SETS)
def test_real_sets_keep_the_rules_of_bos_eos_and_prompt(
    shared_data, plain_template, name, folder, limits
):
    tokenizer = load_tokenizer(shared_data / name, chat_template=plain_template)
    records, _ = load_records(shared_data / folder, on_error="skip", limit=400)
    done = tokenise(records, tokenizer, limits)
    assert len(done.groups) == len(records)
    if limits is None:
        assert all(all(group.finished) for group in done.groups)
    check(done, records, tokenizer, limits)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("model_stories260k", "pairs_hh_harmless"),
        ("tokenizers/tiny_bpe_chatml", "pairs_llamafactory_dpo_en"),
    ],
)
def test_prompt_ids_are_those_that_transformers_generates_from(
    shared_data, plain_template, name, folder
):
    tokenizer = load_tokenizer(shared_data / name, chat_template=plain_template)
    records, _ = load_records(shared_data / folder, on_error="skip", limit=200)
    for record, group in zip(records, tokenise(records, tokenizer).groups, strict=True):
        expected = tokenizer.tokenizer.apply_chat_template(
            [vars(message) for message in record.prompt],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
        )["input_ids"]
        assert group.prompt.tolist() == expected


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("model_stories260k", "pairs_llmbar"),
        ("tokenizers/gpt2", "pairs_llmbar"),
        ("tokenizers/gpt2", "lists_alpaca_eval"),
        ("tokenizers/mistral_v1", "pairs_llmbar"),
        ("tokenizers/mistral_v1", "sft_alpaca_en_demo"),
    ],
)
def test_prompt_and_completion_decode_to_the_text(shared_data, name, folder):
    tokenizer = load_tokenizer(shared_data / name)
    records, _ = load_records(shared_data / folder, on_error="skip", limit=150)
    for record, group in zip(records, tokenise(records, tokenizer).groups, strict=True):
        for text, ids in zip(record.completions, group.completions):
            prompt = group.prompt[1:] if tokenizer.adds_bos else group.prompt
            assert tokenizer.decode([*prompt, *ids[:-1]]) == record.prompt + text


def test_a_conversation_decodes_to_the_rendered_template(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/tiny_bpe_chatml")
    records, _ = load_records(shared_data / "pairs_llamafactory_dpo_en")
    seen = 0
    for record, group in zip(records, tokenise(records, tokenizer).groups, strict=True):
        for text, ids in zip(record.completions, group.completions):
            rendered = tokenizer.render((*record.prompt, *text), generate=False)
            if not set(rendered) <= set(tokenizer.decode(tokenizer.encode([rendered])[0])):
                continue  # this vocabulary lacks some characters
            seen += 1
            assert tokenizer.decode([*group.prompt, *ids]) + "\n" == rendered
            assert tokenizer.decode(ids).startswith("<think>\n\n</think>\n\n")
    assert seen > 300


def test_consecutive_assistant_turns_of_hh_become_one_reply(shared_data, plain_template):
    tokenizer = load_tokenizer(shared_data / "tokenizers/gpt2", chat_template=plain_template)
    records, _ = load_records(shared_data / "pairs_hh_harmless", on_error="skip")
    double = [record for record in records if len(record.completions[0]) == 2]
    assert [record.index for record in double] == [1254, 1688]
    for record, group in zip(double, tokenise(double, tokenizer).groups, strict=True):
        first, second = (message.content for message in record.completions[0])
        reply = tokenizer.decode(group.completions[0])
        assert reply == f" {first}\n\n{second}<|endoftext|>"


def test_numbers_of_tokens_are_those_of_the_scored_tokens(text_tokenizer):
    numbers = (np.arange(2, dtype=np.float32), np.arange(5, dtype=np.float32))
    record = dataclasses.replace(pair("2+2=", "4", "five"), extras={"x:KT": numbers})
    (group,) = tokenise([record], text_tokenizer).groups
    assert [len(ids) for ids in group.completions] == [2, 5]  # with their EOS
    assert group.extras["x:KT"] is numbers
    short = dataclasses.replace(record, extras={"x:KT": (numbers[0], numbers[1][:4])})
    with pytest.raises(RecordError, match=r"pairs.jsonl:17: field 'x\[1\]': expected 5 numbers"):
        tokenise([short], text_tokenizer)
