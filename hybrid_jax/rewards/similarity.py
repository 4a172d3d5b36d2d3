"""Rewards of similarity under an encoder: cosine, BERTScore, coverage of a source, contrast of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import BatchSize, Positive, Rate, settings
from hybrid_jax.metrics.text import sentences, words
from hybrid_jax.models.base import Params
from hybrid_jax.models.encoder import Encoder
from hybrid_jax.models.pooling import l2_normalized
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import (
    COUNTED,
    PADDING,
    Rows,
    TextEncoder,
    needed_column,
    run_in_batches,
    start_embeddings,
    text_encoder,
    texts_of_rows,
)

Scores = Callable[[], list[float]]
Vectors = Mapping[str, np.ndarray]  # text -> embedding


@REWARDS.register("cosine_similarity")
@settings
class CosineSimilarity:
    """``max_i cos(e(response), e(text_i))`` of sentence embeddings, in [-1, 1].

    Reimers and Gurevych 2019 (arXiv:1908.10084). An empty text has an embedding like any other.

    Attributes:
        path: Folder of an encoder; of sentence-transformers it says how to pool, else the mean over tokens.
        to: What to compare with: the best of the column ``references``, the prompt, or the column ``source``.
        batch_size: Texts that the device reads at a time.

    Raises:
        UserError: The column is missing, or a row of it has no text.
    """

    path: str
    to: Literal["references", "prompt", "source"] = "references"
    batch_size: BatchSize = 32

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Scores:
        """Starts embedding both sides; returns what waits for the largest cosine of each row."""
        column = prompts if self.to == "prompt" else needed_column(columns, self.to)
        others = texts_of_rows(column, self.to)
        finish = start_embeddings(text_encoder(self.path), [*responses, *_flat(others)], self.batch_size)

        def scores() -> list[float]:
            vectors = finish()
            pairs = zip(responses, others, strict=True)
            return [max(_cosines(vectors, response, texts)) for response, texts in pairs]

        return scores


@REWARDS.register("truthful_contrast")
@settings
class TruthfulContrast:
    """``max_i cos(response, true_i) - max_j cos(response, false_j)``, in [-2, 2].

    Lin et al. 2021 (arXiv:2109.07958), their contrast of reference answers with sentence embeddings as the
    similarity. The columns ``correct_answers`` and ``incorrect_answers`` are lists of texts. "I have no
    comment" is never false: give it a partner that rewards information.

    Attributes:
        path: Folder of an encoder.
        batch_size: Texts that the device reads at a time.
    """

    path: str
    batch_size: BatchSize = 32

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        correct_answers: Sequence[Any],
        incorrect_answers: Sequence[Any],
    ) -> list[float]:
        return self.start(prompts, responses, correct_answers, incorrect_answers)()

    def start(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        correct_answers: Sequence[Any],
        incorrect_answers: Sequence[Any],
    ) -> Scores:
        """Starts embedding responses and answers; returns what waits for the contrast."""
        true = texts_of_rows(correct_answers, "correct_answers")
        false = texts_of_rows(incorrect_answers, "incorrect_answers")
        texts = [*responses, *_flat(true), *_flat(false)]
        finish = start_embeddings(text_encoder(self.path), texts, self.batch_size)

        def scores() -> list[float]:
            vectors = finish()
            return [
                max(_cosines(vectors, response, goods)) - max(_cosines(vectors, response, bads))
                for response, goods, bads in zip(responses, true, false, strict=True)
            ]

        return scores


@REWARDS.register("facility_coverage")
@settings
class FacilityCoverage:
    """``1/n Σ_i max_j max(0, cos(s_i, y_j))``: how well it stands for each sentence of a source.

    Facility location (Lin and Bilmes 2011, "A class of submodular functions for document summarization"): in
    [0, 1], 1 for the source itself, 0 for an empty response; it grows with every sentence, each adds less the
    more there are, and a repeated one adds nothing. Since more text never covers less, only the sentences
    within a budget of words count; the first always counts. The source is the column ``source``.

    Attributes:
        path: Folder of an encoder.
        budget: Words of the response that count, as a share of the source's; None counts all.
        batch_size: Sentences that the device reads at a time.
    """

    path: str
    budget: Positive | None = 0.5
    batch_size: BatchSize = 32

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], source: Sequence[Any]) -> list[float]:
        return self.start(prompts, responses, source)()

    def start(self, prompts: Sequence[str], responses: Sequence[str], source: Sequence[Any]) -> Scores:
        """Starts embedding the sentences; returns what waits for the coverage."""
        sources = [sentences("\n".join(texts)) for texts in texts_of_rows(source, "source")]
        chosen = [
            self._within_budget(sentences(response), covered)
            for response, covered in zip(responses, sources, strict=True)
        ]
        texts = [*_flat(sources), *_flat(chosen)]
        finish = start_embeddings(text_encoder(self.path), texts, self.batch_size)

        def scores() -> list[float]:
            vectors = finish()
            return [_coverage(vectors, covered, by) for covered, by in zip(sources, chosen, strict=True)]

        return scores

    def _within_budget(self, chosen: list[str], covered: list[str]) -> list[str]:
        if self.budget is None:
            return chosen
        left, kept = self.budget * sum(len(words(text)) for text in covered), []
        for text in chosen:
            left -= len(words(text))
            if kept and left < 0:
                break
            kept.append(text)
        return kept


@REWARDS.register("bertscore")
@settings
class BertScore:
    """BERTScore of the response against the best of its references (Zhang et al. 2020, arXiv:1904.09675).

        recall    = 1/|x| Σ_{x_i in reference} max_{y_j in response} cos(h(x_i), h(y_j))
        precision = 1/|y| Σ_{y_j in response}  max_{x_i in reference} cos(h(x_i), h(y_j))
        f1        = 2 precision recall / (precision + recall)

    h is the encoder's last hidden state, without weights by rarity. Special tokens ([CLS], [SEP]) can be
    matched but carry no weight, as in the authors' program. In [-1, 1]; an empty text scores 0.

    Attributes:
        path: Folder of an encoder.
        measure: Which of the three.
        baseline: b in [0, 1), the score of unrelated texts: rescales to ``(score - b) / (1 - b)``.
        batch_size: Pairs that the device reads at a time.
    """

    path: str
    measure: Literal["f1", "precision", "recall"] = "f1"
    baseline: Rate | None = None
    batch_size: BatchSize = 32

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return self.start(prompts, responses, references)()

    def start(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]) -> Scores:
        """Starts matching tokens; returns what waits for the best score of each row."""
        accepted = texts_of_rows(references, "references")
        encoder = text_encoder(self.path)
        counts = [len(texts) for texts in accepted]
        repeated = [response for response, n in zip(responses, counts, strict=True) for _ in range(n)]
        finish = run_in_batches(
            partial(_matched, encoder.model, encoder.params),
            _pairs(encoder, repeated, _flat(accepted)),
            batch_size=self.batch_size,
            longest=encoder.model.max_length,
        )
        column = ("precision", "recall", "f1").index(self.measure)

        def scores() -> list[float]:
            values = finish()
            ends = np.cumsum(counts)
            best = [float(values[end - n : end, column].max()) for end, n in zip(ends, counts, strict=True)]
            b = self.baseline or 0.0
            return [(value - b) / (1 - b) for value in best]

        return scores


@partial(jax.jit, static_argnames="model")
def _matched(
    model: Encoder,
    params: Params,
    response: Int[Array, "B T"],
    response_roles: Int[Array, "B T"],
    reference: Int[Array, "B T"],
    reference_roles: Int[Array, "B T"],
) -> Float[Array, "B 3"]:
    """Precision, recall and F1 of each pair."""
    tokens = jnp.concatenate([response, reference])
    roles = jnp.concatenate([response_roles, reference_roles])
    states = l2_normalized(model.hidden(params, tokens, roles != PADDING).astype(jnp.float32))
    y, x = jnp.split(states, 2)
    cosines = jnp.einsum("byd,bxd->byx", y, x, precision="highest")
    there = (response_roles != PADDING)[:, :, None] & (reference_roles != PADDING)[:, None, :]
    cosines = jnp.where(there, cosines, -1.0)
    precision = masked_row_mean(cosines.max(2), response_roles == COUNTED)
    recall = masked_row_mean(cosines.max(1), reference_roles == COUNTED)
    both = precision + recall
    f1 = jnp.where(jnp.abs(both) > 1e-6, 2 * precision * recall / jnp.where(both == 0, 1.0, both), 0.0)
    empty = ~(response_roles == COUNTED).any(1) | ~(reference_roles == COUNTED).any(1)
    return jnp.where(empty[:, None], 0.0, jnp.stack([precision, recall, f1], axis=1))


def masked_row_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean of each row where ``mask``; 0 where there is nothing."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _pairs(encoder: TextEncoder, first: Sequence[str], second: Sequence[str]) -> Iterator[Rows]:
    """The four rows of each pair of texts; each text is tokenised once a stretch of pairs."""
    for y, x in zip(encoder.rows(first), encoder.rows(second), strict=True):
        yield (*y, *x)


def _flat(rows: Sequence[Sequence[str]]) -> list[str]:
    return [text for texts in rows for text in texts]


def _cosines(vectors: Vectors, text: str, others: Sequence[str]) -> list[float]:
    return [_cosine(vectors[text], vectors[other]) for other in others]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """In [-1, 1]; 0 with a vector of length 0. An encoder need not give vectors of length 1."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0 else 0.0


def _coverage(vectors: Vectors, covered: Sequence[str], by: Sequence[str]) -> float:
    if not covered or not by:
        return 0.0
    return float(np.mean([max(0.0, *_cosines(vectors, text, by)) for text in covered]))
