"""Language models with a memory of slots that they read and write: each file registers its backbones."""

from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.memory.knn import KnnLMSettings
from hybrid_jax.models.memory.neural_cache import NeuralCacheSettings
from hybrid_jax.models.memory.ntm import NTM

__all__ = ["DNC", "NTM", "KnnLMSettings", "NeuralCacheSettings"]
