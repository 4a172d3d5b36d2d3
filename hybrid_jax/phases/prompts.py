"""The prompts that a policy answers."""

from __future__ import annotations

import numpy as np

from hybrid_jax.core.batches import PromptBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.phases.rollout_settings import RolloutSettings
from hybrid_jax.training.phase import Resources


def prompt_stream(config: RolloutSettings, resources: Resources) -> PromptStream:
    """The prompts that the policy answers; they leave room for a whole response in the model's context."""
    if isinstance(resources.model, EncoderDecoder):
        raise UserError(
            f"phases.{resources.name}: a rollout needs a decoder; an encoder-decoder learns by sft alone"
        )
    assert resources.examples is not None
    examples = config.source.load("train") if config.source is not None else resources.examples
    most, long_rows = config.longest_prompt(resources.name, resources.model.max_length)
    buckets, setting = config.prompt_buckets, f"phases.{resources.name}.prompt_buckets"
    if buckets is not None and most is not None and max(buckets) > most:
        raise UserError(
            f"{setting} must be at most the {most} tokens that a prompt may have, got {max(buckets)}"
        )
    stream = PromptStream(
        examples, resources.tokenizer, most, seed=resources.seed, buckets=buckets, long_rows=long_rows
    )
    if buckets is not None and max(buckets) < stream.longest:
        raise UserError(
            f"{setting} must hold the longest prompt, of {stream.longest} tokens, got {list(buckets)}; add a "
            f"length, or set phases.{resources.name}.max_prompt_length to {max(buckets)}"
        )
    return stream


def repeated(prompts: PromptBatch, times: int) -> PromptBatch:
    """Each prompt ``times`` times, one after the other."""
    if times == 1:
        return prompts
    examples = tuple(example for example in prompts.examples for _ in range(times))
    return PromptBatch(np.repeat(prompts.tokens, times, 0), np.repeat(prompts.mask, times, 0), examples)
