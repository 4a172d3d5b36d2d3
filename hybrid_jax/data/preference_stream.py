"""Preferences as batches of token rows, and how a scorer reads the text of a response."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Message
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.loader import length_buckets, visits
from hybrid_jax.data.long_rows import DEFAULT, LongRows
from hybrid_jax.data.places import places_of, share_of, some_of
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.scored_text import Cut, ScoredRow, measure_scored
from hybrid_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

BOOTSTRAP = 2  # what the generator of a seed draws: beside the order of rows and their windows (`data.loader`)


@dataclass(frozen=True)
class Reading:
    """How a scorer reads a response: the same in training and as a reward, so it is saved beside the scorer.

    Attributes:
        prompt: whether the prompt stands before the response.
        chat: the prompt is a conversation, rendered by the chat template; a plain prompt is its one message.
        max_length: tokens a row at most; None has no bound.
        cut: the end at which a response is cut that is too long by itself; a prompt is cut at its start first.
    """

    prompt: bool = True
    chat: bool = False
    max_length: int | None = None
    cut: Cut = "truncate_end"

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Reading:
        """Reads what `settings` wrote; empty settings give the default.

        Raises:
            UserError: a folder holds something else.
        """
        return parse(Reading, settings, "reading")

    @property
    def settings(self) -> dict[str, Any]:
        """Writes the reading as plain values, for JSON."""
        return asdict(self)

    def rows(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Message] | None] | None = None,
    ) -> list[np.ndarray]:
        """The row of tokens of each response, int32 [T]; see `encode_scored`."""
        return [row.tokens for row in self.measured(tokenizer, prompts, responses, messages)]

    def measured(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Message] | None] | None = None,
    ) -> list[ScoredRow]:
        """Encodes like `rows` and also gives the length of each row before it was cut."""
        before = prompts if self.prompt else None
        asked = None
        if self.prompt and self.chat:
            given = messages or [None] * len(prompts)
            asked = [
                turns or ({"role": "user", "content": prompt},)
                for prompt, turns in zip(prompts, given, strict=True)
            ]
        return measure_scored(tokenizer, before, responses, self.max_length, asked, self.cut)


@struct.dataclass
class Labels:
    """The judgements of people on B prompts, each with up to K responses."""

    ranks: Int[Array, "B K"]  # 0 is the best; equal ranks are a tie
    present: Bool[Array, "B K"]  # which of the K there are
    margins: Float[Array, "B"]  # 0 where nobody said
    weights: Float[Array, "B M"]  # of each prompt for each member of an ensemble


@struct.dataclass
class PreferenceBatch:
    """Prompts with their responses, right-padded; where one has fewer than K, its first one is repeated."""

    tokens: Int[Array, "B K T"] | None
    mask: Bool[Array, "B K T"] | None
    labels: Labels
    index: Int[Array, "B"]  # of the prompt within the data
    features: Float[Array, "B K F"] | None = None  # in place of tokens and mask: of a frozen body


class PreferenceStream:
    """Batches of preferences; the whole state is the cursor, as in `data.loader`.

    Attributes ``flat`` and ``places``: the rows of tokens of all responses, and where those of each prompt
    stand among them, int [N K].

    Args:
        preferences: rows of a source.
        tokenizer: of the scorer; encodes them once, here.
        reading: of responses.
        seed: of the order of rows and of the bootstrap, at least 0.
        members: M. Each of several learns a bootstrap sample of its own: a prompt counts Poisson(1) times, the
            limit of drawing n of n rows with replacement (Oza and Russell 2001). One alone learns all rows.
        long_rows: what becomes of a prompt with a response that ``reading`` cuts. It is left out, too, where
            nothing tells a better response from a worse one any more.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        tokenizer: Tokenizer,
        reading: Reading,
        *,
        seed: int = 0,
        members: int = 1,
        long_rows: LongRows = DEFAULT,
    ):
        if not preferences:
            raise UserError("the data is empty: a stream needs at least one preference")
        preferences, self.flat = _encode(preferences, tokenizer, reading, long_rows)
        self.preferences, self._seed = tuple(preferences), seed
        rankings = [row.ranking for row in preferences]
        most = max(len(responses) for responses, _ in rankings)
        shape = len(preferences), most
        ranks, present = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, (responses, places) in enumerate(rankings):
            ranks[row, : len(places)], present[row, : len(responses)] = places, True
        margins = np.array([row.margin or 0.0 for row in preferences], np.float32)
        weights = bootstrap_weights(len(preferences), members, seed)
        self.labels = _labels(ranks=ranks, present=present, margins=margins, weights=weights)
        starts = np.cumsum([0, *present.sum(axis=1)[:-1]])[:, None]
        self.places = starts + np.where(present, np.arange(most), 0)
        self._lengths = np.array([len(row) for row in self.flat])
        self._buckets = length_buckets(int(self._lengths.max()), reading.max_length)

    @property
    def present(self) -> np.ndarray:
        """Which of the K responses each prompt has, [B K]."""
        return np.asarray(self.labels.present)

    @property
    def num_rows(self) -> int:
        """Prompts an epoch."""
        return len(self.places)

    def batch(self, cursor: int, size: int) -> PreferenceBatch:
        """Prompts ``cursor`` to ``cursor + size`` of the endless stream."""
        _, index = visits(self.num_rows, self._seed, cursor, size)
        places = self.places[index]
        longest = self._lengths[places].max()
        length = next(bucket for bucket in self._buckets if bucket >= longest)
        mask = np.arange(length) < self._lengths[places][..., None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate([self.flat[place] for place in places.ravel()])
        labels = jax.tree.map(lambda array: array[index], self.labels)
        arrays: dict[str, Any] = {"tokens": tokens, "mask": mask, "index": index.astype(np.int32)}
        return PreferenceBatch(labels=labels, **arrays)


def _labels(**arrays: np.ndarray) -> Labels:
    fields: dict[str, Any] = arrays  # they become device arrays where a step is called
    return Labels(**fields)


def bootstrap_weights(num_rows: int, members: int, seed: int) -> np.ndarray:
    """How often each member learns each row, float32 [num_rows, members]."""
    if members == 1:
        return np.ones((num_rows, 1), np.float32)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, BOOTSTRAP]))
    return generator.poisson(1.0, (num_rows, members)).astype(np.float32)


