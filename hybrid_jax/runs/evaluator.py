"""The evaluator of an experiment's policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_jax.core.batches import Example
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.evaluation.evaluate import Evaluator
from hybrid_jax.models.base import LanguageModel
from hybrid_jax.phases import sft


def make_evaluator(
    config: Any,
    model: LanguageModel,
    tokenizer: Tokenizer,
    eos_ids: tuple[int, ...],
    held_out: Sequence[Example] | None = None,
) -> Evaluator:
    """Makes the evaluator of an experiment, with the sampler and the rewards that it trains with."""
    answering = {name: phase for name, phase in config.phases.items() if hasattr(phase, "reward")}
    # What conversations earn is measured by conversations; one answer to a prompt is none.
    rewarded = {name: phase for name, phase in answering.items() if phase.environment is None}
    trained_by = next(iter((rewarded or answering).values()), None)
    # A phase without steps does nothing; but what the first one wants also measures a run of SFT alone.
    used = [name for name, phase in rewarded.items() if phase is trained_by or name in config.scheduler.phases]
    length, long_rows = sft.examples_read(config.phases)
    return Evaluator(
        config.evaluation,
        model,
        tokenizer,
        config.data.load("held_out") if held_out is None else held_out,
        sampler=getattr(trained_by, "sampler", None),
        rewards={name: rewarded[name].reward for name in used},
        length=length,
        long_rows=long_rows,
        long_prompts=getattr(trained_by, "long_prompts", "drop"),
        seed=config.seed,
        eos_ids=eos_ids,
    )
