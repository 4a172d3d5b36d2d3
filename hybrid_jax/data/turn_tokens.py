"""The tokens of a conversation that only grows: what a policy sampled stays, and what it reads is put behind.

    tokens = opening([user])                          # the first answer is sampled behind them
    tokens += sampled + between([user], ended=True)   # the second one behind these, and so on

Nothing that was sampled becomes tokens a second time. Messages that follow an answer are rendered behind a
question and an answer that stand in for the conversation, cut behind the end token of that answer, and
tokenised alone. The tokens are those of the whole conversation, rendered at once, if the template is stable: it
writes a turn in the same way whatever follows. One that writes history anew (Qwen3 leaves out the reasoning of
earlier answers) is refused, or its turns are put together as they were sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import encode_question
from hybrid_jax.data.chat_text import Chat, rendered
from hybrid_jax.data.rendering import Part, render_jobs
from hybrid_jax.data.tokenizer import Tokenizer

Rewriting = Literal["error", "append"]
KEPT = 4096  # messages whose tokens are remembered: users that are programs say the same things again
ROLES = "user", "assistant"
ASKED = {"role": "user", "content": "Hi"}
SAYS = ("Turn one.", "Turn two.", "Turn three.", "Turn four.", "Turn five.")
THOUGHT = "<think>\nHm.\n</think>\n\n"
_WORDLESS = "the chat template does not write the text of an answer; take another one"


class TurnEncoder:
    """Tokens of the messages that a policy reads, apart from those that it samples.

    Args:
        tokenizer: whose chat template renders them.
        rewriting: what becomes of a template that writes earlier turns in another way once more follow: "error"
            refuses it with the turn that it changes; "append" keeps the turns as they were sampled and read.
    """

    def __init__(self, tokenizer: Tokenizer, *, rewriting: Rewriting = "error"):
        self._tokenizer = tokenizer
        self._rewriting = rewriting
        self._checked = lru_cache(KEPT)(self._check)
        self._encoded = lru_cache(KEPT)(self._encode)

    def opening(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """The tokens that the first answer is sampled behind: the messages and the header of the answer.

        Args:
            messages: of which the last is not the policy's.
            variables: what the template reads beside the messages, such as ``tools``.

        Raises:
            UserError: the template refuses the messages, or writes history anew where that is an error.
        """
        self._checked(_json(variables or {}))
        return encode_question(messages, self._tokenizer, variables)

    def between(
        self, messages: Sequence[Message], *, ended: bool, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The tokens from behind a sampled answer to the first token of the next one.

        They are what the template writes behind the end token, the messages, and the header of an answer.

        Args:
            messages: what follows the answer, of the user, a tool or a system; at least one.
            ended: the answer's end token was sampled; otherwise the answer was cut, and that token comes first.
            variables: as of the opening.

        Raises:
            UserError: the template refuses the messages behind an answer, leaves one out, or writes history
                anew where that is an error.
        """
        if not messages:
            raise UserError("nothing was said behind the answer: give at least 1 message")
        self._checked(_json(variables or {}))
        end, tokens = self._encoded(_json(messages), _json(variables or {}))
        return [*tokens] if ended else [end, *tokens]

    def _encode(self, messages: str, variables: str) -> tuple[int, tuple[int, ...]]:
        """The end token of an answer, and the tokens behind it."""
        chat, end, behind = self._written(messages, variables)
        if end is None:
            return self._tokenizer.eos_id, tuple(chat.encode(behind).ids)
        # Read where they stand, since a token may change how the next letters are read.
        end_id, ids = self._tokenizer.special_tokens[end], chat.encode(end + behind).ids
        return end_id, tuple(ids[ids.index(end_id) + 1 :])

    def _written(self, messages: str, variables: str) -> tuple[Chat, str | None, str]:
        """The chat, the end token of an answer if there is one, and what is written behind that token."""
        said = json.loads(messages)
        words = "Noted"
        while words in messages + variables + (self._tokenizer.chat_template or ""):
            words += "d"
        alone: Any = self._render([ASKED, _answer(words)], variables, [Part(2)])[1][0]
        end = _end(self._chat([], variables), rendered(alone).text, words)
        problem: UserError | None = None
        for answer in _answers(said, words):
            chat, (alone, whole) = self._render(
                [ASKED, answer, *said], variables, [Part(2), Part(len(said) + 2, ask=True)]
            )
            if isinstance(whole, UserError):
                problem = problem or whole
            elif not isinstance(alone, UserError) and words in alone.text and words in whole.text:
                end, behind = _behind(chat, alone.text, whole.text, words, end)
                _check_written(chat.messages[2:], behind)
                return chat, end, behind
        if problem and any(message["role"] == "tool" for message in said):
            raise UserError(f"{problem}; a template that knows no tools may be given their results by the user")
        raise problem or UserError(_WORDLESS)

    def _check(self, variables: str) -> None:
        """Holds the template to writing turns as they were sampled, with and without a reasoning."""
        if self._rewriting == "error" and not self._check_turns(THOUGHT, variables):
            self._check_turns("", variables)

    def _check_turns(self, thought: str, variables: str) -> bool:
        """Compares five turns with their beginnings; tells whether the header of an answer opens a thought."""
        says = [thought * (turn % 2) + words for turn, words in enumerate(SAYS)]
        messages = [{"role": ROLES[turn % 2], "content": text} for turn, text in enumerate(says)]
        parts = [Part(turn + 1, ask=turn % 2 == 0) for turn in range(len(says))]
        chat, results = self._render(messages, variables, parts)
        *texts, whole = [rendered(result).text for result in results]
        opened = 0
        for turn, text in enumerate(texts):
            if turn % 2 == 0:  # the header of the next turn may write its first words
                opened = max(size for size in range(len(thought) + 1) if text.endswith(thought[:size]))
            else:
                end = _end(chat, text, SAYS[turn])
                if SAYS[turn] not in text:
                    raise UserError(_WORDLESS)
                if end is None or says[turn][opened:] not in text:
                    raise _rewrites(turn)
                text = text[: text.find(end, text.rfind(SAYS[turn])) + len(end)]
            if not whole.startswith(text):
                raise _rewrites(_changed(text, whole, last=turn + (turn % 2 == 0)))
        if not whole.endswith(self._written(_json(messages[-1:]), variables)[2]):
            raise _rewrites(len(says) - 1)
        return opened > 0

    def _render(self, messages: Sequence[Message], variables: str, parts: Sequence[Part]) -> tuple[Chat, Any]:
        chat = self._chat(messages, variables)
        return chat, render_jobs(chat.template, [chat.job(parts)])[0]

    def _chat(self, messages: Sequence[Message], variables: str) -> Chat:
        return Chat(messages, self._tokenizer, json.loads(variables))


