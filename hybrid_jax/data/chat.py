"""Conversations to tokens: rendered by a chat template, with a mask of what the assistant says.

The tokens are those of the whole rendered conversation, read at once. A turn of the assistant reaches from the
end of the header that asks for it (``add_generation_prompt``) to the end of the special token behind its text;
where the template marks ``{% generation %}``, the marks say so instead. Tokens that lie wholly inside a turn
are learned.

A special token that is *written* in a message stays plain text, so that nobody can end a turn or begin one by
writing it: it is rendered as a stand-in of the same length, and put back before that piece is encoded.

Rendering is jinja in the sandbox of `transformers`, within bounds (`hybrid_jax.data.rendering`); nothing else
in a template is executed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.rendering import Span, render_template
from hybrid_jax.data.tokenizer import Tokenizer, Tokens

log = logging.getLogger(__name__)

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")  # the keys that templates know
STAND_INS = 0x100000  # the last private plane, one character for each special token that a message holds
END_SIGN = chr(0x10FFFD)


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
    every answer is taught as the policy will be asked for it.

    Args:
        messages: of the conversation.
        tokenizer: whose chat template renders them.
        variables: what the template reads beside the messages, such as ``tools``.

    Raises:
        UserError: there is no answer, the template refuses the messages, or it writes them so that what the
            assistant said, or where it ended, cannot be told for certain.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError("no message of the assistant to learn from; use the data for prompts only")
    chat = _Chat(messages, tokenizer, variables)
    whole, marks = chat.render(chat.messages)
    earlier = [chat.render(chat.messages[: index + 1])[0] for index in answers[:-1] if marks is None]
    if all(whole.startswith(text) for text in earlier):
        return [_encode(chat, chat.messages, answers)]
    return [_encode(chat, chat.messages[: index + 1], [index]) for index in answers]


def encode_question(
    messages: Sequence[Message], tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Encodes the messages and the header of the answer that is to come; ``variables`` as in training."""
    chat = _Chat(messages, tokenizer, variables)
    return chat.encode(chat.render(chat.messages, ask=True)[0]).ids


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Finds the special token that ends an answer in training; warns and gives None if there is none.

    Also warns where the template writes a question differently once an answer follows it.
    """
    messages = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "Hello"})
    (conversation,) = encode_conversation(messages, tokenizer)
    question = encode_question(messages[:1], tokenizer)
    if conversation.tokens[: len(question)].tolist() != question:
        log.warning(
            "the tokenizer reads the header of an answer in another way when the answer follows it: the policy "
            "learns from other tokens than it is asked with; end it with a special token or a line break"
        )
    last = int(conversation.tokens[conversation.loss_mask][-1])
    if last in tokenizer.special_tokens.values():
        return last
    log.warning(
        "the generation marks of the chat template leave out the token that ends an answer: "
        "the policy will not learn to stop"
    )
    return None


class _Chat:
    """The messages of one conversation, with stand-ins for the special tokens that are written in them."""

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        variables: Mapping[str, Any] | None = None,
    ):
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; set tokenizer.chat_template to 'chatml', 'plain' or a file"
            )
        self.tokenizer = tokenizer
        self._template = tokenizer.chat_template
        self._variables = variables or {}
        self._stand_ins: dict[str, str] = {}  # a special token -> as many private characters
        self.messages = [
            {key: value if key == "role" else self._guarded(value) for key, value in message.items()}
            for message in messages
        ]

    def render(self, messages: Sequence[Message], ask: bool = False) -> tuple[str, list[Span] | None]:
        """The text, and the spans that the template marks if it marks any."""
        marks = MARKS.search(self._template) is not None
        variables = {**self.tokenizer.template_variables, **self._variables}
        return render_template(self._template, messages, ask=ask, marks=marks, variables=variables)

    def encode(self, text: str) -> Tokens:
        """The tokens of a rendered text, special tokens of the messages as plain text.

        Only one reading knows how pieces join, so the pieces are trusted where they give its tokens.
        """
        whole = self.tokenizer.encode_rendered(text)
        if not self._stand_ins:
            return whole
        tokens = self._in_pieces(text, self.restored(text), whole)
        special = [self.tokenizer.special_tokens[token] for token in self._stand_ins]
        kept = all(tokens.ids.count(token) == whole.ids.count(token) for token in special)
        if not kept or self._in_pieces(text, text, whole).ids != whole.ids:
            raise UserError(
                f"a message holds the special token {next(iter(self._stand_ins))!r}, which this tokenizer "
                "cannot encode as plain text within a chat; remove it from the message"
            )
        return tokens

    def restored(self, text: str) -> str:
        for token, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, token)
        return text

    def special_spans(self, tokens: Tokens, text: str) -> list[tuple[int, Span]]:
        """Finds the special tokens written in ``text`` and their places, without any <unk> of other letters."""
        written = {token: name for name, token in self.tokenizer.special_tokens.items()}
        return [
            (token, (start, end))
            for token, (start, end) in zip(*tokens, strict=True)
            if token in written and text[start:end].strip() == written[token].strip()
        ]

    def _in_pieces(self, rendered: str, text: str, whole: Tokens) -> Tokens:
        """The special tokens of ``whole``, and between them ``text`` piece by piece as plain text."""
        ids, offsets, done = [], [], 0
        for token, (start, end) in [*self.special_spans(whole, rendered), (None, (len(text), len(text)))]:
            if done < start:
                piece = self.tokenizer.encode_rendered(text[done:start], plain=True)
                ids += piece.ids
                offsets += [(done + first, done + last) for first, last in piece.offsets]
            if token is not None:
                ids.append(token)
                offsets.append((start, end))
            done = end
        return Tokens(ids, offsets)

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._guarded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item) for item in value]
        if not isinstance(value, str):
            return value
        value = value.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates
        if max(value, default="") >= chr(STAND_INS):
            raise UserError(
                f"a message holds the private character {max(value)!r} of the last plane; remove it"
            )
        for token in self.tokenizer.special_tokens:
            if token in value:
                sign = chr(STAND_INS + len(self._stand_ins))
                value = value.replace(token, self._stand_ins.setdefault(token, sign * len(token)))
        return value


def _encode(chat: _Chat, messages: Sequence[Message], answers: Sequence[int]) -> Conversation:
    """The messages, and the mask of the ``answers`` among them, the last of which ends them."""
    text, marks = chat.render(messages)
    tokens = chat.encode(text)
    ends = _content_ends(chat, messages, text, answers)
    special = [span for _, span in chat.special_spans(tokens, text)]
    if marks is None:
        spans = _turns(chat, messages, text, answers, ends, special)
    else:
        spans = _marked(marks, answers[-1], ends[-1])
    unended = not text[ends[-1] :].strip() and not any(start >= ends[-1] for start, _ in special)
    if unended:
        spans[-1] = (spans[-1][0], len(text))
    tokens = _covering(tokens)
    mask, straddled = _inside(tokens.offsets, spans)
    _check_identity(chat, tokens, mask, text)
    end = [chat.tokenizer.eos_id] if unended else []  # as behind a plain response
    loss_mask = np.append(mask, [True] * len(end)).astype(bool)
    return Conversation(np.asarray(tokens.ids + end, np.int32), loss_mask, straddled)


def _content_ends(chat: _Chat, messages: Sequence[Message], text: str, answers: Sequence[int]) -> list[int]:
    """Finds where the text of each answer ends in the rendered conversation, by a marker put behind it."""
    signed = list(messages)
    for index in answers:
        content = signed[index]["content"]
        core = content.rstrip()
        signed[index] = {**signed[index], "content": core + END_SIGN + content[len(core) :]}
    parts = chat.render(signed)[0].split(END_SIGN)
    if len(parts) != len(answers) + 1 or "".join(parts) != text:
        raise UserError(
            "the chat template does not write every answer once and as it is, so the mask of the assistant "
            "cannot be told; mark it by {% generation %} in the template"
        )
    return [int(end) for end in np.cumsum([len(part) for part in parts])[:-1]]


def _turns(
    chat: _Chat,
    messages: Sequence[Message],
    text: str,
    answers: Sequence[int],
    ends: Sequence[int],
    special: Sequence[Span],
) -> list[Span]:
    """The turns by comparing renderings, each with the special token that ends it."""
    starts = [_start(chat, messages[:index], text) for index in answers]
    spans = []
    for number, (index, start, end) in enumerate(zip(answers, starts, ends, strict=True)):
        message = messages[index]
        said = [message["content"], *(message[key] for key in REASONING if isinstance(message.get(key), str))]
        if not all(_squashed(words) in _squashed(text[start:end]) for words in said):
            raise UserError(
                f"messages[{index}]: the chat template does not write the whole answer (it drops its "
                "thinking, perhaps), so it would teach another one; change the answer or the template"
            )
        following = starts[number + 1] if number + 1 < len(starts) else len(text)
        spans.append((start, _end_of_turn(text, index, end, following, special, "tool_calls" in message)))
    return spans


def _start(chat: _Chat, asked: Sequence[Message], text: str) -> int:
    question = chat.render(asked, ask=True)[0]
    if not text.startswith(question):
        raise UserError(
            f"messages[{len(asked)}]: the chat template writes what stands before this answer in another way "
            "when it asks for the answer than when the answer follows, so it would teach an answer to another "
            "prompt; mark the assistant by {% generation %} in the template"
        )
    return len(question)


def _end_of_turn(text: str, index: int, end: int, following: int, special: Sequence[Span], calls: bool) -> int:
    """The place behind the special token that ends the answer; a tool call may stand between."""
    close = next((span for span in special if end <= span[0] and span[1] <= following), None)
    if close is not None and (calls or not text[end : close[0]].strip()):
        return close[1]
    rest = text[end:]
    if not rest.strip():  # the last answer, and nothing ends it: `encode_conversation` does
        return end
    raise UserError(
        f"messages[{index}]: the chat template writes {rest[:24]!r} behind the answer, which is no special "
        "token of this tokenizer, so the policy could not learn to stop; let the template end an answer by "
        "eos_token"
    )


def _marked(marks: Sequence[Span], index: int, end: int) -> list[Span]:
    """The marks of the template, which must hold the last answer; it may leave out earlier ones."""
    if not any(start <= end <= stop and start < stop for start, stop in marks):
        raise UserError(f"messages[{index}]: the generation marks of the chat template leave out this answer")
    return sorted(span for span in marks if span[0] < span[1])


def _covering(tokens: Tokens) -> Tokens:
    """Offsets without gaps: a character that no token claims (a trimmed space) is the next token's."""
    offsets, done = [], 0
    for start, end in tokens.offsets:
        offsets.append((min(start, done), end))
        done = max(done, end)
    return Tokens(tokens.ids, offsets)


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """Which tokens lie wholly inside a span, and how many spans begin inside a token."""
    mask, straddled = np.zeros(len(offsets), bool), 0
    for start, end in spans:
        mask |= [start <= first < last <= end for first, last in offsets]
        straddled += any(first < start < last for first, last in offsets)
    mask[0] = False  # nothing stands before the first token to predict it from
    return mask, straddled


def _check_identity(chat: _Chat, tokens: Tokens, mask: np.ndarray, text: str) -> None:
    """Checks that the learned tokens decode to the text in their place, but for spaces and dropped letters."""
    special = set(chat.tokenizer.special_tokens.values())
    learned = [
        (token, span) for token, span, kept in zip(*tokens, mask, strict=True) if kept and token not in special
    ]
    written, done = "", 0
    for _, (start, end) in learned:
        written += text[max(start, done) : end]
        done = max(done, end)
    written = chat.restored(written)
    decoded = chat.tokenizer.decode([token for token, _ in learned])
    if _squashed(decoded) == _squashed(written):
        return
    again = chat.tokenizer.decode(chat.tokenizer.encode_rendered(written, plain=True).ids)
    if _squashed(decoded) != _squashed(again):
        raise UserError(
            f"the tokens of the assistant read {decoded[:60]!r} where the chat template writes "
            f"{written[:60]!r}: this tokenizer does not say exactly where its tokens stand"
        )


def _squashed(text: str) -> str:
    return "".join(text.split())
