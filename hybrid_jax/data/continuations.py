"""Prompts and responses outside chat templates: what stands in front of a text, and how a response goes on.

A tokenizer may read a text in another way where it goes on than where it begins: sentencepiece and its
relatives write a space before what begins. So a response is encoded, and decoded, behind its prompt:

- The prompt's tokens are those that the policy is asked with, start token (BOS) included.
- The response's tokens are the rest of the whole text's tokens, where those begin with the prompt's own.
- Where the tokenizer joins letters of both into one token (``"A: "`` and ``"4"`` as ``"A", ":", " 4"``), the
  prompt's own tokens stay, and the response is encoded as the continuation of a text that it does not join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hybrid_jax.data.tokenizer import Tokenizer

_ANCHORS = ("\n", ":", "a", "1", ".", "\u4e00")  # a text to go on from that the response does not join
_CONTEXT = 8  # tokens before a response that are decoded with it
_AT_A_TIME = 1024  # texts, which bounds the memory of their encodings
_BROKEN = "\ufffd"


class Continuation(NamedTuple):
    """The tokens of a prompt, with its start tokens, and of its response.

    ``joined`` tells that the tokenizer reads the end of the prompt and the start of the response as one token.
    """

    prompt: list[int]
    response: list[int]
    joined: bool = False


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """The tokens of each text that begins a sequence: start tokens, unless the text writes them, and its own.

    Args:
        tokenizer: of the model.
        prompts: texts.
        plain: special tokens that are written in a text are letters.
    """
    return [with_start(tokenizer, ids) for ids in _encode_batch(tokenizer, prompts, plain)]


def with_start(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Tokens with the start tokens in front, once."""
    start = start_ids(tokenizer)
    return [*ids] if tuple(ids[: len(start)]) == start else [*start, *ids]


def start_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The start tokens; a tokenizer of the user's own need not know any."""
    return tuple(getattr(tokenizer, "start_ids", ()))


def encode_continuations(
    tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str], *, plain: bool = False
) -> list[Continuation]:
    """The tokens of each prompt, and of its response behind it; see the module for the rule.

    Args:
        tokenizer: of the model.
        prompts: texts; an empty one is its start tokens alone.
        responses: a text for each.
        plain: special tokens that are written in a text are letters.
    """
    before = _encode_batch(tokenizer, prompts, plain)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    found = [
        _split(own, whole, response)
        for own, whole, response in zip(before, _encode_batch(tokenizer, texts, plain), responses, strict=True)
    ]
    joined = [row for row, tokens in enumerate(found) if tokens is None]
    apart = continued(tokenizer, [before[row] for row in joined], [responses[row] for row in joined], plain)
    by_row = dict(zip(joined, apart, strict=True))
    return [
        Continuation(with_start(tokenizer, own), by_row[row] if tokens is None else tokens, tokens is None)
        for row, (own, tokens) in enumerate(zip(before, found, strict=True))
    ]


def continued(
    tokenizer: Tokenizer, before: Sequence[Sequence[int]], responses: Sequence[str], plain: bool = False
) -> list[list[int]]:
    """The tokens of each response behind tokens that stay as they are.

    The response is encoded behind a short text, an anchor, whose tokens are then dropped. The first anchor is
    taken that keeps its own tokens and gives a response that reads as it is written; else one that keeps its
    own tokens; else the response is encoded alone. Behind a special token it is always encoded alone, for
    there a text begins.
    """
    best: list[list[int] | None] = [None] * len(responses)
    goes_on = [bool(_unspecial_end(tokenizer, tokens[-1:])) for tokens in before]
    open_rows = [row for row, response in enumerate(responses) if response and goes_on[row]]
    for anchor in _ANCHORS:
        (own,) = _encode_batch(tokenizer, [anchor], plain)
        wholes = _encode_batch(tokenizer, [anchor + responses[row] for row in open_rows], plain)
        still_open = []
        for row, whole in zip(open_rows, wholes, strict=True):
            tokens = _split(own, whole, responses[row]) if own else None
            if tokens is not None and decode_behind(tokenizer, before[row], tokens) == responses[row]:
                best[row] = tokens
                continue
            best[row] = tokens if best[row] is None else best[row]
            still_open.append(row)
        if not (open_rows := still_open):
            break
    left = [row for row, tokens in enumerate(best) if tokens is None and responses[row]]
    for row, tokens in zip(
        left, _encode_batch(tokenizer, [responses[row] for row in left], plain), strict=True
    ):
        best[row] = tokens
    return [tokens or [] for tokens in best]


def decode_behind(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add behind the tokens ``before``; see `decoder_behind`."""
    return decoder_behind(tokenizer, before)(ids)


def decoder_behind(tokenizer: Tokenizer, before: Sequence[int]) -> Callable[[Sequence[int]], str]:
    """Makes the function that gives the text which tokens add behind ``before``, without special tokens.

    What precedes decides whether a first token begins with a space. A special token, which has no text, ends
    what is looked at: behind it a text begins.
    """
    context, text = [], ""
    for count in (_CONTEXT, 4 * _CONTEXT):  # the shorter one may begin within a character
        context = _unspecial_end(tokenizer, before[-count:])
        text = tokenizer.decode(context) if context else ""
        if not text.startswith(_BROKEN):
            break

    def decode(ids: Sequence[int]) -> str:
        ids = [int(token) for token in ids]
        whole = tokenizer.decode([*context, *ids])
        return whole[len(text) :] if whole.startswith(text) else tokenizer.decode(ids)

    return decode


def _unspecial_end(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    special = set(getattr(tokenizer, "special_tokens", {}).values())
    found: list[int] = []
    for token in reversed([int(token) for token in ids]):
        if token in special:
            break
        found.append(token)
    return found[::-1]


def _split(own: list[int], whole: list[int], response: str) -> list[int] | None:
    """The tokens behind ``own`` in ``whole``; None where ``whole`` does not begin with them."""
    rest = whole[len(own) :]
    return None if whole[: len(own)] != own or (response and not rest) else rest


def _encode_batch(tokenizer: Tokenizer, texts: Sequence[str], plain: bool) -> list[list[int]]:
    encode_batch = getattr(tokenizer, "encode_batch", None)
    if encode_batch is None:  # of the user's own
        encode = (lambda text: tokenizer.encode_rendered(text, plain=True).ids) if plain else tokenizer.encode
        return [list(encode(text)) for text in texts]
    parts = (texts[start : start + _AT_A_TIME] for start in range(0, len(texts), _AT_A_TIME))
    return [ids for part in parts for ids in encode_batch(part, plain=plain)]