def _answers(said: Sequence[Message], words: str) -> list[dict[str, Any]]:
    """Answers that stand in for one that ``said`` follows; a result of a tool follows the call of it."""
    calls = []
    for message in said:
        if message["role"] != "tool":
            break
        name, number = message.get("name", "tool"), message.get("tool_call_id", f"call{len(calls):05}")
        function = {"name": name, "arguments": {"input": words}}
        calls.append({"id": number, "type": "function", "function": function})
    call = [{"role": "assistant", "content": "", "tool_calls": calls}] if calls else []
    return [*call, _answer(words)]


def _answer(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def _end(chat: Chat, text: str, words: str) -> str | None:
    """The special token that ends the answer with those last words, if one follows them."""
    return chat.special_at_start(text[text.rfind(words) + len(words) :].lstrip())


def _behind(chat: Chat, alone: str, whole: str, words: str, end: str | None) -> tuple[str | None, str]:
    """The end token of the answer in ``alone``, and what ``whole`` has behind that answer.

    A call may have a token of its own for ``end``, which ends any other answer.
    """
    closing = alone[alone.rfind(words) + len(words) :]
    rest = whole[whole.rfind(words) + len(words) :]
    ended = end is not None and end in closing
    if end and not ended:
        closing = closing[: chat.last_special(closing, 0, len(closing))]
        end = next((token for token in chat.tokenizer.special_tokens if closing.endswith(token)), None)
    elif end:
        closing = closing.partition(end)[0]
    if not rest.startswith(closing):
        raise UserError("the chat template writes the call of a tool in another way once its result follows")
    rest = rest[len(closing) :]
    token = chat.special_at_start(rest.lstrip()) if ended else None  # another one where more follows, perhaps
    return end, rest.lstrip()[len(token) :] if token else rest


def _check_written(messages: Sequence[Message], text: str) -> None:
    """Raises where a message is not in the text, as it is or as JSON writes it."""
    squashed = _squashed(text)
    for message in messages:
        content = message.get("content") or ""
        forms = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
        if not any(_squashed(form) in squashed for form in forms):
            raise UserError(f"the chat template leaves out a message of the {message['role']} behind an answer")


def _squashed(text: str) -> str:
    return "".join(text.split())


def _changed(text: str, whole: str, last: int) -> int:
    """The first turn up to ``last`` whose words do not stand where both texts are the same."""
    same = "".join(
        one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(text, whole, strict=False))
    )
    return next(turn for turn, words in enumerate(SAYS) if words not in same or turn == last)


def _rewrites(turn: int) -> UserError:
    return UserError(
        f"the chat template writes turn {turn + 1} ({ROLES[turn % 2]}) differently once turn {turn + 2} "
        "follows, so the policy would be trained on tokens that it did not sample; set "
        "conversation.rewriting_template to append, to keep what was sampled"
    )


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"the messages must be plain values, such as JSON has: {error}") from error
