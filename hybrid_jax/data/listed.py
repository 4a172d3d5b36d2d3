"""Examples that were given from Python as a list, and not by a config file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.conversations import conversation
from hybrid_jax.data.sources import Rows, Split, choose


@dataclass(frozen=True)
class Listed:
    """Examples that were given as a list. A config file can only name them, by their digest.

    Attributes:
        digest: of all examples; it tells a resumed run from one with other data.
        held_out_fraction: the share of the prompts that is held out, chosen by a hash, see `Rows`.
    """

    digest: str
    held_out_fraction: float = 0.1

    @staticmethod
    def of(rows: Sequence[Example | Mapping[str, Any]]) -> Listed:
        """Makes a source of rows or examples, named by a digest of their contents."""
        examples = [_example(row, f"data[{index}]") for index, row in enumerate(rows)]
        listed = Listed(hashlib.sha256(repr(examples).encode("utf-8", "replace")).hexdigest()[:16])
        object.__setattr__(listed, "_examples", examples)  # no field: a config file could not hold them
        return listed

    def load(self, split: Split) -> Sequence[Example]:
        """The rows of the split.

        Raises:
            UserError: the list was given to another program, which has ended.
        """
        examples = getattr(self, "_examples", None)
        if examples is None:
            raise UserError(
                "the run's data was given from Python as a list: go on with HybridTrainer(..., data=...) there"
            )
        return choose(examples, split, False, self.held_out_fraction, "data")


def _example(row: Example | Mapping[str, Any], where: str) -> Example:
    if isinstance(row, Example):
        return row
    return conversation(row, where) if "messages" in row else Rows().example(row, where)
