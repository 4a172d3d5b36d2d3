"""Preferences as data: which of the responses to one prompt people liked better.

A row is plain, ``{"prompt": text, "chosen": text, "rejected": text}``, or a conversation: ``messages`` (or a
``prompt`` that is a list of messages) with the two answers as texts or as messages, or ``chosen`` and
``rejected`` as whole conversations that differ in the last answer. A row of more than two has ``responses``, a
list of texts, and ``ranking``, the place of each (smaller is better, equal is a tie).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from hybrid_jax.core.batches import Example, Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.core.ranges import Fraction, settings
from hybrid_jax.core.registry import Registry, suggest
from hybrid_jax.data.files import json_rows
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.messages import check_messages
from hybrid_jax.data.sources import SOURCES, HuggingFaceDataset, Split, check_held_out, choose
from hybrid_jax.data.template_inputs import TemplateInputs

_COLUMNS = ("chosen", "rejected", "responses", "ranks", "margin", "tie")  # of the example of a preference


@dataclass(frozen=True)
class Preference:
    """The responses to one prompt, ranked.

    Attributes:
        prompt: what they answer; the text of the last message where a conversation stands alone.
        chosen: the best.
        rejected: the worst: of two, the other one.
        messages: the conversation that they answer; empty for a plain prompt.
        margin: by how much the chosen one is better, or how sure people were; None where nobody said.
        tie: neither is better.
        columns: every other field of the row.
        responses: all of them, where there are more than two.
        ranks: the place of each of ``responses``, from 0; equal places are a tie.
        template_variables: what a chat template reads beside the messages, such as ``tools``.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Message, ...] = ()
    margin: float | None = None
    tie: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    where: str = field(default="", repr=False, compare=False)  # its file and line, for messages
    template_variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranking(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """All responses and the place of each, from 0."""
        if self.responses:
            return self.responses, self.ranks
        return (self.chosen, self.rejected), (0, 0 if self.tie else 1)

    @property
    def example(self) -> Example:
        """The same as a row of a run's data: its response is the chosen one. `of` is the inverse."""
        own = {name: getattr(self, name) for name in _COLUMNS}
        columns: dict[str, Any] = {**self.columns, **own}
        messages = self.messages
        if messages:
            columns["messages"] = list(messages)
            messages = (*messages, {"role": "assistant", "content": self.chosen})
        return Example(self.prompt, self.chosen, columns, messages, self.where, self.template_variables)

    @staticmethod
    def of(example: Example) -> Preference:
        """The preference that an example was made from.

        Raises:
            UserError: it was made from something else.
        """
        if any(name not in example.columns for name in _COLUMNS):
            raise UserError(
                "expected rows with a chosen and a rejected response, got others; "
                "use the source {name: preferences, source: {name: jsonl, train: FILE}}"
            )
        own = {name: example.columns[name] for name in _COLUMNS}
        others = {n: value for n, value in example.columns.items() if n not in (*_COLUMNS, "messages")}
        asked = example.question
        variables = example.template_variables
        return Preference(
            example.prompt,
            messages=asked,
            columns=others,
            where=example.where,
            template_variables=variables,
            **own,
        )


class PreferenceSource(Protocol):
    """Settings of a source of preferences, an entry of `PREFERENCES`."""

    def load(self, split: Split) -> Sequence[Preference]:
        """All preferences of the split, in a fixed order; a `UserError` if there are none."""
        ...


PREFERENCES: Registry[PreferenceSource] = Registry("source of preferences")


@settings(kw_only=True)
class PreferenceRows(TemplateInputs, Filtered):
    """How a row of named fields becomes a preference; shared by the sources.

    Attributes:
        prompt_field: the field with the prompt, a text or a list of messages; None has no prompts.
        messages_field: the field with the conversation that is answered, read in place of the prompt where a
            row has one; None reads the prompt.
        chosen_field: the better answer: a text, a message, or messages.
        rejected_field: the other one.
        responses_field: the texts of a row with more than two.
        ranking_field: their places: smaller is better, equal is a tie.
        margin_field: a number: how much better, or how sure; None reads none.
        tie_field: true where neither is better.

    All other fields become ``Preference.columns``.
    """

    prompt_field: str | None = "prompt"
    messages_field: str | None = "messages"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    responses_field: str = "responses"
    ranking_field: str = "ranking"
    margin_field: str | None = None
    tie_field: str = "tie"

    def preference(self, row: Mapping[str, Any], where: str) -> Preference:
        """The preference of one row.

        Raises:
            UserError: one line with the place, what was expected and got.
        """
        prompt, messages = self._asked(row, where)
        if self.responses_field in row:
            responses, ranks = self._ranking(row, where)
            best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
            chosen, rejected = responses[best], responses[worst]
            tie = len(set(ranks)) == 1
        else:
            responses, ranks = (), ()
            messages, chosen, rejected = self._pair(row, messages, where)
            tie = self._tie(row, where)
        if prompt is None:
            prompt = messages[-1]["content"] if messages else ""
        if prompt == "" and not messages and self.prompt_field is not None:
            raise UserError(f"{where}: no prompt; give it, or set prompt_field to null for texts without one")
        fields = (getattr(self, name) for name in _FIELDS)
        used = {name for name in fields if name is not None}
        variables = self.template_variables(row, where) if messages else {}
        given = self.columns(row, variables) if messages else row
        columns = {key: value for key, value in given.items() if key not in used}
        margin = self._margin(row, where)
        return Preference(
            prompt, chosen, rejected, messages, margin, tie, columns, responses, ranks, where, variables
        )

    def _asked(self, row: Mapping[str, Any], where: str) -> tuple[str | None, tuple[Message, ...]]:
        """The prompt and the conversation of a row, as far as they stand beside the answers."""
        prompt = row.get(self.prompt_field) if self.prompt_field is not None else None
        given, name = None, self.messages_field
        if self.messages_field is not None:
            given = row.get(self.messages_field)
        if given is None and isinstance(prompt, list | tuple):
            given, name = prompt, self.prompt_field
        if prompt is not None and not isinstance(prompt, str | list | tuple):
            raise UserError(f"{where}: {self.prompt_field!r} must be a text or messages, got {shown(prompt)}")
        text = prompt if isinstance(prompt, str) else None
        return text, () if given is None else check_messages(given, where, str(name))

    def _pair(
        self, row: Mapping[str, Any], messages: tuple[Message, ...], where: str
    ) -> tuple[tuple[Message, ...], str, str]:
        """The conversation and both answers."""
        found = []
        for name in (self.chosen_field, self.rejected_field):
            if row.get(name) is None:
                raise UserError(f"{where}: no field {name!r}; {suggest(name, list(map(str, row)))}")
            found.append(_answer(row[name], messages, where, name))
        (before, chosen), (other, rejected) = found
        if before != other:
            raise UserError(
                f"{where}: {self.chosen_field!r} and {self.rejected_field!r} must differ in the last answer "
                "only, got conversations that differ before it"
            )
        return before, chosen, rejected

    def _ranking(self, row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        texts, places = row[self.responses_field], row.get(self.ranking_field)
        is_texts = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        if not is_texts or len(texts) < 2:
            raise UserError(f"{where}: {self.responses_field!r} must be two texts or more, got {shown(texts)}")
        is_places = isinstance(places, list | tuple) and all(_is_number(place) for place in places)
        if places is None or not is_places or len(places) != len(texts):
            raise UserError(
                f"{where}: {self.ranking_field!r} must be {len(texts)} numbers, the place of each response, "
                f"got {shown(places)}"
            )
        order = sorted(set(places))
        return tuple(texts), tuple(order.index(place) for place in places)

    def _margin(self, row: Mapping[str, Any], where: str) -> float | None:
        if self.margin_field is None or row.get(self.margin_field) is None:
            return None
        if not _is_number(row[self.margin_field]):
            raise UserError(
                f"{where}: {self.margin_field!r} must be a number or null, got {shown(row[self.margin_field])}"
            )
        return float(row[self.margin_field])

    def _tie(self, row: Mapping[str, Any], where: str) -> bool:
        tie = row.get(self.tie_field, False)
        if not isinstance(tie, bool):
            raise UserError(f"{where}: {self.tie_field!r} must be true or false, got {shown(tie)}")
        return tie


_FIELDS = tuple(
    name
    for name in PreferenceRows.__dataclass_fields__
    if name.endswith("_field") and name not in TemplateInputs.__dataclass_fields__  # these stay columns
)


@PREFERENCES.register("jsonl")
@settings(kw_only=True)
class JsonlPreferences(PreferenceRows):
    """One JSON object a line, or one list of objects; plain, or gzip where the name ends in ``.gz``.

    Attributes:
        train: the training file.
        held_out: the held-out file.
        held_out_fraction: instead of a file, the share in (0, 1) of the prompts to hold out, chosen by a hash:
            all pairs of a prompt, and of conversations that begin with the same message, are on one side.
    """

    train: Path
    held_out: Path | None = None
    held_out_fraction: Fraction | None = None

    def __post_init__(self):
        super().__post_init__()
        check_held_out(self.held_out_fraction, held_out=self.held_out)

    def load(self, split: Split) -> Sequence[Preference]:
        """Reads the preferences of the split."""
        path = self.held_out if split == "held_out" and self.held_out is not None else self.train
        given = self.kept(json_rows(Path(path)), str(path))
        rows = [self.preference(row, where) for where, row in given]
        return _chosen(rows, split, self.held_out is not None, self.held_out_fraction, str(path))


@PREFERENCES.register("huggingface")
@settings(kw_only=True)
class HuggingFacePreferences(PreferenceRows):
    """A dataset of the `datasets` library: a hub name (or its offline cache) or a local folder.

    Attributes:
        path: hub name, folder, or a format such as ``json`` together with ``data_files``.
        subset: the configuration of the dataset, if it has several.
        data_files: local files by the name of their split.
        train_split: name of the training split.
        held_out_split: name of the held-out split.
        held_out_fraction: instead of a split, as in `JsonlPreferences`.
    """

    path: str
    subset: str | None = None
    data_files: dict[str, str] | None = None
    train_split: str = "train"
    held_out_split: str | None = None
    held_out_fraction: Fraction | None = None

    def __post_init__(self):
        super().__post_init__()
        check_held_out(self.held_out_fraction, held_out_split=self.held_out_split)

    def load(self, split: Split) -> Sequence[Preference]:
        """Reads the preferences of the split out of the data set."""
        name = self.held_out_split if split == "held_out" and self.held_out_split else self.train_split
        dataset = HuggingFaceDataset(path=self.path, subset=self.subset, data_files=self.data_files)
        placed = ((f"{self.path}, row {i}", row) for i, row in enumerate(dataset.rows(name), start=1))
        rows = [self.preference(row, where) for where, row in self.kept(placed, self.path)]
        return _chosen(rows, split, self.held_out_split is not None, self.held_out_fraction, self.path)


@SOURCES.register("preferences")
@settings
class PreferenceExamples:
    """Preferences as the data of a run: SFT learns the chosen response, a reward model the whole row.

    Attributes:
        source: where they come from.
    """

    source: Annotated[Any, PREFERENCES]

    def load(self, split: Split) -> Sequence[Example]:
        """The preferences of the split, each as an example with its chosen response."""
        return [preference.example for preference in self.source.load(split)]


def _chosen(
    rows: Sequence[Preference], split: Split, own: bool, fraction: float | None, name: str
) -> Sequence[Preference]:
    """The rows of a split; what stands on one side together is the prompt, or how a conversation begins.

    The whole conversation would not do: one of several turns gives a row at each of them.
    """
    examples = [Example(_group(row), None, {"row": row}) for row in rows]
    return [example.columns["row"] for example in choose(examples, split, own, fraction, name)]


def _group(row: Preference) -> str:
    asked: Iterable[Message] = (message for message in row.messages if message["role"] == "user")
    first = next(iter(asked), None)
    return (row.prompt or row.chosen) if first is None else first["content"]


def _answer(
    value: Any, messages: tuple[Message, ...], where: str, name: str
) -> tuple[tuple[Message, ...], str]:
    """The conversation before an answer, and the answer; a text answers ``messages``."""
    if isinstance(value, str):
        return messages, value
    given = check_messages([value] if isinstance(value, Mapping) else value, where, name)
    whole = given if given[: len(messages)] == messages else (*messages, *given)
    if whole[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: {name!r} must end with a message of the assistant, got {whole[-1]['role']!r}"
        )
    return whole[:-1], whole[-1]["content"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
