"""Examples to rows of tokens: which tokens are learned, padding, and packing by segment ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.core.batches import Example, Message, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.long_work import shown
from hybrid_jax.data.chat import encode_conversations, encode_question
from hybrid_jax.data.continuations import Continuation, encode_continuations, encode_prompts, start_ids
from hybrid_jax.data.long_rows import DEFAULT, ChatPolicy, LongRows
from hybrid_jax.data.oldest_turns import fitting_conversations, fitting_question
from hybrid_jax.data.places import places_of, some_of
from hybrid_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OPEN_ROWS = (
    1024  # first fit tries the newest rows only, so that packing stays linear in the number of sequences
)


class Encoded(NamedTuple):
    """One sequence: its tokens, int32 [T], and which of them are targets, bool [T] (never the first)."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    is_document: bool = False  # learned as a whole, whatever it begins with


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int | None,
    long_rows: LongRows = DEFAULT,
) -> list[Encoded]:
    """Encodes every example with its loss mask: prompt, response, end token; or a whole conversation.

    The prompt is read but not learned; the response and the end token are. It begins with the tokenizer's start
    tokens and is what the policy is asked with; the response is encoded behind it (see
    `hybrid_jax.data.continuations`). A document (an empty prompt) is learned from its second token on, for
    nothing precedes the first. Of a conversation, all turns of the
    assistant are learned; it may become several sequences (see `hybrid_jax.data.chat`).

    What becomes of a sequence of more than ``max_length`` tokens is said by ``long_rows``. Cut at its end, it
    keeps its first tokens: the response then has no end token, since it did not end there. Cut at its start, it
    keeps its last tokens, and a response whose own start or whole prompt is lost is read, not learned. One that
    is left without anything to learn is left out. A conversation that is cut between turns becomes several rows
    (`hybrid_jax.data.oldest_turns`); other rows are then left out. A line in the log counts them.

    Raises:
        UserError: for an example without a response, or a conversation that cannot be encoded; it names the
            row. Also where ``long_rows`` does not allow long ones, or all would be left out.
    """
    _report_empty(examples)
    encoded: list[list[Encoded]] = []  # of each example
    straddled = 0
    chats = [(example.messages, example.template_variables) for example in examples if example.messages]
    encoded_chats = shown(encode_conversations(chats, tokenizer), len(chats), "encoding", "conversations")
    pairs = iter(_encode_pairs(examples, tokenizer))
    places = places_of(examples)
    for place, example in zip(places, examples, strict=True):
        try:
            if example.messages:
                conversations = next(encoded_chats)
                encoded.append([Encoded(tokens, mask) for tokens, mask, _ in conversations])
                straddled += sum(conversation.straddled for conversation in conversations)
            else:
                encoded.append([next(pairs)])
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    if straddled:
        log.warning("%d answers begin inside a token of their header, which is not learned", straddled)
    if max_length is not None and long_rows.policy == "drop_turns":
        return _cut_between_turns(encoded, examples, places, max_length, long_rows, tokenizer)
    sequences = [sequence for row in encoded for sequence in row]
    if max_length is None:
        return sequences
    places = [place for place, row in zip(places, encoded, strict=True) for _ in row]
    return _fitted(sequences, max_length, long_rows, places, start_ids(tokenizer))


def _report_empty(examples: Sequence[Example]) -> None:
    """Says how many rows have an empty text: a response that ends at once, or a document instead of a pair."""
    places = places_of(examples)
    silent = [
        example.response == "" and not any("tool_calls" in message for message in example.messages[-1:])
        for example in examples
    ]
    if found := some_of(silent, places):
        log.warning("%s have an empty response, which teaches to end at once", found)
    alone = [not example.prompt and not example.messages for example in examples]
    if not all(alone) and (found := some_of(alone, places)):
        log.warning("%s have an empty prompt and are learned as documents", found)


