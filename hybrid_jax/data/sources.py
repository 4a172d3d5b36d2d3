"""Where examples come from: the embedded corpus, files, Hugging Face `datasets`, TensorFlow Datasets.

A source is a frozen dataclass with ``load(split)``. All of them hold out data the same way: a file or split
of its own, or a share of the training data. A source without held-out data says so when it is asked for some.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Fraction, Seed, Share, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.data.corpora import restaurants
from hybrid_jax.data.files import json_rows, read_data
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.row_templates import check_template, text_of

Split = Literal["train", "held_out"]


class Source(Protocol):
    """Settings of a data source, an entry of `SOURCES`."""

    def load(self, split: Split) -> Sequence[Example]:
        """All examples of the split, in a fixed order; a `UserError` if there are none."""
        ...


SOURCES: Registry[Source] = Registry("data source")


@SOURCES.register("restaurants")
@settings
class Restaurants(Filtered):
    """The embedded corpus: restaurant facts to short reviews (`hybrid_jax.data.corpora`).

    Attributes:
        omission: share in [0, 1] of the training reviews that leave a fact out.
        seed: of the sampling of pairs.
    """

    omission: Share = 0.25
    seed: Seed = 0

    def load(self, split: Split) -> Sequence[Example]:
        """Makes the split anew, the same one every time."""
        examples = restaurants(split, self.omission, self.seed)
        rows = (
            (str(number), {"prompt": example.prompt, "completion": example.response, **example.columns})
            for number, example in enumerate(examples)
        )
        return [examples[int(number)] for number, _ in self.kept(rows, "restaurants")]


@settings(kw_only=True)
class Rows(Filtered):
    """How a row of named fields becomes an example; shared by the sources that have such rows.

    Attributes:
        prompt_field: the field with the prompt; None makes every row a document, learned as a whole.
        response_field: the field with the response (or the document); None for prompts without responses.
        prompt_template: the prompt as a format of the row's fields, e.g. ``"Q: {question}\\nA:"``, instead of
            a field.
        response_template: the same for the response.

    All other fields become ``Example.columns``.
    """

    prompt_field: str | None = "prompt"
    response_field: str | None = "completion"
    prompt_template: str | tuple[str, ...] | None = None
    response_template: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("prompt_template", "response_template"):
            check_template(name, getattr(self, name))
        nothing = (
            self.prompt_field is self.response_field is self.prompt_template is self.response_template is None
        )
        if nothing:
            raise ValueError("prompt_field must be a field name where response_field is None, got None")

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Makes an example of a row."""
        prompt = text_of(row, self.prompt_field, self.prompt_template, where)
        response = text_of(row, self.response_field, self.response_template, where)
        used = {
            field
            for field, template in (
                (self.prompt_field, self.prompt_template),
                (self.response_field, self.response_template),
            )
            if template is None
        }
        columns = {key: value for key, value in row.items() if key not in used}
        return Example(prompt or "", response, columns, where=where)


@SOURCES.register("jsonl")
@settings(kw_only=True)
class Jsonl(Rows):
    """One JSON object a line, or one list of objects; plain, or gzip where the name ends in ``.gz``.

    Attributes:
        train: the training file.
        held_out: the held-out file.
        held_out_fraction: instead of a file, the share in (0, 1) of the training prompts to hold out, chosen
            by a hash of the prompt: equal prompts stay on one side.
    """

    train: Path
    held_out: Path | None = None
    held_out_fraction: Fraction | None = None

    def __post_init__(self):
        super().__post_init__()
        check_held_out(self.held_out_fraction, held_out=self.held_out)

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the rows of the split."""
        path = self.held_out if split == "held_out" and self.held_out is not None else self.train
        rows = self.kept(json_rows(Path(path)), str(path))
        examples = [self.example(row, where) for where, row in rows]
        return choose(examples, split, self.held_out is not None, self.held_out_fraction, str(path))


@SOURCES.register("text")
@settings(kw_only=True)
class Text(Filtered):
    """Plain text, UTF-8; gzip where the name ends in ``.gz``. One document, or one a line: a filter's "text".

    Attributes:
        train: the text.
        held_out: the held-out text.
        held_out_fraction: instead of a file, the share in (0, 1) at the end of the training text to hold out.
        split_at: instead of both, the number of characters before the held-out text.
        lines: every line that is not blank is a document of its own.
    """

    train: Path
    held_out: Path | None = None
    held_out_fraction: Fraction | None = None
    split_at: Count | None = None
    lines: bool = False

    def __post_init__(self):
        check_held_out(self.held_out_fraction, held_out=self.held_out, split_at=self.split_at)

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the text of the split, whole or by lines."""
        path = Path(self.held_out if split == "held_out" and self.held_out is not None else self.train)
        text = read_data(path).replace("\r\n", "\n")
        if self.held_out is None:
            text = self._part(text, split, path)
        documents = text.split("\n") if self.lines else [text]
        places = (f"{path}:{line}" if self.lines else str(path) for line in itertools.count(1))
        rows = (
            (where, {"text": document})
            for document, where in zip(documents, places, strict=False)
            if document.strip()
        )
        examples = [Example("", row["text"], where=where) for where, row in self.kept(rows, str(path))]
        return _not_empty(examples, split, str(path))

    def _part(self, text: str, split: Split, path: Path) -> str:
        if self.split_at is not None:
            cut = self.split_at
        elif self.held_out_fraction is not None:
            cut = int(len(text) * (1 - self.held_out_fraction))
        elif split == "held_out":
            raise _nothing_held_out(str(path), "held_out, held_out_fraction or split_at")
        else:
            cut = len(text)
        return text[:cut] if split == "train" else text[cut:]


