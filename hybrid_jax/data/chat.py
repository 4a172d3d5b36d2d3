"""Conversations to tokens: rendered by a chat template, with a mask of what the assistant says.

The tokens are those of the whole rendered conversation, read at once. `hybrid_jax.data.turns` tells which
characters of it are learned: the turns of the assistant, each with what ends it. Tokens that lie wholly inside
a turn are learned. What is written in a message never becomes a special token (`hybrid_jax.data.chat_text`).

Rendering is jinja in the sandbox of `transformers`, within bounds (`hybrid_jax.data.rendering`); nothing else
in a template is executed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat_text import Chat
from hybrid_jax.data.rendering import Part, Rendering, Span, render_jobs
from hybrid_jax.data.tokenizer import Tokenizer, Tokens
from hybrid_jax.data.turns import MARKS, Written, find_marked, find_turns, learned_answers, wanted_parts

log = logging.getLogger(__name__)

AT_ONCE = 128  # conversations that are rendered by one request, and become tokens by one call

Row = tuple[Sequence[Message], Mapping[str, Any] | None]


class Conversation(NamedTuple):
    """The tokens of a conversation, int32 [T], and a mask of those to learn, bool [T].

    ``straddled`` counts the turns that begin inside a token of their header, which is not learned.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    straddled: int


def encode_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
) -> list[Conversation]:
    """Encodes all messages once, with a mask of every turn of the assistant.

    Where the template writes an answer in another way once something follows it (without its thinking, or with
    another end), the conversation is given once for each answer: up to it, and only that answer is learned. So
    every answer is taught as the policy will be asked for it. A message with ``"train": False`` is read and
    never learned.

    Args:
        messages: of the conversation.
        tokenizer: whose chat template renders them.
        variables: what the template reads beside the messages, such as ``tools``.

    Raises:
        UserError: there is no answer, the template refuses the messages, or it writes them so that what the
            assistant said, or where it ended, cannot be told for certain.
    """
    return next(encode_conversations([(messages, variables)], tokenizer))


