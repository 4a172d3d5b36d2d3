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
from flax import struct
from jax import Array
from jaxtyping import Bool, Float

from hybrid_jax.algorithms.kto import KTO, kto_baseline
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
from hybrid_jax.models.scoring import target_log_probs
from hybrid_jax.parallel.mesh import put_rows, whole_array
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.kept_log_probs import KeptLogProbs
from hybrid_jax.phases.references import Reference
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

    @property
    def frozen(self) -> Mapping[str, Reference]:
        """The references that the loss reads."""
        if not self.loss.needs_reference:
            return {}
        return {"start": Reference()} if self.references is None else self.references

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each reference, together 1."""
        total = sum(reference.weight for reference in self.frozen.values())
        return {name: reference.weight / total for name, reference in self.frozen.items()}

    @property
    def keeps(self) -> bool:
        """Tells whether the references' log-probs of a row are computed once."""
        changing = any(r.refresh_every_cycles is not None for r in self.frozen.values())
        return bool(self.frozen) and not self.online_references and not changing

    def build(self, resources: Resources) -> PreferencePhase:
        """Makes the phase."""
        return PreferencePhase(self, resources)


@struct.dataclass
class AnswerBatch:
    """Pairs of answers, the better first; or single answers, each beside the answer to another prompt."""

    rows: TokenBatch  # [B 2 T]
    reference: Float[Array, "B 2"] | None = (
        None  # log π_ref of the answers; None where it is computed on the way
    )
    good: Bool[Array, "B"] | None = None  # of single answers
    baseline: Float[Array, "B"] | None = None  # z of `KTO`, the same for all rows

    @property
    def tokens(self) -> Any:
        """The tokens of all rows, [B 2 T]."""
        return self.rows.tokens


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
            good=None if config.loss.paired else shape(dtype="bool"),
        )

    def _reference_log_probs(self, base: Params, models: Groups, rows: TokenBatch) -> Float[Array, "B 2"]:
        params = {f"references/{name}": whole(base, tree) for name, tree in models.items()}
        return mixed_log_probs(self.resources.model, self.config.shares, params, rows)

    def _learn(
        self, base: Params, references: Groups, state: TrainState, batch: Any, key: Array, rate: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step; before it, the KL of the whole batch that all rows of `KTO` are compared with."""
        if not self.config.loss.paired:
            policy = answer_log_probs(self.resources.model, whole(base, state.params["model"]), batch.rows)[0]
            known = batch.reference
            known = self._reference_log_probs(base, references, batch.rows) if known is None else known
            baseline = kto_baseline((policy - known)[:, 1])
            batch = batch.replace(reference=known, baseline=jnp.broadcast_to(baseline, len(policy)))
        return super()._learn(base, references, state, batch, key, rate)


def answer_log_probs(
    model: LanguageModel, params: Params, rows: TokenBatch, dropout_key: Array | None = None
) -> tuple[Float[Array, "B K"], dict[str, Sum]]:
    """log π(y|x) of the answers of rows [B K T], summed over their tokens, and the model's own losses.

    What is no answer (prompts, padding, what stands behind the end) adds neither value nor gradient.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    hidden, losses = model.hidden_and_losses(params, flat.tokens, flat.segment_ids, dropout_key=dropout_key)
    found, _ = target_log_probs(model, params, hidden[:, :-1], flat.tokens[:, 1:])
    summed = jnp.where(flat.loss_mask[:, 1:], found, 0.0).sum(axis=1)
    return summed.reshape(rows.tokens.shape[:-1]), losses


def mixed_log_probs(
    model: LanguageModel, shares: Mapping[str, float], params: Groups, rows: TokenBatch
) -> Float[Array, "B K"]:
    """Σ_i a_i log π_i(y|x) of references: log of their geometric mean, but for its normaliser.

    The optimum of E r − β Σ_i a_i KL(π ‖ π_i) with Σ a_i = 1 is that with this one reference; of a pair the
    normaliser cancels.
    """
    found = [
        share * answer_log_probs(model, params[f"references/{name}"], rows)[0] for name, share in shares.items()
    ]
    return jax.lax.stop_gradient(sum(found[1:], found[0]))


def preference_objective(config: PreferenceSettings, model: LanguageModel) -> Objective:
    """The loss of the group "model"."""
    read = config.loss
    sft_coef = read.sft_coef if config.sft_coef is None else config.sft_coef

    def loss(params: Groups, batch: AnswerBatch, key: Array) -> tuple[dict[str, Sum], dict[str, Sum]]:
        rows = batch.rows if read.paired else jax.tree.map(lambda x: x[:, :1], batch.rows)
        policy, losses = answer_log_probs(model, params["model"], rows, key if config.dropout else None)
        reference = batch.reference
        if reference is None and read.needs_reference:
            reference = mixed_log_probs(model, config.shares, params, rows)
        tokens = rows.loss_mask[..., 1:].sum(axis=-1, dtype=jnp.float32)
        everything = jnp.ones(len(policy), bool)
        if isinstance(read, KTO):
            of_row, metrics = _answers(read, policy, reference, batch)
        else:
            of_row, metrics = _pairs(read, policy, reference, jnp.maximum(tokens, 1.0))
        terms = {"loss": Sum.of(of_row, everything), **losses}
        if sft_coef:
            good = everything if batch.good is None else batch.good
            log_prob, num_tokens = Sum.of(policy[:, 0], good), Sum.of(tokens[:, 0], good)
            terms["sft"] = Sum(total=-log_prob.total, weight=num_tokens.total)
        return terms, metrics

    def weights(batch: AnswerBatch) -> dict[str, Array]:
        mask = batch.rows.loss_mask[:, 0, 1:]
        mask = mask if batch.good is None else mask & batch.good[:, None]
        real = (batch.rows.segment_ids[:, : 2 if read.paired else 1] > 0).sum()
        own = dict.fromkeys(model.loss_coefs, real)
        return {"loss": jnp.float32(len(batch.rows.tokens)), "sft": mask.sum(), **own}

    return Objective(loss, weights, coefs={"loss": 1.0, "sft": sft_coef, **model.loss_coefs})


def _pairs(loss: Any, policy: Array, reference: Array | None, tokens: Array) -> tuple[Array, dict[str, Sum]]:
    """The loss of each pair, and what is logged."""
    rewards = loss.rewards(policy, reference, tokens)
    margin = rewards[:, 0] - rewards[:, 1]
    mean = functools.partial(Sum.of, mask=jnp.ones(len(policy), bool))
    metrics = {
        "chosen_log_prob": mean(policy[:, 0]),
        "rejected_log_prob": mean(policy[:, 1]),
        "chosen_reward": mean(rewards[:, 0]),
        "rejected_reward": mean(rewards[:, 1]),
        "margin": mean(margin),
        "accuracy": mean(0.5 * (jnp.sign(margin) + 1.0)),
    }
    if reference is not None:
        # KL(π_ref ‖ π) an answer, as far as the answers are samples of the reference
        metrics["reference_kl"] = mean(jnp.mean(reference - policy, axis=1))
    return loss(policy, reference, tokens), metrics


def _answers(loss: KTO, policy: Array, reference: Any, batch: AnswerBatch) -> tuple[Array, dict[str, Sum]]:
    """The loss of each single answer, and what is logged."""
    good: Any = batch.good
    ratios = policy[:, 0] - reference[:, 0]
    rewards, ahead = loss.beta * ratios, jnp.sign(ratios - batch.baseline)
    everything = jnp.ones(len(good), bool)
    metrics = {
        "chosen_log_prob": Sum.of(policy[:, 0], good),
        "rejected_log_prob": Sum.of(policy[:, 0], ~good),
        "chosen_reward": Sum.of(rewards, good),
        "rejected_reward": Sum.of(rewards, ~good),
        "accuracy": Sum.of(0.5 * (jnp.where(good, ahead, -ahead) + 1.0), everything),
        "kl": Sum.of(jnp.asarray(batch.baseline), everything),
    }
    return loss(ratios, good, jnp.asarray(batch.baseline)), metrics


def _check_model(config: PreferenceSettings, resources: Resources) -> None:
    where, context = f"phases.{resources.name}", resources.model.max_length
    if isinstance(resources.model, EncoderDecoder):
        raise UserError(f"{where}: preferences need a decoder, got an encoder-decoder")
    if context is not None and config.length > context:
        raise UserError(
            f"{where}: length must be at most the model's max_length {context}, got {config.length}"
        )


def _stream_of(config: PreferenceSettings, resources: Resources) -> PairStream | AnswerStream:
    where = f"phases.{resources.name}"
    long_rows = LongRows.of_phase(resources.name, config.long_rows, "pairs")
    rest = resources.tokenizer, config.length, resources.seed, long_rows
    try:
        if config.loss.paired:
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
