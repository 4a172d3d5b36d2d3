"""Every switch of the configurable decoder: a family of models is a choice of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from annotated_types import Interval

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
from hybrid_jax.models.attention.rule import AttentionRule, alibi_slopes
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.lora import Lora
from hybrid_jax.models.rope import ROPE_SCALINGS

ComputeDtype = Literal["float32", "bfloat16", "float16"]
Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
RopeBase = Annotated[float, Interval(gt=0, le=1e12)]
_PER_LAYER = ("window_layers", "rotary_layers")


@settings
class DecoderSettings:
    """Every switch of the decoder. ``None`` means the usual choice, named behind it."""

    num_layers: Layers = 4  # how many
    width: Width = 256  # of the hidden states
    num_heads: Width = 8  # of queries
    num_kv_heads: Width | None = None  # of keys and values, each for several of queries; null: num_heads
    head_width: Width | None = None  # channels of a head; null: width // num_heads
    mlp_width: Width | None = None  # of the hidden layer of an MLP; null: 4 * width
    max_length: Count = 1024  # tokens of the longest row
    vocab_size: Vocabulary | None = None  # rows of the embedding; null: the tokenizer's

    position: Literal["learned", "rotary", "alibi"] = "learned"  # how tokens know their order
    position_offset: Natural = 0  # rows of the learned table before the one of position 0
    rope_theta: RopeBase = 10_000.0  # base of the rotary frequencies
    rope_scaling: Annotated[Any, ROPE_SCALINGS] | None = None  # to longer rows than in training; null: none
    local_rope_theta: RopeBase | None = None  # base of the windowed layers, never scaled; null: rope_theta
    rotary_width: Width | None = None  # channels of a head that turn; null: all
    rotary_interleaved: bool = False  # channel pairs (2i, 2i + 1) instead of (i, i + C/2)
    rotary_layers: tuple[bool, ...] | None = None  # layers that know positions; null: all
    alibi_exponent: Positive = 8.0  # the smallest slope is 2^-8
    alibi_scaled: bool = False  # the bias is scaled like the scores

    attention_scale: Positive | None = None  # factor on the scores; null: 1 / √head_width
    attention_scale_by_layer: bool = False  # the scores of layer n = 1, 2, … are divided by n
    attention_softcap: Positive | None = None  # bound c of scores, by c · tanh(score / c); null: none
    attention_sinks: bool = False  # a learned score a head that no value answers
    window: Count | None = None  # tokens that a windowed layer sees, itself included; null: all
    window_layers: tuple[bool, ...] | None = None  # which layers have the window; null: all
    query_key_norm: Literal["head", "each_head", "all_heads"] | None = None  # scale [C], [H C], or one over H·C
    query_key_norm_bias: bool = False  # a learned bias beside that scale, of a layer norm
    clip_qkv: Positive | None = None  # queries, keys and values are clipped to ±, behind their norms; null: not

    norm: Literal["layer", "rms"] = "layer"  # with or without the mean
    norm_epsilon: Positive = 1e-5  # added to the variance
    norm_scale: bool = True  # learned scales
    norm_bias: bool = True  # learned biases, of layer norms
    norm_unit_offset: bool = False  # the scale is 1 + the parameter
    norm_placement: Literal["before", "after", "around", "residual"] = "before"  # of branches; "after" the sum
    embedding_norm: bool = False  # a norm behind the embedding
    final_norm: bool = True  # a norm before the head
    block: Literal["sequential", "parallel", "parallel_shared"] = "sequential"  # shared: one norm for both

    mlp: Literal["plain", "gated"] = "plain"  # gated multiplies the hidden layer by a second map
    activation: Activation = "gelu_tanh"  # of the MLP
    experts: Experts | None = None  # a mixture in place of the MLP; null: none
    attention_bias: bool = True  # of queries, keys and values
    output_bias: bool | None = None  # of the attention's output; null: attention_bias
    mlp_bias: bool = True  # of both maps of the MLP
    head_bias: bool = False  # of the logits

    embedding_width: Width | None = None  # of the token embedding, mapped to width and back; null: width
    embedding_scale: Positive = 1.0  # factor on the embedding
    residual_scale: Positive = 1.0  # of what a branch adds
    logit_scale: Positive = 1.0  # factor on the logits
    logit_softcap: Positive | None = None  # bound of the logits, as attention_softcap; null: none
    tie_embeddings: bool = True  # the head is the embedding
    dropout: Rate = 0.0  # of embeddings and branches
    init_std: NonNegative = 0.02  # standard deviation of the initial weights
    dtype: ComputeDtype = "float32"  # of the computation; parameters and logits are float32
    family: str | None = None  # Hugging Face model_type to export as; null: the first that can
    lora: Lora | None = None  # adapters that train in place of the parameters; null: none
    execution: Execution = Execution()  # how it is computed: scanned layers, memory against time

    def __post_init__(self):
        for name in _PER_LAYER:
            if (layers := getattr(self, name)) is not None and len(layers) != self.num_layers:
                raise ValueError(f"{name} must name {self.num_layers} layers, got {len(layers)}")
        if self.experts and self.experts.layers and len(self.experts.layers) != self.num_layers:
            raise ValueError(
                f"experts.layers must name {self.num_layers} layers, got {len(self.experts.layers)}"
            )
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.position == "rotary":
            self._check_rotary_width()
        if self.embedding_width is not None and not self.tie_embeddings:
            raise ValueError("embedding_width needs tie_embeddings")

    def _check_rotary_width(self) -> None:
        """An odd width turns one channel more than it says (`rope.rotary_table`)."""
        width, is_odd = self.rotary_channels, self.rotary_channels % 2 == 1
        name = "head_width" if self.rotary_width is None else "rotary_width"
        if width > self.channels:
            raise ValueError(f"{name} must be at most head_width={self.channels}, got {width}")
        if is_odd and (width == self.channels or self.rotary_interleaved or self.rope_scaling is not None):
            raise ValueError(f"{name} must be even for such rotary positions, got {width}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def channels(self) -> int:
        """Channels of one head, C."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that turn with the position."""
        return self.channels if self.rotary_width is None else self.rotary_width

    @property
    def inner_width(self) -> int:
        """Width of an MLP, F."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def has_query_key_norm_bias(self) -> bool:
        """Tells whether the norms of queries and keys have a bias."""
        has_layer_norm = self.query_key_norm is not None and self.norm == "layer" and self.norm_scale
        return self.query_key_norm_bias and has_layer_norm

    def attention_rule(self, layer: int) -> AttentionRule:
        """The rule for the attention scores of a layer."""
        slopes = None
        if self.position == "alibi":
            slopes = alibi_slopes(self.num_heads, self.alibi_exponent)
            if self.alibi_scaled:
                slopes = tuple(slope / math.sqrt(self.channels) for slope in slopes)
        window = self.window if self.is_windowed(layer) else None
        scale = self.attention_scale
        if self.attention_scale_by_layer:
            scale = (self.channels**-0.5 if scale is None else scale) / (layer + 1)
        return AttentionRule(scale, window, self.attention_softcap, slopes)

    def is_windowed(self, layer: int) -> bool:
        """Tells whether a layer sees only the tokens of the window."""
        return self.window is not None and (self.window_layers is None or self.window_layers[layer])

    def is_rotary(self, layer: int) -> bool:
        """Tells whether a layer turns queries and keys by their positions."""
        return self.position == "rotary" and (self.rotary_layers is None or self.rotary_layers[layer])

    def has_experts(self, layer: int) -> bool:
        """Tells whether a layer has experts in place of one MLP."""
        return self.experts is not None and (self.experts.layers is None or self.experts.layers[layer])

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat: what a scan computes in one turn."""
        scaled = self.attention_scale_by_layer
        kinds = [
            (self.is_windowed(i), self.is_rotary(i), self.has_experts(i), i if scaled else 0)
            for i in range(self.num_layers)
        ]
        periods = (p for p in range(1, self.num_layers) if self.num_layers % p == 0)
        return next((p for p in periods if kinds == kinds[:p] * (self.num_layers // p)), self.num_layers)

    def resolved(self) -> Self:
        """The same decoder with every choice spelled out, so that equal decoders compare equal."""
        layers = range(self.num_layers)
        windowed, rotary = tuple(map(self.is_windowed, layers)), tuple(map(self.is_rotary, layers))
        experts = self.experts and replace(self.experts, layers=tuple(map(self.has_experts, layers)))
        local = self.local_rope_theta if any(windowed) and self.local_rope_theta != self.rope_theta else None
        unused: dict[str, Any] = {}
        if self.position != "rotary":
            plain = ("rope_theta", "rope_scaling", "rotary_width", "rotary_interleaved", "rotary_layers")
            unused |= {name: getattr(_PLAIN, name) for name in (*plain, "local_rope_theta")}
        if self.position != "alibi":
            unused |= {"alibi_exponent": _PLAIN.alibi_exponent, "alibi_scaled": _PLAIN.alibi_scaled}
        if experts and all(experts.layers or ()):
            unused |= {"mlp_width": None, "mlp_bias": False}
        spelled = {
            "num_kv_heads": self.kv_heads,
            "head_width": self.channels,
            "mlp_width": self.inner_width,
            "rotary_width": self.rotary_channels,
            "rotary_layers": None if all(rotary) else rotary,
            "local_rope_theta": local,
            "attention_scale": self.attention_rule(0).score_scale(self.channels),
            "window": self.window if any(windowed) else None,
            "window_layers": None if all(windowed) or not any(windowed) else windowed,
            "query_key_norm_bias": self.has_query_key_norm_bias,
            "norm_bias": self.norm_bias and self.norm == "layer" and self.norm_scale,
            "output_bias": self.attention_bias if self.output_bias is None else self.output_bias,
            "embedding_width": None if self.embedding_width == self.width else self.embedding_width,
            "experts": experts,
        }
        return replace(self, **{**spelled, **unused})


_PLAIN = DecoderSettings()
