"""Pairs of answers, and single answers with a label, as rows for a language model that learns from preferences.

Both rows of a pair begin with the same prompt, token by token, and only the answer behind it is learned. Both
sides are cut alike, so that no difference of log-probs is one of prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from hybrid_jax.core.batches import Example, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.continuations import start_ids
from hybrid_jax.data.loader import visits
from hybrid_jax.data.long_rows import ChatPolicy, LongRows
from hybrid_jax.data.packing import Encoded, cut_start, encode_examples, pad
from hybrid_jax.data.places import places_of, some_of
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Pair = tuple[Encoded, Encoded]
DROP = LongRows("drop", "length", choice=None, rows="pairs")


class RowsOfTwo:
    """Endless batches of rows of two sequences. The whole state is the cursor.

    Args:
        pairs: the rows.
        length: T, tokens a sequence at most.
        seed: of the order of the rows, at least 0.
    """

    def __init__(self, pairs: Sequence[Pair], length: int, seed: int):
        self._pairs, self._length, self._seed = pairs, length, seed

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return len(self._pairs)

    def index(self, cursor: int, size: int) -> np.ndarray:
        """The numbers of the rows ``cursor`` to ``cursor + size`` of the endless stream, [size]."""
        return visits(len(self._pairs), self._seed, cursor, size)[1]

    def rows(self, index: np.ndarray) -> TokenBatch:
        """The rows of those numbers, [size 2 T]."""
        rows = pad([row for i in index for row in self._pairs[i]], self._length)
        return jax.tree.map(lambda x: np.reshape(x, (len(index), 2, self._length)), rows)

    def batch(self, cursor: int, size: int) -> TokenBatch:
        """Rows ``cursor`` to ``cursor + size`` of the endless stream, [size 2 T]."""
        return self.rows(self.index(cursor, size))


class PairStream(RowsOfTwo):
    """Pairs of answers to one prompt, the better one first.

    Args:
        preferences: rows of a source; of more than two answers the best and the worst count. Ties, and pairs
            of the same answer, are left out, and counted in the log.
        tokenizer: of the model.
        length: T, tokens of a prompt with an answer.
        seed: of the order of the rows, at least 0.
        long_rows: what becomes of a pair with a longer one. "truncate_end" cuts both rows behind ``length``
            tokens, "truncate_start" takes the same tokens from the start of both prompts.

    Raises:
        UserError: no pair is left, or the two prompts of a pair are not the same tokens.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        tokenizer: Tokenizer,
        length: int,
        seed: int = 0,
        long_rows: LongRows = DROP,
    ):
        told = [row for row in preferences if not row.tie]
        if len(told) < len(preferences):
            log.warning("%d of %d pairs are ties: left out", len(preferences) - len(told), len(preferences))
        if not told:
            raise UserError(f"the data is empty: all {len(preferences)} rows are ties, which say nothing")
        answers = [_answered(row.example, text) for row in told for text in (row.chosen, row.rejected)]
        encoded = _encoded(answers, tokenizer)
        pairs, places = (
            list(zip(encoded[::2], encoded[1::2], strict=True)),
            places_of([r.example for r in told]),
        )
        for place, pair in zip(places, pairs, strict=True):
            _check_prompts(place, pair)
        alike = [_alike(pair) for pair in pairs]
        if found := some_of(alike, places, "pairs"):
            log.warning("%s have the same better and worse answer: left out", found)
        kept = [i for i, same in enumerate(alike) if not same]
        if not kept:
            raise UserError(f"the data is empty: all {len(pairs)} pairs are of the same answer twice")
        fitted = _fitted([pairs[i] for i in kept], length, long_rows, [places[i] for i in kept], tokenizer)
        super().__init__([pair for pair in fitted if pair is not None], length, seed)


class AnswerStream(RowsOfTwo):
    """Single answers that are good or bad, each beside the answer to another prompt, which estimates a KL.

    Attribute ``good``: whether each answer is, bool [N].

    Args:
        examples: prompts with an answer, plain or conversations.
        good: whether each answer is.
        tokenizer, length, seed: as of `PairStream`.
        long_rows: as of `PairStream`, for an answer together with the one beside it.

    Raises:
        UserError: no row is left, or all are of one class.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        good: Sequence[bool],
        tokenizer: Tokenizer,
        length: int,
        seed: int = 0,
        long_rows: LongRows = DROP,
    ):
        others = _of_another_prompt([(row.prompt, row.question) for row in examples])
        _check_answers(examples)
        answers = [
            _answered(row, text.response or "")
            for row, other in zip(examples, others, strict=True)
            for text in (row, examples[other])
        ]
        encoded = _encoded(answers, tokenizer)
        # The other answer is only read, so that its length never leaves a row out.
        beside = [
            row._replace(tokens=row.tokens[:length], loss_mask=row.loss_mask[:length]) for row in encoded[1::2]
        ]
        pairs = list(zip(encoded[::2], beside, strict=True))
        fitted = _fitted(pairs, length, long_rows, places_of(examples), tokenizer)
        kept = [i for i, pair in enumerate(fitted) if pair is not None]
        self.good = np.array([good[i] for i in kept], bool)
        if self.good.all() or not self.good.any():
            which = "good" if self.good.any() else "bad"
            raise UserError(f"answers must be of both classes, good and bad, got {len(kept)} that are {which}")
        super().__init__([pair for pair in fitted if pair is not None], length, seed)


def encode_answers(examples: Sequence[Example], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of the last answer of each row, with its end, and which of them are learned.

    Raises:
        UserError: a row has no answer, or cannot be encoded.
    """
    _check_answers(examples)
    rows = _encoded([_answered(row, row.response or "") for row in examples], tokenizer)
    starts = [_prompt_length(row) for row in rows]
    return [(row.tokens[n:], row.loss_mask[n:]) for row, n in zip(rows, starts, strict=True)]


