"""How much arithmetic a step needs, by formula: the numerator of its utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from hybrid_jax.models.flops import Counted, forward_flops, train_flops


def sft_flops(model: Any, rows: int, length: int) -> dict[str, float]:
    """The metric ``flops`` of one update; nothing for a model that has no formula."""
    config = _counted_config(model)
    return {} if config is None else {"flops": train_flops(config, rows * length, length)}


def on_policy_flops(
    model: Any,
    rows: int,
    prompt_length: int,
    response_length: int,
    tokens: Array | int,
    *,
    references: Sequence[Any],
    epochs: int,
    value: str | None,
    trains_policy: bool = True,
    examples: tuple[int, int] = (0, 0),
    scored: int | None = None,
    learned: int | None = None,
) -> dict[str, Array | float]:
    """The metric ``flops`` of one step on a rollout: sampling, scoring and all updates.

    Args:
        model: policy and trunk of the value network.
        rows: responses, B.
        prompt_length: P, padding included.
        response_length: R, the longest that may be sampled.
        tokens: sampled, in all responses; the rollout counts no others, scoring and updates read whole rows.
        references: models that score the responses.
        epochs: updates that read the whole rollout.
        value: ``shared`` or ``separate``; None where there is no value.
        trains_policy: whether the updates train it, or the value alone.
        examples: rows of examples, and their length, that each epoch reads besides.
        scored: rows that the models score; None: all responses.
        learned: rows that an epoch reads; None: all responses.
    """
    config = _counted_config(model)
    readers = [reader for each in references if (reader := _counted_config(each)) is not None]
    if config is None or len(readers) < len(references):
        return {}
    length = prompt_length + response_length
    scored, learned = scored or rows, learned or rows

    prefill = forward_flops(config, rows * prompt_length, prompt_length, head_tokens=rows)
    answered = rows * response_length
    a_token = (forward_flops(config, rows * length, length, answered) - prefill) / answered
    trunk = 0.0 if value is None else forward_flops(config, scored * length, length, head_tokens=0)
    score = trunk + sum(
        forward_flops(reader, scored * length, length, scored * response_length) for reader in readers
    )

    learn = train_flops if trains_policy else forward_flops
    update = learn(config, learned * length, length, learned * response_length)
    if value == "separate":
        update += train_flops(config, learned * length, length, head_tokens=0)
    if examples[0]:
        update += learn(config, examples[0] * examples[1], examples[1])
    return {"flops": prefill + a_token * tokens + score + epochs * update}


def _counted_config(model: Any) -> Counted | None:
    config = getattr(model, "config", None)
    return config if isinstance(config, Counted) else None