def encode_conversations(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[list[Conversation]]:
    """Encodes many conversations, each as `encode_conversation` does, in order.

    Args:
        rows: the messages and the variables of each.
        tokenizer: whose chat template renders them.

    Raises:
        UserError: at the first conversation that cannot be encoded, behind those before it.
    """
    chunks = [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
    if len(chunks) < 2:
        for chunk in chunks:
            yield from _unless_errors(_Batch(chunk, tokenizer).read().encoded())
        return
    # While one batch is rendered, by another process, a second becomes tokens, which needs no lock of Python.
    with ThreadPoolExecutor(2) as pool:
        waiting: list[tuple[_Batch, Future[_Batch]]] = []
        for chunk in [*chunks, None]:
            if chunk is not None:
                batch = _Batch(chunk, tokenizer)
                waiting.append((batch, pool.submit(batch.read)))
            while len(waiting) > 2 * (chunk is not None):
                batch, done = waiting.pop(0)
                done.result()
                yield from _unless_errors(batch.encoded())


def encode_question(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Encodes the messages and the header of the answer that is to come; ``variables`` as in training."""
    chat = Chat(messages, tokenizer, variables)
    return chat.encode(chat.render(len(messages), ask=True)).ids


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Finds the special token that ends an answer in training; warns and gives None if there is none.

    Of several that follow one another, it is the first. Also warns where the template writes a question
    differently once an answer follows it.
    """
    messages = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "Hello"})
    (conversation,) = encode_conversation(messages, tokenizer)
    question = encode_question(messages[:1], tokenizer)
    if not conversation.loss_mask[len(question) :].any() or (
        conversation.tokens[: len(question)].tolist() != question
    ):
        log.warning(
            "the tokenizer reads the header of an answer in another way when the answer follows it: the policy "
            "learns from other tokens than it is asked with; end it with a special token or a line break"
        )
    special = set(tokenizer.special_tokens.values())
    learned = [int(token) for token in conversation.tokens[conversation.loss_mask]]
    end = None
    for token in reversed(learned):
        if token in special:
            end = token
        elif tokenizer.decode([token]).strip():
            break
    if end is None:
        log.warning(
            "the generation marks of the chat template leave out the token that ends an answer: "
            "the policy will not learn to stop"
        )
    return end


def _unless_errors(results: Sequence[list[Conversation] | UserError]) -> Iterator[list[Conversation]]:
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


class _Prepared(NamedTuple):
    """A conversation to render: its answers to learn, and the parts that tell where they stand."""

    chat: Chat
    answers: list[int]
    parts: list[Part]


class _Batch:
    """Conversations that are rendered by one request and tokenised by one call."""

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._marks = MARKS.search(tokenizer.chat_template or "") is not None
        self._prepared = [self._prepare(*row) for row in rows]
        self._texts: list[Any] = []  # of each conversation, what is written of it, or what is wrong with it
        self._tokens: list[Tokens] = []  # of what is written, one after the other

    def _prepare(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None
    ) -> _Prepared | UserError:
        try:
            answers = learned_answers(messages)
            chat = Chat(messages, self._tokenizer, variables)
            return _Prepared(chat, answers, wanted_parts(messages, answers, self._marks))
        except UserError as error:
            return error

    def read(self) -> _Batch:
        """Renders all of them, finds their turns and makes tokens of them."""
        replies = iter(self._rendered())
        self._texts = [
            item if isinstance(item, UserError) else self._written(item, next(replies))
            for item in self._prepared
        ]
        texts = [one.text for found in self._texts if isinstance(found, list) for one in found]
        self._tokens = self._tokenizer.encode_all_rendered(texts) if texts else []
        return self

    def _rendered(self) -> list[list[Rendering | UserError] | UserError]:
        """The renderings; where the request fails as a whole, one by one, so that its row is known."""
        found = [item for item in self._prepared if not isinstance(item, UserError)]
        jobs = [chat.job(parts) for chat, _, parts in found]
        if not jobs:
            return []
        template = found[0][0].template
        try:
            return list(render_jobs(template, jobs, marks=self._marks))
        except UserError as error:
            return [error] if len(jobs) == 1 else self._one_by_one(template, jobs)

    def _one_by_one(self, template: str, jobs: Sequence[Any]) -> list[list[Rendering | UserError] | UserError]:
        replies: list[list[Rendering | UserError] | UserError] = []
        for job in jobs:
            try:
                replies += render_jobs(template, [job], marks=self._marks)
            except UserError as error:
                return [*replies, *[error] * (len(jobs) - len(replies))]
        return replies

    def encoded(self) -> list[list[Conversation] | UserError]:
        """The sequences of each conversation, or what is wrong with it."""
        known = [
            (number, one)
            for number, found in enumerate(self._texts)
            if isinstance(found, list)
            for one in found
        ]
        chats: list[Any] = self._prepared
        results: list[Any] = [[] if isinstance(found, list) else found for found in self._texts]
        drafts: list[tuple[int, _Draft]] = []
        special = np.fromiter(self._tokenizer.special_tokens.values(), np.int32)
        is_special = np.zeros(max(self._tokenizer.vocab_size, *special + 1, 1), bool)
        is_special[special] = True
        for (number, one), tokens in zip(known, self._tokens, strict=True):
            try:
                drafts.append((number, _draft(chats[number].chat, one, tokens, is_special)))
            except UserError as error:
                results[number] = error
        right = _reads_as_written(self._tokenizer, [draft for _, draft in drafts])
        for number, draft in drafts:
            try:
                if not right:
                    _check_identity(draft)
                if isinstance(results[number], list):
                    results[number].append(draft.conversation)
            except UserError as error:
                results[number] = error
        return results

    def _written(self, item: _Prepared, reply: list[Rendering | UserError] | UserError) -> Any:
        if isinstance(reply, UserError):
            return reply
        chat, answers, parts = item
        try:
            find = find_marked if self._marks else find_turns
            return find(chat, answers, dict(zip(parts, reply, strict=True)))
        except UserError as error:
            return error


class _Draft(NamedTuple):
    """An encoded conversation, its learned tokens but for special ones, and the text that they stand for."""

    chat: Chat
    conversation: Conversation
    learned: list[int]
    said: str


def _draft(chat: Chat, written: Written, whole: Tokens, is_special: np.ndarray) -> _Draft:
    tokens = chat.encode(written.text, whole)
    offsets = _covering(tokens)
    mask, straddled = _inside(offsets, written.spans)
    end = [chat.tokenizer.eos_id] if written.unended else []  # as behind a plain response
    ids = np.asarray(tokens.ids + end, np.int32)
    conversation = Conversation(ids, np.append(mask, [True] * len(end)).astype(bool), straddled)
    plain = mask & ~is_special[ids[: len(mask)]]
    said = chat.restored(_text_at(written.text, offsets, plain))
    return _Draft(chat, conversation, ids[: len(mask)][plain].tolist(), said)


def _text_at(text: str, offsets: np.ndarray, chosen: np.ndarray) -> str:
    """The text of the chosen tokens; several may share a character."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    parts, done = [], 0
    for first, behind in edges.reshape(-1, 2).tolist():
        start, end = max(int(offsets[first, 0]), done), int(offsets[first:behind, 1].max())
        parts.append(text[start:end])
        done = max(done, end)
    return "".join(parts)


def _covering(tokens: Tokens) -> np.ndarray:
    """Offsets [T 2] without gaps: a character that no token claims (a trimmed space) is the next token's."""
    flat = chain.from_iterable(tokens.offsets)
    offsets = np.fromiter(flat, np.int64, 2 * len(tokens.offsets)).reshape(-1, 2)
    done = np.maximum.accumulate(np.append(0, offsets[:, 1]))[:-1]
    return np.stack([np.minimum(offsets[:, 0], done), offsets[:, 1]], axis=1)


def _inside(offsets: np.ndarray, spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """Which tokens lie wholly inside a span, and how many spans begin inside a token."""
    first, last = offsets[:, 0], offsets[:, 1]
    mask, straddled = np.zeros(len(offsets), bool), 0
    for start, end in spans:
        mask |= (start <= first) & (first < last) & (last <= end)
        straddled += int(((first < start) & (start < last)).any())
    mask[:1] = False  # nothing stands before the first token to predict it from
    return mask, straddled


def _reads_as_written(tokenizer: Tokenizer, drafts: Sequence[_Draft]) -> bool:
    """Tells whether all learned tokens together decode to the texts in their places: then each one does."""
    decoded = tokenizer.decode([token for draft in drafts for token in draft.learned])
    return _squashed(decoded) == _squashed("".join(draft.said for draft in drafts))


def _check_identity(draft: _Draft) -> None:
    """Checks that the learned tokens decode to the text in their place, but for spaces and dropped letters."""
    tokenizer = draft.chat.tokenizer
    decoded = tokenizer.decode(draft.learned)
    if _squashed(decoded) == _squashed(draft.said):
        return
    again = tokenizer.decode(tokenizer.encode_rendered(draft.said, plain=True).ids)
    if _squashed(decoded) != _squashed(again):
        raise UserError(
            f"the tokens of the assistant read {decoded[:60]!r} where the chat template writes "
            f"{draft.said[:60]!r}: this tokenizer does not say exactly where its tokens stand"
        )


def _squashed(text: str) -> str:
    return "".join(text.split())
