"""Language models made of another one: what they take over from it."""

from __future__ import annotations

from jaxtyping import Array

from hybrid_jax.models.base import LanguageModel, Params


class Around:
    """A part of a `LanguageModel` that has the vocabulary, the parameters and the losses of ``model``."""

    model: LanguageModel

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        return self.model.vocab_size

    @property
    def loss_coefs(self) -> dict[str, float]:
        """The losses of the model inside."""
        return self.model.loss_coefs

    def init(self, key: Array) -> Params:
        """The parameters of the model inside."""
        return self.model.init(key)

    def cast(self, params: Params) -> Params:
        """`LanguageModel.cast` of the model inside."""
        return self.model.cast(params)
