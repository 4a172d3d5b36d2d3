"""Names for the axes of every parameter: what `parallel.rules` splits them by.

A row is a linear map with the names of its inputs and outputs. Kernels, biases, adapters and stacks of experts
follow from it; so do optimizer states, which lie like the parameter that they are for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Names = tuple[str | None, ...]

_MAPS: tuple[tuple[str, str | None, str | None], ...] = (
    (r"query", "embed", "heads"),
    (r"(key|value)", "embed", "kv_heads"),
    (r"output", "heads", "embed"),
    (r"(expert_)?(up|gate)", "embed", "mlp"),
    (r"(expert_)?down", "mlp", "embed"),
    (r"(router|shared_gate|head|score|pooler)", "embed", None),
    (r"lm_head", "embed", "vocab"),
    (r"embedding_in", None, "embed"),
    (r"embedding_out", "embed", None),
    (r"(input|recurrent|projection|interface)", "embed", None),  # of a recurrent cell: whole where it is used
)
AHEAD = "ahead"  # responses [B R] that wait in the state of a run for the next step
VECTORS = (
    "bias",
    "scale",
    "sinks",
    "magnitude",
    "taps",
)  # of any shape: one for each expert or head is no matrix
_LARGE = 2**16  # a parameter of this size that no row names is split anyway


def param_axes(path: str, shape: Sequence[int]) -> Names:
    """The names of a parameter's axes; ``path`` may go on before it, as that of an optimizer state does.

    Leading axes that a row does not know (of a stack of layers) stay whole. What no row names is split by its
    longest axis if it is large, else whole.
    """
    module, _, leaf = path.rpartition("/")
    names = _named(module.rpartition("/")[2], leaf)
    if names is not None and len(names) <= len(shape):
        return (None,) * (len(shape) - len(names)) + names
    return _longest(shape)


def path_of(keys: Sequence[Any]) -> str:
    """The path of a parameter, of the keys that `jax.tree_util` gives."""
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def is_vector(path: str, shape: Sequence[int]) -> bool:
    """Tells whether a parameter shifts or scales features and maps none to others, however many axes it has."""
    return path.rpartition("/")[2] in VECTORS or len(shape) < 2


def is_matrix(path: str, shape: Sequence[int]) -> bool:
    """Tells whether a parameter is a linear map, or a stack of them with one for each expert."""
    matrices = len(shape) - (param_axes(path, shape)[0] == "experts") if shape else 0
    return not is_vector(path, shape) and matrices == 2


def _named(module: str, leaf: str) -> Names | None:
    if module == AHEAD:
        return ("batch", None)
    if leaf == "embedding":
        return ("vocab", "embed") if module == "token_embedding" else (None, "embed")
    for pattern, inputs, outputs in _MAPS:
        if re.fullmatch(pattern, module):
            experts: Names = ("experts",) if module.startswith("expert_") else ()
            by_leaf: dict[str, Names] = {
                "kernel": (*experts, inputs, outputs),
                "bias": (*experts, outputs),
                "a": (inputs, None),
                "b": (None, outputs),
                "magnitude": (outputs,),
            }
            return by_leaf.get(leaf)
    return (None,) if leaf in ("scale", "bias", "sinks", "taps") else None


def _longest(shape: Sequence[int]) -> Names:
    size = 1
    for length in shape:
        size *= length
    if size < _LARGE:
        return (None,) * len(shape)
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    return tuple("embed" if axis == longest else None for axis in range(len(shape)))
