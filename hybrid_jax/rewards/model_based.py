"""How rewards run a frozen model over texts: in batches of few shapes, each dispatched as soon as it is full.

A text becomes rows of token numbers; rows of about the same length share a batch. Every batch of a length has
the same number of rows, so a model is compiled once a length and a text's score does not depend on the texts
beside it. Nothing waits for the device until the scores are asked for: while it computes a batch, the host
tokenises the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_jax.data.tokenizer_files import VOCABULARY, check_tokenizer_files
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder import Encoder
from hybrid_jax.models.folders.encoder import load_encoder
from hybrid_jax.models.folders.hf import load_adapted
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.peft import ADAPTER_CONFIG
from hybrid_jax.models.folders.pretrained import load_pretrained
from hybrid_jax.models.vocabulary import own_tokenizer_of

SHORTEST = 16  # tokens of the shortest batch; the others are 32, 64, …
TEXTS_AT_A_TIME = 32  # tokenised before the next full batch is sent off

PADDING, CONTEXT, COUNTED = 0, 1, 2  # roles of a token: padding; read; read and part of the score

Rows = tuple[np.ndarray, ...]  # of one item: token ids and their roles; two texts make four rows
Program = Callable[..., Array]  # rows [B T] int32, as many as an item has -> [B ...]


def run_in_batches(
    program: Program, items: Iterable[Rows], *, batch_size: int, longest: int
) -> Callable[[], np.ndarray]:
    """Starts ``program`` on every item; returns what waits for its results, in the order of the items.

    Args:
        program: a jitted function of the items' rows, padded with 0 on the right, which is `PADDING`.
        items: made lazily, so that the device computes while the next are made.
        batch_size: items of every batch; the last one of a length is filled up with empty ones.
        longest: no item has a row of more tokens.
    """
    waiting: dict[int, list[tuple[int, Rows]]] = {}
    running: list[tuple[list[int], Array]] = []

    def send(length: int) -> None:
        batch = waiting.pop(length)
        running.append(([number for number, _ in batch], program(*_padded(batch, batch_size, length))))

    for number, rows in enumerate(items):
        length = _bucket(max(map(len, rows)), longest)
        batch = waiting.setdefault(length, [])
        batch.append((number, rows))
        if len(batch) == batch_size:
            send(length)
    for length in sorted(waiting):
        send(length)
    return functools.partial(_fetched, running)


def _bucket(length: int, longest: int) -> int:
    """The power of two that holds ``length`` tokens, from `SHORTEST` on; at most ``longest``."""
    return min(max(SHORTEST, 1 << max(length - 1, 0).bit_length()), longest)


def _padded(batch: Sequence[tuple[int, Rows]], batch_size: int, length: int) -> list[Array]:
    columns = len(batch[0][1])
    arrays = np.zeros((columns, batch_size, length), np.int32)
    for i, (_, rows) in enumerate(batch):
        for column, row in enumerate(rows):
            arrays[column, i, : len(row)] = row
    return [jnp.asarray(array) for array in arrays]


def _fetched(running: Sequence[tuple[list[int], Array]]) -> np.ndarray:
    if not running:
        return np.zeros(0, np.float32)
    numbers = np.concatenate([numbers for numbers, _ in running])
    values = np.concatenate([np.asarray(values)[: len(numbers)] for numbers, values in running])
    found = np.empty_like(values)
    found[numbers] = values
    return found


# --------------------------------------------------------------------------------- models, read once a process


class TextEncoder(NamedTuple):
    """An encoder and its tokenizer."""

    model: Encoder
    params: Params
    tokenizer: Any  # tokenizers.Tokenizer

    def rows(self, texts: Sequence[str]) -> Iterator[Rows]:
        """(ids, roles) of each text: special tokens are context, the text's own ones count.

        A special token that a text spells out is ordinary letters. What is longer than the model reads is cut.
        """
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            for encoding in self.tokenizer.encode_batch(encodable(texts[start : start + TEXTS_AT_A_TIME])):
                if (largest := max(encoding.ids, default=0)) >= (rows := self.model.config.vocab_size):
                    raise UserError(
                        f"a text holds the token {largest}, but the encoder has {rows} rows: its folder "
                        "needs the tokenizer that belongs to it"
                    )
                yield np.array(encoding.ids), np.where(encoding.special_tokens_mask, CONTEXT, COUNTED)


class TextModel(NamedTuple):
    """A language model and its tokenizer."""

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer


def text_encoder(path: str) -> TextEncoder:
    """The encoder of a folder (or of the hub) with its tokenizer, read once a process.

    Raises:
        UserError: the folder, or its tokenizer, cannot be read.
    """
    return _text_encoder(find_folder(path).resolve())


def text_model(path: str) -> TextModel:
    """The language model of a folder (or of the hub) with its tokenizer, read once a process.

    Raises:
        UserError: the folder, or its tokenizer, cannot be read.
    """
    return _text_model(find_folder(path).resolve())


@functools.cache
def _text_encoder(folder: Path) -> TextEncoder:
    model, params = load_encoder(folder)
    tokenizer = _own_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_length)
    tokenizer.encode_special_tokens = True
    return TextEncoder(model, jax.tree.map(jnp.asarray, params), tokenizer)


@functools.cache
def _text_model(folder: Path) -> TextModel:
    model, params = (load_adapted if (folder / ADAPTER_CONFIG).is_file() else load_pretrained)(folder)
    tokenizer = bounded(load_tokenizer(folder), model.vocab_size, own_tokenizer_of(folder))
    return TextModel(model, jax.tree.map(jnp.asarray, params), tokenizer)


def _own_tokenizer(folder: Path) -> Any:
    """Reads tokenizer.json, or the files of older folders through `transformers`."""
    from tokenizers import Tokenizer as Backend

    check_tokenizer_files(folder)
    try:
        if (folder / VOCABULARY).is_file():
            return Backend.from_file(str(folder / VOCABULARY))
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return Backend.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises nothing more specific
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {str(folder)!r} cannot be read: {reason}") from error


def encodable(texts: Sequence[str]) -> list[str]:
    """Removes lone surrogates, which JSON may hold and UTF-8 cannot write."""
    return [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]


# -------------------------------------------------------------------------------------------------- embeddings


@functools.partial(jax.jit, static_argnames="model")
def _embeddings(
    model: Encoder, params: Params, tokens: Int[Array, "B T"], roles: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    return model.sentence_embeddings(params, tokens, roles != PADDING)


def start_embeddings(
    encoder: TextEncoder, texts: Sequence[str], batch_size: int
) -> Callable[[], dict[str, np.ndarray]]:
    """Starts to embed the distinct ones of ``texts``; returns what waits for text -> vector float64 [D]."""
    distinct = list(dict.fromkeys(texts))
    program = functools.partial(_embeddings, encoder.model, encoder.params)
    finish = run_in_batches(
        program, encoder.rows(distinct), batch_size=batch_size, longest=encoder.model.max_length
    )
    return lambda: dict(zip(distinct, finish().astype(np.float64), strict=True))


# ----------------------------------------------------------------------------------------------------- columns


def texts_of_rows(column: Sequence[Any], name: str) -> list[list[str]]:
    """A column that holds texts: a list of accepted ones a row, a bare text counts as one.

    Raises:
        UserError: a row has none.
    """
    rows = []
    for number, value in enumerate(column):
        texts = [value] if isinstance(value, str) else list(value or ())
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"row {number} of column {name!r} must be a text or a list of texts, got {_short(value)}"
            )
        rows.append(texts)
    return rows


def needed_column(columns: dict[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The column ``name``.

    Raises:
        UserError: the data has none.
    """
    if columns.get(name) is None:
        known = ", ".join(sorted(columns)) or "no columns"
        raise UserError(f"the data must have the column {name!r}, got {known}")
    return columns[name]


def _short(value: Hashable) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
