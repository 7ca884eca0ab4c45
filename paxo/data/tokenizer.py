"""A tokenizer with what preference data needs of one.

Prompts become the same ids for training and for generation, there is one EOS, and messages are
rendered to text before they are tokenised.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxo.data.records import DataError, Message, Text, TextError, is_ids


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A `transformers` tokenizer; build it with `load_tokenizer`.

    Attributes:
        tokenizer: the `transformers` tokenizer.
        name: what it was loaded from, for messages.
        chat_template: Jinja template for messages, or None.
        stop_ids: ids that end a completion when sampled.
        eos_id: the one of them that ends a finished completion in training data.
        bos_id: id that starts a text, or None.
    """

    tokenizer: Any
    name: str
    chat_template: str | None
    stop_ids: tuple[int, ...]
    eos_id: int
    bos_id: int | None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))

    @functools.cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer puts BOS in front of a text by itself."""
        return self.bos_id is not None and self.tokenizer("")["input_ids"][:1] == [self.bos_id]

    @functools.cached_property
    def special_text(self) -> re.Pattern:
        """Matches the text of any special token, stop tokens included."""
        special = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        stops = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        texts = {*special, *stops, *self.tokenizer.all_special_tokens}
        longest_first = sorted(texts, key=len, reverse=True)
        # Without special tokens: a pattern that matches nothing, not the empty one.
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def final_eos(self) -> re.Pattern:
        """Matches the text of a stop token at the end of a text."""
        texts = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, texts))})\s*\Z")

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Ids of each text and no others; `special=False` reads `"</s>"` as four characters."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def encode_continuation(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text that goes on after another one."""
        if text and self._adds_space:
            # SentencePiece puts a space before a text; after a line break it has done so already.
            head, whole = self.encode(["\n", "\n" + text], special=special)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode([text], special=special)[0]

    def render(self, messages: Sequence[Message | Mapping], *, generate: bool) -> str:
        """The messages as text; with `generate`, up to where the assistant's reply begins.

        Raises:
            TextError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise TextError(
                expected="a string",
                got=f"messages, and tokenizer {self.name} has no chat template",
                way_out="set model.chat_template, or load_tokenizer(..., chat_template=...)",
                reason="messages, but no chat template",
            )
        import jinja2

        turns = [dict(m) if isinstance(m, Mapping) else dict(vars(m)) for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=generate,
                chat_template=self.chat_template,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise TextError(
                expected=f"messages that the chat template of {self.name} takes",
                got=f"its error: {error}",
                way_out="correct the messages or pass another chat_template",
                reason="chat template refuses the messages",
            ) from error

    def encode_prompt(self, prompt: Text | Sequence[Mapping]) -> np.ndarray:
        """`[P]` int32 ids of a prompt, the same for training and for generation.

        A string gets what the tokenizer puts in front of a text (BOS); messages are rendered, and
        the template alone says whether there is a BOS; ids stay as they are.

        Raises:
            TextError: no token comes out, BOS stands elsewhere than first, or messages cannot be
                rendered.
        """
        return np.array(self.encode_prompts([prompt])[0], np.int32)

    def encode_prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        """The same for many prompts at once, as lists; faster."""
        texts = [self.prompt_text(prompt) for prompt in prompts]
        encoded = self.encode(texts)
        return [self.finish_prompt(prompt, ids) for prompt, ids in zip(prompts, encoded)]

    def prompt_text(self, prompt: Text) -> str:
        """The text of which `encode` gives the prompt's ids; empty for a prompt of ids."""
        if isinstance(prompt, str):
            return prompt
        return "" if is_ids(prompt) else self.render(prompt, generate=True)

    def finish_prompt(self, prompt: Text, ids: list[int]) -> list[int]:
        """The prompt's ids from those of its text: BOS in front of a string, once."""
        if is_ids(prompt):
            ids = list(prompt)
        elif isinstance(prompt, str) and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if not ids:
            raise TextError(
                expected="at least one token",
                got=f"none from tokenizer {self.name}",
                way_out="use a tokenizer that has the characters, or remove the record",
                reason="empty prompt",
            )
        if self.bos_id not in (None, self.eos_id) and self.bos_id in ids[1:]:
            raise TextError(
                expected="BOS once and first",
                got=f"{self.tokenizer.convert_ids_to_tokens(self.bos_id)!r} further on too",
                way_out="let the template write it once, and remove it from the texts",
                reason="BOS inside a prompt",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens written out."""
        return self.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text becomes."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        parts = [state, self.chat_template, self.stop_ids, self.eos_id, self.bos_id, self.adds_bos]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def _adds_space(self) -> bool:
        first = self.encode(["a"])[0][:1]
        return self.tokenizer.convert_ids_to_tokens(first)[0].startswith("▁") if first else False


def save_word_tokenizer(folder: str | os.PathLike[str], words: Sequence[str]) -> None:
    """Writes a tokenizer that splits at spaces, for tasks made of known words.

    Each file appears whole, so that several processes may write the same folder at a time.

    Args:
        folder: where it is written.
        words: all tokens in the order of their ids, `<pad>`, `<s>`, `</s>` and `<unk>` first.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_word_tokenizer(folder, ["<pad>", "<s>", "</s>", "<unk>", "good", "film"])
    >>> load_tokenizer(folder).encode_prompt("good film").tolist()
    [1, 4, 5]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("<s>", table["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as spare:
        fast.save_pretrained(spare)
        for name in os.listdir(spare):
            os.replace(os.path.join(spare, name), os.path.join(folder, name))


def load_tokenizer(
    name: str | pathlib.Path, *, chat_template: str | None = None, eos: str | None = None
) -> TextTokenizer:
    """Loads a tokenizer from a folder or, by name, from the Hugging Face hub.

    Ids that stop generation come from `generation_config.json` beside it, else there is only the
    tokenizer's own EOS. Completions end in the tokenizer's EOS if that stops generation, else in
    the first id that does.

    Args:
        name: folder or hub name.
        chat_template: Jinja template, used only if the tokenizer has none of its own.
        eos: text of the token that ends completions, in place of the choice above.

    Raises:
        DataError: it cannot be loaded or has no such EOS.
    """
    tokenizer = _load(str(name))
    configured = _configured_stop_ids(str(name))
    own = tokenizer.eos_token_id
    if eos is not None:
        own = tokenizer.get_vocab().get(eos)
        if own is None:
            raise DataError(f"eos={eos!r} is not a token of {name}; give the text of one token")
        configured = (own, *(i for i in configured if i != own))
    stop_ids = configured or (() if own is None else (own,))
    if not stop_ids:
        raise DataError(
            f"tokenizer {name} has no EOS token; name one: load_tokenizer(..., eos=...)"
        )
    own_template = tokenizer.chat_template
    if isinstance(own_template, dict):  # several by name, such as one for tools
        own_template = own_template.get("default")
    return TextTokenizer(
        tokenizer=tokenizer,
        name=str(name),
        chat_template=own_template or chat_template,
        stop_ids=stop_ids,
        eos_id=own if own in stop_ids else stop_ids[0],
        bos_id=tokenizer.bos_token_id,
    )


def _load(name: str) -> Any:
    if name.startswith((".", "/", "~")) and not pathlib.Path(name).expanduser().is_dir():
        raise DataError(f"{name}: no such folder; give a folder with tokenizer.json or a hub name")
    # transformers says at import that models are not available without PyTorch; nobody asked.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: no tokenizer can be loaded ({reason}); "
            "expected a folder with tokenizer.json and tokenizer_config.json, or a hub name"
        ) from error


def _configured_stop_ids(name: str) -> tuple[int, ...]:
    from transformers.utils import cached_file

    file = cached_file(
        name,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return ()
    try:
        ids = json.loads(pathlib.Path(file).read_text("utf-8")).get("eos_token_id")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
