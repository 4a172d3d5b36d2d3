"""T5 (Raffel et al. 2020), T5 1.1 and FLAN-T5: relative positions, RMSNorm, a plain or gated MLP, no biases."""

from __future__ import annotations

from typing import Any

from hybrid_jax.models.encoder_decoder import EncoderDecoderConfig
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import Part, Settings, activation, require, same
from hybrid_jax.models.families.weights import Table

_ENCODER, _DECODER = "encoder.block.*.layer", "decoder.block.*.layer"
_SELF, _CROSS = "SelfAttention", "EncDecAttention"
_NAMES = {"query": "q", "key": "k", "value": "v", "output": "o"}


def _layer(ours: str, theirs: str, cross: bool) -> dict[str, str]:
    rows = {f"{ours}/attention/{name}": f"{theirs}.0.{_SELF}.{short}" for name, short in _NAMES.items()}
    rows[f"{ours}/attention_norm"] = f"{theirs}.0.layer_norm"
    if cross:
        rows |= {f"{ours}/cross/{name}": f"{theirs}.1.{_CROSS}.{short}" for name, short in _NAMES.items()}
        rows[f"{ours}/cross_norm"] = f"{theirs}.1.layer_norm"
    rows[f"{ours}/mlp_norm"] = f"{theirs}.{1 + cross}.layer_norm"
    return rows


def _mlp(ours: str, theirs: str, gated: bool) -> dict[str, str]:
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    return {f"{ours}/mlp/{name}": f"{theirs}.DenseReluDense.{short}" for name, short in names.items()}


def _table(config: Any) -> Table:
    gated = config.mlp == "gated"
    return {
        "token_embedding": "shared",
        "lm_head": "lm_head",
        "encoder_norm": "encoder.final_layer_norm",
        "decoder_norm": "decoder.final_layer_norm",
        "encoder_bias": f"encoder.block.0.layer.0.{_SELF}.relative_attention_bias",
        "decoder_bias": f"decoder.block.0.layer.0.{_SELF}.relative_attention_bias",
        **_layer("encoder_layer_*", _ENCODER, cross=False),
        **_layer("decoder_layer_*", _DECODER, cross=True),
        **_mlp("encoder_layer_*", f"{_ENCODER}.1", gated),
        **_mlp("decoder_layer_*", f"{_DECODER}.2", gated),
    }


_ACTIVATION = activation("dense_act_fn", "gelu_new")


def _read_mlp(theirs: Any) -> Settings:
    return {"mlp": "gated" if theirs.is_gated_act else "plain", **_ACTIVATION.read(theirs)}


def _write_mlp(config: Any) -> Settings:
    name = _ACTIVATION.write(config)["dense_act_fn"]
    if config.mlp == "gated":  # their "gated-gelu" means the tanh form
        name = "gated-gelu" if name == "gelu_new" else f"gated-{name}"
    return {"feed_forward_proj": name}


def _read_start(theirs: Any) -> Settings:
    start = getattr(theirs, "decoder_start_token_id", None)
    return {"start_id": (theirs.pad_token_id or 0) if start is None else start}


T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    settings=(
        same(num_layers="num_layers", width="d_model", num_heads="num_heads", vocab_size="vocab_size"),
        same(num_buckets="relative_attention_num_buckets", max_distance="relative_attention_max_distance"),
        same(dropout="dropout_rate", norm_epsilon="layer_norm_epsilon", init_factor="initializer_factor"),
        same(scale_outputs="scale_decoder_outputs"),
        Part(
            same(num_decoder_layers="num_decoder_layers", head_width="d_kv", mlp_width="d_ff").read,
            same(decoder_layers="num_decoder_layers", channels="d_kv", inner_width="d_ff").write,
        ),
        Part(_read_mlp, _write_mlp),
        Part(_read_start, same(start_id="decoder_start_token_id").write),
        require(is_decoder=False),
    ),
    table=_table,
    prefix="",
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    embedding="shared.weight",
    config=EncoderDecoderConfig,
)
ENCODER_DECODERS: dict[str, Family] = {T5.model_type: T5}
