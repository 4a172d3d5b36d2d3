"""Heads that were fitted to human scores on the features of a frozen sentence encoder.

    comet_style    [h; r; h·s; h·r; |h − s|; |h − r|]    of response h, reference r, source s (Rei et al. 2020)
    bleurt_style   [h·r; |h − r|; cos(h, r)]             of response and reference (after Sellam et al. 2020)

The head is linear, by ridge regression in closed form. These are not COMET and BLEURT, whose encoders are
trained as well: `adapters` has those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, settings
from hybrid_jax.models.folders.files import read_json, save_tensors, write_json
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import (
    needed_column,
    start_embeddings,
    text_encoder,
    texts_of_rows,
)

Kind = Literal["comet_style", "bleurt_style"]
WEIGHTS, SETTINGS = "head.safetensors", "head.json"
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class Head:
    """A linear map ``features · weights + bias`` to the scale of the human scores.

    Attributes:
        kind: Which features it reads.
        weights: float64 [F].
        bias: The mean score where all features are 0.
    """

    kind: Kind
    weights: Float[np.ndarray, "F"]
    bias: float

    def __call__(self, features: Float[np.ndarray, "B F"]) -> Float[np.ndarray, "B"]:
        return (features * self.weights).sum(1) + self.bias  # row by row, since BLAS rounds by the batch


def features(
    kind: Kind,
    response: Float[np.ndarray, "B D"],
    reference: Float[np.ndarray, "B D"],
    source: Float[np.ndarray, "B D"] | None = None,
) -> Float[np.ndarray, "B F"]:
    """Computes what a head reads from embeddings, float64: 6 D numbers of comet_style, 2 D + 1 of bleurt_style.

    Raises:
        ValueError: comet_style without a source.
    """
    h, r = response, reference
    if kind == "bleurt_style":
        norms = np.linalg.norm(h, axis=1) * np.linalg.norm(r, axis=1)
        cosine = (h * r).sum(1) / np.maximum(norms, 1e-12)
        return np.concatenate([h * r, np.abs(h - r), cosine[:, None]], axis=1)
    if source is None:
        raise ValueError("source must be given for comet_style, got None")
    s = source
    return np.concatenate([h, r, h * s, h * r, np.abs(h - s), np.abs(h - r)], axis=1)


def fit_head(
    kind: Kind, x: Float[np.ndarray, "B F"], scores: Float[np.ndarray, "B"], penalty: float = 100.0
) -> Head:
    """Ridge regression on standardised features: the minimum of Σ (x·w + b − score)² + penalty |w|².

    Hoerl and Kennard 1970. Features that do not vary get no weight.

    Args:
        kind: Of the features.
        x: `features` of the training data.
        scores: What people said.
        penalty: Above 0, on weights of features of variance 1.
    """
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-9, std, np.inf)
    z, y = (x - mean) / std, scores - scores.mean()
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(x.shape[1]), z.T @ y) / std
    return Head(kind, weights, float(scores.mean() - mean @ weights))


def train_head(
    kind: Kind,
    encoder: str,
    responses: Sequence[str],
    references: Sequence[str],
    scores: Sequence[float],
    sources: Sequence[str] | None = None,
    *,
    penalties: Sequence[float] = PENALTIES,
    batch_size: int = 32,
) -> Head:
    """Fits a head to human scores; every fifth row decides which penalty, then all rows are used.

    Args:
        kind: Of the head.
        encoder: Folder of a sentence encoder.
        responses: N texts that people scored.
        references: What each was compared with.
        scores: What people said, larger is better.
        sources: Of comet_style: what each was made from.
        penalties: Strengths of the ridge penalty to choose from.
        batch_size: Texts that the device reads at a time.
    """
    texts = [*responses, *references, *(sources or ())]
    vectors = start_embeddings(text_encoder(encoder), texts, batch_size)()
    x, y = _features(kind, vectors, responses, references, sources), np.asarray(scores, np.float64)
    kept_back = np.arange(len(y)) % 5 == 4

    def error(penalty: float) -> float:
        head = fit_head(kind, x[~kept_back], y[~kept_back], penalty)
        return float(np.square(head(x[kept_back]) - y[kept_back]).mean())

    return fit_head(kind, x, y, min(penalties, key=error))


def save_head(folder: str | Path, head: Head) -> None:
    """Writes head.safetensors and head.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, {"weights": head.weights, "bias": np.array([head.bias])})
    write_json(folder / SETTINGS, {"kind": head.kind, "features": len(head.weights)})


