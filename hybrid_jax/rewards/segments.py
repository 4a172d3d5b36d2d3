"""Rewards for parts of a response, placed on the policy's own tokens.

A sentence (or a token) is scored as a response of its own, and its value is received after its last token
(Wu et al. 2023, arXiv 2306.01693). As a potential, what has been written so far is scored at the end of every
sentence, and only the differences are received: they add up to 0 over a response, so they show where it
improved without changing which response is best (Ng, Harada and Russell 1999). Where a segment ends is found on
the sampled tokens, which are never made again from the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from hybrid_jax.data.continuations import decoder_behind
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.rewards.base import Reward, StartedReward, start_reward

Level = Literal["sequence", "sentence", "token", "potential"]
TokenTexts = list[list[str]]  # of each response, the text that each of its tokens adds

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|\n+|$)", re.DOTALL)


def token_texts(
    decoders: Sequence[Callable[[Sequence[int]], str]],
    tokens: Int[np.ndarray, "B R"],
    mask: Bool[np.ndarray, "B R"],
) -> TokenTexts:
    """The text that each token adds to its response, up to the last chosen one; joined they are the response.

    A token that ends inside a character adds nothing, the one that completes it adds the character. One that
    the policy did not choose (where ``mask`` is False) adds nothing either: it only keeps its place.

    Args:
        decoders: give the text of the first tokens of each response.
        tokens: of the responses.
        mask: which of them were chosen.
    """
    rows = zip(decoders, tokens, mask, strict=True)
    return [_in_place(decode, row, chosen) for decode, row, chosen in rows]


def response_pieces(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: Int[np.ndarray, "B R"],
    mask: Bool[np.ndarray, "B R"],
    eos_ids: Sequence[int],
) -> TokenTexts:
    """`token_texts` of sampled responses behind their prompts; an end-of-sequence token adds nothing."""
    decoders = [_without(decoder_behind(tokenizer, prompt), eos_ids) for prompt in prompts]
    return token_texts(decoders, tokens, mask)


def _without(decode: Callable[[Sequence[int]], str], ends: Sequence[int]) -> Callable[[Sequence[int]], str]:
    return lambda ids: decode([token for token in ids if token not in ends])


def _in_place(decode: Callable[[Sequence[int]], str], row: np.ndarray, chosen: np.ndarray) -> list[str]:
    places = np.flatnonzero(chosen)
    pieces = [""] * (int(places[-1]) + 1 if len(places) else 0)
    for place, piece in zip(places, _added(decode, [int(token) for token in row[places]]), strict=True):
        pieces[place] = piece
    return pieces


def _added(decode: Callable[[Sequence[int]], str], ids: list[int]) -> list[str]:
    whole, pieces, done = decode(ids), [], 0
    for end in range(1, len(ids) + 1):
        # What later tokens change, such as half a character, is not yet the text.
        shared = len(whole) if end == len(ids) else _shared(whole, decode(ids[:end]))
        pieces.append(whole[done:shared])
        done = max(done, shared)
    return pieces


def _shared(first: str, second: str) -> int:
    """The number of characters with which two texts begin alike."""
    if first.startswith(second):
        return len(second)
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def segments(pieces: Sequence[str], level: Level) -> list[tuple[int, str]]:
    """The last token and the text of each segment of one response. Blank segments are left out."""
    if level == "sequence":
        return [(len(pieces) - 1, "".join(pieces))] if pieces else []
    if level == "token":
        return [(t, piece) for t, piece in enumerate(pieces) if piece.strip()]
    if level == "potential":
        return [(t, "".join(pieces[: t + 1])) for t, _ in segments(pieces, "sentence")]
    ends = np.cumsum([len(piece) for piece in pieces])
    found: dict[int, str] = {}
    for match in _SENTENCE.finditer("".join(pieces)):
        last = int(np.searchsorted(ends, match.end()))  # the token that holds the last letter
        found[last] = found.get(last, "") + match.group()  # two sentences that end in one token are one
    return [(last, text.strip()) for last, text in found.items() if text.strip()]


def start_segments(
    name: str,
    reward: Reward | StartedReward,
    level: Level,
    prompts: Sequence[str],
    pieces: TokenTexts,
    columns: Mapping[str, Sequence[Any]],
    length: int,
) -> Callable[[], Float[np.ndarray, "B R"]]:
    """Starts to score every segment of every response; the result is NaN where none ends.

    Args:
        name: of the reward, for errors.
        reward: on texts.
        level: what a segment is.
        prompts: B texts.
        pieces: what `token_texts` gives.
        columns: of the data, each of length B.
        length: R, of the rows of tokens.
    """
    found = [(row, t, text) for row, own in enumerate(pieces) for t, text in segments(own, level)]
    rows = [row for row, _, _ in found]
    of_rows = {key: [column[row] for row in rows] for key, column in columns.items()}
    finish = start_reward(name, reward, [prompts[r] for r in rows], [text for _, _, text in found], of_rows)

    def place() -> np.ndarray:
        placed = np.full((len(pieces), length), np.nan, np.float32)
        placed[rows, [t for _, t, _ in found]] = finish()
        return _differences(placed, [len(own) for own in pieces]) if level == "potential" else placed

    return place


def _differences(reached: Float[np.ndarray, "B R"], lengths: Sequence[int]) -> Float[np.ndarray, "B R"]:
    """Φ(s') − Φ(s) of each token, from the Φ that each sentence reached; Φ is 0 before and after a response."""
    before = np.zeros_like(reached)
    for t in range(1, reached.shape[1]):
        before[:, t] = np.where(np.isnan(reached[:, t - 1]), before[:, t - 1], reached[:, t - 1])
    place, last = np.arange(reached.shape[1])[None], np.array(lengths, int)[:, None] - 1
    after = np.where(place < last, np.roll(before, -1, axis=1), 0.0)
    return np.where(place <= last, after - before, np.nan)
