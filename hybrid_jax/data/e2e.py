"""The E2E NLG challenge (Novikova et al. 2017) with its proper names replaced by placeholders.

A model trained from scratch on a few hundred different prompts cannot spell a restaurant that it has never
seen; it learns ``X-name`` instead of ``The Golden Palace``, as TGen does (Dušek and Jurčíček 2016).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_jax.core.batches import Example
from hybrid_jax.data.sources import SOURCES, Jsonl, Split


@SOURCES.register("e2e_nlg")
@dataclass(frozen=True)
class E2E(Jsonl):
    """Rows of a JSON-lines file whose prompts read ``name[The Eagle], food[French], near[Burger King]``.

    Attributes:
        delexicalise: slots whose values are replaced by ``X-<slot>`` in the prompt, the response and the column
            "references"; the column "values" keeps them, as ``{"X-name": "The Eagle"}``.
    """

    delexicalise: tuple[str, ...] = ("name", "near")

    def load(self, split: Split) -> Sequence[Example]:
        return [delexicalised(example, self.delexicalise) for example in super().load(split)]


def delexicalised(example: Example, slots: Sequence[str]) -> Example:
    """The example with the values of ``slots`` replaced wherever they are written, in any case."""
    values = {
        f"X-{slot}": value for slot, value in re.findall(r"(\w+)\[([^\]]*)\]", example.prompt) if slot in slots
    }

    def replaced(text: str) -> str:
        for placeholder, value in values.items():
            name = re.escape(value.removeprefix("The "))
            text = re.sub(rf"(?i)\b(?:the )?{name}(?!\w)", placeholder, text)
        return text

    columns = dict(example.columns)
    if "references" in columns:
        columns["references"] = [replaced(reference) for reference in columns["references"]]
    return Example(
        prompt=replaced(example.prompt),
        response=None if example.response is None else replaced(example.response),
        columns={**columns, "values": values},
    )
