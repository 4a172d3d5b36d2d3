"""Every switch of the encoder-decoder: T5 and its versions are choices of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Self

from annotated_types import Ge

from hybrid_jax.core.ranges import (
    Count,
    Layers,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Vocabulary,
    Width,
    settings,
)
from hybrid_jax.models.decoder_config import Activation


@settings
class EncoderDecoderSettings:
    """Every switch of the encoder-decoder. ``None`` means the usual choice, named behind it."""

    num_layers: Layers = 4  # of the encoder
    num_decoder_layers: Layers | None = None  # null: num_layers
    width: Width = 256  # of the hidden states
    num_heads: Width = 8  # of attention
    head_width: Width | None = None  # channels of a head; null: width // num_heads
    mlp_width: Width | None = None  # of the hidden layer of an MLP; null: 4 * width
    vocab_size: Vocabulary | None = None  # rows of the embedding; null: the tokenizer's

    num_buckets: Annotated[int, Ge(4)] = 32  # of relative positions, each with a learned bias a head
    max_distance: Count = 128  # all farther positions share a bucket
    mlp: Literal["plain", "gated"] = "plain"  # gated multiplies the hidden layer by a second map
    activation: Activation = "relu"  # of the MLP
    norm_epsilon: Positive = 1e-6  # added to the variance in a norm
    tie_embeddings: bool = True  # the head is the embedding
    scale_outputs: bool = True  # logits / √width, as T5 has them; versions after 1.0 do not
    start_id: Natural = 0  # the token that the decoder reads first

    dropout: Rate = 0.0  # of embeddings, branches and attention weights
    init_factor: NonNegative = 1.0  # of all standard deviations
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and logits are float32
    family: str | None = None  # Hugging Face model_type to export as; null: the first that can express it

    def __post_init__(self):
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance must be more than num_buckets // 2 = {self.num_buckets // 2}, "
                f"got {self.max_distance}"
            )
        if self.vocab_size is not None and self.start_id >= self.vocab_size:
            raise ValueError(f"start_id must be a token of the vocabulary, got {self.start_id}")

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def channels(self) -> int:
        """Channels of one head, C."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def inner_width(self) -> int:
        """Width of an MLP, F."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def resolved(self) -> Self:
        """The settings of a config.json, with every choice spelled out.

        It cannot say whether the head is the embedding: `transformers` 5 looks whether the weights have one.
        """
        return replace(
            self,
            num_decoder_layers=self.decoder_layers,
            head_width=self.channels,
            mlp_width=self.inner_width,
            tie_embeddings=True,
        )
