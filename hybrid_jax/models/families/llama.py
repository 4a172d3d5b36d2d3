"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, gated SiLU MLP, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.core.registry import UserError
from hybrid_jax.models.decoder import Activation, DecoderConfig
from hybrid_jax.models.families.table import TRANSPOSED, Family, Row, choose, express, require, row

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def _read_config(theirs: Mapping[str, Any]) -> DecoderConfig:
    require(theirs, pretraining_tp=1)
    return DecoderConfig(
        num_layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs.get("num_key_value_heads"),
        head_width=theirs.get("head_dim"),
        mlp_width=theirs["intermediate_size"],
        max_length=theirs.get("max_position_embeddings", 2048),
        vocab_size=theirs["vocab_size"],
        position="rotary",
        rope_theta=_rope_theta(theirs),
        norm="rms",
        norm_epsilon=theirs.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=choose(_ACTIVATIONS, "hidden_act", theirs.get("hidden_act", "silu")),
        attention_bias=theirs.get("attention_bias", False),
        mlp_bias=theirs.get("mlp_bias", False),
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        init_std=theirs.get("initializer_range", 0.02),
    )


def _rope_theta(theirs: Mapping[str, Any]) -> float:
    """Before transformers 5 the base stood in ``rope_theta``, beside an optional ``rope_scaling``."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope_type must be default, got {kind!r}: not supported")
    return float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)))


def _write_config(ours: DecoderConfig) -> dict[str, Any]:
    express(ours, "llama", position="rotary", norm="rms", mlp="gated", dropout=0.0)
    names = {value: key for key, value in reversed(_ACTIVATIONS.items())}
    return {
        "num_hidden_layers": ours.num_layers,
        "hidden_size": ours.width,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.channels,
        "intermediate_size": ours.inner_width,
        "max_position_embeddings": ours.max_length,
        "vocab_size": ours.vocab_size,
        "rope_theta": ours.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
        "rms_norm_eps": ours.norm_epsilon,
        "hidden_act": names[ours.activation],
        "attention_bias": ours.attention_bias,
        "mlp_bias": ours.mlp_bias,
        "tie_word_embeddings": ours.tie_embeddings,
        "initializer_range": ours.init_std,
    }


def _rows(config: DecoderConfig) -> list[Row]:
    rows = [
        row("token_embedding/embedding", "embed_tokens.weight"),
        row("final_norm/scale", "norm.weight"),
    ]
    if not config.tie_embeddings:
        rows.append(row("lm_head/kernel", "lm_head.weight", TRANSPOSED))
    for i in range(config.num_layers):
        rows += _layer_rows(config, f"layer_{i}", f"layers.{i}")
    return rows


def _layer_rows(config: DecoderConfig, ours: str, theirs: str) -> list[Row]:
    rows = [
        row(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        row(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
    ]
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    blocks = (
        ("attention", "self_attn", attention, config.attention_bias),
        ("mlp", "mlp", mlp, config.mlp_bias),
    )
    for our_block, their_block, names, has_bias in blocks:
        for our_name, their_name in names.items():
            our_path, their_path = f"{ours}/{our_block}/{our_name}", f"{theirs}.{their_block}.{their_name}"
            rows.append(row(f"{our_path}/kernel", f"{their_path}.weight", TRANSPOSED))
            if has_bias:
                rows.append(row(f"{our_path}/bias", f"{their_path}.bias"))
    return rows


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix="model.",
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    embedding="embed_tokens.weight",
)
