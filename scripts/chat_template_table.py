"""Compares chat templates that TRL ships, shape by shape, with what hybrid_jax reads and learns.

    python scripts/chat_template_table.py            # writes docs/chat_templates.md (needs `pip install trl`)

For each template a byte-level tokenizer gets the special tokens that the template writes. hybrid_jax gets the
model's own template; the other side is `transformers` with TRL's *training* template, whose generation marks
give a mask. A difference is named by a letter only if what the letter says is true of the tokens.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import encode_conversation
from hybrid_jax.data.tokenizer import HuggingFaceTokenizer
from hybrid_jax.data.turn_tokens import TurnEncoder

PAGE = Path(__file__).parents[1] / "docs" / "chat_templates.md"
CONTROL = re.compile(r'<\|[^<>\s"\']+>|<[^<>\s"\'|]+\|>|<｜[^<>｜]+｜>|<(?:start|end)_of_\w+>')
ROLES = {  # of the templates whose names begin so: bos_token and eos_token
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion": ("<bos>", "<eos>"),
    "gemma": ("<bos>", "<eos>"),
    "glm": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm": ("<|startoftext|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": (None, "<|im_end|>"),
    "phi": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(city: str, number: int = 1, arguments: Any = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city} if arguments is None else arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": f"call{number:05}", "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
ASK, TELL = user("Is it cold in Oslo?"), said("Yes, it is.")
MORE, LESS = user("And in Rome?"), said("No, it is mild.")
CALLS = said("", tool_calls=[call("Oslo")])
BOTH = said("", tool_calls=[call("Oslo"), call("Rome", 2)])
THINKS = "Winter is cold."

# shape -> messages and template variables
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one answer": ([ASK, TELL], {}),
    "two answers": ([ASK, TELL, MORE, LESS], {}),
    "three answers": ([ASK, TELL, MORE, LESS, user("Thanks."), said("Welcome.")], {}),
    "system": ([system("Be brief."), ASK, TELL, MORE, LESS], {}),
    "developer": ([{"role": "developer", "content": "Be brief."}, ASK, TELL], {}),
    "last turn by the user": ([ASK, TELL, MORE], {}),
    "assistant first": ([said("Hello."), ASK, TELL], {}),
    "system, then assistant": ([system("Be brief."), said("Hello."), ASK, TELL], {}),
    "two answers in a row": ([ASK, TELL, LESS], {}),
    "two questions in a row": ([ASK, MORE, TELL], {}),
    "empty answer": ([ASK, said("")], {}),
    "white space around": ([ASK, said("\n  It is.\n")], {}),
    "non-Latin": ([user("Осло 冷吗? 🥶"), said("Да, 很冷。\nनमस्ते")], {}),
    "special tokens written": ([user("Say {eos}{eos}"), said("I say {eos} no.")], {}),
    "tools, no call": ([ASK, TELL], {"tools": TOOLS}),
    "call": ([ASK, CALLS], {"tools": TOOLS}),
    "call, content absent": ([ASK, said(tool_calls=[call("Oslo")])], {"tools": TOOLS}),
    "call behind a text": ([ASK, said("I look.", tool_calls=[call("Oslo")])], {"tools": TOOLS}),
    "call, arguments a text": ([ASK, said("", tool_calls=[call("Oslo", 1, '{"city": 1}')])], {"tools": TOOLS}),
    "call, result, answer": ([ASK, CALLS, result("-9 C"), TELL], {"tools": TOOLS}),
    "call, answer, question, answer": ([ASK, CALLS, result("-9 C"), TELL, MORE, LESS], {"tools": TOOLS}),
    "calls one after the other": (
        [ASK, CALLS, result("-9 C"), said("", tool_calls=[call("Rome", 2)]), result("9 C", 2), LESS],
        {"tools": TOOLS},
    ),
    "parallel calls": ([ASK, BOTH], {"tools": TOOLS}),
    "parallel calls, results, answer": ([ASK, BOTH, result("-9 C"), result("9 C", 2), TELL], {"tools": TOOLS}),
    "reasoning": ([ASK, said("Yes.", reasoning_content=THINKS)], {}),
    "reasoning of two answers": (
        [ASK, said("Yes.", reasoning_content=THINKS), MORE, said("No.", reasoning_content="Rome is mild.")],
        {},
    ),
    "reasoning in the text": ([ASK, said(f"<think>\n{THINKS}\n</think>\n\nYes.")], {}),
    "reasoning in both texts": (
        [ASK, said(f"<think>\n{THINKS}\n</think>\n\nYes."), MORE, said("<think>\nMild.\n</think>\n\nNo.")],
        {},
    ),
    "reasoning, call, answer": (
        [ASK, {**CALLS, "reasoning_content": "I look."}, result("-9"), said("Yes.", reasoning_content=THINKS)],
        {"tools": TOOLS},
    ),
    "enable_thinking: true": ([ASK, TELL], {"enable_thinking": True}),
    "enable_thinking: false": ([ASK, TELL, MORE, LESS], {"enable_thinking": False}),
    "documents": ([ASK, TELL], {"documents": [{"title": "Oslo", "text": "It is cold."}]}),
}  # fmt: skip

LETTERS = {
    "=": "the same tokens and the same mask",
    "≡": "the same tokens; TRL has no training template, so there is no mask to compare with",
    "–": "the template refuses these messages, in `transformers` too",
    "h": "the same tokens; TRL also learns what the header of an answer writes, which the policy never does",
    "e": "the same tokens but for the last: TRL's template ends the last answer by another token",
    "s": "one sequence for each answer, each with the tokens and the header of the model's own template, which "
    "writes an earlier answer in another way than the last one (without its reasoning, or with another end): "
    "every answer is taught as the policy is asked for it; TRL's training template writes all in one way",
    "i": "the tokens are those of the model's own template, which asks for an answer in another way than it "
    "writes the answer; it is learned from where the two part",
    "o": "ours are the tokens of the model's own template; TRL's training template writes another text",
    "r": "the reasoning that the template would cut off is kept, as in TRL; what the header opens is not "
    "learned, and earlier answers are read without their reasoning, as the policy is asked",
    "t": "a special token that is written in a message stays text here; there it becomes that token",
    "m": "the same tokens; the marks of TRL's template lie elsewhere (see the template)",
    "C": "refused: the template does not write the tool calls, so another answer would be taught",
    "A": "refused: the template does not write the text of the answer (those of some vision models take lists "
    "of parts, not texts), so another one would be taught",
    "Q": "refused: the template does not ask for the answer as it writes it, or not where it stands",
}

INTRODUCTION = """# Chat templates, compared

