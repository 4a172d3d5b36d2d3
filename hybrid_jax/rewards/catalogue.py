"""Imports every module that registers a reward, so that a config finds it by name."""

import hybrid_jax.rewards.slots
import hybrid_jax.rewards.text
import hybrid_jax.rewards.tokens  # noqa: F401
