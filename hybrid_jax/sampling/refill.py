"""Sampling many prompts in few slots: a row that has ended takes the next prompt, in one compiled loop.

Without it a batch takes as many steps as its longest response; with it the slots stay busy until the prompts
run out. All rows write the same slot of the cache, which is a ring: a new prompt is read into it so that it
ends right before that slot. Prompts are read several at a time, once as many slots wait, since reading few
tokens takes a device as long as reading many.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import SlotCache
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import current_placement, shard_params
from hybrid_jax.sampling.logits import is_end, response_noise, sample_token

if TYPE_CHECKING:
    from hybrid_jax.sampling.decode import Sampler

_REFILLS = 8  # parts in which the slots take new prompts


@struct.dataclass
class _Group:
    """The slots of one device, and the prompts that they answer.

    Its methods are for one group; `generate_in_slots` maps them over all groups. What is no slot of the group
    (``b`` is none) is left out.
    """

    samples: Samples  # of its n prompts
    next: Int[Array, ""]  # the first prompt that no slot has taken
    busy: Bool[Array, "b"]
    row: Int[Array, "b"]  # the prompt that a busy slot answers
    length: Int[Array, "b"]  # tokens of its response so far
    token: Int[Array, "b"]  # the last of them

    @classmethod
    def start(cls, prompts: int, slots: int, num_tokens: int) -> _Group:
        zeros = jnp.zeros(slots, jnp.int32)
        return cls(Samples.empty(prompts, num_tokens), jnp.int32(0), zeros > 0, zeros, zeros, zeros)

    def waiting(self) -> Int[Array, ""]:
        """Free slots that a prompt is left for."""
        return jnp.minimum(jnp.sum(~self.busy), len(self.samples.tokens) - self.next)

    def take(self, count: int) -> tuple[_Group, Int[Array, "m"]]:
        """Gives the next prompts to up to ``count`` free slots, and says which."""
        taken = jnp.arange(count) < self.waiting()
        slots = jnp.where(taken, jnp.argsort(self.busy, stable=True)[:count], len(self.busy))
        rows = self.next + jnp.arange(count)
        group = replace(
            self,
            next=self.next + jnp.sum(taken),
            busy=_put(self.busy, slots, True),
            row=_put(self.row, slots, rows),
            length=_put(self.length, slots, 0),
        )
        return group, slots

    def record(self, slots: Int[Array, "m"], token: Array, log_prob: Array, ended: Array) -> _Group:
        """Writes down the next token of the busy ones of some slots; frees those whose response has ended."""
        busy = (slots < len(self.busy)) & _at(self.busy, slots)
        place = jnp.where(busy, _at(self.row, slots), len(self.samples.tokens)), _at(self.length, slots)
        drawn = Samples.chosen(token, log_prob, busy)
        return replace(
            self,
            samples=jax.tree.map(lambda array, value: _put(array, place, value), self.samples, drawn),
            busy=_put(self.busy, slots, busy & ~ended),
            length=_put(self.length, slots, place[1] + 1),
            token=_put(self.token, slots, token),
        )


def _at(array: Array, index: Any) -> Array:
    return array.at[index].get(mode="clip")


def _put(array: Array, index: Any, value: Any) -> Array:
    return array.at[index].set(value, mode="drop")


@partial(jax.jit, static_argnames=("model", "sampler", "eos_ids", "slots"))
def generate_in_slots(
    model, sampler: Sampler, eos_ids: tuple[int, ...], slots: int, params, prompt_tokens, prompt_mask, key
) -> Samples:
    """`generate`, in ``slots`` rows instead of one for every prompt.

    The samples are the same, since the noise of a token depends on its prompt and its position alone.
    """
    (num_prompts, prompt_length), num_tokens = prompt_tokens.shape, sampler.max_new_tokens
    groups = _num_groups(slots, num_prompts)
    reads = max(1, slots // (_REFILLS * groups))  # prompts of a group that are read at once
    split = lambda x: x.reshape(groups, -1, *x.shape[1:])  # noqa: E731
    join = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    noise = split(response_noise(key, num_prompts, num_tokens))
    prompts = split(prompt_tokens), split(prompt_mask)
    params = shard_params(model.cast(params), param_axes)  # once, not at every token
    every_slot = jnp.broadcast_to(jnp.arange(slots // groups), (groups, slots // groups))

    def rows(group: _Group, slots: Int[Array, "m"]):
        return _at(group.row, slots)

    def noise_of(noise: Float[Array, "n R 2"], group: _Group, slots: Int[Array, "m"]):
        return _at(noise, (_at(group.row, slots), _at(group.length, slots)))

    def draw(group: _Group, slots: Int[Array, "G m"], logits: Float[Array, "B V"]) -> _Group:
        """Writes down the next token of some slots."""
        drawn = join(jax.vmap(noise_of)(noise, group, slots))
        token, log_prob = sample_token(logits, drawn, sampler.temperature, sampler.top_k, sampler.top_p)
        ended = split(is_end(token, eos_ids)) | (jax.vmap(_at)(group.length, slots) == num_tokens - 1)
        return jax.vmap(_Group.record)(group, slots, split(token), split(log_prob), ended)

    def refill(state):
        cache, group = state
        group, slots = jax.vmap(lambda group: group.take(reads))(group)
        chosen = jax.vmap(rows)(group, slots)
        tokens, mask = (join(jax.vmap(_at)(x, chosen)) for x in prompts)
        fresh = model.init_cache(groups * reads, cache_length)
        logits, fresh = model.prefill(params, tokens, mask, fresh)
        return cache.with_rows(slots, fresh), draw(group, slots, logits)

    def next_token(state):
        cache, group = state
        logits, cache = model.step(params, join(group.token), cache)
        return cache, draw(group, every_slot, logits)

    def goes_on(state):
        _, group = state
        waiting, left = jnp.sum(jax.vmap(_Group.waiting)(group)), num_prompts - jnp.sum(group.next)
        return jnp.any(group.busy) & ((waiting < jnp.minimum(groups * reads, left)) | (left == 0))

    def unfinished(state):
        _, group = state
        return jnp.any(group.busy) | (jnp.sum(group.next) < num_prompts)

    cache_length = prompt_length + num_tokens - 1
    cache = model.init_cache(slots, cache_length)
    if not isinstance(cache, SlotCache):
        raise UserError("sampler.slots needs a model whose cache has slots, such as a decoder; leave it out")
    start = _Group.start(num_prompts // groups, slots // groups, num_tokens)
    group = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, *x.shape)), start)
    turn = lambda state: lax.while_loop(goes_on, next_token, refill(state))  # noqa: E731
    _, group = lax.while_loop(unfinished, turn, (cache, group))
    return jax.tree.map(join, group.samples)


def _num_groups(slots: int, num_prompts: int) -> int:
    """One for every device that has slots of its own: no row ever moves to another device."""
    placement = current_placement()
    if placement is None:
        return 1
    groups = slots // placement.sharding((slots,), ("attention_batch",)).shard_shape((slots,))[0]
    return groups if num_prompts % groups == 0 else 1
