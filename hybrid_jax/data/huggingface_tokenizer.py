"""A tokenizer of ``transformers``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.start_tokens import start_ids
from hybrid_jax.data.tokenizer_base import Tokens, encodable, one_at_a_time


class HuggingFaceTokenizer:
    """Any tokenizer of ``transformers`` that has an end token; its pad token may be the same one.

    Special tokens that are written in a text are those tokens, as in ``transformers``.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self._lock = threading.Lock()
        added = backend.added_tokens_decoder.items()
        special = {token.content: id for id, token in added if token.special}
        self.special_tokens = special | dict(
            zip(backend.all_special_tokens, backend.all_special_ids, strict=True)
        )
        self.vocab_size = max(backend.get_vocab().values()) + 1  # ids may have gaps
        self.start_ids = start_ids(backend)
        self.template_variables: Mapping[str, Any] = dict(backend.special_tokens_map)

    @property
    def chat_template(self) -> str | None:
        """The template called default, or the only one.

        Raises:
            UserError: there are several and none is the default.
        """
        templates = self._backend.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                f"the tokenizer has chat templates called {', '.join(sorted(templates))} and none called "
                "default; set tokenizer.chat_template to a file with the one to use"
            )
        return templates["default"] if isinstance(templates, dict) else templates

    @property
    def eos_id(self) -> int:
        """The id of the end token."""
        return int(end_id(self._backend))

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens."""
        return self._backend.get_vocab()

    @one_at_a_time
    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no special token is added."""
        return self._backend.encode(encodable(text), add_special_tokens=False)

    @one_at_a_time
    def encode_batch(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """The ids of each text; written special tokens are those tokens unless ``plain``."""
        if not texts:
            return []
        encoded = self._backend(
            [*map(encodable, texts)],
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def encode_rendered(self, text: str, *, plain: bool = False) -> Tokens:
        """The ids of a rendered chat, with their places in it; see `encode_all_rendered`."""
        return self.encode_all_rendered([text], plain=plain)[0]

    @one_at_a_time
    def encode_all_rendered(self, texts: Sequence[str], *, plain: bool = False) -> list[Tokens]:
        """The ids of rendered chats, with their places in them.

        Raises:
            UserError: the tokenizer is a slow one, which does not know the places.
        """
        if not self._backend.is_fast:
            raise UserError(
                f"chat needs a fast tokenizer, which knows where its tokens stand in a text; "
                f"{type(self._backend).__name__} is a slow one: convert it into a tokenizer.json"
            )
        # The library below transformers, which would spend as long again on what is not asked for.
        backend = self._backend.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        before, backend.encode_special_tokens = backend.encode_special_tokens, plain
        try:
            found = backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before
        return [Tokens(one.ids, one.offsets) for one in found]

    @one_at_a_time
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` as they are, without special tokens."""
        known = [int(i) for i in ids if i < self.vocab_size]
        if self._backend.is_fast:  # as transformers does it, which looks at every id first
            return self._backend.backend_tokenizer.decode(known, skip_special_tokens=True)
        return self._backend.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        """Writes the folder as `transformers` does."""
        self._backend.save_pretrained(folder)


def end_id(backend: Any) -> Any:
    """The end token; of an encoder such as BERT that has none, what it writes behind a text: [SEP]."""
    return backend.sep_token_id if backend.eos_token_id is None else backend.eos_token_id
