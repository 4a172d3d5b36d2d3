"""Reward models: a head learns which responses people liked better."""

from __future__ import annotations

import functools
from dataclasses import field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Interval
from jax import Array
from jaxtyping import Float

from hybrid_jax.algorithms.preference import (
    centring_loss,
    pair_accuracy,
    plackett_luce_loss,
    ranking_loss,
    reward_margin,
)
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, NonNegative, Positive, settings
from hybrid_jax.data.long_rows import LongRows, Policy
from hybrid_jax.data.preference_stream import Labels, PreferenceBatch, PreferenceStream, Reading
from hybrid_jax.data.preferences import PREFERENCES, Preference
from hybrid_jax.data.scored_text import cut_of
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.phases.heads import HeadPhase, HeadSettings, head_name, read_head, scorer_of, scorer_params
from hybrid_jax.phases.reference_samples import ReferenceSamples
from hybrid_jax.phases.reward_report import agreement
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import row_shape
from hybrid_jax.training.state import RunState
from hybrid_jax.training.update import Objective


@PHASES.register("reward_model")
@settings
class RewardModel(HeadSettings):
    """Settings of the training of a reward model.

    A head with one label is one reward; one with several is an ensemble, each label a member that
    learns a bootstrap sample of its own of the data (`PreferenceStream`).

    Attributes:
        batch_size: prompts a step, each with all its responses.
        length: tokens a row, prompt and response together.
        long_rows: what becomes of a longer one. To truncate takes the start of its prompt, then the end
            ("truncate_end") or the start of its response, here and where the model is a reward; to drop leaves
            out the prompt with all its responses.
        prompt: a response is read behind what it answers; else alone.
        loss: "pairs" of responses (Bradley-Terry), or "plackett_luce" of whole rankings, which have no ties,
            margins or smoothing.
        margin: by how much the better response must be ahead.
        margin_coef: what the margin of a row counts beside that.
        label_smoothing: the share of labels in [0, 0.5) that is taken to be wrong.
        tie_threshold: ν of Rao and Kupper, above 0; None takes a tie as half a win of either side.
        centring_coef: of (r_i + r_j)², which keeps rewards near 0.
        matched_ratio: pairs with |log(length of the better / of the worse)| up to this count as matched.
        reference: a policy whose samples have mean 0 and standard deviation 1 after training; None takes all
            responses of the training data.
        source: preferences of its own; None takes the run's, a source ``preferences``.
        optimizer: of the parameters that train.
    """

    batch_size: BatchSize = 16
    length: Annotated[int, Ge(4)] = 256
    long_rows: Policy = "truncate_end"
    prompt: bool = True
    loss: Literal["pairs", "plackett_luce"] = "pairs"
    margin: NonNegative = 0.0
    margin_coef: NonNegative = 0.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    tie_threshold: Positive | None = None
    centring_coef: NonNegative = 0.0
    matched_ratio: NonNegative = 0.2
    reference: ReferenceSamples | None = None
    source: Annotated[Any, PREFERENCES] | None = None
    optimizer: Annotated[Optimizer, OPTIMIZERS] = field(default_factory=lambda: AdamW(learning_rate=1e-4))

    def __post_init__(self):
        super().__post_init__()
        extras = (self.margin, self.margin_coef, self.label_smoothing, self.tie_threshold or 0.0)
        if self.loss == "plackett_luce" and any(extras):
            raise ValueError(
                "loss must be pairs for margins, label_smoothing or tie_threshold, got plackett_luce"
            )

    def build(self, resources: Resources) -> RewardModelPhase:
        """Makes the phase."""
        return RewardModelPhase(self, resources)


