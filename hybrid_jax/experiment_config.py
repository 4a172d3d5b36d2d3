"""The config of a whole experiment: what its YAML file says, read from the user's file or from a run."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from hybrid_jax.core.config import Url, apply_overrides, load_yaml, parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.merging import MERGED
from hybrid_jax.core.ranges import Natural, Positive, Seed, settings
from hybrid_jax.core.registry import EVERYTHING, NOTHING
from hybrid_jax.data import e2e, labelled, preferences, reasoning_gym  # noqa: F401  these register sources
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.data.tokenizer import TOKENIZERS
from hybrid_jax.environments import catalogue, demonstrations  # noqa: F401  these fill registries
from hybrid_jax.evaluation.evaluate import EvaluationConfig
from hybrid_jax.models import decoder, markov, memory, ngrams, recurrent, text_encoder  # noqa: F401  these fill BACKBONES
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.folders import hf  # noqa: F401  these fill BACKBONES
from hybrid_jax.models.heads import HEADS
from hybrid_jax.parallel.mesh import MeshConfig
from hybrid_jax.phases import (  # noqa: F401  these fill PHASES
    a2c,
    a3c,
    cispo,
    classifier,
    dapo,
    distillation,
    dr_grpo,
    gdpo,
    grpo,
    gspo,
    imitation,
    online_preference,
    ppo,
    preference,
    reinforce,
    reinforce_pp,
    reward_model,
    rloo,
    sapo,
    sft,
)
from hybrid_jax.runs.policy import check_spelling, run_settings, trust_explained
from hybrid_jax.sampling import catalogue as samplers  # noqa: F401  fills SAMPLERS
from hybrid_jax.training.checkpoint import CheckpointConfig
from hybrid_jax.training.compilation import cache_folder
from hybrid_jax.training.loggers import LOGGERS
from hybrid_jax.training.offload import Idle
from hybrid_jax.training.phase import LM, PHASES
from hybrid_jax.training.profiler import ProfileConfig
from hybrid_jax.training.scheduler import SCHEDULERS

# Metrics, groups of parameters and folders begin with the name of a phase; these begin other ones.
_TAKEN = ("compile", "evaluation", "heads", "judge", "memory", "reward", "time", "token_chain")


@settings
class ExperimentConfig:
    """A whole experiment, as its YAML file says it."""

    run_dir: Path | Url  # folder of the run, or gs://bucket/path
    steps: Natural  # of all phases together
    model: Annotated[Any, BACKBONES]  # that is trained
    tokenizer: Annotated[Any, TOKENIZERS]  # of all texts; a resumed run has its own
    data: Annotated[Any, SOURCES]  # training and held-out rows
    phases: dict[str, Annotated[Any, PHASES]] = (
        field(  # by the names that the scheduler uses; others do nothing
            metadata={MERGED: True}
        )
    )
    scheduler: Annotated[Any, SCHEDULERS]  # which phase takes the next step
    heads: dict[str, Annotated[Any, HEADS]] = field(  # by name: what phases train on top of the model
        default_factory=dict, metadata={MERGED: True}
    )
    start_from: str | None = None  # RUN or RUN@step: goes on from a checkpoint of another run, see docs/runs.md
    seed: Seed = 0  # of the parameters, the order of rows and all sampling
    share_optimizer_state: bool = False  # one optimizer state for all phases, instead of one each
    offload: tuple[Idle, ...] = ()  # what waits in the host's memory while no phase uses it
    evaluation: EvaluationConfig = EvaluationConfig()  # what is measured on the held-out rows, and when
    checkpoint: CheckpointConfig = CheckpointConfig()  # when the run is saved and exported
    loggers: tuple[Annotated[Any, LOGGERS], ...] = ()  # beside metrics.jsonl and samples.jsonl
    mesh: MeshConfig = MeshConfig()  # how the devices share the work
    compilation_cache: Path | Url | None = field(  # where compiled programs are kept; null keeps none
        default_factory=cache_folder
    )
    peak_tflops: Positive | None = None  # of one device in bfloat16, for the utilisation; null: of its kind
    profile: ProfileConfig | None = None  # steps to trace into run_dir/profile

    def __post_init__(self):
        for phase in self.scheduler.phases:
            if phase not in self.phases:
                raise ValueError(f"scheduler chooses {phase!r}, but phases holds {', '.join(self.phases)}")
        for setting, names, taken in (("phases", self.phases, _TAKEN), ("heads", self.heads, (LM,))):
            if wrong := [name for name in names if name in taken or not re.fullmatch(r"[\w -]+", name)]:
                others = ", ".join(map(repr, taken))
                raise ValueError(
                    f"{setting} must have other names than {others}, of letters, digits, '_' and '-', got "
                    f"{wrong[0]!r}"
                )
        optimizers = [phase.optimizer for phase in self.phases.values()]
        kinds = {(type(optimizer), getattr(optimizer, "state_dtype", None)) for optimizer in optimizers}
        if self.share_optimizer_state and len(kinds) > 1:
            raise ValueError(
                "share_optimizer_state needs phases with the same kind of optimizer and the same state_dtype"
            )

    @property
    def trained_heads(self) -> set[str | None]:
        """The names of the heads that phases train; None where one does not say which."""
        chosen = [self.phases[name] for name in self.scheduler.phases]
        only = next(iter(self.heads)) if len(self.heads) == 1 else None
        return {(phase.head or only) if hasattr(phase, "head") else LM for phase in chosen}

    @property
    def trunk_trains(self) -> bool:
        """Tells whether any phase trains the model that the heads read."""
        return any(getattr(self.heads.get(name or ""), "trains_trunk", True) for name in self.trained_heads)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a config file with ``a.b=value`` overrides.

    Raises:
        UserError: one line that says which setting is wrong, what was expected and the nearest valid name.
    """
    settings = load_yaml(path, overrides, ExperimentConfig, EVERYTHING)
    check_spelling(settings)
    return parse(ExperimentConfig, settings, trust=EVERYTHING)


def load_run_config(
    run_dir: str | Path, overrides: Sequence[str] = (), trust: Container[str] = NOTHING
) -> ExperimentConfig:
    """The config of a run directory, wherever it lies now; ``evaluation.sampler`` is the run's sampler.

    Args:
        run_dir: of the run, whose config may be anybody's.
        overrides: ``a.b=value`` texts over it.
        trust: names in it that may run code.

    Raises:
        Untrusted: the config has a name that runs code and is not in ``trust``.
    """
    settings = run_settings(run_dir)
    measured, phases = settings.get("evaluation") or {}, settings.get("phases") or {}
    sampler = next((phase["sampler"] for phase in phases.values() if "sampler" in phase), None)
    settings["evaluation"] = {**measured, "sampler": measured.get("sampler") or sampler}
    settings = apply_overrides(settings, overrides, ExperimentConfig, trust)
    with trust_explained(run_dir):
        return parse(ExperimentConfig, {**settings, "run_dir": str(run_dir)}, trust=trust)


def spelled_out(settings: dict[str, Any], trust: Container[str]) -> dict[str, Any]:
    """Settings that came up after a run was written have their defaults there."""
    try:
        return to_dict(parse(ExperimentConfig, settings, trust=trust))
    except UserError:  # of settings that are gone, or of objects that only a notebook has
        return settings
