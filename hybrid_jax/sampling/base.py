"""The contract of samplers: from a policy, prompts and a key to responses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import chex
import jax
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import Registry
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params

SAMPLERS: Registry = Registry("sampler", default="ancestral", needs=("max_new_tokens",))


@runtime_checkable
class Sampler(Protocol):
    """Settings of a way to answer prompts, hashable, and the pure function that does it.

    One that draws from the policy's own distribution, ``softmax(logits / temperature)`` over the whole
    vocabulary, also has an attribute ``policy_temperature``; only from its samples may PPO learn. Without it,
    or where it is None, the sampler cuts off, is greedy, chooses or searches. One that mixes the policy with
    something else, as `exploring`, has it, and ``alone``, a sampler of the policy by itself. One whose
    ``reads_texts`` is True also takes the ``tokenizer``, and runs on the host.
    """

    @property
    def max_new_tokens(self) -> int:
        """Longest response, R."""
        ...

    def __call__(
        self,
        model: LanguageModel,
        params: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        *,
        eos_ids: Sequence[int] = (),
    ) -> Samples:
        """A response [R] to every left-padded prompt.

        The same key gives the same samples on any number of devices. ``log_probs`` is None where the
        distribution that a response comes from is not known.
        """
        ...


def explores(sampler: Any) -> bool:
    """Tells whether a sampler draws from another distribution than its policy's on purpose."""
    return hasattr(sampler, "alone")


def between_programs(sampler: Any) -> bool:
    """Tells whether a sampler goes back to the host between its own programs, to read texts or check rewards.

    Of several processes each has a part of the rewards alone: there one that reads no texts is compiled whole.
    """
    chooses = hasattr(sampler, "reads_texts")
    return getattr(sampler, "reads_texts", False) or (chooses and jax.process_count() == 1)


def alone(sampler: Any) -> Any:
    """The sampler with which a policy answers by itself: ``alone`` of one that explores."""
    return getattr(sampler, "alone", sampler)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leaves out what samplers tell of each batch, but for warnings."""
    logger = logging.getLogger(__name__.rpartition(".")[0])
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


ValueT = TypeVar("ValueT")


@dataclass(frozen=True, eq=False)
class Static(Generic[ValueT]):
    """Settings as a static argument of `jax.jit`, equal to themselves alone: they may hold what has no hash."""

    value: ValueT

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def check_fits(model: LanguageModel, prompt_length: int, max_new_tokens: int, eos_ids: Sequence[int]) -> None:
    """Checks that prompts and responses fit into the context, and that the model knows what ends a response.

    Raises:
        UserError: one of them is not so.
    """
    most = model.max_length
    if most is not None and prompt_length + max_new_tokens > most:
        raise UserError(
            f"max_new_tokens must be at most {most - prompt_length} (prompts of {prompt_length} tokens, "
            f"max_length {most}), got {max_new_tokens}"
        )
    if bad := [token for token in eos_ids if not 0 <= token < model.vocab_size]:
        raise UserError(f"eos_ids must be tokens below the vocabulary's {model.vocab_size}, got {bad[0]}")


def sample(
    sampler: Sampler,
    model: LanguageModel,
    params: Params,
    prompt_tokens: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Array,
    *,
    eos_ids: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
) -> Samples:
    """The responses of a sampler, whose shapes are checked: it may be anybody's.

    Raises:
        AssertionError: it gave arrays of other shapes than [B R].
    """
    chex.assert_equal_shape([prompt_tokens, prompt_mask])
    texts = {"tokenizer": tokenizer} if getattr(sampler, "reads_texts", False) else {}
    samples = sampler(model, params, prompt_tokens, prompt_mask, key, eos_ids=tuple(eos_ids), **texts)
    arrays = [samples.tokens, samples.action_mask, samples.attention_mask]
    arrays += [] if samples.log_probs is None else [samples.log_probs]
    chex.assert_shape(arrays, (len(prompt_tokens), sampler.max_new_tokens))
    return samples
