"""Decoding of conversations: rows answer, wait for a reply, read it and answer again, each at its own pace.

    state = engine.init(rows, prompt_length)
    state = engine.admit(params, state, rows, prompts, mask, keys)   # reads openings, draws one token of each
    state = engine.read(params, state, rows, replies, mask)          # reads replies, draws one token of each
    state = engine.decode(params, state, steps)                      # draws tokens of all rows that answer
    samples = engine.harvest(state)

A row's tokens are a buffer that only grows: what was sampled and what was read lie in it as they came, so that
training reads exactly what the policy read. The cache keeps them over all turns. What a row says depends on
what it has read and on its key alone: not on the rows beside it, nor on when they answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.base import LanguageModel, Params, SlotCache, put_rows
from hybrid_jax.sampling.logits import is_end, response_noise
from hybrid_jax.sampling.rules import History, TokenRules


@struct.dataclass
class Talks:
    """The conversation of each row behind its opening, and how far it is."""

    noise: Float[Array, "B R 2"]  # that draws its tokens
    tokens: Int[Array, "B R"]  # chosen and read ones, as they came; behind ``length`` they mean nothing
    log_probs: Float[Array, "B R"]  # of the chosen ones
    chosen: Bool[Array, "B R"]
    length: Int[Array, "B"]  # tokens so far
    spoken: Int[Array, "B"]  # of them, those of the answer under way, or of the last one
    token: Int[Array, "B"]  # the last chosen one, which the model has not read
    busy: Bool[Array, "B"]  # whether the answer goes on
    history: History  # that penalties read: all of the conversation, and counts of the answer under way


@struct.dataclass
class TurnState:
    """The cache of the model, and the conversations."""

    cache: Any
    talks: Talks


@dataclass(frozen=True)
class TurnEngine:
    """Ancestral sampling of answers in conversations; hashable, a static argument of `jax.jit`.

    Attributes:
        model: that answers.
        eos_ids: tokens that end an answer and belong to it.
        max_new_tokens: longest answer.
        max_tokens: of a conversation behind its opening, R.
        rules: by which a token is drawn.
    """

    model: LanguageModel
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    max_tokens: int
    rules: TokenRules = TokenRules()

    def init(self, rows: int, prompt_length: int) -> TurnState:
        """A state whose rows wait for openings of ``prompt_length`` tokens, padding counted."""
        zeros, shape = jnp.zeros(rows, jnp.int32), (rows, self.max_tokens)
        talks = Talks(
            noise=jnp.zeros((*shape, 2)),
            tokens=jnp.zeros(shape, jnp.int32),
            log_probs=jnp.zeros(shape),
            chosen=jnp.zeros(shape, bool),
            length=zeros,
            spoken=zeros,
            token=zeros,
            busy=zeros > 0,
            history=self.rules.empty(rows, self.model.vocab_size),
        )
        # The last token is never read.
        cache = self.model.init_cache(rows, prompt_length + self.max_tokens - 1)
        return TurnState(cache.apart() if isinstance(cache, SlotCache) else cache, talks)

    def admit(
        self,
        params: Params,
        state: TurnState,
        rows: Int[Array, "M"],
        prompts: Int[Array, "M P"],
        mask: Bool[Array, "M P"],
        keys: Shaped[Array, "M"],
    ) -> TurnState:
        """Begins conversations in some rows, in place of what these held.

        Args:
            params: of the model.
            state: of the engine.
            rows: where each begins; what is no row is left out.
            prompts: the openings, left-padded to the length of `init`.
            mask: True is a token.
            keys: of each conversation: the tokens that it draws.
        """
        fresh = self.init(len(rows), prompts.shape[1])
        logits, cache = self.model.prefill(params, prompts, mask, fresh.cache)
        noise, busy = response_noise(keys, self.max_tokens), rows < len(state.talks.busy)
        history = self.rules.read(fresh.talks.history, prompts, mask)
        talks = self._drawn(replace(fresh.talks, noise=noise, busy=busy, history=history), logits)
        return self._with_rows(state, rows, TurnState(cache, talks))

    def read(
        self,
        params: Params,
        state: TurnState,
        rows: Int[Array, "M"],
        replies: Int[Array, "M X"],
        mask: Bool[Array, "M X"],
        goes_on: Bool[Array, "M"],
    ) -> TurnState:
        """Reads replies to the answers of some rows; those that go on draw the first token of the next answer.

        Args:
            params: of the model.
            state: of the engine; the rows have answered.
            rows: that read; what is no row is left out.
            replies: left-padded; a reply and one token more fit into the conversation.
            mask: True is a token.
            goes_on: whether the row answers; else it only keeps the reply.
        """
        talks = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), state.talks)
        counts = jnp.sum(mask, axis=1)
        first = replies.shape[1] - counts
        # The end of the answer was drawn and not read yet: it stands right before the reply.
        put = jax.vmap(lambda row, place, value: row.at[place].set(value))
        tokens = put(jnp.pad(replies, ((0, 0), (1, 0))), first, talks.token)
        read = put(jnp.pad(mask, ((0, 0), (1, 0))), first, jnp.ones(len(rows), bool))
        logits, cache = self.model.extend(params, tokens, read, state.cache.take(rows))
        places = jnp.where(
            mask, talks.length[:, None] + jnp.arange(replies.shape[1]) - first[:, None], self.max_tokens
        )
        write = jax.vmap(lambda row, places, values: row.at[places].set(values, mode="drop"))
        talks = replace(
            talks,
            tokens=write(talks.tokens, places, replies),
            length=talks.length + counts,
            spoken=jnp.zeros_like(talks.spoken),
            busy=goes_on,
            history=self.rules.read(talks.history, replies, mask),
        )
        return self._with_rows(state, rows, TurnState(cache, self._drawn(talks, logits)))

    def decode(self, params: Params, state: TurnState, steps: Int[Array, ""]) -> TurnState:
        """Draws up to so many tokens of every row that answers; stops where none does any more."""

        def unfinished(carry):
            step, state = carry
            return (step < steps) & jnp.any(state.talks.busy)

        def draw(carry):
            step, state = carry
            token, busy = state.talks.token[:, None], state.talks.busy[:, None]
            # Not `step`, which has every row read a token: those that wait must keep what they have read.
            logits, cache = self.model.extend(params, token, busy, state.cache)
            return step + 1, TurnState(cache, self._drawn(state.talks, logits))

        return lax.while_loop(unfinished, draw, (jnp.int32(0), state))[1]

    def harvest(self, state: TurnState) -> Samples:
        """The conversations so far, behind their openings."""
        talks = state.talks
        written = jnp.arange(self.max_tokens) < talks.length[:, None]
        chosen = written & talks.chosen
        return Samples(
            tokens=jnp.where(written, talks.tokens, 0),
            log_probs=jnp.where(chosen, talks.log_probs, 0.0),
            action_mask=chosen,
            attention_mask=written,
        )

    def _drawn(self, talks: Talks, logits: Float[Array, "B V"]) -> Talks:
        """Writes down the next token of the rows that answer."""
        noise = jax.vmap(lambda noise, t: noise.at[t].get(mode="clip"))(talks.noise, talks.length)
        token, log_prob, history = self.rules.draw(logits, noise, talks.history, talks.busy)
        place = jnp.where(talks.busy, talks.length, self.max_tokens)  # of a row that waits: nowhere
        length, spoken = talks.length + talks.busy, talks.spoken + talks.busy
        over = is_end(token, self.eos_ids) | (spoken == self.max_new_tokens) | (length == self.max_tokens)
        write = jax.vmap(lambda row, place, value: row.at[place].set(value, mode="drop"))
        return replace(
            talks,
            tokens=write(talks.tokens, place, token),
            log_probs=write(talks.log_probs, place, log_prob),
            chosen=write(talks.chosen, place, jnp.ones_like(talks.busy)),
            length=length,
            spoken=spoken,
            token=jnp.where(talks.busy, token, talks.token),
            busy=talks.busy & ~over,
            history=history,
        )

    def _with_rows(self, state: TurnState, rows: Int[Array, "M"], fresh: TurnState) -> TurnState:
        group = rows[None]  # one group: a row may lie on any device
        talks = jax.tree.map(lambda x, new: put_rows(x, group, new), state.talks, fresh.talks)
        return TurnState(state.cache.with_rows(group, fresh.cache), talks)
