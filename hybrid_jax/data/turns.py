"""The places of the answers of a conversation in the text that its chat template wrote.

A turn of the assistant reaches from the end of the header that asks for it (``add_generation_prompt``) to the
end of what the template writes when the conversation ends there: its reasoning, its text, its tool calls, the
tokens that close it and the white space behind them. Where the template marks ``{% generation %}``, the marks
say so instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat_text import Chat, rendered
from hybrid_jax.data.rendering import Part, Rendering, Span

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING, END_OF_REASONING = "<think>", "</think>"
HIDDEN_END = "\U0010fffd" * len(END_OF_REASONING)  # what stands in its place where a template would cut there

Renderings = Mapping[Part, Rendering | UserError]


class Written(NamedTuple):
    """A text to learn from, the spans of it to learn, and whether the end token is to follow it."""

    text: str
    spans: list[Span]
    unended: bool


class _Turn(NamedTuple):
    """One answer as the template writes it when the conversation ends with it."""

    text: str
    start: int
    end: int


def learned_answers(messages: Sequence[Message]) -> list[int]:
    """The indices of the answers to learn: those of the assistant without ``train: False``.

    Raises:
        UserError: there are none.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index for index in answers if messages[index].get("train") is not False]
    if not answers:
        raise UserError("no message of the assistant to learn from; use the data for prompts only")
    if not learned:
        raise UserError(
            "no message of the assistant to learn from: all have train: false (or weight: 0); leave the row out"
        )
    return learned


def wanted_parts(messages: Sequence[Message], answers: Sequence[int], marks: bool) -> list[Part]:
    """The parts that must be rendered to find the ``answers`` among the messages."""
    whole = Part(len(messages))
    if not marks:
        asked = [Part(index, ask=True) for index in answers if index]
        return list(dict.fromkeys([whole, *asked, *(Part(index + 1) for index in answers)]))
    if all(message.get("train") is not False for message in messages):
        return [whole]
    return [whole, *(Part(count) for count in range(1, len(messages)))]


def find_turns(chat: Chat, answers: Sequence[int], parts: Renderings) -> list[Written]:
    """Finds the turns by comparing renderings; the texts are one for all answers, or one for each.

    Where the template writes an answer in another way once something follows it (without its reasoning, or with
    another end), each answer has the text that ends with it. So every answer is taught as it will be asked for.

    Args:
        chat: the conversation.
        answers: the indices of the messages to learn.
        parts: the renderings of `wanted_parts`.

    Raises:
        UserError: the template refuses the messages, or writes them so that what the assistant said, or where
            it ended, cannot be told for certain.
    """
    whole = rendered(parts[Part(len(chat.messages))]).text
    turns = [_turn(chat, index, parts, whole) for index in answers]
    spans = [_span_within(chat, whole, index, turn) for index, turn in zip(answers, turns, strict=True)]
    if None not in spans:
        return [_ended(chat, whole, [span for span in spans if span], answers)]
    return [
        _ended(chat, turn.text, [(turn.start, turn.end)], [index])
        for index, turn in zip(answers, turns, strict=True)
    ]


def find_marked(chat: Chat, answers: Sequence[int], parts: Renderings) -> list[Written]:
    """The spans that the template marks, without those of answers that are not learned.

    Raises:
        UserError: the template refuses the messages, or its marks leave out the last answer.
    """
    text, marks = rendered(parts[Part(len(chat.messages))])
    spans = [span for span in marks if span[0] < span[1]]
    for index, message in enumerate(chat.messages):
        if message["role"] == "assistant" and index not in answers:
            spans = [span for span in spans if span not in _marks_of(index, parts, marks)]
    marked = "".join(text[start:end] for start, end in spans)
    if not spans or not _says(marked, chat.messages[answers[-1]], calls=False):
        raise UserError(
            f"messages[{answers[-1]}]: the generation marks of the chat template leave out this answer"
        )
    is_last = answers[-1] == len(chat.messages) - 1
    unended = is_last and not chat.ends_with_special(text)
    if unended:
        spans[-1] = (spans[-1][0], len(text))
    return [Written(text, sorted(spans), unended)]


