"""One conversation as its template reads it, and rendered texts as tokens.

A special token that is *written* in a message, a tool or a document stays plain text, so that nobody can end a
turn or begin one by writing it: it is rendered as a stand-in of the same length, and put back before that piece
is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.rendering import Job, Part, Rendering, Span, render_jobs
from hybrid_jax.data.tokenizer import Tokenizer, Tokens

STAND_INS = 0x100000  # the last private plane, one character for each special token that a message holds
OURS = ("train",)  # keys of a message that are not for the template


class Chat:
    """The messages and variables of one conversation, with stand-ins for the special tokens written in them."""

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
        self.template = tokenizer.chat_template
        self._special = tuple(token for token in tokenizer.special_tokens if token.strip())
        self._stand_ins: dict[str, str] = {}  # a special token -> as many private characters
        self.messages = [
            {
                key: value if key == "role" else self._guarded(value)
                for key, value in message.items()
                if key not in OURS
            }
            for message in messages
        ]
        self.variables = {**tokenizer.template_variables, **self._guarded(variables or {})}

    def job(self, parts: Sequence[Part]) -> Job:
        """The request to render parts of this conversation."""
        return Job(self.messages, self.variables, parts)

    def render(self, count: int, ask: bool = False, messages: Sequence[Message] | None = None) -> str:
        """The text of the first ``count`` messages, of ``messages`` instead of its own if given.

        Raises:
            UserError: the template refuses them.
        """
        job = Job(self.messages if messages is None else messages, self.variables, [Part(count, ask)])
        return rendered(render_jobs(self.template, [job])[0][0]).text

    def ends_with_special(self, text: str) -> bool:
        """Tells whether ``text`` ends with a special token, white space aside."""
        return text.rstrip().endswith(self._special)

    def special_at_start(self, text: str) -> str | None:
        """The special token that ``text`` begins with, if any."""
        found = [token for token in self._special if text.startswith(token)]
        return max(found, key=len, default=None)

    def whole_tokens(self, text: str, end: int) -> int:
        """The last place up to ``end`` that lies inside no special token of the text."""
        for token in self._special:
            place = text.rfind(token, 0, end + len(token) - 1)
            if 0 <= place < end < place + len(token):
                return place
        return end

    def last_special(self, text: str, start: int, end: int) -> int | None:
        """The end of the last special token in ``text[start:end]``."""
        places = [(text.rfind(token, start, end), token) for token in self._special]
        return max((place + len(token) for place, token in places if place >= 0), default=None)

    def next_special(self, text: str, start: int) -> int:
        """The end of the first special token that begins at ``start`` or behind it, or the end of the text."""
        places = [(text.find(token, start), -len(token)) for token in self._special]
        first = min((place for place in places if place[0] >= 0), default=(len(text), 0))
        return first[0] - first[1]

    def encode(self, text: str, whole: Tokens | None = None) -> Tokens:
        """The tokens of a rendered text, special tokens of the messages as plain text.

        Only one reading knows how pieces join, so the pieces are trusted where they give its tokens.

        Args:
            text: as the template wrote it.
            whole: its tokens, where they are known.
        """
        whole = self.tokenizer.encode_rendered(text) if whole is None else whole
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
        """The text with the special tokens that were written in its messages."""
        for token, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, token)
        return text

    def _special_spans(self, tokens: Tokens, text: str) -> list[tuple[int, Span]]:
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
        for token, (start, end) in [*self._special_spans(whole, rendered), (None, (len(text), len(text)))]:
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
        """The value with stand-ins in its texts, and in the keys within it, which a template may write too."""
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item) for item in value]
        if not isinstance(value, str):
            return value
        if not value.isascii():
            value = value.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates
            if max(value) >= chr(STAND_INS):
                raise UserError(
                    f"a message holds the private character {max(value)!r} of the last plane; remove it"
                )
        for token in self._special:
            if token in value:
                sign = chr(STAND_INS + len(self._stand_ins))
                value = value.replace(token, self._stand_ins.setdefault(token, sign * len(token)))
        return value


def rendered(result: Rendering | UserError) -> Rendering:
    """The rendering, unless it is an error, which is raised."""
    if isinstance(result, UserError):
        raise result
    return result