def load_head(folder: str | Path, kind: Kind) -> Head:
    """Reads a head that `save_head` wrote.

    Raises:
        UserError: There is no such head, it is of another kind, or damaged.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise UserError(f"no head {str(folder / SETTINGS)!r}; train one with hybrid_jax.train_head")
    settings = read_json(folder / SETTINGS)
    if settings.get("kind") != kind:
        raise UserError(f"{folder / SETTINGS}: kind must be {kind}, got {settings.get('kind')!r}")
    try:
        tensors = load_file(folder / WEIGHTS)
        weights, bias = tensors["weights"], tensors["bias"]
    except Exception as error:  # safetensors raises nothing more specific
        raise UserError(f"{folder / WEIGHTS} cannot be read: {type(error).__name__}") from error
    if weights.shape != (settings.get("features"),) or bias.shape != (1,):
        raise UserError(f"{folder / WEIGHTS}: expected {settings.get('features')} weights, got {weights.shape}")
    return Head(kind, weights, float(bias[0]))


@REWARDS.register("bleurt_style")
@settings
class BleurtStyle:
    """The score of a bleurt_style head for the response and the best of its references.

    Attributes:
        path: Folder of a head that `train_head` fitted.
        encoder: Folder of the encoder that it was fitted on.
        batch_size: Texts that the device reads at a time.
    """

    path: str
    encoder: str
    batch_size: BatchSize = 32

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return self.start(prompts, responses, references)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> Callable[[], list[float]]:
        """Starts embedding all texts; returns what waits for the scores."""
        return _start(self, "bleurt_style", responses, references, None)


@REWARDS.register("comet_style")
@settings
class CometStyle:
    """The score of a comet_style head for the response, its source and the best of its references.

    The columns are ``references`` and ``source``.

    Attributes:
        path: Folder of a head that `train_head` fitted.
        encoder: Folder of the encoder that it was fitted on.
        batch_size: Texts that the device reads at a time.
    """

    path: str
    encoder: str
    batch_size: BatchSize = 32

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts embedding all texts; returns what waits for the scores."""
        references, sources = needed_column(columns, "references"), needed_column(columns, "source")
        joined = ["\n".join(texts) for texts in texts_of_rows(sources, "source")]
        return _start(self, "comet_style", responses, references, joined)


def _start(
    reward: BleurtStyle | CometStyle,
    kind: Kind,
    responses: Sequence[str],
    references: Sequence[Any],
    sources: Sequence[str] | None,
) -> Callable[[], list[float]]:
    accepted, head = texts_of_rows(references, "references"), load_head(reward.path, kind)
    encoder = text_encoder(reward.encoder)
    width = len(head.weights) // (2 if kind == "bleurt_style" else 6)
    if width != encoder.model.width:
        raise UserError(f"encoder must be that of the head, {width} numbers wide, got {encoder.model.width}")
    rows = [row for row, texts in enumerate(accepted) for _ in texts]
    candidates, others = [responses[row] for row in rows], [text for texts in accepted for text in texts]
    origins = None if sources is None else [sources[row] for row in rows]
    finish = start_embeddings(encoder, [*candidates, *others, *(origins or ())], reward.batch_size)

    def scores() -> list[float]:
        best = np.full(len(responses), -np.inf)
        if rows:
            np.maximum.at(best, rows, head(_features(kind, finish(), candidates, others, origins)))
        return best.tolist()

    return scores


def _features(
    kind: Kind,
    vectors: Mapping[str, np.ndarray],
    responses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str] | None,
) -> Float[np.ndarray, "B F"]:
    h, r = (np.stack([vectors[text] for text in texts]) for texts in (responses, references))
    return features(kind, h, r, None if sources is None else np.stack([vectors[text] for text in sources]))
