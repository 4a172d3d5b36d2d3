"""Mamba-2 (Dao & Gu 2024): state spaces of scalar decays, short convolutions, gated RMS norms by group."""

from __future__ import annotations

import math
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.settings import Part, Settings, require, same
from hybrid_jax.models.families.weights import Table, Taps, Tensor
from hybrid_jax.models.recurrent.mamba2 import Mamba2

_MIXER = "layers.*.mixer"
MAMBA2_TABLE: Table = {
    "token_embedding": "embeddings",
    "final_norm": "norm_f",
    "lm_head": "lm_head",
    "layer_*/norm": "layers.*.norm",
    "layer_*/cell/input": f"{_MIXER}.in_proj",
    "layer_*/cell/convolution/taps": Taps(f"{_MIXER}.conv1d.weight"),
    "layer_*/cell/convolution/bias": Tensor(f"{_MIXER}.conv1d.bias"),
    "layer_*/cell/time_step/bias": Tensor(f"{_MIXER}.dt_bias"),
    "layer_*/cell/decay/log_rate": Tensor(f"{_MIXER}.A_log"),
    "layer_*/cell/skip/scale": Tensor(f"{_MIXER}.D"),
    "layer_*/cell/norm": f"{_MIXER}.norm",
    "layer_*/cell/projection": f"{_MIXER}.out_proj",
}


def _read_limit(theirs: Any) -> Settings:
    limit = tuple(map(float, theirs.time_step_limit))
    if limit != (0.0, math.inf):
        raise UserError(f"time_step_limit must be (0.0, inf), got {limit}: not supported")
    return {}


MAMBA2 = Family(
    "mamba2",
    "Mamba2ForCausalLM",
    settings=(
        same(num_layers="num_hidden_layers", vocab_size="vocab_size", tie_embeddings="tie_word_embeddings"),
        same(width="hidden_size", state_width="state_size", expand="expand", groups="n_groups"),
        same(convolution_width="conv_kernel", convolution_bias="use_conv_bias", bias="use_bias"),
        same(chunk_length="chunk_size", norm_epsilon="layer_norm_epsilon"),
        same(min_time_step="time_step_min", max_time_step="time_step_max"),
        Part(same(head_width="head_dim").read, same(head_width="head_dim", num_heads="num_heads").write),
        Part(_read_limit, lambda config: {}),
        require(hidden_act="silu"),
    ),
    table=MAMBA2_TABLE,
    prefix="backbone.",
    embedding="embeddings.weight",
    config=Mamba2,
)
RECURRENT: dict[str, Family] = {MAMBA2.model_type: MAMBA2}
