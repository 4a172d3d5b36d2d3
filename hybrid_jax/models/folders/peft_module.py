"""One module of `transformers` with the low-rank tensors that `peft` keeps for it, and our maps that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.core import Tracer

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import Family, parameter_shapes
from hybrid_jax.models.families.weights import Row
from hybrid_jax.models.lora import params_at


def linear_rows(family: Family, bare: Decoder) -> Iterator[tuple[str, Row]]:
    """The rows of single linear maps and of embeddings, each with the name of its module."""
    shapes = parameter_shapes(bare)
    for row in family.rows(bare, shapes):
        if all(path.endswith(("/kernel", "/embedding")) and len(shapes[path].shape) == 2 for path in row.ours):
            yield family.full_name(row.theirs[0]).removesuffix(".weight"), row


def bare_model(model: Decoder) -> tuple[Family, Decoder]:
    """The family of a model, and the model without adapters."""
    assert model.config.family is not None, "read from a folder"
    return FAMILIES[model.config.family], Decoder(replace(model.config, lora=None))


@dataclass(frozen=True)
class Module:
    """The low-rank tensors of one module of theirs, and the row of our maps that it is."""

    file: Path
    name: str
    row: Row
    flip: bool  # its map is [out, in]
    tensors: Mapping[str, np.ndarray]
    shapes: Mapping[str, Any]

    @property
    def paths(self) -> list[str]:
        """The paths of our maps."""
        return [path.rpartition("/")[0] for path in self.row.ours]

    @property
    def is_embedding(self) -> bool:
        """Tells whether it is a table of rows and no linear map."""
        return self.row.ours[0].endswith("/embedding")

    @property
    def rank(self) -> int:
        """r."""
        return self._tensor("lora_embedding_A" if self.is_embedding else "lora_A", 2).shape[0]

    def factors(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """A [I r], and B [r O] for each map of ours."""
        a, b = (np.asarray(self._tensor(name, 2), np.float32) for name in ("lora_A", "lora_B"))
        if a.shape[0] != b.shape[1]:
            raise self._wrong(f"lora_A {list(a.shape)} and lora_B {list(b.shape)} have no common rank")
        inputs = self.shapes[self.row.ours[0]].shape[0]
        if a.shape[1] != inputs:
            raise self._wrong(f"lora_A {list(a.shape)} must have {inputs} columns")
        return a.T, self._parts(b if self.flip else b.T, "lora_B")

    def embedding_factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A [V r] and B [r D]."""
        names = ("lora_embedding_A", "lora_embedding_B")
        a, b = (np.asarray(self._tensor(name, 2), np.float32).T for name in names)
        rows, width = self.shapes[self.row.ours[0]].shape
        if "lora_magnitude_vector" in self.tensors:
            raise self._wrong("DoRA of an embedding is not supported; merge the adapter with peft first")
        if (a.shape[0], b.shape[1]) != (rows, width) or a.shape[1] != b.shape[0]:
            raise self._wrong(f"its factors {list(a.shape)} and {list(b.shape)} must give [{rows}, {width}]")
        return a, b

    def vectors(self, name: str, is_needed: bool) -> list[np.ndarray]:
        """One vector [O] for each map of ours, or none."""
        if not is_needed and name not in self.tensors:
            return []
        flat = np.asarray(self._tensor(name, 1), np.float32)
        parts = self._parts(flat[:, None] if self.flip else flat[None], name)
        return [part.reshape(-1) for part in parts]

    def with_residual(self, a, b: list[np.ndarray], base: Params, start: str, scale: float, unit: float):
        """A and B with columns that take the first adapter off the base, as `peft` does when it loads one.

        PiSSA (Meng et al. 2024, eq. 2-4): the r largest parts of a singular value decomposition; OLoRA
        (Büyükakyüz 2024): the first r columns of Q and rows of R. `peft` changes the base; here it stays.
        """
        rank, kernels = self.rank, [params_at(base, path)["kernel"] for path in self.paths]
        if isinstance(kernels[0], Tracer):
            wide = [np.ones((2 * rank, part.shape[1]), np.float32) for part in b]
            return np.zeros((len(a), 2 * rank), np.float32), wide
        theirs = self.row.save([np.asarray(kernel, np.float32) for kernel in kernels])[0]
        if start == "olora":
            if not self.flip:
                raise self._wrong("init_lora_weights = 'olora' is not supported for a map [in, out]")
            q, upper = np.linalg.qr(theirs)
            left, right = scale * q[:, :rank], upper[:rank]
        else:
            u, singular, vh = np.linalg.svd(theirs if self.flip else theirs.T, full_matrices=False)
            left, right = u[:, :rank] * singular[:rank], vh[:rank]
        first = self._parts(left if self.flip else left.T, "lora_B")
        taken = [np.concatenate([part, -one / np.float32(unit)]) for part, one in zip(b, first, strict=True)]
        return np.concatenate([a, right.T], axis=1), taken

    def _parts(self, matrix: np.ndarray, name: str) -> list[np.ndarray]:
        """Its columns, in our layout, as those of our maps."""
        try:
            parts = self.row.load([matrix])
        except ValueError as error:
            raise self._wrong(f"{name}: {error}") from error
        for path, part in zip(self.row.ours, parts, strict=True):
            if part.shape[1] != (outputs := self.shapes[path].shape[1]):
                raise self._wrong(f"{name} has {part.shape[1]} outputs, the model {outputs}")
        return parts

    def _tensor(self, name: str, axes: int) -> np.ndarray:
        if name not in self.tensors:
            raise self._wrong(f"{name} is missing")
        if self.tensors[name].ndim != axes:
            raise self._wrong(f"{name} must have {axes} axes, got {list(self.tensors[name].shape)}")
        return self.tensors[name]

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"{self.file}: {self.name}: {problem}")
