"""Supervised fine-tuning: cross-entropy on the tokens of a response (or of a document)."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import jax
from annotated_types import Ge
from jax import Array

from hybrid_jax.algorithms.supervised import next_token_targets, token_cross_entropy
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.data.loader import SFTStream
from hybrid_jax.data.long_rows import DEFAULT, LongRows, Policy
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.lora import whole
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.parallel.rules import Placement, shard_params, under
from hybrid_jax.phases.work import sft_flops
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import DynamicLossScale, initial_loss_scale, loss_scale_of
from hybrid_jax.training.offload import without_idle
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import PHASES, Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import check_rows, key_shape, rate_shape, row_shape
from hybrid_jax.training.state import RunState, TrainState
from hybrid_jax.training.update import Objective, update_state


@PHASES.register("sft")
@settings
class SFT:
    """Settings of supervised fine-tuning."""

    batch_size: BatchSize = 16  # rows a step
    length: Annotated[int, Ge(2)] = 256  # tokens a row
    long_rows: Policy = "truncate_end"  # what becomes of an example with more tokens; see docs/data.md
    packing: bool = True  # several examples a row
    microbatches: Count = 1  # parts in which a batch is read, to save memory; the gradient is the same
    dropout: bool = True  # apply the model's dropout, if it has any
    source: Annotated[Any, SOURCES] | None = None  # examples of its own; None takes the run's
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(learning_rate=1e-3)

    def __post_init__(self):
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size {self.batch_size}, got {self.microbatches}")

    def build(self, resources: Resources) -> SFTPhase:
        return SFTPhase(self, resources)


class SFTPhase:
    """Steps of supervised fine-tuning. Trains the group "model" and nothing else."""

    references = ()
    waits_for_device = False

    def __init__(self, config: SFT, resources: Resources):
        self.config = config
        self.name, self.kind = resources.name, resources.kind
        self.optimizer_key = resources.optimizer_key
        self._horizon = resources.horizon
        self._placement = resources.placement
        check_rows(resources, "batch_size / microbatches", config.batch_size // config.microbatches)
        self._stream = (
            None if resources.examples is None else sft_stream(config, resources, f"phases.{self.name}")
        )
        self._rate = jax.jit(config.optimizer.rate)
        self._model, self._offload = resources.model, resources.offload
        update: Any = functools.partial(_update, config, resources)
        update.__name__ = f"{self.name}_update"
        self._update = jax.jit(under(resources.placement, update), donate_argnums=1)

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        transform = layer_by_layer(self.config.optimizer.transform())
        opt_state = {"model": transform.init(params["model"])}
        return PhaseInit(opt_state=opt_state, extra=initial_loss_scale(self._model))

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        assert self._stream is not None, "a planned phase takes no steps"
        started = time.perf_counter()
        cursor = state.cursors.get(self.name, 0)
        batch = put_rows(self._placement, self._stream.batch(cursor, self.config.batch_size))
        input_seconds = time.perf_counter() - started
        steps = state.schedule.steps.get(self.name, 0)
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        train, metrics = self._update(state.base, state.train, batch, key, rate)
        metrics |= {"learning_rate": rate, "tokens": batch.tokens.size, "input_seconds": input_seconds}
        metrics |= sft_flops(self._model, *batch.tokens.shape)
        state = replace(
            state, train=train, cursors={**state.cursors, self.name: cursor + self.config.batch_size}
        )
        return state, {f"{self.name}/{name}": value for name, value in metrics.items()}

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        batch = example_shapes(self._placement, self.config.batch_size, self.config.length)
        state, idle = without_idle(state, self)
        inputs = (state.base, state.train, batch, key_shape(self._placement), rate_shape(self._placement))
        tokens = self.config.batch_size * self.config.length
        beside = {"optimizer_states": idle, "references": state.references}
        beside = {name: trees for name, trees in beside.items() if name not in self._offload}
        return [Program(f"{self.name}/update", self._update, inputs, tokens=tokens, learns=True, beside=beside)]


def example_shapes(placement: Placement, rows: int, length: int) -> TokenBatch:
    """The shapes of a batch of examples."""
    shape = functools.partial(row_shape, placement, rows, length)
    batch: Any = TokenBatch  # pyright does not see the fields of a flax.struct.dataclass
    return batch(tokens=shape(dtype="int32"), segment_ids=shape(dtype="int32"), loss_mask=shape(dtype="bool"))


def sft_stream(config: SFT, resources: Resources, where: str) -> SFTStream:
    """The rows that a supervised loss learns from; ``where`` its settings stand, such as ``phases.sft``.

    Raises:
        UserError: a row is longer than what the model can read, or the data cannot be arranged in such rows.
    """
    context = resources.model.max_length
    if context is not None and config.length > context:
        raise UserError(
            f"{where}: length must be at most the model's max_length {context}, got {config.length}"
        )
    assert resources.examples is not None
    examples = config.source.load("train") if config.source is not None else resources.examples
    pairs = isinstance(resources.model, EncoderDecoder)
    settings: dict[str, Any] = {"seed": resources.seed, "packing": config.packing, "pairs": pairs}
    long_rows = long_examples(config, where, at_limit=config.length == context)
    return SFTStream(examples, resources.tokenizer, config.length, long_rows=long_rows, **settings)


def long_examples(config: SFT, where: str, *, at_limit: bool = False) -> LongRows:
    """Makes the policy for long examples from the settings at ``where``; ``at_limit``: a model limit."""
    limit = f"{where}.length"
    advice = f"raise {limit} and the model's max_length" if at_limit else None
    return LongRows(config.long_rows, limit, f"{where}.long_rows", advice)


def examples_read(phases: Mapping[str, Any]) -> tuple[int | None, LongRows]:
    """How long the examples are that the phases of a run learn from, and what becomes of longer ones.

    Where several learn from examples, that of the longest; None where none does.
    """
    found: list[tuple[int, LongRows]] = []
    for name, phase in phases.items():
        if isinstance(phase, SFT):
            found.append((phase.length, long_examples(phase, f"phases.{name}")))
        if (mix := getattr(phase, "sft_mix", None)) is not None:
            found.append((mix.length, long_examples(mix.as_sft(), f"phases.{name}.sft_mix")))
    return max(found, key=lambda one: one[0], default=(None, DEFAULT))


def sft_losses(
    model: LanguageModel, params: Params, batch: TokenBatch, dropout_key: Array | None = None
) -> dict[str, Sum]:
    """``loss``: Σ −log π(token | before) over the targets of a batch; and the model's own losses."""
    hidden, losses = model.hidden_and_losses(params, batch.tokens, batch.segment_ids, dropout_key=dropout_key)
    targets, mask = next_token_targets(batch.tokens, batch.loss_mask)
    logits_of = functools.partial(model.logits, model.cast(params))
    loss = token_cross_entropy(logits_of, hidden[:, :-1], targets, mask, model.vocab_size)
    return {"loss": loss, **losses}