def _check_read_whole(preferences: Sequence[Preference]) -> None:
    """Refuses rows whose chat template reads what the reward, later, is not given: a model of other prompts."""
    for place, row in zip(places_of(preferences), preferences, strict=True):
        if row.template_variables:
            names = ", ".join(row.template_variables)
            raise UserError(
                f"{place}: a reward model reads messages alone, got also {names}; set tools_field and "
                "documents_field of the source to null and leave out chat_template_kwargs"
            )


def _encode(
    preferences: Sequence[Preference], tokenizer: Tokenizer, reading: Reading, long_rows: LongRows
) -> tuple[list[Preference], list[np.ndarray]]:
    """The preferences that are learned, and the rows of all their responses, one preference after the other."""
    if reading.chat and reading.prompt:
        _check_read_whole(preferences)
    flat = [(row, response) for row in preferences for response in row.ranking[0]]
    encoded = iter(
        reading.measured(
            tokenizer,
            [row.prompt for row, _ in flat],
            [response for _, response in flat],
            [row.messages for row, _ in flat],
        )
    )
    rows = [[next(encoded) for _ in row.ranking[0]] for row in preferences]
    most = reading.max_length
    lengths = [max(response.whole for response in responses) for responses in rows]
    is_long = [most is not None and length > most for length in lengths]
    alike = [_alike(responses, row.ranking[1]) for row, responses in zip(preferences, rows, strict=True)]
    places = places_of(preferences)
    short_alike = [same and not long for same, long in zip(alike, is_long, strict=True)]
    if found := some_of(short_alike, places, long_rows.rows):
        log.warning("%s have the same better and worse response: left out", found)
    dropped = long_rows.policy in ("drop", "error")
    left_out = [same or (long and dropped) for same, long in zip(alike, is_long, strict=True)]
    if most is not None:
        long_rows.report(lengths, left_out, places, most, "cut, the better and the worse would be the same")
    if all(left_out):
        raise UserError(f"no preference is left: {share_of(len(places), places)} say the same twice")
    keep = [not out for out in left_out]
    kept = list(compress(rows, keep))
    return list(compress(preferences, keep)), [response.tokens for responses in kept for response in responses]


def _alike(responses: Sequence[ScoredRow], places: Sequence[int]) -> bool:
    """Tells whether two responses of different ranks have the same tokens, which contradicts itself."""
    known: dict[bytes, int] = {}
    return any(
        known.setdefault(response.tokens.tobytes(), place) != place
        for response, place in zip(responses, places, strict=True)
    )
