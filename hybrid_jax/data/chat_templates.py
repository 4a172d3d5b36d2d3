"""The chat templates that have a name, and those of files; they are jinja, as `transformers` renders it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, read_text
from hybrid_jax.core.registry import suggest

MOST_LETTERS = MEBIBYTE  # of a template; those of the hub have up to 20,000


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja template, and the special tokens beside the end token that it needs."""

    source: str
    special_tokens: tuple[str, ...] = ()


CHAT_TEMPLATES = {
    # <|im_start|>role, a line break, the text, <|im_end|>: the token that ends every turn.
    "chatml": ChatTemplate(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # "User: …", "Assistant: …": for any tokenizer, since its end token is the only special one.
    "plain": ChatTemplate(
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}


def read_chat_template(name: str) -> ChatTemplate:
    """The template of that name, or that of a file.

    Raises:
        UserError: it is neither, or the file cannot be read.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not Path(name).exists():
        raise UserError(f"chat_template {name!r} is no file and no name; {suggest(name, CHAT_TEMPLATES)}")
    return ChatTemplate(read_text(name, MOST_LETTERS, "chat_template"))