def _marks_of(index: int, parts: Renderings, marks: list[Span]) -> list[Span]:
    """The marks that ``messages[index]`` adds to what stands before it."""
    before = rendered(parts[Part(index)]).spans if index else []
    spans = rendered(parts[Part(index + 1)]).spans if Part(index + 1) in parts else marks
    if marks[: len(spans)] != spans:
        raise UserError(
            f"messages[{index}] is not to be learned (train: false), and the generation marks of the chat "
            "template change when something follows it, so which are its own cannot be told; leave the row out"
        )
    return spans[len(before) :]


def _turn(chat: Chat, index: int, parts: Renderings, whole: str) -> _Turn:
    """The turn of ``messages[index]``, checked to say all that the message says."""
    alone = parts[Part(index + 1)]
    text = whole if isinstance(alone, UserError) else alone.text
    start = _start(chat, index, text, parts)
    end = len(text) if text != whole or index + 1 == len(chat.messages) else _closing(chat, text, start, index)
    message = chat.messages[index]
    headed = chat.last_special(text, 0, start) or 0  # a header may write the first words, such as <think>
    if not _says(text[headed:end], message, calls=False):
        if (kept := _with_reasoning(chat, index, parts)) is not None:
            return kept
        raise UserError(
            f"messages[{index}]: the chat template does not write the whole answer (it drops its thinking, "
            "perhaps), so it would teach another one; change the answer or the template"
        )
    if not _says(text[headed:end], message, calls=True):
        raise UserError(
            f"messages[{index}]: the chat template does not write the tool calls of this answer, so it would "
            "teach another one; take a template for tools"
        )
    return _Turn(text, start, end)


def _start(chat: Chat, index: int, text: str, parts: Renderings) -> int:
    """The start of the answer: behind the header that asks for it."""
    question = parts.get(Part(index, ask=True))
    if isinstance(question, Rendering) and text.startswith(question.text):
        return len(question.text)
    if not any(message["role"] == "user" for message in chat.messages[:index]):
        return _behind_header(chat, index, text)
    asked = rendered(question).text if question is not None else ""
    before = chat.render(index)
    content = str(chat.messages[index].get("content", "")).strip()
    # The header writes what the answer itself begins with, or leaves out, such as the start of its reasoning.
    if text.startswith(before) and (shared := chat.whole_tokens(text, _common(asked, text))) > len(before):
        written = text.find(content, len(before)) if content else -1
        return min(shared, written) if written > len(before) else shared
    if chat.messages[index - 1]["role"] in ("assistant", "tool"):  # one turn goes on, without another header
        if text.startswith(before):
            return len(before)
        header = asked[len(before) :] if asked.startswith(before) else ""
        if header.strip() and (place := text.rfind(header, 0, text.rfind(content))) >= 0:
            return place + len(header)
        if (closed := chat.last_special(text, 0, _common(before, text))) is not None and content:
            return max(closed, text.find(content, closed))
    raise UserError(
        f"messages[{index}]: the chat template writes what stands before this answer in another way "
        "when it asks for the answer than when the answer follows, so it would teach an answer to another "
        "prompt; mark the assistant by {% generation %} in the template"
    )


def _behind_header(chat: Chat, index: int, text: str) -> int:
    """The start of an answer that no question precedes: behind the header that follows any question."""
    asked = [{"role": "user", "content": "1"}]
    before, header = chat.render(1, messages=asked), chat.render(1, ask=True, messages=asked)
    header = header[chat.whole_tokens(header, _common(before, header)) :]
    # It may open a reasoning that an earlier answer is written without.
    headers = [words for words in (header, header.partition(REASONING)[0]) if words.strip()]
    start = 0
    for message in chat.messages[: index + 1]:
        if message["role"] == "assistant":
            found = [(text.find(words, start), -len(words)) for words in headers if words in text[start:]]
            if not found:
                raise UserError(
                    f"messages[{index}]: no user message stands before this answer, and the chat template "
                    "writes no header that says where it begins; let the conversation begin with a question"
                )
            place, length = min(found)
            start = place - length
    return start


