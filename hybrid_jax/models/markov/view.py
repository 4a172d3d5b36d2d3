"""Any language model as a Markov chain of order k: it reads the last k tokens, from position 0 on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.models.around import Around
from hybrid_jax.models.base import BACKBONES, LanguageModel, Params
from hybrid_jax.models.markov.windows import OrderK


@BACKBONES.register("markov")
@settings
class MarkovSettings:
    """Settings of a model that sees k tokens: it has the parameters of ``model`` and no others.

    Attributes:
        model: any decoder or recurrent model; it reads each window by itself, from its first position.
        order: k. Training costs k times the tokens, and so does each token that is sampled.
    """

    model: Annotated[Any, BACKBONES]
    order: Count = 8

    def build(self, vocab_size: int | None = None) -> MarkovView:
        """The model for a tokenizer of ``vocab_size`` tokens.

        Raises:
            UserError: the model cannot read as many tokens, or reads no windows.
        """
        model = self.model.build(vocab_size)
        if not isinstance(model, LanguageModel):
            raise UserError(f"markov needs a language model, got {BACKBONES.name_of(self.model)}")
        if model.max_length is not None and self.order > model.max_length:
            raise UserError(
                f"order must be at most {model.max_length}, what the model can read, got {self.order}"
            )
        return MarkovView(replace(self, model=getattr(model, "settings", self.model)), model)


@dataclass(frozen=True)
class MarkovView(Around, OrderK):
    """A language model that is shown windows of k tokens."""

    settings: MarkovSettings
    model: LanguageModel

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.model.width

    def of_windows(
        self, params: Params, windows: Int[Array, "N K"], mask: Bool[Array, "N K"], key: Array | None = None
    ) -> tuple[Float[Array, "N D"], dict[str, Sum]]:
        """`OrderK.of_windows`: the last state of the model after reading one."""
        hidden, losses = self.model.hidden_and_losses(params, windows, mask, dropout_key=key)
        return hidden[:, -1], losses

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""
        return self.model.logits(params, hidden)
