"""Imports every module that registers an environment, so that a config finds it by name."""

import hybrid_jax.environments.booking
import hybrid_jax.environments.gymnasium
import hybrid_jax.environments.memory
import hybrid_jax.environments.openenv
import hybrid_jax.environments.skyrl_gym
import hybrid_jax.environments.textarena
import hybrid_jax.environments.textworld
import hybrid_jax.environments.tools
import hybrid_jax.environments.trl
import hybrid_jax.environments.twenty_questions
import hybrid_jax.environments.user  # noqa: F401
