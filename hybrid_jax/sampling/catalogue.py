"""Imports every module that registers a sampler, so that a config finds it by name."""

import hybrid_jax.sampling.ancestral
import hybrid_jax.sampling.beam
import hybrid_jax.sampling.best_of_n
import hybrid_jax.sampling.exploring
import hybrid_jax.sampling.guidance
import hybrid_jax.sampling.metropolis
import hybrid_jax.sampling.particles
import hybrid_jax.sampling.rejection
import hybrid_jax.sampling.tree_search  # noqa: F401
