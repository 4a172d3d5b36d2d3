"""The prompts that a policy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid_jax.core.batches import Example, PromptBatch, Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.pair_stream import encode_answers
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.phases.references import shortest_context
from hybrid_jax.phases.rollout_settings import RolloutSettings
from hybrid_jax.phases.sft import SFT, sft_stream
from hybrid_jax.training.phase import Resources


def prompt_stream(config: RolloutSettings, resources: Resources) -> PromptStream:
    """The prompts that the policy answers; they leave room for a whole response in the model's context."""
    if isinstance(resources.model, EncoderDecoder):
        raise UserError(
            f"phases.{resources.name}: a rollout needs a decoder; an encoder-decoder learns by sft alone"
        )
    assert resources.examples is not None
    learner = shared_with(config, resources)
    source = config.source if learner is None else resources.phases[learner].source
    examples = source.load("train") if source is not None else resources.examples
    most, long_rows = config.longest_prompt(
        resources.name, shortest_context(config.references, resources.model)
    )
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
    _check_rotary_positions(config, resources, stream.longest)
    if learner is not None:
        _check_rows_are_examples(learner, resources, examples, stream)
    return stream


def _check_rotary_positions(config: RolloutSettings, resources: Resources, longest: int) -> None:
    """Refuses rows whose tokens would be sampled with other rotary positions than they are scored with."""
    scaling = getattr(getattr(resources.model, "config", None), "rope_scaling", None)
    steady = None if scaling is None else scaling.steady_length
    rows = longest + config.sampler.max_new_tokens
    if steady is not None and rows > steady:
        here = f"phases.{resources.name}"
        raise UserError(
            f"{here}: rows must have at most {steady} tokens, got prompts of {longest} and "
            f"{here}.sampler.max_new_tokens {config.sampler.max_new_tokens}: beyond that the model's "
            "rope_scaling turns all tokens by other angles, so that a response would be scored otherwise than "
            f"it was sampled; lower max_new_tokens or {here}.max_prompt_length"
        )


def shared_with(config: RolloutSettings, resources: Resources) -> str | None:
    """The phase whose examples are answered as well as learned; None where the prompts are the phase's own.

    Raises:
        UserError: there is no such phase, or more than one, its batches have another size or no row identity.
    """
    if config.prompts == "own":
        return None
    here = f"phases.{resources.name}"
    learners = {name: phase for name, phase in resources.phases.items() if isinstance(phase, SFT)}
    if len(learners) != 1:
        found = ", ".join(learners) or "none"
        raise UserError(f"{here}.prompts: shared needs one phase of sft that takes steps, got {found}")
    (name, sft), *_ = learners.items()
    if sft.packing:
        raise UserError(f"phases.{name}.packing must be false for {here}.prompts: shared, got true")
    if sft.carry_state:
        raise UserError(f"phases.{name}.carry_state must be false for {here}.prompts: shared, got true")
    if sft.batch_size != config.prompts_per_step:
        raise UserError(
            f"{here}.prompts_per_step must be phases.{name}.batch_size, {sft.batch_size}, for prompts: shared, "
            f"got {config.prompts_per_step}"
        )
    return name


def _check_rows_are_examples(
    learner: str, resources: Resources, examples: Sequence[Example], prompts: PromptStream
) -> None:
    """Row i is example i in both streams: then one cursor reads the same examples in both."""
    rows = {learner: sft_stream(resources.phases[learner], resources, f"phases.{learner}").num_rows}
    rows[resources.name] = prompts.num_rows
    for name, count in rows.items():
        if count != len(examples) or any(example.messages for example in examples):
            raise UserError(
                f"phases.{resources.name}.prompts: shared needs one row for each of the {len(examples)} "
                f"examples, phases.{name} has {count}: none may be a conversation, or left out as too long"
            )


def repeated(prompts: PromptBatch, times: int) -> PromptBatch:
    """Each prompt ``times`` times, one after the other."""
    if times == 1:
        return prompts
    examples = tuple(example for example in prompts.examples for _ in range(times))
    return PromptBatch(np.repeat(prompts.tokens, times, 0), np.repeat(prompts.mask, times, 0), examples)


class DataAnswers:
    """The data's own answers to the prompts of a stream, as if a policy had written them.

    One that is longer than a policy may write is cut, as its own answers are.

    Args:
        prompts: the stream.
        config: how many answers each prompt has, and how long they may be.
        resources: of the phase.

    Raises:
        UserError: a row has no answer.
    """

    def __init__(self, prompts: PromptStream, config: RolloutSettings, resources: Resources):
        self._prompts, self._times = prompts, config.samples_per_prompt
        try:
            answers = encode_answers(prompts.examples, resources.tokenizer)
        except UserError as error:
            raise UserError(f"phases.{resources.name}: {error}") from error
        self._length = config.sampler.max_new_tokens
        self._answers = [(tokens[: self._length], mask[: self._length]) for tokens, mask in answers]

    def batch(self, cursor: int, size: int) -> Samples:
        """The answers to `PromptStream.batch`, each as often as its prompt is answered; on the host."""
        rows = [self._answers[row] for row in self._prompts.index(cursor, size)]
        tokens = np.zeros((size, self._length), np.int32)
        chosen, read = np.zeros((2, size, self._length), bool)
        for row, (answer, mask) in enumerate(rows):
            own = np.s_[row, : len(answer)]
            tokens[own], chosen[own], read[own] = answer, mask, True
        arrays = (tokens, np.zeros(tokens.shape, np.float32), chosen, read)
        repeated: Any = [np.repeat(array, self._times, axis=0) for array in arrays]
        return Samples(*repeated)
