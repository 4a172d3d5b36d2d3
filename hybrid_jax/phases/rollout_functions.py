"""The pure functions of a rollout: sampled, scored by the models, rewarded on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from hybrid_jax.core.batches import Rollout, Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.lora import whole
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.scoring import response_log_probs
from hybrid_jax.parallel.rules import shard_params, shard_rows
from hybrid_jax.phases.references import reference_model
from hybrid_jax.sampling.base import quietly, sample
from hybrid_jax.sampling.responses import ended, join


@dataclass(frozen=True)
class RolloutFunctions:
    """The pure functions of a rollout, for one model and one setting.

    Policy, references and the trunk of a value network are given as what trains of them; ``base`` are the
    parameters that they share, below adapters.
    """

    config: Any  # RolloutSettings, and those of a method
    model: LanguageModel
    eos_ids: tuple[int, ...]
    name: str  # of the phase
    base: Params = field(default_factory=dict, kw_only=True)

    def sample(
        self,
        policy: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        tokenizer: Tokenizer | None = None,
    ) -> Samples:
        """Answers of a policy; a sampler that chooses by texts reads the ``tokenizer``."""
        return self._sample(self.model, policy, prompt_tokens, prompt_mask, key, tokenizer=tokenizer)

    def speaker(self, policy: Params) -> Params:
        """A policy as the computation reads it: for many calls that sample from it."""
        return shard_params(self.model.cast(self.whole(policy)), param_axes)

    def sample_opponent(self, opponent: Params, *inputs: Array, tokenizer: Tokenizer | None = None) -> Samples:
        """Answers of an opponent that has a model of its own."""
        model = self.reference_model(self.config.answered_by)
        return self._sample(model, opponent, *inputs, tokenizer=tokenizer)

    def check_opponent(self) -> None:
        """Raises `UserError` if the opponent may answer with tokens that the policy has not."""
        name = self.config.answered_by
        if name is None or self.config.environment is not None:  # a user's text becomes tokens of its own
            return
        theirs, own = self.reference_model(name).vocab_size, self.model.vocab_size
        if theirs != own:
            where, path = f"phases.{self.name}.opponent", self.config.references[name].path
            raise UserError(f"{where}: {path} must hold a model of the policy's {own} tokens, got {theirs}")

    def _sample(
        self, model: LanguageModel, params: Params, *inputs: Array, tokenizer: Tokenizer | None = None
    ) -> Samples:
        sampler, params = self.config.sampler, self.whole(params)
        with quietly():  # at every step
            return sample(sampler, model, params, *inputs, eos_ids=self.eos_ids, tokenizer=tokenizer)

    def reference_model(self, name: str) -> LanguageModel:
        """The model of a reference."""
        return reference_model(self.config.references[name], self.model)

    def score(
        self,
        params: dict[str, Params],
        references: Mapping[str, Params],
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        samples: Samples,
    ) -> Rollout:
        """The rollout, with the values of the states and the references' log-probabilities of the tokens."""
        prompt_tokens, prompt_mask, samples = shard_rows((prompt_tokens, prompt_mask, samples))
        log_probs: Any = samples.log_probs
        if log_probs is None:  # of a sampler that chooses, from which nothing learns that reads them
            assert not self.config.needs_distribution, "the sampler has a policy_temperature"
            log_probs = jnp.zeros(samples.tokens.shape)
        tokens, attention_mask = join(prompt_tokens, prompt_mask, samples)
        # The temperature that sampled: else the ratio of a fresh policy would not be 1, nor its KL to itself 0.
        length = samples.tokens.shape[1]
        temperature = getattr(self.config.sampler, "policy_temperature", None)
        # Answers to one prompt lie one after the other: they are known by their place, never by their text.
        group = jnp.arange(len(tokens), dtype=jnp.int32) // self.config.samples_per_prompt
        values: Any = self.values(params, tokens, attention_mask, length)
        of_tokens: Any = None if values is None else values[:, :length]
        last_values: Any = None
        if values is not None and self.config.environment is not None:
            last = samples.attention_mask.sum(axis=1, keepdims=True)
            last_values = jnp.take_along_axis(values, last, axis=1)[:, 0]
        return Rollout(
            tokens=tokens,
            attention_mask=attention_mask,
            action_mask=samples.action_mask,
            log_probs=log_probs,
            group=group,
            values=of_tokens,
            last_values=last_values,
            reference_log_probs={
                name: response_log_probs(
                    self.reference_model(name),
                    self.whole(references[name]),
                    tokens,
                    attention_mask,
                    length,
                    temperature or 1.0,
                )
                for name in (self.config.references if self.config.needs_distribution else ())
            },
        )

    def values(
        self,
        params: dict[str, Params],
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        length: int,
    ) -> Any:
        """The values of the states before each response token and behind the last, [B R+1].

        None for a method without.
        """
        return None

    def rewarded(self, rollout: Rollout) -> Rollout:
        """The rollout with its scores, for a reward on the device."""
        reward = self.config.reward
        plain = reward.score_tokens(rollout.tokens, rollout.attention_mask, rollout.action_mask)
        return replace(rollout, plain_scores=plain, scores=plain - self.penalties(self.complete(rollout)))

    def complete(self, rollout: Rollout) -> Bool[Array, "B"]:
        """Tells whether a response ended by itself, not by its length."""
        length = rollout.action_mask.shape[1]
        return ended(rollout.tokens[:, -length:], rollout.action_mask, self.eos_ids)

    def penalties(self, complete: Any) -> Any:
        """The penalty of a response that did not end, float32 [B]; for arrays on the host or on the device."""
        return np.float32(self.config.missing_eos_penalty or 0.0) * ~complete

    def score_metrics(self, rollout: Rollout) -> dict[str, Array]:
        """Scores and penalty, each logged under a name of its own."""
        complete, own = self.complete(rollout), whole_rows(rollout)
        return {
            "score": rollout.plain_scores.mean(where=own),
            "score_std": rollout.plain_scores.std(where=own),
            "shaped_score": rollout.scores.mean(where=own),
            "penalty": self.penalties(complete).mean(where=own),
            "eos_fraction": complete.mean(where=own),
            "response_length": rollout.action_mask.sum(axis=1).mean(where=own),
        }

    def whole(self, trained: Params) -> Params:
        """All parameters of a model, of those that train of it."""
        return whole(self.base, trained)


def whole_rows(rollout: Rollout) -> Bool[Array, "B"] | None:
    """The conversations that did not fail; None where rows are answers, which are whole."""
    return None if rollout.truncated is None else rollout.counts


def above_base(functions: RolloutFunctions, name: str) -> Callable[..., Any]:
    """One of the functions as a program's, whose first argument is the base.

    ``learn`` and ``apply`` give a new state first.
    """

    def function(base: Params, *inputs, **settings):
        result = getattr(replace(functions, base=base), name)(*inputs, **settings)
        new = name in ("learn", "apply")
        return (shard_params(result[0], param_axes), *result[1:]) if new else result

    function.__name__ = f"{functions.name}_{name}"
    return function