def _fitted(
    sequences: Sequence[Encoded],
    most: int,
    long_rows: LongRows,
    places: Sequence[str],
    start: tuple[int, ...],
) -> list[Encoded]:
    """The sequences, those of more than ``most`` tokens cut or left out."""
    fitted: list[Encoded | None] = []
    for sequence in sequences:
        long = len(sequence.tokens) > most
        fitted.append(_cut(sequence, most, long_rows.policy, start) if long else sequence)
    lengths = [len(sequence.tokens) for sequence in sequences]
    long_rows.report(lengths, [sequence is None for sequence in fitted], places, most)
    return [sequence for sequence in fitted if sequence is not None]


def _cut_between_turns(
    rows: Sequence[list[Encoded]],
    examples: Sequence[Example],
    places: Sequence[str],
    most: int,
    long_rows: LongRows,
    tokenizer: Tokenizer,
) -> list[Encoded]:
    """The sequences of each example; of a conversation with one of more than ``most`` tokens, its parts."""
    lengths = [max(len(sequence.tokens) for sequence in row) for row in rows]
    fitted = [row if length <= most else [] for row, length in zip(rows, lengths, strict=True)]
    long = [n for n, row in enumerate(fitted) if not row and examples[n].messages]
    chats = [(examples[n].messages, examples[n].template_variables) for n in long]
    parts, passed_over = fitting_conversations(chats, [places[n] for n in long], tokenizer, most)
    for number, found in zip(long, parts, strict=True):
        fitted[number] = [Encoded(tokens, mask) for tokens, mask, _ in found]
    left_out = [not row for row in fitted]
    long_rows.report(lengths, left_out, places, most, "no conversation, or none of its turns fits")
    if passed_over:
        log.warning("%d turns alone have more than %d tokens: left out", passed_over, most)
    return [sequence for row in fitted for sequence in row]


def _cut(sequence: Encoded, most: int, policy: ChatPolicy, start: tuple[int, ...]) -> Encoded | None:
    tokens, mask = sequence.tokens, sequence.loss_mask
    if policy == "truncate_end":
        tokens, mask = tokens[:most], mask[:most]
    elif policy == "truncate_start":
        kept = kept_start(tokens, most, start)
        tokens, mask = cut_start(tokens, most, start), mask[len(mask) - (most - kept) :].copy()
        # What begins without its own start, or without any prompt, would be taught as a beginning.
        mask[: 1 if sequence.is_document else int(np.argmin(np.append(mask, False)))] = False
        mask = np.append(np.zeros(kept, bool), mask)
    else:
        return None
    return Encoded(tokens, mask) if mask.any() else None


def cut_start(tokens: np.ndarray, most: int, start: tuple[int, ...]) -> np.ndarray:
    """The last of ``most`` tokens, behind the tokenizer's start tokens where ``tokens`` begin with them."""
    kept = kept_start(tokens, most, start)
    return np.append(tokens[:kept], tokens[max(len(tokens) - (most - kept), kept) :])


def kept_start(tokens: np.ndarray, most: int, start: tuple[int, ...]) -> int:
    """The number of start tokens to keep in a row of ``most`` tokens: all, or none if they would fill it."""
    begins = tuple(tokens[: len(start)]) == start
    return len(start) if begins and len(start) < most else 0


def encode_prompt(example: Example, tokenizer: Tokenizer, most: int | None = None) -> list[int]:
    """The tokens to answer: start tokens and prompt, or a conversation up to the header of its last answer.

    Args:
        example: whose response is not read.
        tokenizer: makes the tokens.
        most: the oldest turns of a conversation with more tokens are left out, so that it fits if it can.
    """
    if not example.messages:
        return encode_prompts(tokenizer, [example.prompt])[0]

    def encode(messages: Sequence[Message]) -> list[int]:
        return encode_question(messages, tokenizer, example.template_variables)

    if most is None:
        return encode(example.question)
    return fitting_question(example.question, encode, most)


