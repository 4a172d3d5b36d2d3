"""How much arithmetic a step needs, by formula: the numerator of its utilisation (MFU)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax import Array

from hybrid_jax.models.decoder_config import DecoderConfig
from hybrid_jax.models.flops import forward_flops, train_flops

if TYPE_CHECKING:
    from hybrid_jax.phases.ppo_settings import PPO


def sft_flops(model: Any, rows: int, length: int) -> dict[str, float]:
    """The metric ``flops`` of one update; nothing for a model that has no formula."""
    config = _decoder_config(model)
    return {} if config is None else {"flops": train_flops(config, rows * length, length)}


def ppo_flops(
    settings: PPO,
    model: Any,
    rows: int,
    prompt_length: int,
    response_length: int,
    tokens: Array | int,
    groups: tuple[str, ...],
) -> dict[str, Array | float]:
    """The metric ``flops`` of one PPO step: rollout, scoring and all updates.

    Args:
        settings: of the phase.
        model: policy, reference and trunk of the value network.
        rows: responses, B.
        prompt_length: P, padding included.
        response_length: R, the longest that may be sampled.
        tokens: sampled, in all responses; the rollout counts no others, scoring and updates read whole rows.
        groups: of parameters that the updates train.
    """
    config = _decoder_config(model)
    if config is None:
        return {}
    length = prompt_length + response_length
    read, answered = rows * length, rows * response_length

    prefill = forward_flops(config, rows * prompt_length, prompt_length, head_tokens=rows)
    a_token = (forward_flops(config, read, length, answered) - prefill) / answered
    trunk = forward_flops(config, read, length, head_tokens=0)
    score = trunk + len(settings.references) * forward_flops(config, read, length, answered)

    learn = train_flops if "model" in groups else forward_flops
    update = learn(config, read, length, answered)
    if settings.value_network == "separate":
        update += train_flops(config, read, length, head_tokens=0)
    if mix := settings.sft_mix:
        update += learn(config, settings.minibatches * mix.batch_size * mix.length, mix.length)
    return {"flops": prefill + a_token * tokens + score + settings.epochs * update}


def _decoder_config(model: Any) -> DecoderConfig | None:
    config = getattr(model, "config", None)
    return config if isinstance(config, DecoderConfig) else None
