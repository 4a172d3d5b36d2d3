"""Names of tensors in a file: what was around a model when it was saved, and the copies of a tied embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_jax.core.errors import UserError

Reader = Callable[[], np.ndarray]  # of one tensor; its ``file``, if it has one, is named in messages
Tensors = dict[str, Reader]  # by name
# Parts that torch.compile, FSDP and activation checkpointing put between the others.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """The name that a tensor has in the model itself: without ``module.`` of DataParallel, ``_orig_mod.`` …"""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def described(name: str, read: Reader) -> str:
    """The name with the file that the tensor is in, where the reader says so."""
    file = getattr(read, "file", None)
    return f"tensor {name!r}" if file is None else f"{file}: tensor {name!r}"


def canonical(family: Any, tensors: Tensors, tied: bool) -> Tensors:
    """Names without prefix, without buffers, and without the second copy of a tied embedding.

    Raises:
        UserError: a tensor is there twice, or the file is of an adapter that is not merged.
    """
    canonical: Tensors = {}
    outer = _outer_prefix(family, tensors)
    for full_name, read in tensors.items():
        name = full_name.removeprefix(outer).removeprefix(family.prefix)
        if re.fullmatch(family.ignored, name):
            continue
        if name in canonical:
            raise UserError(f"{described(name, read)} is there twice, with and without {family.prefix!r}")
        canonical[name] = read
    if tied and family.head in canonical:  # whichever of the two a file has; `are_tied` compares both
        head = canonical.pop(family.head)
        canonical.setdefault(family.embedding, head)
    return canonical


def are_tied(family: Any, tensors: Tensors) -> bool:
    """Tells whether the head is the embedding, for a config that ties them: not where a file has two tensors
    that differ. So does `transformers` 5."""
    by_name = canonical(family, family.unpack(tensors), tied=False)
    if not {family.head, family.embedding} <= by_name.keys():
        return True
    return np.array_equal(by_name[family.head](), by_name[family.embedding]())


def _outer_prefix(family: Any, tensors: Mapping[str, Reader]) -> str:
    """The prefix of every name where a model was saved as a part of another one, else ""."""
    if any(".lora_" in name for name in tensors):
        name = next(name for name in tensors if ".lora_" in name)
        fix = "merge the adapter into its base (merge_and_unload of peft), or name its folder as lora.path"
        raise UserError(f"{described(name, tensors[name])} is of an adapter: {fix}")
    if not {family.prefix + family.embedding, family.embedding}.isdisjoint(tensors):
        return ""
    for inner in (family.prefix + family.embedding, family.embedding):
        found = [name.removesuffix(inner) for name in tensors if name.endswith("." + inner)]
        if len(found) == 1:
            return found[0]
    return ""
