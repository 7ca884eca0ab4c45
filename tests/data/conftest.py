"""A tokenizer of bytes, so that the main facts are tested without any data from outside."""

import json
import pathlib

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '\n\n' if not loop.first }}{{ 'Assistant' if m.role == 'assistant' else 'Human' }}: "
    "{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML


@pytest.fixture(scope="session")
def plain_template() -> str:
    """Human: ... Assistant: ..., started by BOS where there is one."""
    return PLAIN


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory):
    """Makes tokenizer folders: one id a byte, then `specials`, joined by `merges` of two bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    def make(
        *, bos=None, eos="</s>", pad=None, template=None, stop=None, merges=(), extra=()
    ) -> pathlib.Path:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        specials = list(dict.fromkeys(t for t in (bos, eos, pad, *extra) if t))
        vocab = {token: i for i, token in enumerate(alphabet)}
        vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(specials)
        if bos:
            ids = [(bos, tokenizer.token_to_id(bos))]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=ids
            )
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= {"bos_token": bos, "eos_token": eos, "pad_token": pad, "chat_template": template}
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if stop is not None:
            ids = [tokenizer.token_to_id(token) for token in stop]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return folder

    return make
