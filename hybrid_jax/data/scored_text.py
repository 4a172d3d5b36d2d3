"""Texts to the rows of tokens that a `SequenceScorer` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from hybrid_jax.core.batches import Message
from hybrid_jax.data.chat import encode_question, end_of_turn
from hybrid_jax.data.continuations import continued, encode_continuations, start_ids
from hybrid_jax.data.long_rows import Policy
from hybrid_jax.data.tokenizer import Tokenizer

Cut = Literal["truncate_end", "truncate_start"]


class ScoredRow(NamedTuple):
    """The tokens of a row, int32 [T], and how many it had before it was cut."""

    tokens: np.ndarray
    whole: int


def encode_scored(
    tokenizer: Tokenizer,
    prompts: Sequence[str] | None,
    responses: Sequence[str],
    max_length: int | None,
    messages: Sequence[Sequence[Message]] | None = None,
    cut: Cut = "truncate_end",
) -> list[np.ndarray]:
    """The row of tokens of each text, int32 [T].

    With the tokenizer of a decoder: its start tokens, prompt, response, end token; the response is encoded
    behind the prompt (see `hybrid_jax.data.continuations`). With that of an encoder, which has marks for
    the start of a row and between its texts: ``[CLS] response [SEP]``, or ``[CLS] prompt [SEP] response [SEP]``
    (RoBERTa's relatives write the mark in the middle twice). Marks that are written in a text are letters.

    Args:
        tokenizer: of the scorer.
        prompts: what the texts answer; None where a text stands alone.
        responses: the texts.
        max_length: tokens a row at most. A longer row loses the start of its prompt, then the end (or the
            start) of its response; never a mark, nor the end token.
        messages: the conversation that each text answers, in place of its prompt where it is not empty.
        cut: the end at which a response is cut that is too long by itself.
    """
    rows = measure_scored(tokenizer, prompts, responses, max_length, messages, cut)
    return [row.tokens for row in rows]


def measure_scored(
    tokenizer: Tokenizer,
    prompts: Sequence[str] | None,
    responses: Sequence[str],
    max_length: int | None,
    messages: Sequence[Sequence[Message]] | None = None,
    cut: Cut = "truncate_end",
) -> list[ScoredRow]:
    """Encodes like `encode_scored` and also gives the length of each row before it was cut."""
    rows: Sequence[str | None] = [None] * len(responses) if prompts is None else prompts
    asked = [()] * len(responses) if messages is None else messages
    frame = _Frame(tokenizer)
    return [
        frame.row(prompt, response, conversation, max_length, cut)
        for prompt, response, conversation in zip(rows, responses, asked, strict=True)
    ]


def cut_of(policy: Policy) -> Cut:
    """The end at which to cut a text that must be scored, even if training would drop it."""
    return "truncate_start" if policy == "truncate_start" else "truncate_end"


def padded(
    rows: Sequence[np.ndarray], multiple: int = 32, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array, padded at the right.

    Args:
        rows: int32 [T] each, at least one.
        multiple: the arrays have ``multiple · 2^k`` columns, so that few lengths are compiled.
        limit: never more columns, such as the scorer's ``max_length``; no row is longer.

    Returns:
        Tokens, int32 [B T], and the mask, bool [B T].
    """
    lengths = np.array([len(row) for row in rows])
    columns = multiple
    while columns < lengths.max():
        columns *= 2
    columns = columns if limit is None else min(columns, limit)
    mask = np.arange(columns) < lengths[:, None]
    tokens = np.zeros((len(rows), columns), np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


class _Frame:
    """The special tokens around the texts of a row."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        names, ids = tokenizer.template_variables, tokenizer.special_tokens
        self._start = ids.get(str(names.get("cls_token")))
        self._separator = ids.get(str(names.get("sep_token")))
        self._chat_end: int | None = None

    def row(
        self,
        prompt: str | None,
        response: str,
        messages: Sequence[Message],
        max_length: int | None,
        cut: Cut,
    ) -> ScoredRow:
        if self._start is None or self._separator is None:
            start, before, text = self._following(prompt, response, messages)
            middle, end = [], [self._end_token(bool(messages))]
        else:
            before = None if prompt is None else self._plain(prompt)
            before = encode_question(messages, self._tokenizer) if messages else before
            start, text, end = [self._start], self._plain(response), [self._separator]
            middle = [] if before is None else end * (2 if self._doubled() else 1)
        whole = sum(map(len, (start, before or (), middle, text, end)))
        if max_length is not None:
            room = max_length - len(start) - len(middle) - len(end)
            if room < 1:
                raise ValueError(f"max_length must leave room for a token of the text, got {max_length}")
            text = text[:room] if cut == "truncate_end" else text[-room:]
            before = before and before[max(len(before) - (room - len(text)), 0) :]
        return ScoredRow(np.asarray([*start, *(before or ()), *middle, *text, *end], np.int32), whole)

    def _following(
        self, prompt: str | None, response: str, messages: Sequence[Message]
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Start tokens, prompt, and the response behind it; a conversation writes its own start."""
        if messages:
            before = encode_question(messages, self._tokenizer)
            return [], before, continued(self._tokenizer, [before], [response], plain=True)[0]
        (pair,) = encode_continuations(self._tokenizer, [prompt or ""], [response], plain=True)
        count = len(start_ids(self._tokenizer))
        return pair.prompt[:count], pair.prompt[count:], pair.response

    def _plain(self, text: str) -> list[int]:
        """Encodes a text as plain letters: special tokens written in it do not count."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return list(self._tokenizer.encode_rendered(text, plain=True).ids)

    def _doubled(self) -> bool:
        return self._tokenizer.template_variables.get("sep_token") == "</s>"

    def _end_token(self, chat: bool) -> int:
        if not chat:
            return self._tokenizer.eos_id
        if self._chat_end is None:
            found = end_of_turn(self._tokenizer)
            self._chat_end = self._tokenizer.eos_id if found is None else found
        return self._chat_end
