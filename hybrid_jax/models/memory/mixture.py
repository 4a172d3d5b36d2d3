"""A model whose prediction is mixed with another one, made of its own states: what such models share.

    p(w) = (1 − λ) p_model(w) + λ p_other(w)

Hidden states are [h, p_other], D + V channels, so that heads, scoring and sampling need nothing further.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.around import Around
from hybrid_jax.models.base import BACKBONES, ModelOutput, Params, StateReader


@dataclass(frozen=True)
class Mixture(Around):
    """The model and the settings of the mixture, of which ``share`` is λ."""

    settings: Any
    model: StateReader

    @abstractmethod
    def predicted(
        self,
        params: Params,
        states: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """p_other after each token of whole rows; all 0 where there is none."""

    def own(self, params: Params) -> Params:
        """The parameters of the model inside."""
        return params

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.model.width + self.vocab_size

    @property
    def max_length(self) -> int | None:
        """The bound of the model inside."""
        return self.model.max_length

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T E"]:
        """`LanguageModel.hidden`."""
        return self.hidden_and_losses(params, tokens, attention_mask, dropout_key=dropout_key)[0]

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T E"], dict[str, Sum]]:
        """`LanguageModel.hidden_and_losses`: those of the model."""
        inner = self.own(params)
        states, losses = self.model.hidden_and_losses(inner, tokens, attention_mask, dropout_key=dropout_key)
        segments = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
        other = self.predicted(params, states, tokens, segments)
        return jnp.concatenate([states, other], axis=-1), losses

    def logits(self, params: Params, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`: the logarithm of the mixture; without a share the model's own."""
        states, other = jnp.split(hidden, [self.model.width], axis=-1)
        logits = self.model.logits(self.own(params), states)
        return mixed(logits, other, self.settings.share) if self.settings.share else logits

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        """`LanguageModel.apply`."""
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    @abstractmethod
    def extend(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: Any
    ) -> tuple[Float[Array, "B V"], Any]:
        """`LanguageModel.extend`."""

    def prefill(
        self, params, tokens: Int[Array, "B P"], attention_mask: Bool[Array, "B P"], cache: Any
    ) -> tuple[Float[Array, "B V"], Any]:
        """`LanguageModel.prefill`."""
        return self.extend(params, tokens, attention_mask, cache)

    def step(self, params, token: Int[Array, "B"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
        """`LanguageModel.step`."""
        return self.extend(params, token[:, None], jnp.ones((len(token), 1), bool), cache)


def mixed(logits: Float[Array, "... V"], other: Float[Array, "... V"], share: float) -> Float[Array, "... V"]:
    """``log((1 − λ) softmax(logits) + λ other)``; the model alone where ``other`` is all 0."""
    log_probs, found = jax.nn.log_softmax(logits), other > 0
    of_other = share * jnp.where(found, other, 1.0)
    taken = share * jnp.sum(other, axis=-1, keepdims=True)  # 0 where there is none
    log_probs = log_probs + jnp.log1p(-taken)
    return jnp.where(found, jnp.logaddexp(log_probs, jnp.log(of_other)), log_probs)


def state_reader(settings: Any, vocab_size: int | None, wanted_by: str) -> StateReader:
    """The model that settings build, which must give its hidden states.

    Raises:
        UserError: it does not.
    """
    model = settings.build(vocab_size)
    if not isinstance(model, StateReader):
        raise UserError(
            f"{wanted_by} needs a model that gives its hidden states, a decoder or a recurrent one, "
            f"got {BACKBONES.name_of(settings)}"
        )
    return model
