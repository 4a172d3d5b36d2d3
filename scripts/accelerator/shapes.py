"""Published models as their config.json describes them, one for any machine, and how much is timed of each."""

from __future__ import annotations

from dataclasses import replace

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.rope import Llama3

_LLAMA = DecoderConfig(
    **{"position": "rotary", "norm": "rms", "mlp": "gated", "activation": "silu", "dtype": "bfloat16"},
    **{"attention_bias": False, "mlp_bias": False, "family": "llama"},
)
_QWEN2 = replace(
    _LLAMA, attention_bias=True, output_bias=False, norm_epsilon=1e-6, rope_theta=1e6, family="qwen2"
)
SHAPES = {  # as the config.json of each model says
    "smoke": replace(
        _QWEN2, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=64, vocab_size=64
    ),
    "qwen2.5-0.5b": replace(
        _QWEN2,
        **{"num_layers": 24, "width": 896, "num_heads": 14, "num_kv_heads": 2, "mlp_width": 4_864},
        **{"max_length": 32_768, "vocab_size": 151_936},
    ),
    "qwen2.5-1.5b": replace(
        _QWEN2,
        **{"num_layers": 28, "width": 1_536, "num_heads": 12, "num_kv_heads": 2, "mlp_width": 8_960},
        **{"max_length": 131_072, "vocab_size": 151_936},
    ),
    "llama-3.2-1b": replace(
        _LLAMA,
        **{"num_layers": 16, "width": 2_048, "num_heads": 32, "num_kv_heads": 8, "mlp_width": 8_192},
        **{"max_length": 131_072, "vocab_size": 128_256, "rope_theta": 500_000.0},
        rope_scaling=Llama3(32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8_192),
    ),
}
DEFAULTS = {  # rows, tokens of a row or of a prompt, new tokens, burst
    "sft": {"rows": 8, "length": 1_024, "new_tokens": 0, "burst": 4},
    "rollout": {"rows": 128, "length": 128, "new_tokens": 512, "burst": 1},
    "ppo": {"rows": 64, "length": 128, "new_tokens": 256, "burst": 1},
}
SMOKE = {
    "sft": {"rows": 2, "length": 8, "new_tokens": 0, "burst": 2},
    "rollout": {"rows": 3, "length": 4, "new_tokens": 6, "burst": 1},
    "ppo": {"rows": 4, "length": 4, "new_tokens": 6, "burst": 1},
}
