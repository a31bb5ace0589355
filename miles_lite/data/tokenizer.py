"""Text to tokens and back, with the model's own tokenizer and chat template, offline."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_lite.data.trial import refuse_endless


class ChatTokenizer:
    """The tokenizer of an HF folder. It adds and drops nothing: the template writes every token."""

    def __init__(self, backend: Any, folder: Path) -> None:
        self._backend = backend  # a transformers tokenizer
        self.folder = folder

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Read tokenizer and chat template from `folder`; ValueError names what is missing.

        Code shipped inside the folder is never run, but for the template, which jinja keeps to
        itself and `refuse_endless` within bounds; and nothing is looked up on a network.
        """
        if not folder.is_dir():
            raise ValueError(f"no tokenizer: {folder} is not a folder")
        from transformers import AutoTokenizer  # slow to import

        try:
            backend = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
            backend.encode("1+1")  # what of it breaks only now
        except Exception as error:  # damaged files of it raise all kinds
            raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
        if not backend.chat_template:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template; "
                "add a chat_template.jinja to the folder"
            )
        if not isinstance(backend.chat_template, str):
            raise ValueError(
                f"the chat template in {folder} is a {type(backend.chat_template).__name__}: "
                "name one by putting it into a chat_template.jinja"
            )
        refuse_endless(backend.chat_template, folder)
        return cls(backend, folder)

    def knows(self, word: str) -> bool:
        """Whether `word` is a token, or spelt in the chat template."""
        return word in self._backend.get_vocab() or word in self._backend.chat_template

    def takes(self, name: str) -> bool:
        """Whether the chat template speaks of a setting called `name`."""
        return re.search(rf"\b{re.escape(name)}\b", self._backend.chat_template) is not None

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary and the chat template."""
        words = sorted(self._backend.get_vocab().items())
        text = repr((self._backend.chat_template, words))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        template_kwargs: Mapping[str, Any],
        tools: Sequence[Any] = (),
    ) -> str:
        """The chat as text, ending where the assistant is to begin.

        `template_kwargs` go to the template as they are, e.g. {"enable_thinking": False}; so do
        `tools`, descriptions of functions that the model may call.
        """
        return self._backend.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
            **template_kwargs,
        )

    def least_tokens(self, text: str) -> int:
        """A text of this length has no fewer: it costs nothing to say so."""
        return -(-len(text) // self._longest)

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of the longest token. One of bytes is spelt with a letter for each."""
        return max(map(len, self._backend.get_vocab()))

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of `text` alone; special tokens are read where the text spells them."""
        return tuple(self._backend.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens kept, spaces untouched."""
        if self._backend.is_fast:
            # past transformers, which first looks at every token, for three times as long
            rust = self._backend.backend_tokenizer
            return rust.decode(list(tokens), skip_special_tokens=False)
        return self._backend.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
