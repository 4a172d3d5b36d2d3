"""The contracts between stages: every batch that crosses a folder boundary, with its shapes.

Two rules hold for all of them. Masks come from lengths, never from ``token != pad``; True keeps.
Item ``t`` of a response array belongs to response token ``t``: ``log_probs[b, t]`` is log π(token t | before),
``values[b, t]`` the value of the state *before* it, ``rewards[b, t]`` what is received *after* it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# {"role": …, "content": …}, and what else a chat template reads. ``"train": False``, which no template sees,
# marks an answer that is read and never learned.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One row of a data source: a prompt, its response if there is one, and every other column as it came.

    A conversation is its messages: they are what a model reads and learns. Its prompt is then the text of the
    message that the last answer replies to, its response the text of that answer. Its template variables are
    what a chat template reads beside the messages, such as ``tools`` and ``documents``.
    """

    prompt: str
    response: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    where: str = field(default="", repr=False, compare=False)  # its file and line, for messages
    template_variables: Mapping[str, Any] = field(default_factory=dict)  # ``tools`` and the like

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]

    @property
    def texts(self) -> list[str]:
        """All that is written in it."""
        if self.messages:
            return [message["content"] for message in self.messages]
        return [text for text in (self.prompt, self.response) if text]


@struct.dataclass
class TokenBatch:
    """Tokens to learn from. A row holds one sequence, or several packed ones told apart by `segment_ids`."""

    tokens: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]  # 0 is padding; 1, 2, … number the sequences of a row (see `number_pairs`)
    loss_mask: Bool[Array, "B T"]  # item t: token t is a target (never the first token of a segment)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to answer, left-padded to one length so that every response starts in the same column."""

    tokens: np.ndarray  # int32 [B P]
    mask: np.ndarray  # bool [B P], True at the right
    examples: tuple[Example, ...]  # length B, for the rewards

    def unpadded(self, rows: Iterable[int] | None = None) -> list[list[int]]:
        """The tokens of each prompt, or of those ``rows``, without padding."""
        chosen = range(len(self.tokens)) if rows is None else rows
        return [self.tokens[row][self.mask[row]].tolist() for row in chosen]


@struct.dataclass
class Samples:
    """The tokens after the prompts, right-padded: those that a policy chose and those that it was given.

    A token that was not chosen, such as one of a user's turn, is read and never learned. Ancestral sampling
    chooses all of them: then the two masks are the same.
    """

    tokens: Int[Array, "B R"]
    # under the distribution that sampled, temperature and truncation included; None where nobody knows it
    log_probs: Float[Array, "B R"] | None
    action_mask: Bool[Array, "B R"]  # chosen by the policy, up to and including the end-of-sequence token
    attention_mask: Bool[Array, "B R"]  # read by the policy: whatever was chosen, and more

    @classmethod
    def empty(cls, rows: int, num_tokens: int) -> Samples:
        """Makes room for so many rows and tokens, of which none is chosen yet."""
        shape = (rows, num_tokens)
        return cls.chosen(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))

    @classmethod
    def chosen(
        cls, tokens: Int[Array, "B R"], log_probs: Float[Array, "B R"], mask: Bool[Array, "B R"]
    ) -> Samples:
        """Makes the samples of a policy that chose all of their tokens."""
        return cls(tokens=tokens, log_probs=log_probs, action_mask=mask, attention_mask=mask)


_LATER: Any = None  # what a later stage adds, or nobody


@struct.dataclass
class Rollout:
    """The record of a rollout, from sampling to loss: every stage adds its fields by ``replace``.

    A [B R] array holds anything where the action mask is False.
    """

    tokens: Int[Array, "B T"]  # left-padded prompt, then right-padded response; T = P + R
    attention_mask: Bool[Array, "B T"]  # what may be read
    action_mask: Bool[Array, "B R"]  # what the policy chose: only this has a probability and an advantage
    log_probs: Float[Array, "B R"]  # of the behaviour policy, at the temperature that sampled
    group: Int[Array, "B"]  # rows that answer one prompt share a number, whatever its text
    # Scored by the models:
    reference_log_probs: Mapping[str, Float[Array, "B R"]] = field(default_factory=dict)  # by reference
    values: Float[Array, "B R"] = _LATER  # where the estimator of advantages reads them
    # Rewarded:
    plain_scores: Float[Array, "B"] = _LATER  # to log: without penalty, normalisers and baseline
    scores: Float[Array, "B"] = _LATER  # what is received for the whole response
    placed: Float[Array, "B R"] = _LATER  # the part of the scores that is received with earlier tokens
    counts: Bool[Array, "B"] = _LATER  # which rows the policy learns from, where some do not count
    last_values: Float[Array, "B"] = _LATER  # of the states that conversations ended in
    truncated: Bool[Array, "B"] = _LATER  # whether a conversation was broken off: its last value counts
    # Estimated:
    advantages: Float[Array, "B R"] = _LATER
    returns: Float[Array, "B R"] = _LATER  # what the values are to become
    loss_weights: Float[Array, "B R"] = _LATER  # of each token in the loss of the policy
    loss_shares: Float[Array, "B"] = _LATER  # the loss is divided by their sum