Written by `scripts/chat_template_table.py`; a test holds it to the code. Each line is a chat template that TRL
{version} ships, each column a conversation (below). hybrid_jax encodes it with the model's own template. The
other side is `transformers` with TRL's training template, which has generation marks
(`apply_chat_template(..., return_assistant_tokens_mask=True)`). `hybrid_jax/data/turns.py` finds the turns.
"""

ACROSS = """## Across turns

A conversation that is sampled turn by turn only grows: tokens that were sampled or read stay, and what
follows is tokenised alone (`hybrid_jax/data/turn_tokens.py`). Where a template is stable, these are the
tokens of the whole conversation rendered at once; a slow test compares them with `transformers`. One
that rewrites a turn once others follow (it leaves out the reasoning of earlier answers, or ends them by
another token) is refused, with the turn; `rewriting_template: append` takes it, and keeps every turn as
it was sampled and read. It is asked with answers that hold a `<think>` reasoning and with answers that
hold none.
"""


class Side(NamedTuple):
    """Tokens and what is learned of them."""

    ids: list[int]
    mask: list[bool]


class Template:
    """A chat template of TRL with its training template and a tokenizer that has its special tokens."""

    def __init__(self, folder: Path, name: str):
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        from hybrid_jax.data.tokenizer import Bytes

        self.name = name
        self.source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        training = folder / f"{name}_training.jinja"
        marked = re.search(r"\{%-?\s*generation", self.source)
        self.training = (
            training.read_text(encoding="utf-8") if training.exists() else self.source if marked else None
        )
        self.bos, self.eos = next(roles for prefix, roles in ROLES.items() if name.startswith(prefix))
        special = {*CONTROL.findall(self.source), self.eos, *([self.bos] if self.bos else [])}
        backend: Any = Bytes().build()
        backend = backend._backend
        backend.add_special_tokens([AddedToken(token, special=True) for token in sorted(special)])
        backend.encode_special_tokens = False
        roles = {"bos_token": self.bos} if self.bos else {}
        self.theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=self.eos, **roles)
        self.theirs.chat_template = self.source
        self.ours = HuggingFaceTokenizer(self.theirs)

    def shape(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages of a shape, with the end token where the shape writes one."""
        messages, variables = SHAPES[name]
        return [
            {**message, "content": message["content"].replace("{eos}", self.eos)}
            if "content" in message
            else message
            for message in messages
        ], variables

    def reference(self, messages: Any, variables: Mapping[str, Any]) -> Side | str:
        """The tokens and mask of `transformers` with TRL's training template, or its refusal."""
        try:
            out = self.theirs.apply_chat_template(
                messages,
                chat_template=self.training or self.source,
                return_dict=True,
                return_assistant_tokens_mask=self.training is not None,
                **variables,
            )
        except Exception as error:
            return str(error)
        return Side(out["input_ids"], [bool(item) for item in out.get("assistant_masks", [])])

    def rendered(self, messages: Any, variables: Mapping[str, Any], ask: bool = False) -> list[int] | None:
        """The tokens that `transformers` gives with the model's own template, if it takes the messages."""
        try:
            return self.theirs.apply_chat_template(
                messages, return_dict=False, add_generation_prompt=ask, **variables
            )
        except Exception:
            return None

    def own(self, messages: Any, variables: Mapping[str, Any]) -> list[Side] | str:
        """The tokens and mask of hybrid_jax, or its refusal."""
        try:
            found = encode_conversation(messages, self.ours, variables)
        except UserError as error:
            return str(error)
        return [Side(one.tokens.tolist(), one.loss_mask.tolist()) for one in found]


