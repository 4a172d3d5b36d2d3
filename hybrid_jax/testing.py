"""What tests, CI and benches share: the 27-sequence language model, on which every optimum is a closed form.

Three tokens, three steps, so 27 responses that can be enumerated. KL-regularised reward maximisation has the
optimum π*(s) ∝ π_ref(s) exp(r(s)/β), and every algorithm that claims to find it is checked against its numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybrid_jax.models.base import ModelOutput, Params

VOCABULARY, STEPS = 3, 3
SEQUENCES = np.array(list(itertools.product(range(VOCABULARY), repeat=STEPS)))  # [27 3]
START = np.array([0.5, 0.3, 0.2])  # π_ref is a Markov chain: START, then TRANSITION
TRANSITION = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
NUM_PREFIXES = sum(VOCABULARY**step for step in range(STEPS))  # 13: (), (0), (1), (2), (0, 0), …


@dataclass(frozen=True)
class PrefixTable:
    """A `LanguageModel` with one row of scores for each prefix of a response; the prompt is any one token.

    Hidden states are one-hot prefixes, so that a linear value head is a table of state values.
    """

    vocab_size: int = VOCABULARY
    width: int = NUM_PREFIXES
    max_length: int | None = STEPS + 1

    def init(self, key: Array) -> Params:
        return reference_params()

    def cast(self, params: Params) -> Params:
        return params

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None):
        prefix, prefixes = jnp.zeros(tokens.shape[0], jnp.int32), []
        for t in range(tokens.shape[1]):
            if t:
                prefix = self._append(prefix, tokens[:, t])
            prefixes.append(prefix)
        return jax.nn.one_hot(jnp.stack(prefixes, axis=1), NUM_PREFIXES)

    @property
    def loss_coefs(self):
        return {}

    def hidden_and_losses(self, params, tokens, attention_mask=None, *, dropout_key=None):
        return self.hidden(params, tokens), {}

    def logits(self, params, hidden):
        return hidden @ params["table"]

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None):
        hidden = self.hidden(params, tokens)
        return ModelOutput(self.logits(params, hidden), hidden)

    def init_cache(self, batch: int, length: int):
        return jnp.zeros(batch, jnp.int32)

    def prefill(self, params, tokens, attention_mask, cache):
        return params["table"][cache], cache

    def step(self, params, token, cache):
        prefix = self._append(cache, token)
        return params["table"][prefix], prefix

    def _append(self, prefix: Array, token: Array) -> Array:
        """Row of the longer prefix; a whole response has none, and any will do."""
        return jnp.minimum(VOCABULARY * prefix + 1 + token, NUM_PREFIXES - 1)


def reference_params() -> Params:
    """The table of π_ref."""
    rows = [START, *TRANSITION, *np.tile(TRANSITION, (VOCABULARY, 1))]
    return {"table": jnp.asarray(np.log(np.array(rows)), jnp.float32)}


def sequence_probabilities(params: Params) -> np.ndarray:
    """π(s) of all 27 responses, float64, in the order of `SEQUENCES`."""
    table = np.asarray(params["table"], np.float64)
    log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    total, prefix = np.zeros(len(SEQUENCES)), np.zeros(len(SEQUENCES), int)
    for tokens in SEQUENCES.T:
        total += log_probs[prefix, tokens]
        prefix = VOCABULARY * prefix + 1 + tokens
        prefix = np.minimum(prefix, NUM_PREFIXES - 1)
    return np.exp(total)


def true_reward() -> np.ndarray:
    """r(s) = (number of 2s) − ½ [s starts with 1]."""
    return (SEQUENCES == 2).sum(axis=1) - 0.5 * (SEQUENCES[:, 0] == 1)


def optimum(reference: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """π* ∝ π_ref exp(r/β)."""
    weights = reference * np.exp(reward / beta)
    return weights / weights.sum()


def objective(policy: np.ndarray, reference: np.ndarray, reward: np.ndarray, beta: float) -> float:
    """J(π) = E[r] − β KL(π ‖ π_ref)."""
    return float((policy * (reward - beta * np.log(policy / reference))).sum())
