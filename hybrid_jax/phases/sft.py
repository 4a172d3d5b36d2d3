"""Supervised fine-tuning: cross-entropy on the tokens of a response (or of a document)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge
from jax import Array

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.data.continuous import ContinuousStream
from hybrid_jax.data.loader import SFTStream
from hybrid_jax.data.long_rows import DEFAULT, ChatPolicy, LongRows
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.models.scoring import token_loss
from hybrid_jax.parallel.rules import Placement
from hybrid_jax.phases.carried import CarriedPhase
from hybrid_jax.phases.step_flops import sft_flops
from hybrid_jax.phases.supervised import Supervised, SupervisedPhase, tokens_of
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import row_shape
from hybrid_jax.training.update import Objective


@PHASES.register("sft")
@settings
class SFT(Supervised):
    """Settings of supervised fine-tuning."""

    length: Annotated[int, Ge(2)] = 256  # tokens a row
    long_rows: ChatPolicy = "truncate_end"  # what becomes of an example with more tokens; see docs/data.md
    packing: bool = True  # several examples a row
    source: Annotated[Any, SOURCES] | None = None  # examples of its own; None takes the run's
    carry_state: bool = False  # rows go on where those of the step before ended; for recurrent models
    stride: Count | None = None  # with carry_state, tokens that a row goes on by; null: all but one, length - 1

    def __post_init__(self):
        super().__post_init__()
        if self.stride is not None and not self.carry_state:
            raise ValueError("stride needs carry_state: true")
        if self.stride is not None and self.stride >= self.length:
            raise ValueError(f"stride must be at most length - 1 = {self.length - 1}, got {self.stride}")
        if self.carry_state and self.microbatches != 1:
            raise ValueError(f"carry_state needs microbatches: 1, got {self.microbatches}")

    def build(self, resources: Resources) -> SupervisedPhase:
        """Makes the phase: its stream, its loss and the shapes of a batch."""
        model, where = resources.model, f"phases.{resources.name}"
        if self.carry_state and not isinstance(model, RecurrentModel):
            raise UserError(f"{where}: carry_state needs a recurrent model, such as lstm")
        kind = CarriedPhase if self.carry_state else SupervisedPhase
        return kind(
            self,
            resources,
            stream=None if resources.examples is None else sft_stream(self, resources, where),
            objective=sft_objective(model, dropout=self.dropout),
            shapes=lambda: example_shapes(resources.placement, self.batch_size, self.length),
            logged=lambda batch: {**tokens_of(batch), **sft_flops(model, *batch.tokens.shape)},
        )


def example_shapes(placement: Placement, rows: int, *rest: int) -> TokenBatch:
    """The shapes of a batch of examples: [rows T], or of pairs [rows 2 T]."""
    shape = functools.partial(row_shape, placement, rows, *rest)
    batch: Any = TokenBatch  # pyright does not see the fields of a flax.struct.dataclass
    return batch(tokens=shape(dtype="int32"), segment_ids=shape(dtype="int32"), loss_mask=shape(dtype="bool"))


def sft_stream(config: SFT, resources: Resources, where: str) -> SFTStream | ContinuousStream:
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
    if config.carry_state:
        return ContinuousStream(
            examples,
            resources.tokenizer,
            length=config.length,
            stride=config.stride or config.length - 1,
            lanes=config.batch_size,
            where=where,
        )
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
    return {"loss": token_loss(model, params, hidden, batch), **losses}


def sft_objective(model: LanguageModel, *, dropout: bool = False) -> Objective:
    """The loss of the group "model"."""

    def loss(params, batch, key):
        return sft_losses(model, params["model"], batch, key if dropout else None), {}

    def weights(batch: TokenBatch) -> dict[str, Array]:
        real = (batch.segment_ids > 0).sum()
        return {"loss": num_targets(batch), **dict.fromkeys(model.loss_coefs, real)}

    return Objective(loss, weights, coefs={"loss": 1.0, **model.loss_coefs})


def num_targets(batch: TokenBatch) -> Array:
    """How many tokens a loss learns to predict."""
    return batch.loss_mask[:, 1:].sum()
