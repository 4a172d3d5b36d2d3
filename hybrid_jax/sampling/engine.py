"""Decoding as pure functions over a state: rows are admitted with a prompt, step together, and are harvested.

    state = engine.init(rows, length)
    state, finished = engine.admit(params, state, rows, prompts, mask, keys)  # reads prompts, draws one token
    state, finished = engine.step(params, state)                              # draws one token of each row
    samples = engine.harvest(state, rows)

`ancestral` runs it over one batch, `queue` over more prompts than there are rows. What a row answers depends on
its prompt and its key alone: not on the rows beside it, nor on when it was admitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params, RefillCache, put_rows
from hybrid_jax.sampling.logits import is_end, response_noise
from hybrid_jax.sampling.rules import History, TokenRules


@struct.dataclass
class Rows:
    """The response that each row of the engine is writing, and how far it is."""

    noise: Float[Array, "B R 2"]  # that draws its tokens
    tokens: Int[Array, "B R"]  # of its response; behind ``length`` they mean nothing
    log_probs: Float[Array, "B R"]
    length: Int[Array, "B"]  # tokens of its response so far
    token: Int[Array, "B"]  # the last of them, which the model has not read
    busy: Bool[Array, "B"]  # whether the response goes on
    history: History  # that its penalties read


@struct.dataclass
class EngineState:
    """The cache of the model, and the rows."""

    cache: Any
    rows: Rows
    cache_length: int = struct.field(pytree_node=False)  # tokens of a prompt and its response, at most

    def grown(self, length: int) -> EngineState:
        """With a longer cache (`SlotCache.grown`)."""
        return replace(self, cache=self.cache.grown(length), cache_length=length)


@dataclass(frozen=True)
class Engine:
    """Ancestral sampling of one model; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        model: that answers.
        eos_ids: tokens that end a response and belong to it.
        max_new_tokens: longest response, R.
        rules: by which a token is drawn.
    """

    model: LanguageModel
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    rules: TokenRules = TokenRules()

    def init(self, rows: int, length: int) -> EngineState:
        """A state whose rows wait for prompts.

        Args:
            rows: answered at the same time, B.
            length: of the cache: a padded prompt and its response less its last token, which is never read.
        """
        zeros, shape = jnp.zeros(rows, jnp.int32), (rows, self.max_new_tokens)
        waiting = Rows(
            noise=jnp.zeros((*shape, 2)),
            tokens=jnp.zeros(shape, jnp.int32),
            log_probs=jnp.zeros(shape),
            length=zeros,
            token=zeros,
            busy=zeros > 0,
            history=self.rules.empty(rows, self.model.vocab_size),
        )
        return EngineState(self.model.init_cache(rows, length), waiting, length)

    def start(
        self,
        params: Params,
        state: EngineState,
        prompts: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
        keys: Shaped[Array, "B"],
        prefill: Callable[..., Any] | None = None,
    ) -> tuple[EngineState, Bool[Array, "B"]]:
        """`admit` of a prompt to every row of a new state; ``prefill`` may read them in another way."""
        rows = len(prompts)
        chex.assert_equal_shape([prompts, mask])
        chex.assert_shape([keys, state.rows.busy], (rows,))
        logits, cache = (prefill or self.model.prefill)(params, prompts, mask, state.cache)
        noise = response_noise(keys, self.max_new_tokens)
        history = self.rules.read(state.rows.history, prompts, mask)
        begun = replace(state.rows, noise=noise, busy=jnp.ones(rows, bool), history=history)
        return self._drawn(state, cache, begun, logits)

    def admit(
        self,
        params: Params,
        state: EngineState,
        rows: Int[Array, "G M"],
        prompts: Int[Array, "X P"],
        mask: Bool[Array, "X P"],
        keys: Shaped[Array, "X"],
    ) -> tuple[EngineState, Bool[Array, "X"]]:
        """Gives prompts to some rows, in place of what these did, and draws the first token of each response.

        Args:
            params: of the model.
            state: of the engine.
            rows: where each prompt goes within each of G equal groups of the rows, and of the prompts; what is
                no row of its group is left out. A group is what one device holds, so that no row moves.
            prompts: X = G · M, left-padded.
            mask: True is a token.
            keys: of each response.

        Returns:
            The state, and which of the responses have ended with their first token.

        Raises:
            UserError: all rows of the model's cache begin together.
        """
        if not isinstance(state.cache, RefillCache):
            raise UserError(
                "sampler.slots needs a model whose cache takes new rows, as a decoder's does; leave it out"
            )
        fresh, finished = self.start(params, self.init(len(prompts), state.cache_length), prompts, mask, keys)
        admitted = jax.tree.map(lambda old, new: put_rows(old, rows, new), state.rows, fresh.rows)
        return replace(state, cache=state.cache.with_rows(rows, fresh.cache), rows=admitted), finished

    def step(self, params: Params, state: EngineState) -> tuple[EngineState, Bool[Array, "B"]]:
        """Draws the next token of every busy row; says which responses have ended with it."""
        logits, cache = self.model.step(params, state.rows.token, state.cache)
        return self._drawn(state, cache, state.rows, logits)

    def harvest(self, state: EngineState, rows: Int[Array, "G M"] | None = None) -> Samples:
        """The responses of some rows, of G groups as in `admit`, so far; None takes all."""
        found = state.rows
        if rows is not None:
            found = jax.tree.map(lambda x: _rows_of(x, rows), state.rows)
        written = jnp.arange(self.max_new_tokens) < found.length[:, None]
        tokens, log_probs = jnp.where(written, found.tokens, 0), jnp.where(written, found.log_probs, 0.0)
        return Samples.chosen(tokens, log_probs, written)

    def _drawn(
        self, state: EngineState, cache: Any, rows: Rows, logits: Float[Array, "B V"]
    ) -> tuple[EngineState, Bool[Array, "B"]]:
        """Writes down the next token of the busy rows."""
        noise = jax.vmap(lambda noise, t: noise.at[t].get(mode="clip"))(rows.noise, rows.length)
        token, log_prob, history = self.rules.draw(logits, noise, rows.history, rows.busy)
        token = jnp.where(rows.busy, token, 0)
        place = jnp.where(rows.busy, rows.length, self.max_new_tokens)  # of a waiting row: nowhere
        length = rows.length + rows.busy
        finished = rows.busy & (is_end(token, self.eos_ids) | (length == self.max_new_tokens))
        write = jax.vmap(lambda array, t, value: array.at[t].set(value, mode="drop"))
        rows = replace(
            rows,
            tokens=write(rows.tokens, place, token),
            log_probs=write(rows.log_probs, place, log_prob),
            length=length,
            token=token,
            busy=rows.busy & ~finished,
            history=history,
        )
        return replace(state, cache=cache, rows=rows), finished


def _rows_of(array: Shaped[Array, "B ..."], rows: Int[Array, "G M"]) -> Shaped[Array, "X ..."]:
    """Some rows of each of G groups; of what is no row of its group, any."""
    take = jax.vmap(lambda group, index: group.at[index].get(mode="clip"))
    taken = take(array.reshape(len(rows), -1, *array.shape[1:]), rows)
    return taken.reshape(-1, *array.shape[1:])
