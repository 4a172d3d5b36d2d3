"""The reward of a classifier: sentiment, toxicity, truth, consistency with a source, or any other label."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jaxtyping import Array, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Natural, settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.preference_stream import Reading
from hybrid_jax.data.scored_text import Cut, encode_scored
from hybrid_jax.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_jax.models.base import Params
from hybrid_jax.models.folders.files import CONFIG, read_json
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.scorer import load_scorer, read_extra
from hybrid_jax.models.scorer import SequenceScorer
from hybrid_jax.models.vocabulary import own_tokenizer_of
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import (
    COUNTED,
    PADDING,
    TEXTS_AT_A_TIME,
    Rows,
    needed_column,
    run_in_batches,
    texts_of_rows,
)

USUAL_LENGTH = 512


class LoadedScorer(NamedTuple):
    """A scorer with what is needed to read texts and to give probabilities."""

    model: SequenceScorer
    params: Params
    tokenizer: Tokenizer
    temperature: float  # divisor of the logits that makes the probabilities agree with frequencies
    longest: int  # tokens of a row in training
    independent: bool  # every label is a yes or no of its own, else exactly one of them is true
    cut: Cut = "truncate_end"  # the end at which a text is cut that is too long


@REWARDS.register("classifier")
@settings
class ClassifierReward:
    """The log-odds, or the (log-)probability, that a classifier gives to a label.

        p = softmax(logits / temperature)[label], or sigmoid where labels are independent or there is only one
        log_odds = log p - log(1 - p)

    Log-odds do not saturate, so they still tell good from better. Of a harmful label (toxicity) give a negative
    weight. The temperature is what the training of the scorer left in its folder, else 1.

    Attributes:
        path: Folder of a scorer: a ``*ForSequenceClassification``, or one that was trained here.
        label: Its name, or its number from 0.
        output: ``log_odds`` (any number), ``log_prob`` (at most 0) or ``probability`` (in [0, 1]).
        reads: What stands before the response: nothing, the prompt, or the column ``source``.
        max_length: Tokens to read at most; a longer text loses the start of its prompt, then its own end. None:
            as many as in training, or 512 where the folder does not say.
        batch_size: Texts that the device reads at a time.

    Raises:
        UserError: The folder holds no scorer, or none with such a label; a column is missing.
    """

    path: str
    label: str | Natural
    output: Literal["log_odds", "log_prob", "probability"] = "log_odds"
    reads: Literal["response", "prompt", "source"] = "response"
    max_length: Annotated[int, Ge(8)] | None = None
    batch_size: BatchSize = 32

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts reading the texts; returns what waits for the log-odds or probabilities."""
        scorer = loaded_scorer(self.path)
        label = _number(scorer.model.labels, self.label, self.path)
        before = None
        if self.reads != "response":
            column = prompts if self.reads == "prompt" else needed_column(columns, "source")
            before = ["\n".join(texts) for texts in texts_of_rows(column, self.reads)]
        finish = start_logits(scorer, before, responses, self.max_length or scorer.longest, self.batch_size)

        def scores() -> list[float]:
            odds = log_odds(finish(), label, scorer.temperature, scorer.independent)
            if self.output == "log_odds":
                return odds.tolist()
            log_probs = -np.logaddexp(0.0, -odds)
            return (log_probs if self.output == "log_prob" else np.exp(log_probs)).tolist()

        return scores


def start_logits(
    scorer: LoadedScorer,
    before: Sequence[str] | None,
    responses: Sequence[str],
    max_length: int,
    batch_size: int,
) -> Callable[[], Float[np.ndarray, "B Y"]]:
    """Starts to score each response behind its text; returns what waits for the logits."""
    longest = min(max_length, scorer.model.max_length or max_length)
    finish = run_in_batches(
        partial(_logits, scorer.model, scorer.params),
        _rows(scorer.tokenizer, before, responses, longest, scorer.cut),
        batch_size=batch_size,
        longest=longest,
    )
    return lambda: finish().reshape(len(responses), len(scorer.model.labels))


def log_odds(
    logits: Float[np.ndarray, "B Y"], label: int, temperature: float = 1.0, independent: bool = False
) -> Float[np.ndarray, "B"]:
    """``log p - log(1 - p)`` of one label, float64.

    Exactly one label is true: logit minus the logsumexp of the others. Labels that are ``independent`` (or a
    single one): the logit itself.
    """
    scaled = np.asarray(logits, np.float64) / temperature
    if independent or scaled.shape[1] == 1:
        return scaled[:, label]
    return scaled[:, label] - np.logaddexp.reduce(np.delete(scaled, label, axis=1), axis=1)


def loaded_scorer(path: str) -> LoadedScorer:
    """The scorer of a folder (or of the hub), read once a process."""
    return _loaded_scorer(find_folder(path).resolve())


@functools.cache
def _loaded_scorer(folder: Path) -> LoadedScorer:
    model, params = load_scorer(folder)
    extra = read_extra(folder)
    temperature = extra.get("temperature", 1.0)
    reading = Reading.of(extra.get("reading") or {})
    longest = reading.max_length or model.max_length or USUAL_LENGTH
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise UserError(f"{folder}: temperature must be a number above 0, got {temperature!r}")
    independent = read_json(folder / CONFIG).get("problem_type") == "multi_label_classification"
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = bounded(load_tokenizer(folder), model.vocab_size, own_tokenizer_of(folder))
    return LoadedScorer(model, params, tokenizer, float(temperature), longest, independent, reading.cut)


@partial(jax.jit, static_argnames="model")
def _logits(
    model: SequenceScorer, params: Params, tokens: Int[Array, "B T"], roles: Int[Array, "B T"]
) -> Float[Array, "B Y"]:
    return model.apply(params, tokens, roles != PADDING)


def _rows(
    tokenizer: Tokenizer, before: Sequence[str] | None, responses: Sequence[str], longest: int, cut: Cut
) -> Iterator[Rows]:
    for start in range(0, len(responses), TEXTS_AT_A_TIME):
        part = slice(start, start + TEXTS_AT_A_TIME)
        prompts = None if before is None else before[part]
        for row in encode_scored(tokenizer, prompts, responses[part], longest, cut=cut):
            yield row, np.full(len(row), COUNTED)


def _number(labels: Sequence[str], label: str | int, path: str) -> int:
    if isinstance(label, str):
        if label not in labels:
            raise UserError(
                f"the classifier in {path!r} has no label {label!r}; {suggest(label, tuple(labels))}"
            )
        return labels.index(label)
    if not 0 <= label < len(labels):
        raise UserError(f"label must be below {len(labels)}, the labels of {path!r}, got {label}")
    return label
