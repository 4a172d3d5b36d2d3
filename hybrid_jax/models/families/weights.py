"""Weight tables: how the tensors of a Hugging Face family map to our parameter tree and back.

A table is a mapping from our names to theirs; ``*`` stands for the number of a layer:

    "layer_*/attention/query": "layers.*.self_attn.q_proj"               one linear map, norm or embedding
    ("layer_*/attention/query", ".../key", ".../value"): Fused("h.*.attn.c_attn")    one tensor of theirs
    "layer_*/mlp/expert_up": Stacked("layers.*.mlp.experts.+.up_proj")   + is the index on our first axis
    "layer_*/attention/sinks": Tensor("layers.*.self_attn.sinks")        one parameter, named in full
    "layer_*/cell/convolution/taps": Taps("layers.*.mixer.conv1d.weight")   filters of single channels

The leaves follow from our tree: ``kernel`` is their transposed ``weight``, ``scale`` and ``embedding`` their
``weight``, ``bias`` their ``bias``. Loading and saving are complete or fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Fused:
    """One map of theirs that holds several of ours side by side along its output.

    ``groups`` of a config tells into how many equal groups the output is divided; each holds a part of all of
    ours: 1 puts one whole behind the other, the number of key/value heads puts each key head behind its
    queries.
    """

    theirs: str
    groups: Callable[[Any], int] = lambda config: 1


@dataclass(frozen=True)
class Stacked:
    """Maps of theirs that ours holds in one array, along its first axis."""

    theirs: str


@dataclass(frozen=True)
class Tensor:
    """Exactly one tensor of theirs, by its full name; with ``groups`` it is fused (see `Fused`)."""

    theirs: str
    transposed: bool = False
    groups: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Taps(Tensor):
    """A convolution of each channel by itself, [channels 1 taps]; ours is [taps channels]."""


Entry = str | Fused | Stacked | Tensor
Table = Mapping[str | tuple[str, ...], Entry]


def with_fused(table: Table, fused: Mapping[tuple[str, ...], Entry]) -> Table:
    """``table`` with some of its rows fused, each of them named once."""
    taken = {name for names in fused for name in names}
    return {**{ours: theirs for ours, theirs in table.items() if ours not in taken}, **fused}


@dataclass(frozen=True)
class Row:
    """One line of an expanded table, with both ways of its transform."""

    ours: tuple[str, ...]  # paths like "layer_0/mlp/up/kernel"
    theirs: tuple[str, ...]
    load: Callable[[Arrays], Arrays]  # theirs to ours
    save: Callable[[Arrays], Arrays]  # ours to theirs


def expand(
    table: Table, shapes: Mapping[str, tuple[int, ...]], config: Any, transposed: Callable[[str], bool]
) -> list[Row]:
    """The rows of a table for a tree of parameters.

    Args:
        table: of the family.
        shapes: of all our parameters, by path.
        config: of the model, for `Fused.groups`.
        transposed: whether a map of theirs is [out, in], as PyTorch's Linear keeps it; ours are [in, out].
    """
    rows = []
    for ours, entry in table.items():
        names = (ours,) if isinstance(ours, str) else ours
        for found in _matches(names[0], shapes, whole=isinstance(entry, Tensor)):
            leaf, layer = found
            rows.append(_row(names, entry, leaf, layer, shapes, config, transposed))
    return rows


def _matches(pattern: str, shapes: Mapping[str, Any], whole: bool) -> list[tuple[str, str]]:
    """(leaf, layer number) of every parameter under ``pattern``."""
    leaf = "" if whole else f"/({'|'.join(_LEAVES)})"
    regex = re.compile(re.escape(pattern).replace(r"\*", r"(?P<layer>\d+)") + leaf)
    found = [match for path in shapes if (match := regex.fullmatch(path))]
    return [("" if whole else m.group(0).rpartition("/")[2], m.groupdict().get("layer", "")) for m in found]


def _row(names, entry: Entry, leaf: str, layer: str, shapes, config, transposed) -> Row:
    ours = tuple(name.replace("*", layer) + (f"/{leaf}" if leaf else "") for name in names)
    pattern = (entry if isinstance(entry, str) else entry.theirs).replace("*", layer)
    theirs = pattern if isinstance(entry, Tensor) else f"{pattern}.{_LEAVES[leaf]}"
    flip = entry.transposed if isinstance(entry, Tensor) else leaf == "kernel" and transposed(pattern)
    if isinstance(entry, Taps):
        return Row(ours, (theirs,), _load_taps, lambda arrays: [arrays[0].T[:, None]])
    if isinstance(entry, Stacked):
        count = shapes[ours[0]][0]
        return Row(ours, tuple(theirs.replace("+", str(i)) for i in range(count)), *_stacked(flip))
    if isinstance(entry, Fused) or (isinstance(entry, Tensor) and entry.groups is not None):
        groups = (entry.groups or (lambda config: 1))(config)
        return Row(ours, (theirs,), *_fused([shapes[path][-1] for path in ours], groups, flip))
    return Row(ours, (theirs,), *_same(flip))


Both = tuple[Callable[[Arrays], Arrays], Callable[[Arrays], Arrays]]


def _flip(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def _load_taps(arrays: Arrays) -> Arrays:
    if arrays[0].ndim != 3 or arrays[0].shape[1] != 1:
        raise ValueError("expected one filter a channel, [channels 1 taps]")
    return [arrays[0][:, 0].T]


def _same(flip: bool) -> Both:
    change = (lambda arrays: [_flip(a) for a in arrays]) if flip else (lambda arrays: arrays)
    return change, change


def _stacked(flip: bool) -> Both:
    turn = _flip if flip else (lambda a: a)
    return lambda arrays: [turn(np.stack(arrays))], lambda arrays: [turn(a) for a in arrays[0]]


def _fused(widths: Sequence[int], groups: int, flip: bool) -> Both:
    """Ours are the columns of theirs, group by group."""
    turn = _flip if flip else (lambda a: a)
    ends = np.cumsum([width // groups for width in widths])

    def load(arrays: Arrays) -> Arrays:
        whole = turn(arrays[0])
        if whole.shape[-1] != sum(widths):
            raise ValueError(f"expected {sum(widths)} outputs, got {whole.shape[-1]}")
        grouped = whole.reshape(*whole.shape[:-1], groups, -1)
        parts = np.split(grouped, ends[:-1], axis=-1)
        return [part.reshape(*whole.shape[:-1], -1) for part in parts]

    def save(arrays: Arrays) -> Arrays:
        parts = [a.reshape(*a.shape[:-1], groups, -1) for a in arrays]
        whole = np.concatenate(parts, axis=-1)
        return [turn(whole.reshape(*arrays[0].shape[:-1], -1))]

    return load, save