def _with_reasoning(chat: Chat, index: int, parts: Renderings) -> _Turn | None:
    """The turn with the reasoning that the template cuts off, where its header asks for that reasoning.

    The template of DeepSeek-R1-Distill asks with an opened ``<think>`` and writes no answer with it, for it is
    made to ask; what the policy answers is the whole of it.
    """
    message, question = chat.messages[index], parts.get(Part(index, ask=True))
    content = message.get("content", "")
    if not isinstance(question, Rendering) or END_OF_REASONING not in content:
        return None
    hidden = {**message, "content": content.replace(END_OF_REASONING, HIDDEN_END)}
    text = chat.render(index + 1, messages=[*chat.messages[:index], hidden]).replace(
        HIDDEN_END, END_OF_REASONING
    )
    start, place = len(question.text), text.find(content.strip())
    if text.startswith(question.text) and 0 <= place <= start < place + len(content.strip()):
        return _Turn(text, start, len(text))
    return None


def _span_within(chat: Chat, whole: str, index: int, turn: _Turn) -> Span | None:
    """The turn within the whole conversation, if it is written there as it is on its own."""
    if turn.text is whole or whole.startswith(turn.text[: turn.end]):
        return turn.start, turn.end
    closed = chat.last_special(whole, turn.start, _common(whole, turn.text))
    message = chat.messages[index]
    if (
        closed is None
        or not str(message.get("content", "")).strip()
        or not _says(whole[turn.start : closed], message)
    ):
        return None
    return turn.start, closed + _spaces(whole[closed:])


def _ended(chat: Chat, text: str, spans: list[Span], answers: Sequence[int]) -> Written:
    """Checks that every turn ends by a special token, which may be what begins the next message."""
    ended, unended = [], False
    for index, (start, end) in zip(answers, spans, strict=True):
        if not chat.ends_with_special(text[start:end]):
            rest = text[end:].lstrip()
            behind = _behind(text[start:end], chat.messages[index])
            if not behind.strip() and (token := chat.special_at_start(rest)) is not None:
                end = len(text) - len(rest) + len(token)
            elif not behind.strip() and not rest:
                unended = True
            else:
                raise UserError(
                    f"messages[{index}]: the chat template writes {(behind + rest)[:24]!r} behind the answer, "
                    "which is no special token of this tokenizer, so the policy could not learn to stop; let "
                    "the template end an answer by eos_token"
                )
        ended.append((start, end))
    return Written(text, ended, unended)


def _behind(turn: str, message: Message) -> str:
    """The end of the turn behind the text of the message; empty where tool calls may stand there."""
    last_line = str(message.get("content", "")).strip().rpartition("\n")[2]
    return "" if message.get("tool_calls") or not last_line else turn.rpartition(last_line)[2]


def _closing(chat: Chat, text: str, start: int, index: int) -> int:
    """The end of a turn that more messages follow: that of the special token behind what it says."""
    place = start
    for words in _said(chat.messages[index], calls=True):
        place = max(place, text.find(words, place) + len(words))
    end = chat.next_special(text, place)
    return end + _spaces(text[end:])


def _said(message: Message, calls: bool) -> list[str]:
    """The words that the turn of a message must hold: its text, and the names of functions that it calls."""
    if not calls:
        content = message.get("content")
        return [content.strip()] if isinstance(content, str) else []
    functions = [_mapping(_mapping(call).get("function", call)) for call in message.get("tool_calls") or ()]
    return _said(message, calls=False) + [str(function["name"]) for function in functions if "name" in function]


def _says(text: str, message: Message, calls: bool = True) -> bool:
    squashed = _squashed(text)
    return all(_squashed(words) in squashed for words in _said(message, calls))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _common(one: str, other: str) -> int:
    """The number of characters that two texts share at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _squashed(text: str) -> str:
    return "".join(text.split())
