"""Exploring: a policy mixed with a Markov chain over tokens, with the log-probs that this has.

    b(y_t | y_<t) = (1 − share) π(y_t | y_<t) + share · M(y_t | y_<t)
    M             = repeat · 1[y_t = y_{t−1}] + (1 − repeat) · C(y_t | last k tokens)

C is uniform over the vocabulary, or the model of a folder that sees k tokens, such as counted n-grams. With
``repeat`` exploration goes on in its direction, as in temporally extended ε-greedy (Dabney et al. 2020).

A method must know b from π. The samples hold log b, and a ``correction``, or ``advantage: {name: vtrace}``,
weighs tokens by π / b ≤ 1 / (1 − share), so that a cap above this never cuts. With such caps V-trace follows
the gradient of π itself, as ``sequence_mask`` does. With ``truncated`` beginnings have the distribution of b.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Positive, Rate, Share, settings
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.folders.pretrained import load_pretrained
from hybrid_jax.models.markov.windows import OrderK
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS


@SAMPLERS.register("exploring")
@settings
class Exploring:
    """Settings of a policy that a Markov chain leads astray now and then."""

    max_new_tokens: Count = 64  # longest response
    temperature: Positive = 1.0  # of the policy
    share: Rate = 0.1  # ε: how often the chain chooses a token
    repeat: Share = 0.0  # how often the chain says the token before again
    path: Path | None = None  # a folder of a model that sees k tokens, for the other tokens; null: all alike

    @property
    def policy_temperature(self) -> float:
        """``temperature``."""
        return self.temperature

    @property
    def alone(self) -> Ancestral:
        """The policy without the chain, as it is evaluated and answers (`sampling.base.alone`)."""
        return Ancestral(max_new_tokens=self.max_new_tokens, temperature=self.temperature)

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
        chain, of_chain = (None, {}) if self.path is None else read_chain(self.path)
        if chain is not None and chain.vocab_size != model.vocab_size:
            raise UserError(
                f"sampler.path {self.path} must hold a model of the policy's {model.vocab_size} tokens, got "
                f"{chain.vocab_size}"
            )
        behaviour: Any = Behaviour(self, model, chain)
        both = {"policy": params, "chain": of_chain}
        inputs = (behaviour, both, prompt_tokens, prompt_mask, key)
        return Ancestral(max_new_tokens=self.max_new_tokens)(*inputs, eos_ids=eos_ids)


@functools.lru_cache(maxsize=4)
def read_chain(path: Path) -> tuple[OrderK, Params]:
    """The model of a folder that sees k tokens.

    Raises:
        UserError: the folder holds another one, or none.
    """
    with jax.ensure_compile_time_eval():  # read once, not where a program is traced
        model, params = load_pretrained(path)
    if not isinstance(model, OrderK):
        raise UserError(
            f"sampler.path {path} must hold a model that sees k tokens, as python -m hybrid_jax.count writes, "
            f"got a {type(model).__name__}"
        )
    return model, params


@struct.dataclass
class Caches:
    """The caches of both models."""

    policy: Any
    chain: Any


@dataclass(frozen=True)
class Behaviour:
    """The mixture b as a model whose logits are log b, for an engine that samples from it.

    Its parameters are those of both: ``policy`` and ``chain``.
    """

    settings: Exploring
    model: LanguageModel
    chain: OrderK | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        """Tokens that the policy can read."""
        return self.model.max_length

    def cast(self, params: Params) -> Params:
        """`LanguageModel.cast` of the policy."""
        return {**params, "policy": self.model.cast(params["policy"])}

    def init_cache(self, batch: int, length: int) -> Caches:
        """`LanguageModel.init_cache` of both."""
        chain = None if self.chain is None else self.chain.init_cache(batch, length)
        return Caches(self.model.init_cache(batch, length), chain)

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], attention_mask: Bool[Array, "B P"], cache: Caches
    ) -> tuple[Float[Array, "B V"], Caches]:
        """`LanguageModel.prefill` of left-padded prompts."""
        logits, policy = self.model.prefill(params["policy"], tokens, attention_mask, cache.policy)
        of_chain, chain = None, None
        if self.chain is not None:
            of_chain, chain = self.chain.prefill(params["chain"], tokens, attention_mask, cache.chain)
        return self._mixed(logits, of_chain, tokens[:, -1]), Caches(policy, chain)

    def step(self, params: Params, token: Int[Array, "B"], cache: Caches) -> tuple[Float[Array, "B V"], Caches]:
        """`LanguageModel.step`."""
        logits, policy = self.model.step(params["policy"], token, cache.policy)
        of_chain, chain = None, None
        if self.chain is not None:
            of_chain, chain = self.chain.step(params["chain"], token, cache.chain)
        return self._mixed(logits, of_chain, token), Caches(policy, chain)

    def _mixed(
        self, logits: Float[Array, "B V"], of_chain: Float[Array, "B V"] | None, before: Int[Array, "B"]
    ) -> Float[Array, "B V"]:
        """Log b of the next token, where ``before`` is the last one."""
        given = self.settings
        p = jax.nn.softmax(logits.astype(jnp.float32) / given.temperature, axis=-1)
        c = jnp.full_like(p, 1 / self.vocab_size) if of_chain is None else jax.nn.softmax(of_chain, axis=-1)
        m = given.repeat * jax.nn.one_hot(before, self.vocab_size) + (1 - given.repeat) * c
        return jnp.log((1 - given.share) * p + given.share * m)
