"""Language models with a memory of slots that they read and write: each file registers its backbones."""

from hybrid_jax.models.memory import dnc, ntm  # noqa: F401