class RewardModelPhase(HeadPhase):
    """Steps of a reward model."""

    def __init__(self, config: RewardModel, resources: Resources):
        self.config, self.name, self.resources = config, resources.name, resources
        self.scorer = scorer_of(config, resources)
        super().__init__(
            config,
            resources,
            stream=None if resources.examples is None else self._training_stream(),
            objective=reward_objective(config, head_name(config, resources), self.scorer),
            shapes=self._batch_shapes,
            read_rows=2 * config.batch_size,
            length=config.length,
        )
        self._loss = jax.jit(functools.partial(preference_loss, config))

    def batch(self, state: RunState, cursor: int) -> tuple[PreferenceBatch, dict[str, Any]]:
        """The batch at a cursor; of a trunk that never trains, what it makes of the rows."""
        stream: Any = self.stream
        batch = stream.batch(cursor, self.config.batch_size)
        logged = {"tokens": batch.mask.sum()}
        if not self.reader.keeps_features:
            return batch, logged
        flat = self.reader.features(self.params_of(state), stream.flat, "train")
        return batch.replace(tokens=None, mask=None, features=flat[stream.places[batch.index]]), logged

    def _batch_shapes(self) -> PreferenceBatch:
        length = self.config.length
        shape = functools.partial(row_shape, self.resources.placement, self.config.batch_size)
        make: Any = PreferenceBatch  # pyright does not see the fields of a flax.struct.dataclass
        labels: Any = Labels
        return make(
            tokens=shape(2, length, dtype="int32"),
            mask=shape(2, length, dtype="bool"),
            labels=labels(
                ranks=shape(2, dtype="int32"),
                present=shape(2, dtype="bool"),
                margins=shape(dtype="float32"),
                weights=shape(len(self.scorer.labels), dtype="float32"),
            ),
            index=shape(dtype="int32"),
        )

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Agreement with held-out preferences, calibration, and the part of length in it."""
        stream = self._held_out
        scores = self.reader.scores(self.params_of(state), stream.flat, "held_out")
        rewards = np.zeros(stream.present.shape, np.float32)
        rewards[stream.present] = scores.mean(axis=1)  # over the members
        report = {"loss": float(self._loss(rewards[..., None], stream.labels).mean())}
        by_prompt = [row[here] for row, here in zip(rewards, stream.present, strict=True)]
        if scores.shape[1] > 1:  # members differ by a constant, which says nothing
            report["disagreement"] = float((scores - scores.mean(axis=0)).std(axis=1).mean())
        return report | agreement(stream.preferences, by_prompt, self.config.matched_ratio)

    def extra(self, state: RunState) -> dict[str, Any]:
        """How to read texts, and mean and standard deviation of each member's rewards on reference samples.

        Preferences say nothing about the zero of a reward, and little about its unit (Ziegler et al. 2019,
        section 2.1: after training, gain and bias give samples of the reference policy mean 0 and variance 1).
        """
        if (reference := self.config.reference) is None:
            assert isinstance(self.stream, PreferenceStream), "a planned phase saves nothing"
            rows, name, of = self.stream.flat, "train", "the responses of the training data"
        else:
            drawn = reference.draw(self._preferences("train"), self.resources.seed)
            rows = self._reading.rows(self.resources.tokenizer, *zip(*drawn, strict=True))
            name, of = None, str(reference.path)
        rewards = self.reader.scores(self.params_of(state), rows, name).astype(np.float64)
        std = rewards.std(axis=0)
        return {
            "kind": "reward_model",
            "reading": self._reading.settings,
            "normaliser": {
                "mean": rewards.mean(axis=0).tolist(),
                "std": np.where(std > 0, std, 1.0).tolist(),
                "samples": len(rows),
                "of": of,
            },
        }

    @functools.cached_property
    def _reading(self) -> Reading:
        limits = (self.config.length, self.scorer.max_length or self.config.length)
        chat = any(row.messages for row in self._preferences("train"))
        cut = cut_of(self.config.long_rows)
        return Reading(self.config.prompt, self.config.prompt and chat, min(limits), cut)

    def _preferences(self, split: Literal["train", "held_out"]) -> list[Preference]:
        if self.config.source is not None:
            return list(self.config.source.load(split))
        examples = self.resources.examples
        if split == "held_out":
            examples = self.resources.held_out and self.resources.held_out()
        try:
            return [Preference.of(example) for example in examples or ()]
        except UserError as error:
            raise UserError(f"phases.{self.name}: {error}") from error

    def _training_stream(self) -> PreferenceStream:
        preferences = self._preferences("train")
        tied = next((row for row in preferences if len(set(row.ranking[1])) < len(row.ranking[1])), None)
        if self.config.loss == "plackett_luce" and tied is not None:
            raise UserError(
                f"phases.{self.name}: loss must be pairs for data with ties, got plackett_luce "
                f"and a tie for the prompt {tied.prompt[:40]!r}"
            )
        if self.scorer.max_length is not None and self.config.length > self.scorer.max_length:
            raise UserError(
                f"phases.{self.name}: length must be at most the model's max_length {self.scorer.max_length}, "
                f"got {self.config.length}"
            )
        members = len(self.scorer.labels)
        return self._stream_of(preferences, "rows", seed=self.resources.seed, members=members)

    @functools.cached_property
    def _held_out(self) -> PreferenceStream:
        return self._stream_of(self._preferences("held_out"), "held-out rows")

    def _stream_of(self, preferences: list[Preference], rows: str, **settings: Any) -> PreferenceStream:
        long_rows = LongRows.of_phase(self.name, self.config.long_rows, rows)
        tokenizer, reading = self.resources.tokenizer, self._reading
        return PreferenceStream(preferences, tokenizer, reading, long_rows=long_rows, **settings)


def reward_objective(config: RewardModel, head: str, scorer: TextScorer) -> Objective:
    """The loss of a head and of the trunk below it."""

    def loss(params, batch: PreferenceBatch, key: Array):
        rewards = read_head(scorer, scorer_params(head, params), batch, key if config.dropout else None)
        of = batch.labels
        terms = {"loss": preference_loss(config, rewards, of)}
        if config.centring_coef:
            terms["centring"] = centring_loss(rewards, of.ranks, of.present, of.weights)
        mean = jnp.mean(rewards, axis=-1)
        metrics = {
            "accuracy": pair_accuracy(mean, of.ranks, of.present),
            "margin": reward_margin(mean, of.ranks, of.present),
        }
        return terms, metrics

    def weights(batch: PreferenceBatch) -> dict[str, Array]:
        return dict.fromkeys(("loss", "centring"), batch.labels.weights.sum())

    return Objective(loss, weights, coefs={"loss": 1.0, "centring": config.centring_coef})


def preference_loss(config: RewardModel, rewards: Float[Array, "B K M"], labels: Labels) -> Sum:
    """The loss that the settings name, over prompts and members."""
    of = labels.ranks, labels.present, labels.weights
    if config.loss == "plackett_luce":
        return plackett_luce_loss(rewards, *of)
    return ranking_loss(
        rewards,
        *of,
        config.margin + config.margin_coef * labels.margins,
        label_smoothing=config.label_smoothing,
        tie_threshold=config.tie_threshold,
    )
