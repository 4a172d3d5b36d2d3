"""Markov chains of order k as language models: each file registers its backbones."""

from hybrid_jax.models.markov.counts import CountsSettings
from hybrid_jax.models.markov.feed_forward import FeedForwardSettings
from hybrid_jax.models.markov.view import MarkovSettings

__all__ = ["CountsSettings", "FeedForwardSettings", "MarkovSettings"]
