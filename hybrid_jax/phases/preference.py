"""Preferences, offline: a language model learns from answers that people compared, without a reward model.

    pairs ─ stream ─▶ rows [B 2 T] ─ log π, log π_ref of the answers [B 2] ─ loss ─▶ gradients ─▶ update

`hybrid_jax.algorithms.preference_losses` has the losses, docs/preferences.md says which to take. As a rule,
references never change within a phase: what they say of a row is then computed once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jax import Array
from jaxtyping import Float

from hybrid_jax.algorithms import sppo  # noqa: F401  this fills PREFERENCE_LOSSES
from hybrid_jax.algorithms.kto import kto_baseline
from hybrid_jax.algorithms.preference_losses import PREFERENCE_LOSSES, PreferenceLoss, Sigmoid
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Example, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.core.ranges import BatchSize, NonNegative, settings
from hybrid_jax.data.long_rows import LongRows, Policy
from hybrid_jax.data.pair_stream import AnswerStream, PairStream
from hybrid_jax.data.places import places_of
from hybrid_jax.data.preferences import PREFERENCES, Preference
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.lora import whole
from hybrid_jax.parallel.mesh import put_rows, whole_array
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.answer_losses import (
    AnswerBatch,
    answer_log_probs,
    mixed_log_probs,
    preference_terms,
    preference_weights,
)
from hybrid_jax.phases.kept_log_probs import KeptLogProbs
from hybrid_jax.phases.references import Reference, reference_models, shares_of, shortest_context
from hybrid_jax.phases.sft import example_shapes
from hybrid_jax.phases.supervised import Supervised, SupervisedPhase
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import row_shape
from hybrid_jax.training.state import RunState, TrainState
from hybrid_jax.training.update import Groups, Objective


@PHASES.register("preference")
@settings
class PreferenceSettings(Supervised):
    """Settings of learning from preferences.

    Attributes:
        batch_size: pairs a step; of ``kto`` answers.
        length: tokens of a prompt with an answer.
        long_rows: what becomes of a pair with a longer one: left out ("drop"), both rows cut behind ``length``
            tokens ("truncate_end"), the same tokens cut from the start of both prompts ("truncate_start"), or
            an error.
        loss: of a pair.
        sft_coef: of −log π a token of the better answer, beside the loss; null takes the loss's own, which is 1
            for ``orpo`` and ``cpo`` and 0 for the others.
        references: frozen models, for a loss that reads one; null is a copy of the policy at the first step of
            this phase. Of several the log-probs are averaged by their weights: the policy is held by their
            geometric mean.
        online_references: compute what references say at every step, in place of once a row; so it is, too,
            where one is refreshed.
        source: preferences of its own; null takes the run's, a source ``preferences``.
        label_field: for ``kto`` on rows that are no preferences: the field that is true for a good answer.
        dropout: apply the model's dropout, if it has any; a reference never has it.
        optimizer: of the parameters that train.
    """

    batch_size: BatchSize = 16
    length: Annotated[int, Ge(2)] = 256
    long_rows: Policy = "drop"
    loss: Annotated[PreferenceLoss, PREFERENCE_LOSSES] = Sigmoid()
    sft_coef: NonNegative | None = None
    references: Mapping[str, Reference] | None = None
    online_references: bool = False
    source: Annotated[Any, PREFERENCES] | None = None
    label_field: str = "label"
    dropout: bool = False
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(learning_rate=1e-5)

    def __post_init__(self):
        super().__post_init__()
        if self.references is not None and not self.loss.needs_reference:
            name = PREFERENCE_LOSSES.name_of(type(self.loss))
            raise ValueError(f"references must be null for the loss {name}, which reads none, got some")
        if self.references is not None and not sum(r.weight for r in self.references.values()) > 0:
            raise ValueError("references must be null or have a weight above 0 together, got none")
        if self.loss.learns_from == "groups":
            raise ValueError(
                "loss must learn from pairs or single answers, got one that reads how often samples win: take "
                "sppo_hard, or the phase online_preference"
            )

    @property
    def frozen(self) -> Mapping[str, Reference]:
        """The references that the loss reads."""
        if not self.loss.needs_reference:
            return {}
        return {"start": Reference()} if self.references is None else self.references

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each reference, together 1."""
        return shares_of(self.frozen)

    @property
    def keeps(self) -> bool:
        """Tells whether the references' log-probs of a row are computed once."""
        changing = any(reference.changes for reference in self.frozen.values())
        return bool(self.frozen) and not self.online_references and not changing

    def build(self, resources: Resources) -> PreferencePhase:
        """Makes the phase."""
        return PreferencePhase(self, resources)


