"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, plain MLP, biases, fused query-key-value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.models.decoder import Activation, DecoderConfig
from hybrid_jax.models.families.table import THIRDS, TRANSPOSED, Family, Row, choose, express, require, row

# Conv1D keeps [in, out] as we do, so no kernel is transposed.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "relu": "relu",
}


def _read_config(theirs: Mapping[str, Any]) -> DecoderConfig:
    require(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return DecoderConfig(
        num_layers=theirs["n_layer"],
        width=theirs["n_embd"],
        num_heads=theirs["n_head"],
        mlp_width=theirs.get("n_inner"),
        max_length=theirs.get("n_positions", 1024),
        vocab_size=theirs["vocab_size"],
        norm_epsilon=theirs.get("layer_norm_epsilon", 1e-5),
        activation=choose(_ACTIVATIONS, "activation_function", theirs.get("activation_function", "gelu_new")),
        tie_embeddings=theirs.get("tie_word_embeddings", True),
        dropout=theirs.get("resid_pdrop", 0.1),
        init_std=theirs.get("initializer_range", 0.02),
    )


def _write_config(ours: DecoderConfig) -> dict[str, Any]:
    express(ours, "gpt2", position="learned", norm="layer", mlp="plain", attention_bias=True, mlp_bias=True)
    express(ours, "gpt2", kv_heads=ours.num_heads, channels=ours.width // ours.num_heads)
    names = {value: key for key, value in reversed(_ACTIVATIONS.items())}
    return {
        "n_layer": ours.num_layers,
        "n_embd": ours.width,
        "n_head": ours.num_heads,
        "n_inner": ours.mlp_width,
        "n_positions": ours.max_length,
        "vocab_size": ours.vocab_size,
        "layer_norm_epsilon": ours.norm_epsilon,
        "activation_function": names[ours.activation],
        "tie_word_embeddings": ours.tie_embeddings,
        "resid_pdrop": ours.dropout,
        "embd_pdrop": ours.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": ours.init_std,
    }


def _rows(config: DecoderConfig) -> list[Row]:
    rows = [
        row("token_embedding/embedding", "wte.weight"),
        row("position_embedding/embedding", "wpe.weight"),
        row("final_norm/scale", "ln_f.weight"),
        row("final_norm/bias", "ln_f.bias"),
    ]
    if not config.tie_embeddings:
        rows.append(row("lm_head/kernel", "lm_head.weight", TRANSPOSED))
    for i in range(config.num_layers):
        rows += _layer_rows(f"layer_{i}", f"h.{i}")
    return rows


def _layer_rows(ours: str, theirs: str) -> list[Row]:
    rows = []
    for part, name in (("kernel", "weight"), ("bias", "bias")):
        fused = tuple(f"{ours}/attention/{head}/{part}" for head in ("query", "key", "value"))
        rows += [
            Row(fused, (f"{theirs}.attn.c_attn.{name}",), THIRDS),
            row(f"{ours}/attention/output/{part}", f"{theirs}.attn.c_proj.{name}"),
            row(f"{ours}/mlp/up/{part}", f"{theirs}.mlp.c_fc.{name}"),
            row(f"{ours}/mlp/down/{part}", f"{theirs}.mlp.c_proj.{name}"),
        ]
    for part, name in (("scale", "weight"), ("bias", "bias")):
        rows += [
            row(f"{ours}/attention_norm/{part}", f"{theirs}.ln_1.{name}"),
            row(f"{ours}/mlp_norm/{part}", f"{theirs}.ln_2.{name}"),
        ]
    return rows


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=_read_config,
    write_config=_write_config,
    rows=_rows,
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # causal masks that old files carry along
    embedding="wte.weight",
)