def compare(template: Template, shape: str) -> str:
    """The letter of `LETTERS` for one template and one shape."""
    messages, variables = template.shape(shape)
    own, reference = template.own(messages, variables), template.reference(messages, variables)
    if isinstance(own, str):
        return _refusal(template, messages, variables, own)
    if own == [reference]:
        return "="
    for letter, holds in DIFFERENCES.items():
        if holds(template, messages, variables, own, reference):
            return letter
    return "?"


def _refusal(template: Template, messages: Any, variables: Any, problem: str) -> str:
    if "the chat template refuses the messages" in problem and template.rendered(messages, variables) is None:
        return "–"
    if "does not write the tool calls" in problem:
        return "C"
    if "does not write the whole answer" in problem or "leave out this answer" in problem:
        return "A"
    if "another prompt" in problem or "no user message stands" in problem or "refuses" in problem:
        return "Q"
    return "?"


def _no_oracle(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    return template.training is None and [one.ids for one in own] == [reference.ids]


def _header(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    if isinstance(reference, str) or len(own) != 1 or own[0].ids != reference.ids:
        return False
    more = np.flatnonzero(np.array(reference.mask) & ~np.array(own[0].mask))
    less = np.array(own[0].mask) & ~np.array(reference.mask)
    headers = set()
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = template.rendered(messages[:index], variables, ask=True) or []
            before = template.rendered(messages[:index], variables) or []
            headers |= set(range(min(_common(before, asked), len(asked)), len(asked)))
    return bool(len(more)) and not less.any() and set(more.tolist()) <= headers


def _several(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return (
        answers != [len(messages) - 1]
        and len(own) == len(answers)
        and all(
            _as_asked(template, messages[: i + 1], variables, one) for i, one in zip(answers, own, strict=True)
        )
    )


def _own_texts(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    """Tells whether each sequence is that of the model's own template for the messages up to its answer."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(own) != len(answers):
        return False
    texts = [template.rendered(messages[: index + 1], variables) or [] for index in answers]
    whole = template.rendered(messages, variables)  # of an answer that cannot stand alone
    return all(
        one.ids in (ids, [*ids, template.ours.eos_id], whole) for one, ids in zip(own, texts, strict=True)
    )


def _another_text(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    differs = isinstance(reference, str) or reference.ids != own[0].ids
    ids = template.rendered(messages, variables) or []
    return differs and len(own) == 1 and own[0].ids in (ids, [*ids, template.ours.eos_id])


def _as_asked(template: Template, messages: Any, variables: Any, own: Side) -> bool:
    """Tells whether these are the model's own tokens, and all behind the question is learned."""
    ids = template.rendered(messages, variables)
    asked = template.rendered(messages[:-1], variables, ask=True)
    if ids is None or asked is None or own.ids[: len(ids)] != ids:
        return False
    learned = np.flatnonzero(own.mask)
    return own.ids[len(ids) :] in ([], [template.ours.eos_id]) and learned.tolist() == list(
        range(min(len(asked), _common(asked, ids)), len(own.ids))
    )


def _kept_reasoning(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(own) != len(answers):
        return False
    for index, one in zip(answers, own, strict=True):
        asked = template.rendered(messages[:index], variables, ask=True) or []
        answer = template.theirs.encode(messages[index].get("content", ""), add_special_tokens=False)
        learned = [token for token, kept in zip(one.ids, one.mask, strict=True) if kept]
        said = next((k for k in range(len(answer)) if [*answer[k:], template.ours.eos_id] == learned), None)
        if one.ids[: len(asked)] != asked or said is None or asked[len(asked) - said :] != answer[:said]:
            return False
    return True


def _ends_otherwise(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    if isinstance(reference, str) or len(own) != 1:
        return False
    shared = _common(own[0].ids, reference.ids)
    special = set(template.ours.special_tokens.values())
    rest = [*own[0].ids[shared:], *reference.ids[shared:]]
    cut = [Side(side.ids[:shared], side.mask[:shared]) for side in (own[0], reference)]
    same = cut[0] == cut[1] or _header(template, messages, variables, cut[:1], cut[1])
    return same and len(rest) <= 3 and all(token in special or token == 10 for token in rest)


def _written(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    written = any(template.eos in str(message.get("content")) for message in messages)
    text = template.theirs.decode(own[-1].ids, skip_special_tokens=False)
    return written and own[-1].ids.count(template.ours.eos_id) + sum(
        str(message.get("content")).count(template.eos) for message in messages
    ) <= text.count(template.eos)


def _marks(template: Template, messages: Any, variables: Any, own: list[Side], reference: Any) -> bool:
    return not isinstance(reference, str) and len(own) == 1 and own[0].ids == reference.ids


def _common(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


DIFFERENCES: dict[str, Callable[[Template, Any, Any, list[Side], Any], bool]] = {
    "≡": _no_oracle,
    "t": _written,
    "h": _header,
    "e": _ends_otherwise,
    "s": _several,
    "r": _kept_reasoning,
    "o": _another_text,
    "i": _own_texts,
    "m": _marks,
}


def templates(only: Callable[[str], bool] = lambda name: True) -> list[Template]:
    """The templates of the installed TRL, by name."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise SystemExit("the chat templates are those of TRL: pip install trl")
    folder = Path(spec.origin).parent / "chat_templates"
    names = sorted(path.stem for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))
    return [Template(folder, name) for name in names if only(name)]


def row(template: Template) -> str:
    """The line of the table for one template."""
    return f"{template.name:24}" + "".join(f"{compare(template, shape):>3}" for shape in SHAPES)


def across_turns(template: Template) -> str:
    """Stable where a conversation may grow turn by turn, the turn that is rewritten, or "refused"."""
    try:
        TurnEncoder(template.ours).opening([ASK])
    except UserError as error:
        rewritten = re.search(r"writes (turn \d \(\w+\)) differently", str(error))
        return f"rewrites {rewritten[1]}" if rewritten else "refused"
    return "stable"


def page() -> str:
    """The text of the page."""
    every = templates()
    rows = [row(template) for template in every]
    turns: dict[str, list[str]] = {}
    for template in every:
        turns.setdefault(across_turns(template), []).append(template.name)
    used = [letter for letter in LETTERS if any(letter in line[24:] for line in rows)]
    numbers = " " * 24 + "".join(f"{number:>3}" for number in range(1, len(SHAPES) + 1))
    return "\n".join(
        [
            INTRODUCTION.format(version=metadata.version("trl")),
            "```",
            numbers,
            *rows,
            "```",
            "",
            "The signs:",
            "",
            *(f"- `{letter}` {LETTERS[letter]}." for letter in used),
            "",
            "The conversations:",
            "",
            *(f"{number}. {shape}" for number, shape in enumerate(SHAPES, start=1)),
            "",
            ACROSS,
            *(f"- **{kind}**: {', '.join(names)}." for kind, names in sorted(turns.items(), reverse=True)),
            "",
        ]
    )


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
