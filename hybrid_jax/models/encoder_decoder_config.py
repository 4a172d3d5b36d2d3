"""Every switch of the encoder-decoder: T5 and its versions are choices of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hybrid_jax.core.registry import UserError
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.decoder_config import Activation

if TYPE_CHECKING:
    from hybrid_jax.models.encoder_decoder import EncoderDecoder

_SIZES = ("num_layers", "num_decoder_layers", "width", "num_heads", "head_width", "mlp_width", "vocab_size")


@BACKBONES.register("encoder_decoder")
@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Every switch of the encoder-decoder. ``None`` means the usual choice, named behind it."""

    num_layers: int = 4  # of the encoder
    num_decoder_layers: int | None = None  # num_layers
    width: int = 256
    num_heads: int = 8
    head_width: int | None = None  # width // num_heads
    mlp_width: int | None = None  # 4 * width
    vocab_size: int | None = None  # the tokenizer's

    num_buckets: int = 32  # of relative positions, each with a learned bias a head
    max_distance: int = 128  # all farther positions share a bucket
    mlp: Literal["plain", "gated"] = "plain"
    activation: Activation = "relu"
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True  # the head is the embedding
    scale_outputs: bool = True  # logits / √width, as T5 has them; versions after 1.0 do not
    start_id: int = 0  # the token that the decoder reads first

    dropout: float = 0.0
    init_factor: float = 1.0  # of all standard deviations
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and logits are float32
    family: str | None = None  # Hugging Face model_type to export as; the first that can express the model

    def __post_init__(self):
        for name in _SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even and at least 4, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance must be more than num_buckets // 2 = {self.num_buckets // 2}, "
                f"got {self.max_distance}"
            )
        if self.start_id < 0 or (self.vocab_size is not None and self.start_id >= self.vocab_size):
            raise ValueError(f"start_id must be a token of the vocabulary, got {self.start_id}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def channels(self) -> int:
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def inner_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def resolved(self) -> EncoderDecoderConfig:
        """What a config.json can say, with every choice spelled out.

        It cannot say whether the head is the embedding: `transformers` 5 looks whether the weights have one.
        """
        return replace(
            self,
            num_decoder_layers=self.decoder_layers,
            head_width=self.channels,
            mlp_width=self.inner_width,
            tie_embeddings=True,
        )

    def build(self, vocab_size: int | None = None) -> EncoderDecoder:
        """The model for a tokenizer of ``vocab_size`` tokens; an own ``vocab_size`` may be larger."""
        from hybrid_jax.models.encoder_decoder import EncoderDecoder

        size = self.vocab_size or vocab_size
        if size is None:
            raise UserError("vocab_size is missing: the encoder-decoder names none and there is no tokenizer")
        if vocab_size is not None and size < vocab_size:
            raise UserError(f"vocab_size must be at least the tokenizer's {vocab_size}, got {size}")
        return EncoderDecoder(replace(self, vocab_size=size))
