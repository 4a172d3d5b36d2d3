"""hybrid_jax teaches language models by examples and by reward: SFT and PPO in one JAX program."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_jax.trainer import HybridTrainer

__all__ = ["HybridTrainer"]


def __getattr__(name: str):
    """Imports the notebook's face when it is asked for, so that ``import hybrid_jax`` costs nothing."""
    if name == "HybridTrainer":
        from hybrid_jax.trainer import HybridTrainer

        return HybridTrainer
    raise AttributeError(f"module 'hybrid_jax' has no attribute {name!r}")
