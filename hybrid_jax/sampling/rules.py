"""The rules by which a token is drawn, and what they must remember of a row.

The order is that of `transformers`: repetition penalty, then frequency and presence penalty, temperature,
top-k, top-p, min-p, typical. A rule that is None costs nothing: arrays over rows and vocabulary are kept only
for penalties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.sampling.logits import sample_token


@struct.dataclass
class History:
    """Tokens of each row that the penalties read; None where no penalty reads them."""

    seen: Bool[Array, "B V"] | None = None  # tokens of its prompt and of its response
    counts: Int[Array, "B V"] | None = None  # of each token in its response


@dataclass(frozen=True)
class TokenRules:
    """How a token is drawn; see the settings of `Ancestral`, which have the same names. None is off."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @property
    def keeps_all(self) -> bool:
        """Tells whether nothing is cut off or penalised."""
        return self == TokenRules(self.temperature)

    def empty(self, rows: int, vocab_size: int) -> History:
        """The history of rows that have read and said nothing."""
        counts = self.frequency_penalty is not None or self.presence_penalty is not None
        return History(
            None if self.repetition_penalty is None else jnp.zeros((rows, vocab_size), bool),
            jnp.zeros((rows, vocab_size), jnp.int32) if counts else None,
        )

    def read(self, history: History, tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]) -> History:
        """The history of rows that have read a prompt or a reply, and begin a new response."""
        seen = None if history.seen is None else _marked(history.seen, tokens, mask)
        counts = None if history.counts is None else jnp.zeros_like(history.counts)
        return History(seen, counts)

    def draw(
        self,
        logits: Float[Array, "B V"],
        noise: Float[Array, "B 2"],
        history: History,
        busy: Bool[Array, "B"],
    ) -> tuple[Int[Array, "B"], Float[Array, "B"], History]:
        """The next token of each row, its log-probability, and the history with it, of rows that are busy."""
        token, log_prob = sample_token(
            self.penalised(logits, history),
            noise,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.typical_p,
        )
        if history.seen is not None:
            history = replace(history, seen=_marked(history.seen, token[:, None], busy[:, None]))
        if history.counts is not None:
            add = jax.vmap(lambda row, token, busy: row.at[token].add(busy))
            history = replace(history, counts=add(history.counts, token, busy))
        return token, log_prob, history

    def penalised(self, logits: Float[Array, "B V"], history: History) -> Float[Array, "B V"]:
        """The logits less the penalties.

        The repetition penalty θ makes z / θ of a logit z ≥ 0 whose token stands in the prompt or the response,
        and z · θ of a negative one (Keskar et al. 2019, as `transformers` has it). The other two are OpenAI's:
        z − frequency · count − presence · [count > 0], with the counts of the response alone.
        """
        penalty = self.repetition_penalty
        if history.seen is not None and penalty is not None:
            weaker = jnp.where(logits < 0, logits * penalty, logits / penalty)
            logits = jnp.where(history.seen, weaker, logits)
        if history.counts is not None:
            logits = logits - (self.frequency_penalty or 0.0) * history.counts
            logits = logits - (self.presence_penalty or 0.0) * (history.counts > 0)
        return logits


def _marked(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B X"], mask: Bool[Array, "B X"]
) -> Bool[Array, "B V"]:
    """``seen`` with the tokens of each row that the mask keeps."""
    nowhere = seen.shape[1]
    mark = jax.vmap(lambda row, places: row.at[places].set(True, mode="drop"))
    return mark(seen, jnp.where(mask, tokens, nowhere))