def sft_objective(model: LanguageModel, base: Params | None = None, *, dropout: bool = False) -> Objective:
    """The loss of the group "model", which is all parameters, or what trains above a ``base``."""

    def loss(params, batch, key):
        policy = whole(base or {}, params["model"])
        return sft_losses(model, policy, batch, key if dropout else None), {}

    def weights(batch: TokenBatch) -> dict[str, Array]:
        real = (batch.segment_ids > 0).sum()
        return {"loss": num_targets(batch), **dict.fromkeys(model.loss_coefs, real)}

    return Objective(loss, weights, coefs={"loss": 1.0, **model.loss_coefs})


def _update(config: SFT, resources: Resources, base: Params, state: TrainState, *inputs):
    objective = sft_objective(resources.model, base, dropout=config.dropout)
    scaling = loss_scale_of(resources.model)
    state, metrics = sft_update(config, objective, resources.optimizer_key, state, *inputs, scaling=scaling)
    return shard_params(state, param_axes), metrics


def num_targets(batch: TokenBatch) -> Array:
    return batch.loss_mask[:, 1:].sum()


def sft_update(
    config: SFT,
    objective: Objective,
    optimizer_key: str,
    state: TrainState,
    batch: TokenBatch,
    key: Array,
    rate: Array | float,
    scaling: DynamicLossScale | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step, as a pure function of the state."""
    state, metrics, _ = update_state(
        objective,
        config.optimizer,
        state,
        batch,
        key,
        rate,
        optimizer_key=optimizer_key,
        microbatches=config.microbatches,
        scaling=scaling,
    )
    return state, metrics
