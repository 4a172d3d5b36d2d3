"""Imports every module that registers a reward or a mixture of them, so that a config finds it by name."""

import hybrid_jax.rewards.adapters
import hybrid_jax.rewards.classifier
import hybrid_jax.rewards.coherence
import hybrid_jax.rewards.coverage
import hybrid_jax.rewards.dialogue
import hybrid_jax.rewards.format
import hybrid_jax.rewards.judge_rewards
import hybrid_jax.rewards.learned_metrics
import hybrid_jax.rewards.likelihood
import hybrid_jax.rewards.mixture
import hybrid_jax.rewards.ngram
import hybrid_jax.rewards.overlap
import hybrid_jax.rewards.reasoning_gym
import hybrid_jax.rewards.reward_model
import hybrid_jax.rewards.shaping
import hybrid_jax.rewards.similarity
import hybrid_jax.rewards.slots
import hybrid_jax.rewards.style
import hybrid_jax.rewards.text
import hybrid_jax.rewards.tokens
import hybrid_jax.rewards.verifiable  # noqa: F401
