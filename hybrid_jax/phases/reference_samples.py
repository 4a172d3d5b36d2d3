"""Samples of a policy in a folder: what the rewards of a trained reward model are measured against."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from hybrid_jax.core.batches import Example, Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose
from hybrid_jax.core.ranges import BatchSize, settings
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.packing import encode_prompt
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.tokenizer import load_tokenizer
from hybrid_jax.models.folders.hf import load_pretrained
from hybrid_jax.models.vocabulary import own_tokenizer_of
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS, sample
from hybrid_jax.sampling.generation_config import read_eos_ids
from hybrid_jax.sampling.responses import decode_responses

log = logging.getLogger(__name__)

Answered = tuple[str, str, tuple[Message, ...]]  # prompt, response, the conversation that it answers


@settings
class ReferenceSamples:
    """One answer of a policy to each of some prompts.

    Attributes:
        path: a Hugging Face folder with its tokenizer, such as an exported policy.
        num_prompts: how many prompts of the training data, from the first on.
        batch_size: prompts answered together.
        sampler: how it answers.
    """

    path: Path
    num_prompts: Annotated[int, Ge(2)] = 256
    batch_size: BatchSize = 32
    sampler: Annotated[Any, SAMPLERS] = Ancestral()

    def draw(self, preferences: Sequence[Preference], seed: int) -> list[Answered]:
        """The answers to the prompts of ``preferences``, each prompt once; those too long are left out.

        Raises:
            UserError: the folder holds no policy, or fewer than two prompts leave room for an answer.
        """
        model, params = load_pretrained(self.path)
        tokenizer = bounded(load_tokenizer(self.path), model.vocab_size, own_tokenizer_of(self.path))
        eos_ids = read_eos_ids(self.path) or (tokenizer.eos_id,)
        room = 2**30 if model.max_length is None else model.max_length - self.sampler.max_new_tokens
        asked = _distinct(preferences)
        fitting = [example for example in asked if 0 < len(encode_prompt(example, tokenizer)) <= room]
        if len(fitting) < len(asked):
            log.warning(
                "%d of %d prompts do not fit the reference policy", len(asked) - len(fitting), len(asked)
            )
        chosen = fitting[: self.num_prompts]
        if len(chosen) < 2:
            raise UserError(
                f"reference: at least 2 prompts must leave room for {self.sampler.max_new_tokens} new tokens "
                f"in the context of {model.max_length}, got {len(chosen)}"
            )
        drawn: list[Answered] = []
        stream = PromptStream(chosen, tokenizer, None)
        for index, (batch, count) in enumerate(stream.sequential(min(self.batch_size, len(chosen)))):
            key = jax.random.fold_in(root_key(seed, Purpose.REFERENCE_ANSWERS), index)
            prompts = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
            inputs = (model, params, *prompts, key)
            samples = sample(self.sampler, *inputs, eos_ids=eos_ids, tokenizer=tokenizer)
            tokens, mask = np.asarray(samples.tokens)[:count], np.asarray(samples.action_mask)[:count]
            texts = decode_responses(tokenizer, batch.unpadded()[:count], tokens, mask, eos_ids)
            drawn += [(e.prompt, text, e.messages) for e, text in zip(batch.examples, texts, strict=False)]
        return drawn


def _distinct(preferences: Sequence[Preference]) -> list[Example]:
    """The prompts, each once, in the order of the data."""
    found = {
        repr((row.messages, row.template_variables)) if row.messages else row.prompt: Example(
            row.prompt, messages=row.messages, template_variables=row.template_variables
        )
        for row in preferences
    }
    return list(found.values())
