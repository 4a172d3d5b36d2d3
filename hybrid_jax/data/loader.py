"""Endless streams of batches whose whole state is one integer: the cursor, the rows handed out so far.

``batch(cursor, size)`` is a pure function of (data, seed, cursor); the next cursor is ``cursor + size``. An
epoch visits every row once, in an order drawn from (seed, epoch) alone, so a resumed run, or one whose batch
size changed, reads exactly what is left. A batch may straddle two epochs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import jax
import numpy as np

from hybrid_jax.core.batches import Example, PromptBatch, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.seeds import check_seed
from hybrid_jax.data.continuations import start_ids
from hybrid_jax.data.long_rows import DEFAULT, LongRows
from hybrid_jax.data.packing import (
    Encoded,
    cut_start,
    encode_examples,
    encode_prompt,
    number_pairs,
    pack,
    pad,
    token_batch,
)
from hybrid_jax.data.places import places_of
from hybrid_jax.data.tokenizer import Tokenizer

_REFUSED = LongRows("error", "max_prompt_length")
ORDER, OFFSET = 0, 1  # what an epoch draws: the order of its rows, where its windows start


class SFTStream:
    """Batches of examples to learn from.

    Prompts and responses, and short documents, are packed several to a row (``packing``), once and for all,
    or stand one to a row, a batch being padded to the smallest of ``buckets`` that holds it. Where all
    examples are documents and one is longer than ``max_length``, the documents are joined and cut into
    windows of exactly ``max_length`` tokens, and every epoch moves the cuts: nothing of them is lost. A window
    begins with the tokenizer's start tokens, which are never learned, so that it reads like a text.

    Args:
        examples: rows of a source, each with a response (a document is a response to an empty prompt).
        tokenizer: encodes them, once, here.
        max_length: T, tokens a row at most.
        packing: several sequences a row; without it a row is one sequence.
        seed: of the order of rows, at least 0.
        buckets: lengths to pad to without packing; `length_buckets` of the data if None.
        pairs: number prompts and responses apart, for an encoder-decoder; see `number_pairs`.
        long_rows: what becomes of longer ones; see `encode_examples`.

    Raises:
        UserError: no examples, an example without a response; among pairs one without a prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        max_length: int,
        *,
        packing: bool = True,
        seed: int = 0,
        buckets: Sequence[int] | None = None,
        pairs: bool = False,
        long_rows: LongRows = DEFAULT,
    ):
        _check(examples, seed)
        if max_length < 2:
            raise UserError(f"max_length must be at least 2 tokens, got {max_length}")
        for place, example in zip(places_of(examples), examples, strict=True):
            if pairs and not example.prompt and not example.messages:
                raise UserError(f"{place}: an encoder-decoder needs a prompt to encode, got none")
        self._pairs = pairs
        self._rows = _arrange(examples, tokenizer, max_length, packing, seed, buckets, long_rows)
        self._seed = seed

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return len(self._rows)

    def batch(self, cursor: int, size: int) -> TokenBatch:
        """Rows ``cursor`` to ``cursor + size`` of the endless stream, [size T]."""
        return self._numbered(self._rows.take(*visits(self.num_rows, self._seed, cursor, size)))

    def sequential(self, size: int) -> Iterator[TokenBatch]:
        """All data once, in order, for evaluation; rows of padding alone fill up the last batch."""
        for batch in self._rows.in_order(size):
            yield self._numbered(_fill(batch, size))

    def _numbered(self, batch: TokenBatch) -> TokenBatch:
        return number_pairs(batch) if self._pairs else batch


