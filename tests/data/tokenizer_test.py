import json

import numpy as np
import pytest

from paxo.data.records import DataError, Message, TextError
from paxo.data.tokenizer import load_tokenizer

CONVERSATION = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Go on."))


def test_a_string_prompt_gets_the_bos_that_the_tokenizer_adds(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    ids = tokenizer.encode_prompt("ab")
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.tokenizer("ab")["input_ids"]
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == "<s>ab"


def test_a_bos_that_the_text_brings_is_not_doubled(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    np.testing.assert_array_equal(tokenizer.encode_prompt("<s>ab"), tokenizer.encode_prompt("ab"))


def test_a_tokenizer_without_bos_adds_none(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder())
    assert tokenizer.bos_id is None
    assert tokenizer.decode(tokenizer.encode_prompt("ab")) == "ab"


def test_only_the_template_decides_about_bos_in_messages(byte_tokenizer_folder, chatml):
    bare = load_tokenizer(byte_tokenizer_folder(bos="<s>", template=chatml))
    assert bare.bos_id not in bare.encode_prompt(CONVERSATION)
    writes = load_tokenizer(byte_tokenizer_folder(bos="<s>", template="{{ bos_token }}" + chatml))
    ids = writes.encode_prompt(CONVERSATION).tolist()
    assert ids.index(writes.bos_id) == 0
    assert ids.count(writes.bos_id) == 1


@pytest.mark.parametrize("prompt", ["ab<s>c", "<s><s>ab"])
def test_bos_elsewhere_than_first_is_refused(byte_tokenizer_folder, prompt):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    with pytest.raises(TextError, match="BOS once and first"):
        tokenizer.encode_prompt(prompt)


def test_messages_are_the_ids_of_the_rendered_template(byte_tokenizer_folder, chatml):
    folder = byte_tokenizer_folder(template=chatml, eos="<|im_end|>", extra=("<|im_start|>",))
    tokenizer = load_tokenizer(folder)
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    expected = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.encode_prompt(CONVERSATION).tolist() == expected["input_ids"]
    assert tokenizer.encode_prompt(messages).tolist() == expected["input_ids"]


def test_ids_are_a_prompt_as_they_are(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    assert tokenizer.encode_prompt((5, 6)).tolist() == [5, 6]


def test_the_tokenizers_own_template_comes_before_the_given_one(byte_tokenizer_folder, chatml):
    own = load_tokenizer(byte_tokenizer_folder(template=chatml), chat_template="other")
    assert own.chat_template == chatml
    given = load_tokenizer(byte_tokenizer_folder(), chat_template="other")
    assert given.chat_template == "other"
    assert given.render(CONVERSATION, generate=True) == "other"


def test_messages_without_a_template_say_how_to_give_one(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder())
    with pytest.raises(TextError, match=r"no chat template; .*chat_template=") as caught:
        tokenizer.encode_prompt(CONVERSATION)
    placed = str(caught.value.at("pairs.jsonl:17", "prompt"))
    assert placed.startswith("pairs.jsonl:17: field 'prompt': ")


def test_a_template_that_refuses_messages_is_quoted(byte_tokenizer_folder):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load_tokenizer(byte_tokenizer_folder(template=template))
    with pytest.raises(TextError, match="roles must alternate"):
        tokenizer.encode_prompt(CONVERSATION)


def test_stop_ids_come_from_the_generation_config(byte_tokenizer_folder):
    folder = byte_tokenizer_folder(bos="<s>", stop=["<s>", "</s>"])
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert list(tokenizer.stop_ids) == ids
    assert tokenizer.eos_id == ids[1]


def test_an_eos_that_does_not_stop_generation_is_not_the_one_that_is_scored(byte_tokenizer_folder):
    folder = byte_tokenizer_folder(extra=("<|end|>", "<|stop|>"), stop=["<|end|>", "<|stop|>"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([tokenizer.eos_id]) == "<|end|>"


def test_without_a_generation_config_only_the_tokenizers_eos_stops(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder())
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    assert tokenizer.decode([tokenizer.eos_id]) == "</s>"


def test_another_eos_can_be_named(byte_tokenizer_folder):
    folder = byte_tokenizer_folder(extra=("<|end|>",), stop=["</s>"])
    tokenizer = load_tokenizer(folder, eos="<|end|>")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|end|>"
    assert [tokenizer.decode([i]) for i in tokenizer.stop_ids] == ["<|end|>", "</s>"]
    with pytest.raises(DataError, match=r"eos='<\|none\|>' is not a token"):
        load_tokenizer(folder, eos="<|none|>")


def test_a_tokenizer_without_eos_says_how_to_name_one(byte_tokenizer_folder):
    with pytest.raises(DataError, match=r"no EOS token; .*eos="):
        load_tokenizer(byte_tokenizer_folder(eos=None))


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_tokenizer_is_an_error_of_one_line(tmp_path, content):
    folder = tmp_path / "tokenizer"
    if content:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_generation_config_is_named(byte_tokenizer_folder):
    folder = byte_tokenizer_folder()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json"):
        load_tokenizer(folder)


def test_special_tokens_in_data_are_characters_when_asked(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder())
    assert tokenizer.encode(["a</s>"]) == [[*tokenizer.encode(["a"])[0], tokenizer.eos_id]]
    assert len(tokenizer.encode(["a</s>"], special=False)[0]) == len("a</s>")
    # The setting belongs to the call: it does not stay behind.
    assert len(tokenizer.encode(["a</s>"])[0]) == 2


def test_the_fingerprint_follows_vocabulary_template_and_stops(byte_tokenizer_folder, chatml):
    folder = byte_tokenizer_folder(bos="<s>")
    prints = [
        load_tokenizer(folder).fingerprint(),
        load_tokenizer(folder, chat_template=chatml).fingerprint(),
        load_tokenizer(folder, eos="<s>").fingerprint(),
        load_tokenizer(byte_tokenizer_folder(bos="<s>", merges=[("a", "b")])).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert load_tokenizer(folder).fingerprint() == prints[0]
    used = load_tokenizer(folder)
    used.encode(["some text </s>"], special=False)
    assert used.fingerprint() == prints[0]


def test_the_vocabulary_counts_the_special_tokens(byte_tokenizer_folder):
    tokenizer = load_tokenizer(byte_tokenizer_folder(bos="<s>"))
    assert tokenizer.vocab_size == 256 + 2
    folder = byte_tokenizer_folder()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "</s>"
    assert load_tokenizer(folder).eos_id == 256


@pytest.mark.parametrize("name", ["model_stories260k", "tokenizers/mistral_v1"])
def test_sentencepiece_continuations_do_not_get_a_space_in_front(shared_data, name):
    tokenizer = load_tokenizer(shared_data / name)
    front = tokenizer.encode(["One word"])[0]
    for text in ("X rest", " and more", "\nnext line"):
        both = [*front, *tokenizer.encode_continuation(text)]
        assert tokenizer.decode(both) == "One word" + text


@pytest.mark.parametrize(
    ("name", "stops", "eos", "bos", "size"),
    [
        ("model_stories260k", (1, 2), 2, 1, 512),
        ("tokenizers/gpt2", (50256,), 50256, 50256, 50257),
        ("tokenizers/mistral_v1", (2,), 2, 1, 32000),
        ("tokenizers/tiny_bpe_chatml", (2002,), 2002, None, 2003),
    ],
)
def test_real_tokenizers_have_their_published_ids(shared_data, name, stops, eos, bos, size):
    tokenizer = load_tokenizer(shared_data / name)
    assert (tokenizer.stop_ids, tokenizer.eos_id) == (stops, eos)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (bos, size)


def test_gpt2_says_hello_world(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/gpt2")
    assert tokenizer.encode_prompt("Hello world").tolist() == [15496, 995]
