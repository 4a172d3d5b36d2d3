"""The protocol of all tokenizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def one_at_a_time(method: Method) -> Method:
    """Lets one thread at a time into methods of a tokenizer, by its ``_lock``.

    Whether special tokens count is a state of the library's tokenizer: another thread must not read a text
    while it is set for one.
    """

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked  # pyright: ignore[reportReturnType]


class Tokens(NamedTuple):
    """Ids, and the characters ``[start, end)`` of the text that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer(Protocol):
    """Turns texts into token ids and back. It needs no pad token, since masks come from lengths."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special ones included."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        ...

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The ids of all tokens, special ones included."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The jinja source that renders a conversation, if there is one."""
        ...

    @property
    def template_variables(self) -> Mapping[str, Any]:
        """The names that a chat template may use beside the messages, such as ``eos_token``."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The special tokens and their ids."""
        ...

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The tokens that ``transformers`` puts in front of a text by default; most often BOS or none."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no special token is added (see `hybrid_jax.data.continuations`)."""
        ...

    def encode_batch(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """The ids of each text as by `encode`; where ``plain``, written special tokens are letters."""
        ...

    def encode_rendered(self, text: str, *, plain: bool = False) -> Tokens:
        """The ids of a rendered chat: written special tokens become those tokens, unless ``plain``."""
        ...

    def encode_all_rendered(self, texts: Sequence[str], *, plain: bool = False) -> list[Tokens]:
        """The ids of many rendered chats at once, which takes less time."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens and ids outside the vocabulary are skipped."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_tokenizer` and ``transformers.AutoTokenizer`` load, chat template too."""
        ...


def encodable(text: str) -> str:
    """``text`` without lone surrogates (JSON may hold them), which UTF-8 cannot write."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
