"""One family of Hugging Face models: its config both ways and its weight table both ways."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.families.names import Reader, Tensors, canonical, described
from hybrid_jax.models.families.settings import Part, Settings
from hybrid_jax.models.families.weights import Row, Table, expand
from hybrid_jax.models.folders.host_copy import packed
from hybrid_jax.parallel.mesh import whole_array

Place = Callable[[str, np.ndarray], Any]  # (our path, array) -> the parameter, where and as it is wanted
# Of training only, so every family expresses them.
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "num_labels")
_FLOAT = "__float__"  # the key of a number that JSON does not have
_MOST = 2**16  # of layers and labels
_THREADS = 4  # that load weights, each with a row of its own in memory
_FREE = (
    *("dropout", "attention_dropout", "head_dropout", "variational_dropout", "init_std"),
    *("dtype", "family", "lora", "execution"),
)


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
        model_type: the name in config.json.
        architecture: the class of `transformers` with a language-model head.
        settings: the parts of the config, both ways.
        table: of the weights, or a function of our config that gives it. Names leave the prefix out.
        prefix: of every name but those of heads; files of the bare model leave it out.
        heads: first parts of the names that never have the prefix.
        ignored: names (without prefix) that hold no weights, as a regular expression.
        transposed: their linear maps are [out, in].
        unpack: makes plain tensors out of quantised ones: set for a folder that has such
            (`folders.quantised`).
        embedding: whose copy a file may also hold as ``head``, where they are tied.
        config: the class of our settings.
        causal: no token sees a later one, of the decoder at least.
    """

    model_type: str
    architecture: str
    settings: tuple[Part, ...]
    table: Table | Callable[[Any], Table]
    prefix: str = "model."
    heads: tuple[str, ...] = ("lm_head", "score")
    ignored: str = r".*\.rotary_emb\.inv_freq"
    transposed: bool = True
    unpack: Callable[[Tensors], Tensors] = lambda tensors: tensors
    embedding: str = "embed_tokens.weight"
    head: str = "lm_head.weight"
    config: type = DecoderConfig
    causal: bool = True

    def read_config(self, content: Mapping[str, Any]) -> Any:
        """Our settings, out of a config.json."""
        return self._read(_their_config(self.model_type, content))

    def write_config(self, config: Any, content: Mapping[str, Any] | None = None) -> Settings:
        """A config.json; ``content`` has what it shall hold beside our settings.

        Raises:
            UserError: the family cannot express the model: reading back would give another one.
        """
        theirs = self.their_config(config, content)
        if differences := self.differences(config, theirs):
            name, wanted, got = differences[0]
            raise UserError(f"{name} must be {got!r} for a {self.model_type} export, got {wanted!r}")
        written = {**theirs.to_dict(), "model_type": self.model_type}
        written.pop("quantization_config", None)  # what is written is unpacked
        return _with_floats(written, _spelled)

    def their_config(self, config: Any, content: Mapping[str, Any] | None = None) -> Any:
        """`transformers`' config object of a model, as far as the family can express it."""
        settings: Settings = {}
        for part in self.settings:
            settings |= part.write(config)
        known = _their_config(self.model_type, content).to_dict() if content else _NO_TOKENS  # in newest names
        return _their_config(self.model_type, {**known, **settings})

    def differences(self, config: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
        """(setting, ours, what the family makes of it) wherever the two differ."""
        wanted, got = config.resolved(), self._read(theirs).resolved()
        names = [field.name for field in fields(wanted) if field.name not in _FREE]
        pairs = ((name, getattr(wanted, name), getattr(got, name)) for name in names)
        return [(name, ours, other) for name, ours, other in pairs if not _same_setting(ours, other)]

    def _read(self, theirs: Any) -> Any:
        if self.causal and not (is_causal := getattr(theirs, "is_causal", True)):
            raise UserError(f"is_causal must be true for {self.model_type}, got {is_causal!r}: not supported")
        settings: Settings = {}
        for part in self.settings:
            settings |= part.read(theirs)
        if any(field.name == "family" for field in fields(self.config)):
            settings["family"] = self.model_type
        return self.config(**settings)

    def rows(self, model: Any, shapes: Mapping[str, Any]) -> list[Row]:
        """The table for a model with these parameters; every parameter is in exactly one row."""
        table = self.table(model.config) if callable(self.table) else self.table
        sizes = {path: tuple(shape.shape) for path, shape in shapes.items()}
        rows = expand(table, sizes, model.config, self.is_transposed)
        covered = sorted(path for row in rows for path in row.ours)
        assert covered == sorted(shapes), f"{self.model_type}: the table has {covered}, not {sorted(shapes)}"
        return rows

    def full_name(self, name: str) -> str:
        """With the prefix, if it is no head's."""
        return name if self._is_head(name) else self.prefix + name

    def is_transposed(self, name: str) -> bool:
        """Tells whether a linear map of theirs is [out, in]."""
        return self.transposed or self._is_head(name)

    def _is_head(self, name: str) -> bool:
        return name.split(".")[0] in self.heads


def _same_setting(a: Any, b: Any) -> bool:
    if isinstance(a, Experts) and isinstance(b, Experts):  # their losses are of training only
        a, b = (replace(experts, balance_coef=0.0, z_coef=0.0) for experts in (a, b))
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


def load_weights(family: Family, model: Any, tensors: Tensors, place: Place, source: str = "") -> Params:
    """Their tensors as our parameters, row by row: each tensor used once, each parameter filled.

    The largest go first, so that what a row needs beside its parameters is small by the time that most of
    them are in memory. ``source`` is where the tensors should be, for messages.
    """
    tensors = canonical(family, family.unpack(tensors), getattr(model.config, "tie_embeddings", False))
    shapes = parameter_shapes(model)
    rows = family.rows(model, shapes)
    rows.sort(key=lambda row: -sum(math.prod(shapes[path].shape) for path in row.ours))
    _check_complete(family, rows, tensors, source)

    def load(row: Row) -> dict[str, Any]:
        return _load_row(family, row, [tensors[name] for name in row.theirs], shapes, place)

    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))  # copying in numpy leaves Python to others
    try:
        return unflatten({path: leaf for row in pool.map(load, rows) for path, leaf in row.items()})
    finally:
        pool.shutdown(cancel_futures=True)


