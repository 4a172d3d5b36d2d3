"""A sampler: of several answers to each prompt, the one that a reward or the policy itself likes best."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from hybrid_jax import REWARDS, Ancestral, Count, Positive, Samples, settings


@settings
class BestOfN:
    """Draws ``n`` answers to each prompt and keeps the one with the highest score.

    What it draws is not the policy's own distribution, so PPO refuses it: it has no ``policy_temperature``.
    """

    max_new_tokens: Count = 64  # longest answer
    n: Count = 4  # answers to choose from
    temperature: Positive = 1.0  # of the draws
    reward: Annotated[Any, REWARDS] | None = (
        None  # one that reads tokens; None takes the mean log-prob of a token
    )

    def __call__(
        self, model: Any, params: Any, prompts: Any, mask: Any, key: Any, *, eos_ids: Sequence[int] = ()
    ) -> Samples:
        """The best answer to each prompt."""
        prompts, mask = (jnp.repeat(x, self.n, axis=0) for x in (prompts, mask))
        draw = Ancestral(self.max_new_tokens, self.temperature)
        drawn = draw(model, params, prompts, mask, key, eos_ids=eos_ids)
        scores = self._scores(prompts, mask, drawn).reshape(-1, self.n)
        best = jnp.arange(len(scores)) * self.n + jnp.argmax(scores, axis=1)
        return replace(jax.tree.map(lambda x: x[best], drawn), log_probs=None)

    def _scores(self, prompts: Any, mask: Any, drawn: Samples) -> Any:
        if self.reward is None:
            return drawn.log_probs.sum(axis=1) / drawn.action_mask.sum(axis=1)
        tokens = jnp.concatenate([prompts, drawn.tokens], axis=1)
        read = jnp.concatenate([mask, drawn.attention_mask], axis=1)
        return self.reward.score_tokens(tokens, read, drawn.action_mask)