class PromptStream:
    """Batches of prompts to answer, left-padded to the smallest of ``buckets`` that holds the batch.

    Args:
        examples: rows of a source; responses, if there are any, stay with the examples for the rewards.
            Of a conversation, what precedes its last answer is read, with the header of that answer.
        tokenizer: encodes the prompts, once, here.
        max_prompt_length: P, tokens a prompt at most; None has no bound.
        seed: of the order of rows, at least 0.
        buckets: lengths to pad to; `length_buckets` of the data if None. One bucket means one compiled
            rollout.
        long_rows: what becomes of a longer prompt. Cut at its start it keeps its end, which says what is asked;
            cut between turns, a conversation keeps the system's messages and the last turns.

    Raises:
        UserError: no examples, an empty prompt, or long ones that ``long_rows`` does not allow.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        max_prompt_length: int | None,
        *,
        seed: int = 0,
        buckets: Sequence[int] | None = None,
        long_rows: LongRows = _REFUSED,
    ):
        _check(examples, seed)
        places = places_of(examples)
        prompts = [_prompt(row, tokenizer, place) for row, place in zip(examples, places, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        most = max_prompt_length or max(lengths)
        if long_rows.policy == "drop_turns":
            prompts = [
                prompt if len(prompt) <= most else np.asarray(encode_prompt(row, tokenizer, most), np.int32)
                for row, prompt in zip(examples, prompts, strict=True)
            ]
        kept = [len(prompt) <= most or long_rows.policy.startswith("truncate") for prompt in prompts]
        why = "no conversation, or its last turn does not fit"
        long_rows.report(lengths, [not keep for keep in kept], places, most, why)
        self.examples = tuple(itertools.compress(examples, kept))
        prompts = itertools.compress(prompts, kept)
        if long_rows.policy == "truncate_end":
            self._prompts = [prompt[:most] for prompt in prompts]
        else:
            self._prompts = [cut_start(prompt, most, start_ids(tokenizer)) for prompt in prompts]
        self.longest = max(map(len, self._prompts))
        self._buckets = sorted(buckets) if buckets else length_buckets(self.longest, max_prompt_length)
        self._seed = seed

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return len(self._prompts)

    def index(self, cursor: int, size: int) -> np.ndarray:
        """The numbers of the rows ``cursor`` to ``cursor + size`` of the endless stream in ``examples``."""
        return visits(self.num_rows, self._seed, cursor, size)[1]

    def batch(self, cursor: int, size: int, *, widest: bool = False) -> PromptBatch:
        """Rows ``cursor`` to ``cursor + size`` of the endless stream, [size P]; ``widest`` fixes P."""
        rows = self.index(cursor, size)
        longest = self.longest if widest else max(len(self._prompts[row]) for row in rows)
        return self._left_padded(rows, _bucket(longest, self._buckets))

    def sequential(self, size: int) -> Iterator[tuple[PromptBatch, int]]:
        """All prompts once, in order, each batch of one shape, with the number of its rows that count.

        The last batch is filled up with its own first prompt: a real one, so that sampling it is safe.
        """
        for start in range(0, self.num_rows, size):
            rows = list(range(start, min(start + size, self.num_rows)))
            filled = rows + [start] * (size - len(rows))
            yield self._left_padded(filled, self._buckets[-1]), len(rows)

    def _left_padded(self, rows: Sequence[int] | np.ndarray, length: int) -> PromptBatch:
        tokens = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            prompt = self._prompts[row]
            tokens[i, length - len(prompt) :] = prompt
            mask[i, length - len(prompt) :] = True
        return PromptBatch(tokens=tokens, mask=mask, examples=tuple(self.examples[row] for row in rows))


def _prompt(example: Example, tokenizer: Tokenizer, place: str) -> np.ndarray:
    try:
        prompt = np.asarray(encode_prompt(example, tokenizer), np.int32)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    if len(prompt) == 0:
        raise UserError(f"{place}: a prompt must have at least 1 token, got none; give the row a prompt")
    return prompt


def length_buckets(longest: int, limit: int | None = None, smallest: int = 32) -> tuple[int, ...]:
    """Lengths to pad to, ascending: ``longest``, its half, its quarter, … down to ``smallest``.

    They are multiples of 8, except a last one that is ``limit``. Each costs a compilation; halves lie so
    far apart that a random batch of some size needs only the last.
    """
    buckets = [_eights(longest)]
    while (half := _eights(buckets[-1] // 2)) >= smallest and half < buckets[-1]:
        buckets.append(half)
    buckets[0] = buckets[0] if limit is None else min(buckets[0], limit)
    return tuple(reversed(buckets))


def _eights(length: int) -> int:
    return -(-length // 8) * 8


class _Rows(Protocol):
    """How rows are kept. ``take`` reads row ``rows[i]`` as it is in epoch ``epochs[i]``."""

    def __len__(self) -> int: ...

    def take(self, epochs: np.ndarray, rows: np.ndarray) -> TokenBatch: ...

    def in_order(self, size: int) -> Iterator[TokenBatch]: ...


class _Packed:
    def __init__(self, rows: TokenBatch):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def take(self, epochs: np.ndarray, rows: np.ndarray) -> TokenBatch:
        return jax.tree.map(lambda array: array[rows], self._rows)

    def in_order(self, size: int) -> Iterator[TokenBatch]:
        rows = np.arange(len(self))
        for start in range(0, len(self), size):
            yield self.take(rows, rows[start : start + size])


class _Bucketed:
    def __init__(self, sequences: Sequence[Encoded], buckets: Sequence[int]):
        self._sequences = sequences
        self._buckets = buckets

    def __len__(self) -> int:
        return len(self._sequences)

    def take(self, epochs: np.ndarray, rows: np.ndarray) -> TokenBatch:
        sequences = [self._sequences[row] for row in rows]
        return pad(sequences, _bucket(max(len(sequence.tokens) for sequence in sequences), self._buckets))

    def in_order(self, size: int) -> Iterator[TokenBatch]:
        for start in range(0, len(self), size):
            yield pad(self._sequences[start : start + size], self._buckets[-1])


class _Windows:
    """Row i of epoch e is ``start + tokens[r_e + i·N : r_e + (i+1)·N]``, the offset r_e drawn anew each epoch.

    N is the length of a row less the start tokens, which are in front of every window. They belong to the
    document that the window begins in, unless it begins with that document's own start.
    """

    def __init__(self, documents: Sequence[Encoded], length: int, seed: int, start: tuple[int, ...] = ()):
        if length - len(start) < 2:
            raise UserError(f"max_length must be at least {len(start) + 2} tokens, got {length}")
        self._tokens = np.concatenate([document.tokens for document in documents])
        self._document = np.repeat(np.arange(len(documents)), [len(document.tokens) for document in documents])
        self._start = np.asarray(start, np.int32)
        self._length = length - len(start)
        self._seed = seed

    def __len__(self) -> int:
        # As many windows as fit behind any offset below N; a text too short for that has one window.
        return max((len(self._tokens) - self._length + 1) // self._length, 1)

    def take(self, epochs: np.ndarray, rows: np.ndarray) -> TokenBatch:
        offsets = np.array([self._offset(int(epoch)) for epoch in epochs])
        return self._cut(offsets + rows * self._length)

    def in_order(self, size: int) -> Iterator[TokenBatch]:
        # Windows overlap by one token, so that each token but a document's first is scored exactly once.
        starts = np.arange(0, len(self._tokens) - 1, self._length - 1)
        for start in range(0, len(starts), size):
            yield self._cut(starts[start : start + size])

    def _offset(self, epoch: int) -> int:
        spare = len(self._tokens) - len(self) * self._length
        return int(_generator(self._seed, epoch, OFFSET).integers(min(self._length, spare + 1)))

    def _cut(self, starts: np.ndarray) -> TokenBatch:
        index = starts[:, None] + np.arange(self._length)
        inside = index < len(self._tokens)
        index = np.minimum(index, len(self._tokens) - 1)
        document = self._document[index]
        continues = np.zeros(index.shape, bool)
        continues[:, 1:] = document[:, 1:] == document[:, :-1]
        # Start tokens before a document's own are a sequence by themselves: nothing else reads them.
        apart = (starts == 0) | (self._document[starts - 1] != self._document[starts])
        apart &= len(self._start) > 0
        segment_ids = np.where(inside, document - document[:, :1] + 1 + apart[:, None], 0)
        shape = len(starts), len(self._start)
        return token_batch(
            np.hstack([np.broadcast_to(self._start, shape), np.where(inside, self._tokens[index], 0)]).astype(
                np.int32
            ),
            np.hstack([np.ones(shape, np.int32), segment_ids]).astype(np.int32),
            np.hstack([np.zeros(shape, bool), inside & continues]),
        )


def _arrange(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    packing: bool,
    seed: int,
    buckets: Sequence[int] | None,
    long_rows: LongRows,
) -> _Rows:
    if all(e.prompt == "" and e.response is not None and not e.messages for e in examples):
        documents = encode_examples(examples, tokenizer, None)
        if max(len(document.tokens) for document in documents) > max_length:
            return _Windows(documents, max_length, seed, start_ids(tokenizer))
    sequences = encode_examples(examples, tokenizer, max_length, long_rows)
    if packing:
        return _Packed(pack(sequences, max_length))
    return _Bucketed(sequences, _checked_buckets(buckets, [len(s.tokens) for s in sequences], max_length))


def visits(num_rows: int, seed: int, cursor: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of each of the visits ``cursor`` to ``cursor + size``."""
    epochs, places = np.divmod(np.arange(cursor, cursor + size), num_rows)
    rows = [_order(num_rows, seed, int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
    return epochs, np.array(rows)


@lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return _generator(seed, epoch, ORDER).permutation(num_rows)


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """A counter-based generator: any epoch is reached without drawing those before it."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]))


def _fill(batch: TokenBatch, size: int) -> TokenBatch:
    missing = ((0, size - len(batch.tokens)), (0, 0))
    return jax.tree.map(lambda array: np.pad(array, missing), batch)


def _bucket(length: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= length)


def _checked_buckets(
    buckets: Sequence[int] | None, lengths: Sequence[int], limit: int | None
) -> tuple[int, ...]:
    longest = max(lengths)
    if buckets is None:
        return length_buckets(longest, limit)
    if not buckets or max(buckets) < longest:
        raise UserError(f"the largest bucket must hold {longest} tokens, got {list(buckets)}")
    return tuple(sorted(buckets))


def _check(examples: Sequence[Example], seed: int) -> None:
    if not examples:
        raise UserError("the data is empty: a stream needs at least one example")
    check_seed(seed)