def _check_answers(examples: Sequence[Example]) -> None:
    for place, row in zip(places_of(examples), examples, strict=True):
        if row.response is None:
            raise UserError(f"{place}: no answer to learn from, got a prompt alone")


def _answered(example: Example, text: str) -> Example:
    """The example with another answer, which alone is learned: earlier ones belong to the prompt."""
    question = [{**m, "train": False} if m["role"] == "assistant" else m for m in example.question]
    messages = (*question, {"role": "assistant", "content": text}) if example.messages else ()
    return replace(example, response=text, messages=messages)


def _encoded(answers: Sequence[Example], tokenizer: Tokenizer) -> list[Encoded]:
    """Each answer as a row of which it alone is learned."""
    encoded = encode_examples(answers, tokenizer, None)
    if len(encoded) != len(answers):
        raise UserError("a conversation must be one row of tokens to be one of a pair, got several")
    return encoded


def _prompt_length(row: Encoded) -> int:
    return int(np.argmax(np.append(row.loss_mask, True)))


def _check_prompts(place: str, pair: Pair) -> None:
    better, worse = (row.tokens[: _prompt_length(row)] for row in pair)
    if not np.array_equal(better, worse):
        raise UserError(
            f"{place}: the prompt must be the same tokens before both answers, got others: the chat template "
            "writes it in another way for each answer"
        )


def _alike(pair: Pair) -> bool:
    return np.array_equal(pair[0].tokens, pair[1].tokens)


def _fitted(
    pairs: Sequence[Pair], most: int, long_rows: LongRows, places: Sequence[str], tokenizer: Tokenizer
) -> list[Pair | None]:
    """The pairs, both rows of a longer one cut alike, or None in its place."""
    start = start_ids(tokenizer)
    lengths = [max(len(row.tokens) for row in pair) for pair in pairs]
    fitted = [
        _cut(pair, most, long_rows.policy, start) if length > most else pair
        for pair, length in zip(pairs, lengths, strict=True)
    ]
    left_out = [pair is None for pair in fitted]
    long_rows.report(lengths, left_out, places, most, "cut, nothing would tell the answers apart")
    return fitted


def _cut(pair: Pair, most: int, policy: ChatPolicy, start: tuple[int, ...]) -> Pair | None:
    if policy == "truncate_end":
        cut = [row._replace(tokens=row.tokens[:most], loss_mask=row.loss_mask[:most]) for row in pair]
    elif policy == "truncate_start":
        excess = max(len(row.tokens) for row in pair) - most
        cut = [_shorter_prompt(row, excess, start) for row in pair]
    else:
        return None
    told = all(row is not None and row.loss_mask.any() for row in cut)
    return (cut[0], cut[1]) if told and not _alike((cut[0], cut[1])) else None


def _shorter_prompt(row: Encoded, excess: int, start: tuple[int, ...]) -> Encoded:
    """The row without ``excess`` tokens of its prompt's start; nothing to learn where no prompt remains."""
    prompt = _prompt_length(row)
    if excess >= prompt - len(start):
        return row._replace(loss_mask=np.zeros_like(row.loss_mask))
    left = cut_start(row.tokens[:prompt], prompt - excess, start)
    mask = np.append(np.zeros(len(left), bool), row.loss_mask[prompt:])
    return row._replace(tokens=np.append(left, row.tokens[prompt:]), loss_mask=mask)


def _of_another_prompt(prompts: Sequence[object]) -> list[int]:
    """For each row one that asks something else; the next row where all ask the same.

    Rows of one prompt that follow each other are a run. The k-th row of a run takes the k-th of the next run,
    in a circle: so rows that list the good answer first are not all compared with good ones.
    """
    count = len(prompts)
    starts = [i for i in range(count) if not i or prompts[i] != prompts[i - 1]]
    runs = [range(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]
    if len(runs) == 1:
        return [(row + 1) % count for row in range(count)]
    others = []
    for i, run in enumerate(runs):
        after = runs[(i + 1) % len(runs)]
        if prompts[after[0]] == prompts[run[0]]:  # the last run, which asks what the first one does
            after = runs[1]
        others += [after[k % len(after)] for k in range(len(run))]
    return others