def _encode_pairs(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Encoded]:
    """The rows that are no conversations; says how many have a token of both prompt and response."""
    chosen = [not example.messages for example in examples]
    rows, places = list(compress(examples, chosen)), list(compress(places_of(examples), chosen))
    for place, row in zip(places, rows, strict=True):
        if row.response is None:
            raise UserError(
                f"{place}: no response to learn from; set response_field, or use it for prompts only"
            )
    try:
        pairs = _continuations(rows, tokenizer)
    except UserError:
        for place, row in zip(places, rows, strict=True):  # which one is it?
            try:
                _continuations([row], tokenizer)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        raise
    if found := some_of([pair.joined for pair in pairs], places):
        log.info(
            "%s have a prompt whose end the tokenizer would join with the response into one token (a space at "
            "the end, as a rule): they are learned as the policy is asked, with the prompt's own tokens",
            found,
        )
    start = start_ids(tokenizer)
    return [
        _encoded(pair.prompt, pair.response, tokenizer.eos_id, is_document=tuple(pair.prompt) == start)
        for pair in pairs
    ]


def _continuations(rows: Sequence[Example], tokenizer: Tokenizer) -> list[Continuation]:
    responses = [row.response or "" for row in rows]
    return encode_continuations(tokenizer, [row.prompt for row in rows], responses)


def _encoded(prompt: list[int], response: list[int], end: int, is_document: bool) -> Encoded:
    tokens = [*prompt, *response]
    if response[-1:] != [end]:  # the response may write it
        tokens.append(end)
    mask = np.arange(len(tokens)) >= max(len(prompt), 1)
    return Encoded(np.asarray(tokens, np.int32), mask, is_document)


def pack(sequences: Sequence[Encoded], length: int) -> TokenBatch:
    """Rows of ``length`` tokens holding several sequences each: first fit, in the order given.

    Segment ids number the sequences of a row from 1; 0 is padding. Every sequence stays whole.
    """
    free = np.zeros(0, np.int64)  # of the newest rows
    rows: list[list[Encoded]] = []
    for sequence in sequences:
        size = _checked_size(sequence, length)
        fits = np.flatnonzero(free >= size)
        if fits.size == 0:
            rows.append([])
            free = np.append(free, length)[-OPEN_ROWS:]
            fits = np.array([len(free) - 1])
        free[fits[0]] -= size
        rows[len(rows) - len(free) + fits[0]].append(sequence)
    return _to_batch(rows, length)


def pad(sequences: Sequence[Encoded], length: int) -> TokenBatch:
    """One sequence a row, padded at the right to ``length``."""
    for sequence in sequences:
        _checked_size(sequence, length)
    return _to_batch([[sequence] for sequence in sequences], length)


def number_pairs(batch: TokenBatch) -> TokenBatch:
    """A batch of host arrays as an encoder-decoder reads it: of sequence k, what precedes its first target is
    segment 2k − 1, the source, and the rest is segment 2k, the target."""
    ids, learned = np.asarray(batch.segment_ids), np.asarray(batch.loss_mask)
    starts = np.diff(ids, axis=1, prepend=0) != 0
    latest = np.maximum.accumulate(np.where(starts | learned, np.arange(ids.shape[1]), 0), axis=1)
    is_target = np.take_along_axis(learned, latest, axis=1)  # a start is never learned
    numbers = np.where(ids > 0, 2 * ids - 1 + is_target, 0).astype(np.int32)
    return token_batch(np.asarray(batch.tokens), numbers, learned)


def token_batch(tokens: np.ndarray, segment_ids: np.ndarray, loss_mask: np.ndarray) -> TokenBatch:
    """A batch of host arrays; they become device arrays where a step is called."""
    arrays: Any = {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask}
    return TokenBatch(**arrays)


def _checked_size(sequence: Encoded, length: int) -> int:
    if len(sequence.tokens) > length:
        raise ValueError(f"a sequence must fit length {length}, got {len(sequence.tokens)} tokens")
    return len(sequence.tokens)


def _to_batch(rows: Sequence[Sequence[Encoded]], length: int) -> TokenBatch:
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    loss_mask = np.zeros((len(rows), length), bool)
    for row, sequences in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(sequences, start=1):
            here = slice(start, start + len(sequence.tokens))
            tokens[row, here] = sequence.tokens
            segment_ids[row, here] = segment
            loss_mask[row, here] = sequence.loss_mask
            start = here.stop
    return token_batch(tokens, segment_ids, loss_mask)