class PreferencePhase(SupervisedPhase):
    """Steps that learn from preferences."""

    def __init__(self, config: PreferenceSettings, resources: Resources):
        _check_model(config, resources)
        self._stream = None if resources.examples is None else _stream_of(config, resources)
        super().__init__(
            config,
            resources,
            stream=self._stream,
            objective=preference_objective(config, resources.model),
            shapes=self._batch_shapes,
            references=config.frozen,
        )
        self._kept = None
        if config.keeps and self._stream is not None:
            self._kept = KeptLogProbs(self._stream.index(0, self._stream.num_rows), config.batch_size)
        self._read = jax.jit(under(resources.placement, self._reference_log_probs))

    def batch(self, state: RunState, cursor: int) -> tuple[AnswerBatch, Mapping[str, Any]]:
        """The batch at a cursor, with what the references say of it."""
        stream = self._stream
        assert stream is not None, "a planned phase reads nothing"
        index = stream.index(cursor, self.config.batch_size)
        batch: Any = AnswerBatch(stream.rows(index))
        if isinstance(stream, AnswerStream):
            batch = batch.replace(good=stream.good[index])
        if self._kept is not None:
            models = self._frozen.of(state)

            def read(index: np.ndarray) -> np.ndarray:
                rows = put_rows(self.resources.placement, stream.rows(index))
                return whole_array(self._read(state.base, models, rows))

            batch = batch.replace(reference=self._kept.of(models, index, read))
        return batch, self._logged(batch)

    def _batch_shapes(self) -> AnswerBatch:
        config, placement = self.config, self.resources.placement
        shape = functools.partial(row_shape, placement, config.batch_size)
        make: Any = AnswerBatch  # pyright does not see shapes as arrays
        return make(
            example_shapes(placement, config.batch_size, 2, config.length),
            reference=shape(2, dtype="float32") if config.keeps else None,
            good=shape(dtype="bool") if config.loss.learns_from == "answers" else None,
        )

    def _reference_log_probs(self, base: Params, models: Groups, rows: TokenBatch) -> Float[Array, "B 2"]:
        params = {f"references/{name}": whole(base, tree) for name, tree in models.items()}
        readers = reference_models(self.config.frozen, self.resources.model)
        return mixed_log_probs(readers, self.config.shares, params, rows)

    def _learn(
        self, base: Params, references: Groups, state: TrainState, batch: Any, key: Array, rate: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step; before it, the KL of the whole batch that all rows of `KTO` are compared with."""
        if self.config.loss.learns_from == "answers":
            policy = answer_log_probs(self.resources.model, whole(base, state.params["model"]), batch.rows)[0]
            known = batch.reference
            known = self._reference_log_probs(base, references, batch.rows) if known is None else known
            baseline = kto_baseline((policy - known)[:, 1])
            batch = batch.replace(reference=known, baseline=jnp.broadcast_to(baseline, len(policy)))
        return super()._learn(base, references, state, batch, key, rate)


def preference_objective(config: PreferenceSettings, model: LanguageModel) -> Objective:
    """The loss of the group "model"."""
    read = config.loss
    single = read.learns_from == "answers"
    sft_coef = read.sft_coef if config.sft_coef is None else config.sft_coef

    def loss(params: Groups, batch: AnswerBatch, key: Array) -> tuple[dict[str, Sum], dict[str, Sum]]:
        rows = jax.tree.map(lambda x: x[:, :1], batch.rows) if single else batch.rows
        policy, losses = answer_log_probs(model, params["model"], rows, key if config.dropout else None)
        reference = batch.reference
        if reference is None and read.needs_reference:
            reference = mixed_log_probs(reference_models(config.frozen, model), config.shares, params, rows)
        terms, metrics = preference_terms(read, sft_coef, policy, reference, batch)
        if reference is not None and not single:
            # KL(π_ref ‖ π) an answer, as far as the answers are samples of the reference
            apart = jnp.mean(reference - policy, axis=1)
            metrics["reference_kl"] = Sum.of(apart, jnp.ones(len(policy), bool))
        return {**terms, **losses}, metrics

    coefs = {"loss": 1.0, "sft": sft_coef, **model.loss_coefs}
    return Objective(loss, functools.partial(preference_weights, read, model), coefs)


def _check_model(config: PreferenceSettings, resources: Resources) -> None:
    where = f"phases.{resources.name}"
    if isinstance(resources.model, EncoderDecoder):
        raise UserError(f"{where}: preferences need a decoder, got an encoder-decoder")
    context = shortest_context(config.frozen, resources.model)
    if context is not None and config.length > context:
        raise UserError(
            f"{where}: length must be at most the model's max_length {context}, got {config.length}"
        )


def _stream_of(config: PreferenceSettings, resources: Resources) -> PairStream | AnswerStream:
    where = f"phases.{resources.name}"
    long_rows = LongRows.of_phase(resources.name, config.long_rows, "pairs")
    rest = resources.tokenizer, config.length, resources.seed, long_rows
    try:
        if config.loss.learns_from == "pairs":
            return PairStream(_preferences(config, resources), *rest)
        return AnswerStream(*_labelled(config, resources), *rest)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _preferences(config: PreferenceSettings, resources: Resources) -> list[Preference]:
    if config.source is not None:
        return list(config.source.load("train"))
    return [Preference.of(example) for example in resources.examples or ()]


def _labelled(config: PreferenceSettings, resources: Resources) -> tuple[list[Example], list[bool]]:
    """Answers and whether each is good: rows with a label, or both answers of each preference."""
    examples, field = list(resources.examples or ()), config.label_field
    if config.source is None and examples and field in examples[0].columns:
        for place, row in zip(places_of(examples), examples, strict=True):
            if not isinstance(row.columns.get(field), bool):
                raise UserError(
                    f"{place}: {field!r} must be true or false, got {shown(row.columns.get(field))}"
                )
        return examples, [row.columns[field] for row in examples]
    pairs = [row for row in _preferences(config, resources) if not row.tie]
    both = [(row.example, row.rejected) for row in pairs]
    bad = [replace(row, response=text, messages=_with_answer(row, text)) for row, text in both]
    return [row for row, _ in both] + bad, [True] * len(pairs) + [False] * len(pairs)


def _with_answer(row: Example, text: str) -> tuple[Any, ...]:
    return (*row.question, {"role": "assistant", "content": text}) if row.messages else ()
