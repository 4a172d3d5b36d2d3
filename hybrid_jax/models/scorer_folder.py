"""Scorers in folders: those of Hugging Face, and those that only we know.

Ours have a config.json whose ``model_type`` begins with ``hybrid_jax_`` and whose ``settings`` are those of the
scorer, and a model.safetensors with the parameters under their own paths. What a scorer needs beside (the scale
of a reward, the temperature of probabilities) lies in extra.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hybrid_jax.models.base import Params
from hybrid_jax.models.hf_files import read_json
from hybrid_jax.models.scorer import SequenceScorer

EXTRA = "extra.json"


def load_scorer(
    folder: str | Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[SequenceScorer, Params]:
    """Reads a scorer; its ``config.json`` decides the kind.

    Args:
        folder: a ``*ForSequenceClassification`` of a decoder or an encoder family, or what `save_scorer` wrote;
            or the id of such a model on the hub.
        dtype: of the computation, where the kind has a choice.

    Raises:
        UserError: it holds no scorer, or is damaged: a parameter is missing, left over or of the wrong shape.
    """
    raise NotImplementedError


def save_scorer(
    folder: str | Path,
    scorer: SequenceScorer,
    params: Params,
    tokenizer_save: Callable[[Path], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load_scorer` reads; an earlier scorer in it is replaced.

    Args:
        folder: to write.
        scorer: a `Classifier` is written as `transformers` knows it, where it does.
        params: all finite.
        tokenizer_save: writes the scorer's tokenizer into the folder (`Tokenizer.save`).
        extra: what `read_extra` gives back: JSON.

    Raises:
        UserError: a parameter is not finite, or of the wrong shape.
    """
    raise NotImplementedError


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What was saved beside a scorer; nothing for a folder of others."""
    path = Path(folder) / EXTRA
    return read_json(path) if path.is_file() else {}
