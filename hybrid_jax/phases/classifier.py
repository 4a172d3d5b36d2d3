"""Classifiers: a head learns the labels that people gave to texts, or a number."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jax import Array

from hybrid_jax.algorithms.classification import label_cross_entropy, squared_error
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, NonNegative, Rate, settings
from hybrid_jax.data.labelled import LabelledBatch, LabelledStream, targets_of
from hybrid_jax.data.long_rows import LongRows, Policy
from hybrid_jax.data.places import places_of
from hybrid_jax.data.preference_stream import Reading
from hybrid_jax.data.scored_text import ScoredRow, cut_of
from hybrid_jax.data.sources import SOURCES, choose
from hybrid_jax.metrics.labels import classification_report, fit_temperature, regression_report, softmax
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.phases.heads import HeadPhase, HeadSettings, head_name, read_head, scorer_of, scorer_params
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import row_shape
from hybrid_jax.training.state import RunState
from hybrid_jax.training.update import Objective


@PHASES.register("classifier")
@settings
class Classification(HeadSettings):
    """Settings of the training of a classifier; of a head with one label alone, of a regression.

    Attributes:
        batch_size: texts a step.
        length: tokens a text at most, with its prompt; None reads all that the model can.
        long_rows: what becomes of a longer one. To truncate takes the start of its prompt, then the end
            ("truncate_end") or the start of the text, here and where the model is a reward.
        prompt: a text is read behind its prompt, where the data has any; else alone.
        label_field: the column with the label: its number from 0 or its name; for a regression a number.
        class_weights: what the rows of each label count; "balanced" is B / (Y · rows of the label); None is 1.
        label_smoothing: the share of the label in [0, 1) that is spread over all labels.
        calibration_fraction: the share of the training data in [0, 1), by a hash of the text (or its prompt),
            that is kept back to fit the temperature of the probabilities. 0 fits none.
        source: labelled texts of its own; None takes the run's.
    """

    batch_size: BatchSize = 32
    length: Annotated[int, Ge(4)] | None = None
    long_rows: Policy = "truncate_end"
    prompt: bool = True
    label_field: str = "label"
    class_weights: tuple[NonNegative, ...] | Literal["balanced"] | None = None
    label_smoothing: Rate = 0.0
    calibration_fraction: Rate = 0.05
    source: Annotated[Any, SOURCES] | None = None

    def build(self, resources: Resources) -> ClassifierPhase:
        """Makes the phase."""
        return ClassifierPhase(self, resources)


class ClassifierPhase(HeadPhase):
    """Steps of a classifier."""

    def __init__(self, config: Classification, resources: Resources):
        self.config, self.name, self.resources = config, resources.name, resources
        self.scorer = scorer_of(config, resources)
        self._labels = self.scorer.labels
        self._check()
        limits = [limit for limit in (config.length, self.scorer.max_length) if limit is not None]
        self._length = min(limits, default=None)
        stream = None if resources.examples is None else self._training_stream()
        self.class_weights = self._class_weights(stream)
        super().__init__(
            config,
            resources,
            stream=stream,
            objective=classifier_objective(
                config, head_name(config, resources), self.scorer, self.class_weights
            ),
            shapes=self._batch_shapes,
            read_rows=4 * config.batch_size,
            length=self._length,
        )

    def batch(self, state: RunState, cursor: int) -> tuple[LabelledBatch, dict[str, Any]]:
        """The batch at a cursor; of a trunk that never trains, what it makes of the rows."""
        stream: Any = self.stream
        if self.reader.keeps_features:
            features = self.reader.features(self.params_of(state), stream.rows, "train")
            return stream.batch(cursor, self.config.batch_size, features), {}
        batch = stream.batch(cursor, self.config.batch_size)
        return batch, {"tokens": batch.mask.sum()}

    def _batch_shapes(self) -> LabelledBatch:
        if self._length is None:
            raise UserError(f"phases.{self.name}: length must be given to plan for a model that reads any")
        rows, shape = self.config.batch_size, functools.partial(row_shape, self.resources.placement)
        make: Any = LabelledBatch  # pyright does not see the fields of a flax.struct.dataclass
        targets = shape(rows, dtype="float32" if len(self._labels) == 1 else "int32")
        if self.reader.keeps_features:
            features = shape(rows, self.scorer.trunk.num_features, dtype="float32")
            return make(tokens=None, mask=None, targets=targets, features=features)
        tokens, mask = (shape(rows, self._length, dtype=dtype) for dtype in ("int32", "bool"))
        return make(tokens=tokens, mask=mask, targets=targets)

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Agreement with the labels of the held-out data, and calibration before and after the temperature."""
        rows, targets = self._held_out
        scores = self.reader.scores(self.params_of(state), rows, "held_out")
        if len(self._labels) == 1:
            report = regression_report(scores[:, 0], targets)
            return {"loss": report["mse"], **report}
        report = classification_report(scores, targets, self._labels)
        report["loss"] = float(-np.log(softmax(scores)[np.arange(len(targets)), targets]).mean())
        if (temperature := self._temperature(state)) is not None:
            calibrated = classification_report(scores, targets, self._labels, temperature)
            report |= {f"calibrated_{name}": calibrated[name] for name in ("brier", "calibration_error")}
            report["temperature"] = temperature
        return report

    def extra(self, state: RunState) -> dict[str, Any]:
        """How to read texts, and the temperature that makes probabilities of the logits."""
        kind = "regression" if len(self._labels) == 1 else "classifier"
        extra: dict[str, Any] = {"kind": kind, "reading": self._reading.settings}
        if (temperature := self._temperature(state)) is not None:
            extra |= {"temperature": temperature, "calibration_rows": len(self._kept_back[0])}
        return extra

    # ----------------------------------------------------------------------------------------------------- data

    def _check(self) -> None:
        weights, labels = self.config.class_weights, self._labels
        if len(labels) == 1 and (weights is not None or self.config.label_smoothing):
            raise UserError(
                f"phases.{self.name}: class_weights and label_smoothing need several labels, the head has 1"
            )
        if isinstance(weights, tuple) and len(weights) != len(labels):
            raise UserError(
                f"phases.{self.name}: class_weights must be {len(labels)} numbers, got {len(weights)}"
            )

    @functools.cached_property
    def _examples(self) -> Sequence[Example]:
        if self.config.source is not None:
            return self.config.source.load("train")
        return self.resources.examples or ()

    @functools.cached_property
    def _reading(self) -> Reading:
        chat = any(example.messages for example in self._examples)
        asked = chat or any(example.prompt for example in self._examples)
        cut = cut_of(self.config.long_rows)
        return Reading(self.config.prompt and asked, self.config.prompt and chat, self._length, cut)

    def _split(self, split: Literal["train", "held_out"]) -> Sequence[Example]:
        """The training data without, or only, what is kept back for the temperature."""
        fraction = self._calibration_fraction
        if fraction is None:
            return self._examples if split == "train" else ()
        return choose(self._examples, split, False, fraction, f"phases.{self.name}")

    @property
    def _calibration_fraction(self) -> float | None:
        return (self.config.calibration_fraction or None) if len(self._labels) > 1 else None

    def _read(self, examples: Sequence[Example], what: str) -> tuple[list[np.ndarray], np.ndarray]:
        try:
            targets = targets_of(examples, self.config.label_field, self._labels)
        except UserError as error:
            raise UserError(f"phases.{self.name}: {what} data: {error}") from error
        prompts, texts = ([e.prompt for e in examples], [e.response or "" for e in examples])
        messages = [e.question for e in examples]
        rows = self._reading.measured(self.resources.tokenizer, prompts, texts, messages)
        left_out = [self._is_left_out(row) for row in rows]
        if self._length is not None:
            lengths = [row.whole for row in rows]
            long_rows = LongRows.of_phase(self.name, self.config.long_rows, f"{what} rows")
            long_rows.report(lengths, left_out, places_of(examples), self._length)
        keep = np.flatnonzero(~np.array(left_out, bool))
        return [rows[i].tokens for i in keep], targets[keep]

    def _is_left_out(self, row: ScoredRow) -> bool:
        is_long = self._length is not None and row.whole > self._length
        return is_long and not self.config.long_rows.startswith("truncate")

    def _training_stream(self) -> LabelledStream:
        rows, targets = self._read(self._split("train"), "training")
        stream = LabelledStream(rows, targets, self.resources.seed, self._length)
        stream.chosen(0, self.config.batch_size)  # are there so many?
        return stream

    def _class_weights(self, stream: LabelledStream | None) -> np.ndarray:
        weights, num_labels = self.config.class_weights, len(self._labels)
        if weights == "balanced" and stream is not None:
            counts = np.bincount(stream.targets, minlength=num_labels)
            if not counts.all():
                missing = self._labels[int(np.argmin(counts))]
                raise UserError(
                    f"phases.{self.name}: class_weights balanced needs rows of every label: {missing}"
                )
            return (counts.sum() / (num_labels * counts)).astype(np.float32)
        return np.array(weights if isinstance(weights, tuple) else [1.0] * num_labels, np.float32)

    @functools.cached_property
    def _kept_back(self) -> tuple[list[np.ndarray], np.ndarray]:
        return self._read(self._split("held_out"), "calibration")

    @functools.cached_property
    def _held_out(self) -> tuple[list[np.ndarray], np.ndarray]:
        if self.config.source is not None:
            examples = self.config.source.load("held_out")
        else:
            assert self.resources.held_out is not None, "a planned phase is not evaluated"
            examples = self.resources.held_out()
        return self._read(examples, "held-out")

    def _temperature(self, state: RunState) -> float | None:
        if not self._calibration_fraction:
            return None
        rows, targets = self._kept_back
        return fit_temperature(self.reader.scores(self.params_of(state), rows, "calibration"), targets)


def classifier_objective(
    config: Classification, head: str, scorer: TextScorer, class_weights: np.ndarray
) -> Objective:
    """The loss of a head and of the trunk below it."""
    weights = jnp.asarray(class_weights)
    is_regression = len(scorer.labels) == 1

    def loss(params, batch: LabelledBatch, key: Array):
        scores = read_head(scorer, scorer_params(head, params), batch, key if config.dropout else None)
        if is_regression:
            return {"loss": squared_error(scores[:, 0], batch.targets)}, {}
        right = (jnp.argmax(scores, axis=1) == batch.targets).astype(jnp.float32)
        term = label_cross_entropy(scores, batch.targets, weights, config.label_smoothing)
        return {"loss": term}, {"accuracy": Sum.of(right, jnp.ones_like(right, bool))}

    def total(batch: LabelledBatch) -> dict[str, Any]:
        rows = batch.targets.shape[0]
        return {"loss": jnp.float32(rows) if is_regression else weights[batch.targets].sum()}

    return Objective(loss, total, coefs={"loss": 1.0})
