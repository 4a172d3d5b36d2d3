"""The adapter_config.json of `peft`: what we read of it, what changes nothing, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
# Read, or said by the tensors themselves: their names, shapes and values.
READ = (
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "alpha_pattern",
        "rank_pattern",
        "lora_dropout",
        "use_rslora",
        "use_dora",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    *("lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    "base_model_name_or_path",
)
# About where a model came from, how training began (`init_lora_weights` says which way) or how it saved memory.
HARMLESS = (
    *("revision", "task_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    "velora_config",
)
# They change what the model computes, in a way that ours does not.
REFUSED = (
    *("megatron_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication"),
    *("target_parameters", "use_bdlora", "arrow_config", "kasa_config"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
RESIDUAL_STARTS = ("pissa", "olora")  # `peft` takes their first adapter off the base, again at every loading
_BIASES = ("none", "all", "lora_only")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """A checked adapter_config.json.

    Raises:
        UserError: it is not there, or holds what we would compute differently from `peft`.
    """
    file = folder / ADAPTER_CONFIG
    content = read_json(file)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type must be LORA, got {content.get('peft_type')!r}")
    for name, value in content.items():
        if value and name not in READ and name not in HARMLESS:
            raise UserError(f"{file}: {name} = {value!r} is not supported; merge the adapter with peft first")
    start = content.get("init_lora_weights")
    if start not in (*_PLAIN_STARTS, *RESIDUAL_STARTS):
        raise UserError(
            f"{file}: init_lora_weights = {start!r} is not supported, for it changed the base: write the "
            "adapter again by peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if (bias := content.get("bias", "none")) not in _BIASES:
        raise UserError(f"{file}: bias must be one of {', '.join(_BIASES)}, got {bias!r}")
    for name in ("alpha_pattern", "rank_pattern"):
        if not isinstance(content.get(name) or {}, dict):
            raise UserError(f"{file}: {name} must be a mapping, got {content[name]!r}")
    return content


def of_module(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as `peft` chooses it."""
    found = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(found, default)


def is_saved(content: dict[str, Any], name: str) -> bool:
    """Tells whether a tensor of the base, ``a.b.weight``, belongs to one of ``modules_to_save``."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(saved) for saved in content.get("modules_to_save") or () for module in modules)


def tokens_of(content: dict[str, Any], module: str) -> tuple[int, ...]:
    """The ids whose rows of an embedding, or of a head, are trained."""
    indices = content.get("trainable_token_indices") or ()
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if module.endswith(name)), ())
    if not all(isinstance(i, int) and i >= 0 for i in indices):
        raise UserError(f"trainable_token_indices must be ids, got {indices!r}")
    return tuple(indices)
