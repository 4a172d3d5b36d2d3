"""A tokenizer larger than its model: texts are refused that the model has no rows for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.continuations import start_ids
from hybrid_jax.data.tokenizer import Tokenizer


def bounded(tokenizer: Tokenizer, size: int | None, remedy: str) -> Tokenizer:
    """``tokenizer``, whose encoding of a text raises where an id is not below ``size``, a model's rows.

    A gather beyond the last row of an embedding gives NaN, so such a text is neither learned from nor answered.

    Args:
        tokenizer: returned as it is where all its ids are below ``size``.
        size: rows of the model; None for one that reads any id.
        remedy: the end of the message, after a colon.

    Raises:
        UserError: the end token or a start token has no row.
    """
    if size is None or tokenizer.vocab_size <= size:
        return tokenizer
    found = _Bounded(tokenizer, size, remedy)
    found.check([tokenizer.eos_id], "its end token")
    found.check(start_ids(tokenizer), "what it puts in front of a text")
    return cast(Tokenizer, found)


class _Bounded:
    """The tokenizer itself, but for methods called ``encode…``, whose ids are checked."""

    def __init__(self, tokenizer: Tokenizer, size: int, remedy: str):
        self._tokenizer, self._size, self._remedy = tokenizer, size, remedy

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._tokenizer, name)
        if not name.startswith("encode"):
            return found

        def encode(*args: Any, **kwargs: Any) -> Any:
            encoded = found(*args, **kwargs)
            texts = encoded if name in ("encode_batch", "encode_all_rendered") else [encoded]
            self.check([token for text in texts for token in getattr(text, "ids", text)], "the text")
            return encoded

        return encode

    def check(self, ids: Sequence[int], what: str) -> None:
        beyond = [i for i in ids if i >= self._size]
        if beyond:
            token = next((t for t, i in self._tokenizer.vocabulary.items() if i == beyond[0]), "")
            raise UserError(
                f"{what} holds the token {token!r} with the id {beyond[0]}, but the model has {self._size} "
                f"rows: {self._remedy}"
            )
