"""hybrid_jax teaches language models by examples and by reward: SFT and PPO in one JAX program.

Everything public is imported from here, when it is first asked for: ``import hybrid_jax`` loads no jax. Where a
thing lives inside the package may change, its name here does not. docs/extending.md says what each is for.
"""

import importlib
from typing import Any

_PUBLIC = {
    # to train, to answer, to read and write models
    "trainer": ["HybridTrainer"],
    "experiment": ["Experiment", "build"],
    "experiment_config": ["ExperimentConfig", "load_config"],
    "models.folders.pretrained": ["load_pretrained", "save_pretrained"],
    "runs.policy": ["Policy", "load_policy"],
    "data.tokenizer": ["Tokenizer", "TOKENIZERS", "load_tokenizer"],
    # the batches between the stages, and what losses are made of
    "core.batches": ["Example", "Message", "PromptBatch", "Rollout", "Samples", "TokenBatch"],
    "core.arrays": ["Sum", "masked_mean", "masked_sum"],
    "core.errors": ["UserError"],
    "core.keys": ["Purpose", "root_key"],
    # settings and their ranges
    "core.ranges": [
        *("settings", "BatchSize", "Count", "Finite", "Fraction", "Layers", "Natural", "NonNegative"),
        *("Positive", "Rate", "Seconds", "Seed", "Share", "Width"),
    ],
    "core.registry": ["Registry"],
    # models
    "models.heads": ["HEADS", "Head"],
    "models.scorer": ["TextScorer", "TextTrunk"],
    "models.scoring": ["next_token_log_probs"],
    "models.base": [
        "BACKBONES",
        "LanguageModel",
        "ModelOutput",
        "Params",
        "Cache",
        "RefillCache",
        "RowCache",
        "SlotCache",
        "StateReader",
    ],
    "models.markov.windows": ["OrderK"],
    "models.memory.bank": ["Bank"],
    "models.recurrent.cell": ["Cell"],
    "models.recurrent.model": ["RecurrentModel", "RecurrentSettings"],
    "models.families": ["FAMILIES"],
    "models.families.family": ["Family"],
    "models.families.settings": ["fixed", "require", "same"],
    "models.folders.hf": ["Pretrained"],
    "models.rope": ["ROPE_SCALINGS"],
    # data
    "data.sources": ["SOURCES", "Source"],
    "data.filtering": ["CONDITIONS"],
    "data.preferences": ["PREFERENCES", "Preference"],
    "data.loader": ["PromptStream", "SFTStream"],
    "data.pair_stream": ["PairStream"],
    # algorithms
    "algorithms.supervised": ["next_token_targets", "token_cross_entropy"],
    "algorithms.log_probs": ["entropy", "token_log_probs"],
    "algorithms.advantages": ["ADVANTAGES", "GAE", "Advantage", "Returns", "gae", "whiten"],
    "algorithms.group_advantages": ["GroupRelative", "LeaveOneOut", "PassAtK"],
    "algorithms.policy_gradient": [
        *("OBJECTIVES", "PolicyObjective", "Clipped", "Truncated", "Soft", "ScoreFunction"),
        *("token_losses", "clipped_policy_loss", "clipped_value_loss"),
    ],
    "algorithms.preference_losses": ["PREFERENCE_LOSSES"],
    "algorithms.kl": ["KL_CONTROLS", "KLControl", "k1", "k2", "k3", "token_rewards"],
    # samplers
    "sampling.base": ["SAMPLERS", "Sampler"],
    "environments.base": ["ENVIRONMENTS", "Environment", "Step"],
    "environments.tools": ["TOOLS"],
    "environments.factories": ["FACTORIES"],
    "sampling.ancestral": ["Ancestral"],
    "sampling.beam": ["Beam"],
    "sampling.best_of_n": ["BestOfN"],
    "sampling.guidance": ["Guidance"],
    "sampling.metropolis": ["Metropolis"],
    "sampling.rejection": ["Rejection"],
    "sampling.rules": ["TokenRules"],
    "sampling.particles": ["Particles"],
    "sampling.engine": ["Engine"],
    # rewards
    "rewards.base": ["REWARDS", "DeviceReward", "StartedReward"],
    "rewards.composite": ["CompositeReward"],
    "rewards.part": ["Part"],
    "rewards.learned_metrics": ["save_head", "train_head"],
    "rewards.likelihood": ["mc1", "mc2"],
    "rewards.postprocess": ["NORMALISERS", "TRANSFORMS", "Normaliser", "Transform"],
    "rewards.combine": ["COMBINERS", "Combiner"],
    # phases
    "phases.policy_gradient": ["OnPolicy", "PolicyGradient"],
    "phases.policy_gradient_functions": ["PolicyGradientFunctions"],
    # training
    "training.phase": ["PHASES", "Metrics", "Phase", "PhaseInit", "Program", "Resources"],
    "training.state": ["RunState", "ScheduleState", "TrainState"],
    "training.update": ["Objective", "apply_gradients", "gradients", "update", "update_state"],
    "training.optimizers": ["OPTIMIZERS", "SCHEDULES", "Optimizer", "Schedule"],
    "training.scheduler": ["SCHEDULERS", "Scheduler"],
    "training.loggers": ["LOGGERS", "Logger"],
    # phases that learn from batches
    "phases.supervised": ["Supervised", "SupervisedPhase"],
    "phases.heads": ["HeadPhase", "HeadSettings"],
    "phases.references": ["Reference"],
    "phases.sft": ["example_shapes"],
    "evaluation.suites": ["SUITES"],
}
_HOMES = {name: (module, name) for module, names in _PUBLIC.items() for name in names}
_HOMES["sample"] = ("sampling.ancestral", "generate")  # `hybrid_jax.generate` is the command

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hybrid_jax' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(importlib.import_module(f"hybrid_jax.{module}"), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
