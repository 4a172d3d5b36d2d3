"""Tasks of reasoning-gym: questions made by a program, each with a program that scores an answer (Stojanovski
et al. 2025).

A row keeps the name of its task and its number rather than the task itself: the scorer makes it again, so that
nothing in a file of rows decides what it does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Fraction, Seed, settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.data.sources import SOURCES, Rows, Split, choose


@SOURCES.register("reasoning_gym")
@settings(kw_only=True)
class ReasoningGym(Rows):
    """Questions of one task of reasoning-gym, with the answers that the package gives.

    The fields of a row are ``question``, ``answer`` and ``reasoning_gym``, which the reward of that name reads.
    Question i of seed s is question i + 1 of seed s - 1: seeds that are near each other share most questions.

    Attributes:
        task: its name in the package, such as ``chain_sum``.
        size: number of questions, those that are held out included.
        seed: of the questions.
        config: settings of the task, such as ``{max_terms: 3}``; the package's where none is given.
        held_out_fraction: the share in (0, 1) of the questions to hold out, chosen by a hash: equal questions
            stay on one side.
    """

    task: str
    size: Count = 1000
    seed: Seed = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    held_out_fraction: Fraction = 0.1
    prompt_field: str | None = "question"
    response_field: str | None = "answer"

    def load(self, split: Split) -> Sequence[Example]:
        """Makes the questions of the split, the same ones every time."""
        name = f"reasoning_gym task {self.task!r}"
        examples = [self.example(row, where) for where, row in self.kept(self._rows(), name)]
        return choose(examples, split, False, self.held_out_fraction, name)

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(self.size):
            key = {"task": self.task, "seed": self.seed, "size": self.size, "config": dict(self.config)}
            entry, _ = entry_of({**key, "index": index})
            row = {name: entry[name] for name in ("question", "answer")}
            yield f"{self.task}, question {index}", {**row, "reasoning_gym": {**key, "index": index}}


def entry_of(key: Any) -> tuple[Mapping[str, Any], Any]:
    """The question that a row names, and the data set that scores answers to it.

    Raises:
        UserError: there is no such question.
    """
    names = ("task", "seed", "size", "config", "index")
    if not isinstance(key, Mapping) or key.keys() != {*names}:
        raise UserError(f"the column 'reasoning_gym' must hold {', '.join(names)}, got {str(key)[:60]}")
    task, seed, size, config, index = (key[name] for name in names)
    data = _data_set(str(task), seed, size, json.dumps(config, sort_keys=True))
    try:
        return data[index], data
    except Exception as error:  # of the program that makes the question
        raise UserError(f"question {index} of {task!r} cannot be made: {_line(error)}") from error


@functools.lru_cache(maxsize=64)
def _data_set(task: str, seed: int, size: int, config: str) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError(
            f"the reasoning_gym tasks need a package: pip install -e '.[envs]' in the checkout ({error})"
        ) from error
    if task not in DATASETS:
        raise UserError(f"reasoning_gym has no task {task!r}; {suggest(task, DATASETS)}")
    try:
        return create_dataset(task, seed=seed, size=size, **json.loads(config))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"the config of the reasoning_gym task {task!r} is refused: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
