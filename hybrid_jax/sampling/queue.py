"""The engine over a fixed queue of prompts: a row that has ended takes the next one, in one compiled loop.

Without it a batch takes as many steps as its longest response; with it the rows stay busy until the prompts run
out. Prompts are read several at a time, once as many rows wait, since reading few tokens takes a device as long
as reading many.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import current_placement, shard_params
from hybrid_jax.sampling.engine import Engine
from hybrid_jax.sampling.logits import response_keys

_REFILLS = 8  # parts in which the rows take new prompts


@struct.dataclass
class _Group:
    """The prompts of one device, and which of them its rows answer. Its methods are for one group."""

    samples: Samples  # of its n prompts, as far as they are harvested
    next: Int[Array, ""]  # the first prompt that no row has taken
    prompt: Int[Array, "b"]  # that a row answers or has answered; n is none

    @classmethod
    def start(cls, prompts: int, rows: int, num_tokens: int) -> _Group:
        return cls(Samples.empty(prompts, num_tokens), jnp.int32(0), jnp.full(rows, prompts))

    def waiting(self, busy: Bool[Array, "b"]) -> Int[Array, ""]:
        """Free rows that a prompt is left for."""
        return jnp.minimum(jnp.sum(~busy), len(self.samples.tokens) - self.next)

    def take(self, busy: Bool[Array, "b"], count: int) -> tuple[_Group, Array, Array, Array]:
        """Gives the next prompts to up to ``count`` free rows.

        Returns:
            The group; for each of ``count`` the row, the prompt that it takes and the one that it has answered,
            each beyond the last where there is none.
        """
        index = jnp.arange(count)
        taken = index < self.waiting(busy)
        rows = jnp.where(taken, jnp.argsort(busy, stable=True)[:count], len(busy))
        answered = jnp.where(taken, self.prompt.at[rows].get(mode="clip"), len(self.samples.tokens))
        prompts = self.next + index
        group = replace(
            self, next=self.next + jnp.sum(taken), prompt=self.prompt.at[rows].set(prompts, mode="drop")
        )
        return group, rows, prompts, answered

    def write(self, prompts: Int[Array, "m"], samples: Samples) -> _Group:
        """Keeps the responses to some prompts."""
        kept = jax.tree.map(lambda x, new: x.at[prompts].set(new, mode="drop"), self.samples, samples)
        return replace(self, samples=kept)


@partial(jax.jit, static_argnames=("engine", "rows"))
def answer_in_turn(
    engine: Engine,
    rows: int,
    params: Any,
    prompt_tokens: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: Array,
) -> Samples:
    """Responses to N prompts, of which ``rows`` are answered at a time.

    They are those of answering all at once, since the noise of a token depends on its prompt and its position
    alone.
    """
    (num_prompts, prompt_length), num_tokens = prompt_tokens.shape, engine.max_new_tokens
    groups = _num_groups(rows, num_prompts)
    reads = max(1, rows // (_REFILLS * groups))  # prompts of a group that are read at once
    split = lambda x: x.reshape(groups, -1, *x.shape[1:])  # noqa: E731
    join = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    first = jnp.arange(groups)[:, None] * (num_prompts // groups)  # prompt of each group
    prompts = split(prompt_tokens), split(prompt_mask)
    params = shard_params(engine.model.cast(params), param_axes)  # once, not at every token

    def refill(carry):
        state, group = carry
        group, free, taken, answered = jax.vmap(lambda group, busy: group.take(busy, reads))(
            group, split(state.rows.busy)
        )
        group = jax.vmap(_Group.write)(group, answered, jax.tree.map(split, engine.harvest(state, free)))
        tokens, mask = (join(jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, taken)) for x in prompts)
        keys = response_keys(key, join(first + taken))
        state, _ = engine.admit(params, state, free, tokens, mask, keys)
        return state, group

    def next_token(carry):
        state, group = carry
        return engine.step(params, state)[0], group

    def goes_on(carry):
        state, group = carry
        waiting = jnp.sum(jax.vmap(_Group.waiting)(group, split(state.rows.busy)))
        left = num_prompts - jnp.sum(group.next)
        return jnp.any(state.rows.busy) & ((waiting < jnp.minimum(groups * reads, left)) | (left == 0))

    def unfinished(carry):
        state, group = carry
        return jnp.any(state.rows.busy) | (jnp.sum(group.next) < num_prompts)

    start = _Group.start(num_prompts // groups, rows // groups, num_tokens)
    group = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), start)
    turn = lambda carry: lax.while_loop(goes_on, next_token, refill(carry))  # noqa: E731
    state = engine.init(rows, prompt_length + num_tokens - 1)
    state, group = lax.while_loop(unfinished, turn, (state, group))
    last = jax.tree.map(split, engine.harvest(state))
    return jax.tree.map(join, jax.vmap(_Group.write)(group, group.prompt, last).samples)


def _num_groups(rows: int, num_prompts: int) -> int:
    """One for every device that has rows of its own: no row ever moves to another device."""
    placement = current_placement()
    if placement is None:
        return 1
    groups = rows // placement.sharding((rows,), ("attention_batch",)).shard_shape((rows,))[0]
    return groups if num_prompts % groups == 0 else 1
