"""A backbone: a gated recurrent unit over token embeddings (Cho et al. 2014), whose cache is its state."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_jax import ModelOutput, RowCache, Width, settings


@settings
class GRU:
    """Settings of the model; `build` is what a config asks for."""

    width: Width = 64  # channels of embedding and state

    def build(self, vocab_size: int | None) -> "GRUModel":
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return GRUModel(vocab_size or 256, self.width)


class Network(nn.Module):
    """Embedding, cell and head."""

    vocab_size: int
    width: int

    def setup(self):
        """Makes the parts."""
        self.embedding = nn.Embed(self.vocab_size, self.width)
        self.cell = nn.GRUCell(self.width)
        self.lm_head = nn.Dense(self.vocab_size)

    def __call__(self, state: Any, token: Any) -> Any:
        """The states [B D] after one token [B] a row."""
        return self.cell(state, self.embedding(token))[0]

    def logits(self, hidden: Any) -> Any:
        """Scores of the next token."""
        return self.lm_head(hidden).astype(jnp.float32)

    def everything(self, state: Any, token: Any) -> Any:
        """Only to make the parameters."""
        return self.logits(self(state, token))


@dataclass(frozen=True)
class GRUModel:
    """The recurrent unit as a `LanguageModel`. It reads a row of any length, token by token."""

    vocab_size: int
    width: int
    max_length: int | None = None

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Empty: it has no losses of its own."""
        return {}

    def init(self, key: Any) -> Any:
        """Random parameters."""
        state, token = jnp.zeros((1, self.width)), jnp.zeros(1, jnp.int32)
        return dict(self._network.init(key, state, token, method="everything")["params"])

    def cast(self, params: Any) -> Any:
        """The parameters as they are."""
        return params

    def hidden(self, params: Any, tokens: Any, attention_mask: Any = None, *, dropout_key: Any = None) -> Any:
        """The state after each token; each packed sequence begins anew, padding changes nothing."""
        segments = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
        begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))

        def read(state, inputs):
            token, real, anew = inputs
            state = jnp.where(anew[:, None], 0.0, state)
            state = jnp.where(real[:, None], self._after(params, state, token), state)
            return state, state

        start = jnp.zeros((len(tokens), self.width))
        return jax.lax.scan(read, start, (tokens.T, segments.T > 0, begins.T))[1].swapaxes(0, 1)

    def hidden_and_losses(self, params: Any, tokens: Any, attention_mask: Any = None, **keys: Any) -> Any:
        """`hidden`, and no losses."""
        return self.hidden(params, tokens, attention_mask, **keys), {}

    def logits(self, params: Any, hidden: Any) -> Any:
        """Scores of the next token, float32."""
        return self._network.apply({"params": params}, hidden, method="logits")

    def apply(self, params: Any, tokens: Any, attention_mask: Any = None, **keys: Any) -> ModelOutput:
        """States and scores of all positions."""
        hidden = self.hidden(params, tokens, attention_mask, **keys)
        return ModelOutput(self.logits(params, hidden), hidden)

    def init_cache(self, batch: int, length: int) -> RowCache:
        """The state of rows that have read nothing."""
        return RowCache(jnp.zeros((batch, self.width)))

    def extend(self, params: Any, tokens: Any, attention_mask: Any, cache: RowCache) -> tuple[Any, RowCache]:
        """Reads left-padded tokens; returns the scores after them and the new state."""

        def read(state, inputs):
            token, real = inputs
            return jnp.where(real[:, None], self._after(params, state, token), state), None

        state, _ = jax.lax.scan(read, cache.state, (tokens.T, attention_mask.T > 0))
        return self.logits(params, state), RowCache(state)

    prefill = extend

    def step(self, params: Any, token: Any, cache: RowCache) -> tuple[Any, RowCache]:
        """Reads one token a row."""
        state = self._after(params, cache.state, token)
        return self.logits(params, state), RowCache(state)

    @property
    def _network(self) -> Network:
        return Network(self.vocab_size, self.width)

    def _after(self, params: Any, state: Any, token: Any) -> Any:
        return self._network.apply({"params": params}, state, token)