@SOURCES.register("huggingface")
@settings(kw_only=True)
class HuggingFaceDataset(Rows):
    """A dataset of the `datasets` library: a hub name (or its offline cache) or a local folder.

    Attributes:
        path: hub name, folder, or a format such as ``json``, ``csv``, ``parquet`` together with
            ``data_files``.
        subset: the configuration of the dataset, if it has several.
        data_files: local files by the name of their split.
        train_split: name of the training split.
        held_out_split: name of the held-out split.
        held_out_fraction: instead of a split, as in `Jsonl`.
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

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the split out of the data set."""
        own = self.held_out_split is not None
        name = (
            self.held_out_split if split == "held_out" and self.held_out_split is not None else self.train_split
        )
        rows = ((f"{self.path}, row {i}", row) for i, row in enumerate(self.rows(name), start=1))
        examples = [self.example(row, where) for where, row in self.kept(rows, self.path)]
        return choose(examples, split, own, self.held_out_fraction, self.path)

    def rows(self, split: str) -> Iterable[Any]:
        """The rows of a split as the library gives them."""
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            if (Path(self.path) / "dataset_dict.json").is_file() or (Path(self.path) / "state.json").is_file():
                saved = datasets.load_from_disk(self.path)
                return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(self.path, self.subset, data_files=self.data_files, split=split)
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"split {split!r} of the dataset {self.path!r} cannot be loaded: {reason}"
            ) from error


@SOURCES.register("tfds")
@settings(kw_only=True)
class TensorFlowDataset(Rows):
    """A prepared TensorFlow dataset, read at random access by ``tfds.data_source``.

    Attributes:
        dataset: its name, e.g. ``imdb_reviews/plain_text:1.0.0``.
        data_dir: where it is prepared; the default of tfds if None.
        train_split: name of the training split, tfds slices such as ``train[:90%]`` included.
        held_out_split: name of the held-out split.
        held_out_fraction: instead of a split, as in `Jsonl`.
    """

    dataset: str
    data_dir: Path | None = None
    train_split: str = "train"
    held_out_split: str | None = None
    held_out_fraction: Fraction | None = None

    def __post_init__(self):
        super().__post_init__()
        check_held_out(self.held_out_fraction, held_out_split=self.held_out_split)

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the split out of the prepared data set."""
        own = self.held_out_split is not None
        name = (
            self.held_out_split if split == "held_out" and self.held_out_split is not None else self.train_split
        )
        given = self._rows(name)
        rows = ((f"{self.dataset}, row {i + 1}", _plain(given[i])) for i in range(len(given)))
        examples = [self.example(row, where) for where, row in self.kept(rows, self.dataset)]
        return choose(examples, split, own, self.held_out_fraction, self.dataset)

    def _rows(self, split: str) -> Sequence[Mapping[str, Any]]:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"the tfds source needs a package: pip install -e '.[tfds]' in the checkout ({error})"
            ) from error
        data_dir = None if self.data_dir is None else str(self.data_dir)
        try:
            return tfds.data_source(self.dataset, split=split, data_dir=data_dir)  # type: ignore
        except Exception as error:  # tfds raises many kinds, its own and those of what it reads with
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"split {split!r} of the tfds dataset {self.dataset!r} cannot be loaded: {reason}"
            ) from error


def check_held_out(fraction: float | None, **others: Any) -> None:
    """Held-out data is named in one way only; raises `ValueError`."""
    given = [name for name, value in {**others, "held_out_fraction": fraction}.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} must be alone, got {' and '.join(given)}")


def choose(
    examples: Sequence[Example], split: Split, own_held_out: bool, fraction: float | None, name: str
) -> Sequence[Example]:
    """Chooses the examples of a split that is no file or split of its own."""
    given = len(examples)
    if fraction is not None:
        held_out = _held_out_texts(examples, fraction)
        examples = [e for e in examples if (_identity(e) in held_out) == (split == "held_out")]
    elif split == "held_out" and not own_held_out:
        raise _nothing_held_out(name, "held_out (a file or split) or held_out_fraction")
    if not examples and given:
        raise UserError(
            f"{name} has no {split.replace('_', '-')} examples left: held_out_fraction {fraction} of {given} "
            "holds out all of them; give more rows or a file of held-out data"
        )
    return _not_empty(examples, split, name)


def _held_out_texts(examples: Sequence[Example], fraction: float) -> set[str]:
    texts = {_identity(example) for example in examples}
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())
    return set(by_hash[: max(round(fraction * len(texts)), 1)])


def _identity(example: Example) -> str:
    """The text that must not stand on both sides of a split: the question, with the turns before it."""
    if example.messages:
        return json.dumps([[m["role"], m["content"]] for m in example.question])
    return example.prompt or example.response or ""


def _not_empty(examples: Sequence[Example], split: Split, name: str) -> Sequence[Example]:
    if not examples:
        raise UserError(f"{name} has no {split.replace('_', '-')} examples: the data is empty")
    return examples


def _nothing_held_out(name: str, settings: str) -> UserError:
    return UserError(f"{name} has no held-out data; set {settings}")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Texts for bytes, lists and numbers for arrays."""
    return {key: _plain_value(value) for key, value in row.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return _plain(value)
    if hasattr(value, "tolist"):
        return _plain_value(value.tolist())
    return [_plain_value(item) for item in value] if isinstance(value, list | tuple) else value
