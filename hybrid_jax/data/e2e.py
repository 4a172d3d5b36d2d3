"""The E2E NLG challenge (Novikova et al. 2017) with its proper names replaced by placeholders.

A model trained from scratch on a few hundred different prompts cannot spell a restaurant that it has never
seen; it learns ``X-name`` instead of ``The Golden Palace``, as TGen does (Dušek and Jurčíček 2016).
"""

from __future__ import annotations

import random
import re
from collections.abc import Container, Sequence
from dataclasses import replace

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Natural, settings
from hybrid_jax.data.sources import SOURCES, Jsonl, Split

SLOT = re.compile(r"([\w ]+)\[([^\]]*)\]")


@SOURCES.register("e2e_nlg")
@settings
class E2E(Jsonl):
    """Rows of a JSON-lines file whose prompts read ``name[The Eagle], food[French], near[Burger King]``.

    Attributes:
        recombined: draw so many new prompts from the slots and values of the training file, none of them
            held out, without responses: prompts to be answered for reward need no examples.
        delexicalise: slots whose values are replaced by ``X-<slot>`` in the prompt, the response and the column
            "references"; the column "values" keeps them, as ``{"X-name": "The Eagle"}``.
    """

    delexicalise: tuple[str, ...] = ("name", "near")
    recombined: Natural | None = None

    def load(self, split: Split) -> Sequence[Example]:
        """The rows of the split, or recombined prompts in place of training rows."""
        examples = [delexicalised(example, self.delexicalise) for example in super().load(split)]
        if split == "held_out" or self.recombined is None:
            return examples
        known = {example.prompt for example in self.load("held_out")}
        return [Example(prompt) for prompt in recombine(examples, self.recombined, known)]


def delexicalised(example: Example, slots: Sequence[str]) -> Example:
    """The example with the values of ``slots`` replaced wherever they are written, in any case."""
    values = {f"X-{slot}": value for slot, value in slots_of(example.prompt) if slot in slots}

    def replaced(text: str) -> str:
        for placeholder, value in values.items():
            name = re.escape(value.removeprefix("The "))
            text = re.sub(rf"(?i)\b(?:the )?{name}(?!\w)", placeholder, text)
        return text

    columns = dict(example.columns)
    if "references" in columns:
        columns["references"] = [replaced(reference) for reference in columns["references"]]
    return replace(
        example,
        prompt=replaced(example.prompt),
        response=None if example.response is None else replaced(example.response),
        columns={**columns, "values": values},
    )


def slots_of(prompt: str) -> list[tuple[str, str]]:
    """The slots and values of ``name[The Eagle], food[French]``, in order."""
    return [(slot.strip(), value) for slot, value in SLOT.findall(prompt)]


def recombine(examples: Sequence[Example], number: int, excluded: Container[str]) -> list[str]:
    """New prompts: the set of slots of one example, each with its value in another; always the same ones."""
    draw = random.Random(0)
    rows = [slots_of(example.prompt) for example in examples]
    values = {slot: sorted({v for row in rows for s, v in row if s == slot}) for row in rows for slot, _ in row}
    prompts: dict[str, None] = {}
    for _ in range(20 * number):
        slots = [slot for slot, _ in draw.choice(rows)]
        prompt = ", ".join(f"{slot}[{draw.choice(values[slot])}]" for slot in slots)
        if prompt not in excluded:
            prompts[prompt] = None
        if len(prompts) == number:
            return list(prompts)
    raise UserError(f"recombined must be at most the {len(prompts)} prompts that there are, got {number}")
