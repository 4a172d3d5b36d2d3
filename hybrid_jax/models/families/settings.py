"""Settings tables: how the config.json of a Hugging Face family maps to a decoder config and back.

A family lists `Part`s; each knows some settings both ways. `transformers` itself reads the file, so that old
names, missing keys and their defaults are its business. What a family cannot express is found by reading back
what was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.decoder_config import Activation
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.rope import Dynamic, Linear, Llama3, LongRope, Yarn, yarn_amplification

Settings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some settings both ways: of ours, out of their config object, and of theirs, out of ours."""

    read: Callable[[Any], Settings]
    write: Callable[[DecoderConfig], Settings]


def same(**names: str) -> Part:
    """Settings that mean the same: our name = their name."""
    return Part(
        lambda theirs: {ours: getattr(theirs, name) for ours, name in names.items()},
        lambda config: {name: getattr(config, ours) for ours, name in names.items()},
    )


def fixed(**ours: Any) -> Part:
    """Settings that every model of the family shares."""
    return Part(lambda theirs: ours, lambda config: {})


def require(**expected: Any) -> Part:
    """Settings of theirs that must have this value: what they switch on is not built."""

    def read(theirs: Any) -> Settings:
        for setting, wanted in expected.items():
            if (got := getattr(theirs, setting, wanted)) != wanted:
                raise UserError(f"{setting} must be {wanted}, got {got!r}: not supported")
        return {}

    return Part(read, lambda config: dict(expected))


def off(*names: str) -> Part:
    """Switches of theirs that must be off, or absent: what they switch on is not built."""

    def read(theirs: Any) -> Settings:
        for setting in names:
            if got := getattr(theirs, setting, None):
                raise UserError(f"{setting} must be false, got {got!r}: not supported")
        return {}

    return Part(read, lambda config: {})


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(key: str, *names: str) -> Part:
    """The activation under ``key``; ``names`` are preferred where several mean ours."""

    def read(theirs: Any) -> Settings:
        name = getattr(theirs, key)
        if name not in _ACTIVATIONS:
            raise UserError(f"{key} must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
        return {"activation": _ACTIVATIONS[name]}

    def write(config: DecoderConfig) -> Settings:
        known = [name for name in (*names, *_ACTIVATIONS) if _ACTIVATIONS[name] == config.activation]
        return {key: known[0]}

    return Part(read, write)


SIZES = Part(
    same(
        num_layers="num_hidden_layers",
        width="hidden_size",
        num_heads="num_attention_heads",
        vocab_size="vocab_size",
        tie_embeddings="tie_word_embeddings",
    ).read,
    lambda config: {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    },
)
MAX_LENGTH = same(max_length="max_position_embeddings")
INIT_STD = same(init_std="initializer_range")
MLP_WIDTH = Part(
    lambda theirs: {"mlp_width": theirs.intermediate_size},
    lambda config: {"intermediate_size": config.inner_width},
)
KV_HEADS = Part(
    lambda theirs: {"num_kv_heads": theirs.num_key_value_heads},
    lambda config: {"num_key_value_heads": config.kv_heads},
)
HEAD_WIDTH = Part(
    lambda theirs: {"head_width": getattr(theirs, "head_dim", None)},
    lambda config: {"head_dim": config.channels},
)
# Of families whose config does not know it, and whose code reads it where it is there.
OPTIONAL_HEAD_WIDTH = Part(
    HEAD_WIDTH.read,
    lambda config: {} if config.channels * config.num_heads == config.width else {"head_dim": config.channels},
)


# ------------------------------------------------------------------------------------------------ layers


def _layer_types(config: DecoderConfig) -> list[str]:
    windowed = [config.is_windowed(layer) for layer in range(config.num_layers)]
    return ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]


def _read_layer_types(theirs: Any) -> Settings:
    types = theirs.layer_types
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise UserError(f"layer_types must be sliding_attention or full_attention, got {min(unknown)!r}")
    windowed = tuple(kind == "sliding_attention" for kind in types)
    return {"window": theirs.sliding_window, "window_layers": windowed} if any(windowed) else {}


def _write_layer_types(config: DecoderConfig) -> Settings:
    types = _layer_types(config)  # without a window, the family's own stays: some need a number
    return {"layer_types": types, **({} if config.window is None else {"sliding_window": config.window})}


# Layers with and without a window, by name.
LAYER_TYPES = Part(_read_layer_types, _write_layer_types)
# One window for all layers.
WINDOW = Part(
    lambda theirs: {"window": theirs.sliding_window},
    lambda config: {"sliding_window": config.window},
)


# ------------------------------------------------------------------------------------------------ experts


def experts(count: str, width: str, *, normalize: str | bool, shared: str | None = None, **fixed: Any) -> Part:
    """Experts by the names of their count, of their width and of the other settings that vary."""

    def read(theirs: Any) -> Settings:
        return {
            "experts": Experts(
                count=getattr(theirs, count),
                per_token=theirs.num_experts_per_tok,
                width=getattr(theirs, width),
                normalize=normalize if isinstance(normalize, bool) else getattr(theirs, normalize),
                shared_width=getattr(theirs, shared) if shared else None,
                balance_coef=theirs.router_aux_loss_coef,
                **fixed,
            )
        }

    def write(config: DecoderConfig) -> Settings:
        e = config.experts
        if e is None:
            raise UserError("experts must be set for a family of experts")
        settings: Settings = {count: e.count, width: e.width, "num_experts_per_tok": e.per_token}
        settings["router_aux_loss_coef"] = e.balance_coef
        settings |= {} if isinstance(normalize, bool) else {normalize: e.normalize}
        return settings if shared is None else {**settings, shared: e.shared_width}

    return Part(read, write)


