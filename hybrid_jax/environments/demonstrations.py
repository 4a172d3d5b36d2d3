"""Demonstrations: conversations of an environment's expert, to begin by examples before learning by reward."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from hybrid_jax.core.batches import Example, Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Seed, Share, settings
from hybrid_jax.data.conversations import chat_example
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.sources import SOURCES, Split
from hybrid_jax.environments import catalogue  # noqa: F401  registers the environments
from hybrid_jax.environments.base import ENVIRONMENTS, reads_rows
from hybrid_jax.environments.replies import BadReply, said_at_reset, said_at_step, tools_of

FIRST_SEED = 2**32  # those below are for training by reward and for evaluation
MOST_LETTERS = 2**20


@SOURCES.register("demonstrations")
@settings(kw_only=True)
class Demonstrations(Filtered):
    """Conversations that the expert of an environment has with it, as examples to learn from.

    An environment has an expert where its settings have ``expert(messages)``, which answers a conversation so
    far, or where it has ``expert()`` itself. ``moves()`` of the settings are all answers to choose from. Each
    row has its return in the column "return", by which ``filter`` may choose. The seeds of the conversations
    are those from 2^32 on, which no phase and no evaluation draws; held-out ones are others than those of
    training.

    Attributes:
        environment: to play with.
        num_rows: conversations to learn from.
        num_held_out: conversations that are held out.
        expert_share: of the answers; the others are drawn from all moves.
        max_turns: after which a conversation is broken off.
        seed: of the conversations and of what is drawn.
    """

    environment: Annotated[Any, ENVIRONMENTS]
    num_rows: Count = 1000
    num_held_out: Count = 100
    expert_share: Share = 1.0
    max_turns: Count = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        name = type(self.environment).__name__
        if reads_rows(self.environment):
            raise ValueError(f"environment must begin without a row of data, which {name} reads")
        if self.expert_share < 1 and not hasattr(self.environment, "moves"):
            raise ValueError(f"expert_share must be 1 for an environment without moves, which {name} is")

    def load(self, split: Split) -> Sequence[Example]:
        """Plays the conversations of the split, the same ones every time."""
        rows = range(self.num_rows)
        if split == "held_out":
            rows = range(self.num_rows, self.num_rows + self.num_held_out)
        first = self.seed * (self.num_rows + self.num_held_out)
        played = {row.where: row for row in (self._play(FIRST_SEED + first + row) for row in rows)}
        return [played[where] for where, _ in self.kept(((w, row.columns) for w, row in played.items()), split)]

    def _play(self, seed: int) -> Example:
        environment = self.environment.make()
        where = f"{type(self.environment).__name__}, seed {seed}"
        try:
            rewards, messages = zip(*self._turns(environment, seed), strict=True)
            variables = {"tools": list(tools)} if (tools := tools_of(environment)) else {}
        except BadReply as error:
            raise UserError(f"environment {where}: {error}") from error
        finally:
            getattr(environment, "close", lambda: None)()
        return chat_example([m for part in messages for m in part], where, {"return": sum(rewards)}, variables)

    def _turns(self, environment: Any, seed: int) -> Iterator[tuple[float, Sequence[Message]]]:
        """The reward of each answer, and the messages up to it, which come after the one before."""
        draw, messages = random.Random(f"moves {seed}"), list[Message]()  # apart from the environment's draws
        said = said_at_reset(environment.reset(seed), MOST_LETTERS)
        for _ in range(self.max_turns):
            if draw.random() < self.expert_share:
                text = self._expert(environment, [*messages, *said.messages])
            else:
                text = draw.choice(self.environment.moves())
            new = [*said.messages, {"role": "assistant", "content": text}]
            messages += new
            said = said_at_step(environment.step(text), MOST_LETTERS)
            yield said.reward, new
            if said.terminated or said.truncated:
                return

    def _expert(self, environment: Any, messages: Sequence[Message]) -> str:
        if hasattr(self.environment, "expert"):
            return self.environment.expert(messages)
        if hasattr(environment, "expert"):
            return environment.expert()
        raise UserError(f"environment {type(self.environment).__name__} has no expert to demonstrate it")
