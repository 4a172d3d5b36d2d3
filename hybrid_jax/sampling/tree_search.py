"""Tree search: before each token a tree of possible answers is grown where it pays off (Gumbel MuZero).

A state is a beginning, an action a token, and what follows is certain. The return of an answer y is

    G(y) = r(y) + beta · Σ_t log p(y_t | y_<t)

The prior of a node is p, its value that of a value function of the beginning, or 0 without one; behind an end
nothing more is received. The token that the search prefers at the root is said, then the next tree is grown.
With enough ``simulations`` to see all answers this is the best one; with few it is p that decides. A tree keeps
a cache for each of its nodes: memory grows with ``simulations``.

Needs `mctx` (extra ``search``). Source: Danihelka et al. 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.metrics.packages import import_package
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.guidance import ByValue, read_value
from hybrid_jax.sampling.logits import is_end
from hybrid_jax.sampling.scoring import ChoosesByReward, Score, check_scores, score_of


@SAMPLERS.register("tree_search")
@settings
class TreeSearch(ChoosesByReward):
    """Says the token that a search over answers prefers, one after the other."""

    max_new_tokens: Count = 64  # longest response
    reward: Annotated[Any, REWARDS] | None = None  # of a whole response, on tokens
    value: str | None = None  # folder of a value function of beginnings, as an export of a run writes it
    beta: NonNegative = 0.0  # weight of each token's log-probability in what is searched for
    simulations: BatchSize = 32  # nodes that a tree grows by before each token
    candidates: Count = 16  # likely tokens that are tried at its root
    noise: NonNegative = 1.0  # scale of the Gumbel noise on what is tried first; 0: always the same answer

    def __post_init__(self):
        if self.reward is None and self.value is None and self.beta == 0:
            raise ValueError("tree_search needs a reward, a value, or beta above 0, got none of them")

    def __call__(
        self,
        model: LanguageModel,
        params: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        *,
        eos_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
    ) -> Samples:
        search = import_package("mctx", "sampler tree_search", "pip install -e '.[search]' in the checkout")
        check_fits(model, prompt_tokens.shape[1], self.max_new_tokens, eos_ids)
        score_of(self.reward, prompt_tokens, prompt_mask, eos_ids, None)  # refuses a reward on texts
        critic, critic_params = None, {}
        if self.value is not None:
            room = prompt_tokens.shape[1], self.max_new_tokens
            critic, critic_params = read_value(self.value, model, *room)
        settings = Static((self, search))
        inputs = (params, prompt_tokens, prompt_mask, key)
        samples, scores = _searched(settings, model, critic, critic_params, tuple(eos_ids), *inputs)
        check_scores(scores, scores)
        return samples

    @property
    def reads_texts(self) -> bool:
        """False: the trees are grown on the device."""
        return False


@struct.dataclass
class Node:
    """A beginning, [B ...] for one of each row."""

    caches: Any  # of the model and of the value function, each row's by itself
    logits: Float[Array, "B V"]  # of the next token
    value: Float[Array, "B"]
    tokens: Int[Array, "B R"]
    length: Int[Array, "B"]
    ended: Bool[Array, "B"]

    @property
    def samples(self) -> Samples:
        """The beginning as a response."""
        mask = jnp.arange(self.tokens.shape[1]) < self.length[:, None]
        return Samples(self.tokens, None, mask, mask)


@partial(jax.jit, static_argnames=("settings", "model", "critic", "eos_ids"))
def _searched(
    settings: Static[tuple[TreeSearch, Any]],
    model: LanguageModel,
    critic: Any,
    critic_params: Params,
    eos_ids: tuple[int, ...],
    params: Params,
    prompts: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    key: Array,
) -> tuple[Samples, Float[Array, "B"]]:
    """The responses and their rewards."""
    sampler, search = settings.value
    judge = None if critic is None else ByValue(critic, critic.cast(critic_params))
    params, length = model.cast(params), sampler.max_new_tokens
    score = score_of(sampler.reward, prompts, mask, eos_ids, None)
    grow = partial(_grown, sampler, model, params, judge, score, eos_ids)

    def recurrent(_, key: Array, token: Int[Array, "B"], node: Node):
        after, reward = grow(node, token)
        discount = jnp.where(after.ended, 0.0, 1.0)
        value = jnp.where(after.ended, 0.0, after.value)
        output = search.RecurrentFnOutput(
            reward=reward, discount=discount, prior_logits=after.logits, value=value
        )
        return output, after

    def say(carry: tuple[Array, Node]) -> tuple[Array, Node]:
        t, node = carry
        policy = search.gumbel_muzero_policy(
            (),
            keys[t],
            search.RootFnOutput(prior_logits=node.logits, value=node.value, embedding=node),
            recurrent,
            sampler.simulations,
            max_num_considered_actions=min(sampler.candidates, model.vocab_size),
            gumbel_scale=sampler.noise,
        )
        return t + 1, grow(node, policy.action)[0]

    keys, root = jax.random.split(key, length), _begun(model, params, judge, prompts, mask, length)
    unfinished = lambda carry: (carry[0] < length) & ~jnp.all(carry[1].ended)  # noqa: E731
    node = lax.while_loop(unfinished, say, (jnp.int32(0), root))[1]
    return node.samples, score(node.samples)


def _begun(model: LanguageModel, params: Params, judge: ByValue | None, prompts, mask, length: int) -> Node:
    """The root of each row, whose prompt has been read; rows have caches of their own, as nodes must."""

    def read(tokens: Int[Array, "P"], mask: Bool[Array, "P"]):
        tokens, mask = tokens[None], mask[None]
        empty = model.init_cache(1, tokens.shape[1] + length)
        logits, cache = model.prefill(params, tokens, mask, empty)
        values, kept = jnp.zeros(1), None
        if judge is not None:
            kept = judge.critic.backbone.init_cache(1, tokens.shape[1] + length)
            values, kept = judge.read(tokens, mask, kept)
        return (cache, kept), logits[0].astype(jnp.float32), values[0]

    caches, logits, value = jax.vmap(read)(prompts, mask)
    rows = len(prompts)
    return Node(
        caches=caches,
        logits=logits,
        value=value,
        tokens=jnp.zeros((rows, length), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
    )


def _grown(
    sampler: TreeSearch,
    model: LanguageModel,
    params: Params,
    judge: ByValue | None,
    score: Score,
    eos_ids: tuple[int, ...],
    node: Node,
    token: Int[Array, "B"],
) -> tuple[Node, Float[Array, "B"]]:
    """The node behind a token, and what was received on the way; nothing changes behind an end."""

    def read(token: Int[Array, ""], caches: Any):
        logits, cache = model.step(params, token[None], caches[0])
        values, kept = jnp.zeros(1), caches[1]
        if judge is not None:
            values, kept = judge.read(token[None, None], jnp.ones((1, 1), bool), kept)
        return (cache, kept), logits[0].astype(jnp.float32), values[0]

    rows = jnp.arange(len(token))
    log_prob = jax.nn.log_softmax(node.logits)[rows, token]
    caches, logits, value = jax.vmap(read)(token, node.caches)
    write = jax.vmap(lambda row, t, token: row.at[t].set(token, mode="drop"))
    place = jnp.where(node.ended, sampler.max_new_tokens, node.length)
    length = node.length + ~node.ended
    ends = ~node.ended & (is_end(token, eos_ids) | (length == sampler.max_new_tokens))
    after = Node(
        caches=caches,
        logits=logits,
        value=value,
        tokens=write(node.tokens, place, token),
        length=length,
        ended=node.ended | ends,
    )
    # Without a reward an answer is worth what the value said of it before its end: what stands behind one it
    # has not learned.
    worth = node.value if sampler.reward is None else score(after.samples)
    received = sampler.beta * log_prob + jnp.where(ends, worth, 0.0)
    return after, jnp.where(node.ended, 0.0, received)