def sparse_layers(part: Part) -> Part:
    """`experts`, with the settings that leave some layers without any."""

    def read(theirs: Any) -> Settings:
        step, dense = theirs.decoder_sparse_step, theirs.mlp_only_layers or ()
        layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(theirs.num_hidden_layers))
        settings = part.read(theirs)
        return {"experts": replace(settings["experts"], layers=None if all(layers) else layers)}

    def write(config: DecoderConfig) -> Settings:
        dense = [i for i in range(config.num_layers) if not config.has_experts(i)]
        return {**part.write(config), "decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Part(read, write)


# ------------------------------------------------------------------------------------------------ rotary


def _read_rope(parameters: Mapping[str, Any], theirs: Any) -> Settings:
    scaling = _read_scaling(parameters, theirs)
    settings = {"rope_theta": float(parameters["rope_theta"]), "rope_scaling": scaling}
    fraction = parameters.get("partial_rotary_factor") or 1.0
    if fraction != 1.0:
        channels = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        settings["rotary_width"] = int(channels * fraction)
    return settings


def _read_scaling(rope: Mapping[str, Any], theirs: Any) -> Any:
    kind, length = rope.get("rope_type", "default"), theirs.max_position_embeddings
    original = rope.get("original_max_position_embeddings") or length
    factor = rope.get("factor") or length / original
    match kind:
        case "default":
            return None
        case "linear":
            return Linear(factor)
        case "dynamic":
            return Dynamic(factor, length)
        case "llama3":
            return Llama3(factor, rope["low_freq_factor"], rope["high_freq_factor"], original)
        case "yarn":
            return Yarn(
                factor,
                original,
                rope.get("beta_fast") or 32.0,
                rope.get("beta_slow") or 1.0,
                rope.get("truncate", True),
                _yarn_attention_factor(rope, factor),
            )
        case "longrope":
            amplification = rope.get("attention_factor") or _longrope_amplification(factor, original)
            return LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), original, amplification)
    raise UserError(f"rope_type must be default, linear, dynamic, yarn, llama3 or longrope, got {kind!r}")


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        strengths = rope["mscale"], rope["mscale_all_dim"]
        above, below = (yarn_amplification(factor, strength) for strength in strengths)
        return above / below
    return None


def _longrope_amplification(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _write_rope(config: DecoderConfig) -> Settings:
    rope: Settings = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_channels != config.channels:
        fraction = config.rotary_channels / config.channels
        if int(config.channels * fraction) != config.rotary_channels:  # rounded down below it: 0.58 · 100
            fraction = (config.rotary_channels + 0.5) / config.channels
        rope["partial_rotary_factor"] = fraction
    return rope | _write_scaling(config.rope_scaling)


def _write_scaling(scaling: Any) -> Settings:
    match scaling:
        case Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case Dynamic(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3(factor, low, high, original):
            written = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
            return written | {"low_freq_factor": low, "high_freq_factor": high}
        case Yarn(factor, original, fast, slow, truncate, attention_factor):
            written = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            written |= {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
            return written | ({} if attention_factor is None else {"attention_factor": attention_factor})
        case LongRope(short, long, original, amplification):
            written = {"rope_type": "longrope", "original_max_position_embeddings": original}
            written |= {"short_factor": list(short), "long_factor": list(long)}
            return written | {"attention_factor": amplification}
    return {}


# Some channels of a head may not turn.
PARTIAL_ROPE = Part(
    lambda theirs: {"position": "rotary", **_read_rope(theirs.rope_parameters, theirs)},
    lambda config: {"rope_parameters": _write_rope(config)},
)


def _whole(settings: Settings) -> Settings:
    """Refuses heads that turn in part: most families of `transformers` ignore that, or fail with a scaling."""
    if "rotary_width" in settings:
        raise UserError(
            f"partial_rotary_factor must be 1, got {settings['rotary_width']} channels: not supported"
        )
    return settings


# All channels turn.
ROPE = Part(lambda theirs: _whole(PARTIAL_ROPE.read(theirs)), PARTIAL_ROPE.write)


def _read_even_rope(theirs: Any) -> Settings:
    settings = PARTIAL_ROPE.read(theirs)
    if (width := settings.get("rotary_width", 0)) % 2:
        raise UserError(f"partial_rotary_factor must give an even number of channels, got {width}")
    return settings


# For the families in which `transformers` itself fails with an odd number of rotary channels.
EVEN_ROPE = Part(_read_even_rope, PARTIAL_ROPE.write)


def _read_local_rope(theirs: Any) -> Settings:
    ropes = theirs.rope_parameters
    local = ropes["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise UserError(f"rope_type of sliding layers must be default, got {local['rope_type']!r}")
    # transformers looks for `truncate` beside the two, not in them.
    full = {**ropes["full_attention"], "truncate": ropes.get("truncate", True)}
    settings = {"position": "rotary", **_whole(_read_rope(full, theirs))}
    return settings | {"local_rope_theta": float(local["rope_theta"])}


def _write_local_rope(config: DecoderConfig) -> Settings:
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    plain = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": _write_rope(config), "sliding_attention": plain}}


# The windowed layers have a base of their own (Gemma 3).
LOCAL_ROPE = Part(_read_local_rope, _write_local_rope)