def _check_complete(family: Family, rows: list[Row], tensors: Tensors, source: str) -> None:
    wanted = [name for row in rows for name in row.theirs]
    if missing := [name for name in wanted if name not in tensors]:
        where = f": it is not in {source}" if source else ""
        if missing == [family.head]:
            where += (
                ", and tie_word_embeddings is false; take the folder of the *ForCausalLM, or set "
                "tie_word_embeddings: true in config.json to train only heads on the model"
            )
        name = family.full_name(missing[0])
        raise UserError(f"tensor {name!r} is missing from the {family.model_type} weights{where}")
    if left := tensors.keys() - set(wanted):
        what = described(family.full_name(min(left)), tensors[min(left)])
        raise UserError(f"{what} has no place in a {family.model_type} model")


def _load_row(family: Family, row: Row, readers: list[Reader], shapes, place: Place) -> dict[str, Any]:
    theirs = [read() for read in readers]
    what = f"{described(family.full_name(row.theirs[0]), readers[0])} {list(theirs[0].shape)}"
    try:
        ours = row.load(theirs)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    for path, array in zip(row.ours, ours, strict=True):
        if array.shape != shapes[path].shape:
            shape, wanted = list(array.shape), list(shapes[path].shape)
            raise UserError(f"{what} gives {path} the shape {shape}, the config says {wanted}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{what} must hold floating-point numbers, got {array.dtype}")
    return {path: place(path, array) for path, array in zip(row.ours, ours, strict=True)}


def dump_weights(family: Family, model: Any, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, tensor) for all our parameters, row by row."""
    flat, shapes = flatten(params), parameter_shapes(model)
    if wrong := sorted(flat.keys() ^ shapes.keys()):
        raise UserError(f"parameter {wrong[0]!r} is {'missing' if wrong[0] in shapes else 'not of this model'}")
    for row in family.rows(model, shapes):
        theirs = row.save([whole_array(flat[path]) for path in row.ours])
        for name, array in zip(row.theirs, theirs, strict=True):
            yield family.full_name(name), array if array.flags.c_contiguous else packed(array, array.dtype)


def _their_config(model_type: str, content: Mapping[str, Any]) -> Any:
    """`transformers`' config object: old names and missing keys as it understands them."""
    from transformers import CONFIG_MAPPING

    content = {
        name: _with_floats(value, lambda number: number)
        for name, value in content.items()
        if name != "model_type"
    }
    _check_counts(content)
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # its validation raises errors of many kinds, over several lines
        raise UserError(" ".join(str(error).split())) from error


def _with_floats(value: Any, change: Callable[[float], Any]) -> Any:
    """A part of a config.json with its floats changed; ``{"__float__": "Infinity"}`` is one, too."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT}:
            return change(float(value[_FLOAT]))
        return {name: _with_floats(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_floats(item, change) for item in value)
    return change(value) if isinstance(value, float) else value


def _spelled(value: float) -> Any:
    """A number that JSON does not have in the spelling of `transformers`."""
    if math.isfinite(value):
        return value
    return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def _check_counts(content: Mapping[str, Any]) -> None:
    """Checks the numbers of which `transformers` makes lists, at once and however large they are."""
    counts = [(name, content.get(name)) for name in _COUNTS]
    blocks = content.get("attention_types")  # of GPT-Neo: [[kinds of layers, how often], …]
    for block in blocks if isinstance(blocks, list) else ():
        counts += [("attention_types", item) for item in (block if isinstance(block, list) else ())]
    for name, count in counts:
        if isinstance(count, int) and count > _MOST:
            raise UserError(f"{name} must be at most {_MOST}, got {count}")


def parameter_shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path, without making them."""
    return flatten(jax.eval_shape(model.init, jax.random.key(0)))


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a nested dict by their paths with slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
