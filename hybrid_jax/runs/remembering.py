"""Answers of a policy that remembers a user: the memory is read on with each prompt and each answer.

What was asked and answered before is not read again: a turn costs as much however many there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.seeds import check_seed
from hybrid_jax.data.packing import encode_prompt
from hybrid_jax.data.turn_tokens import TurnEncoder
from hybrid_jax.models.memory.keeping import Continued, kept_of, resumed
from hybrid_jax.runs.memory_folder import Memory, MemoryFolder
from hybrid_jax.runs.policy import Answer, Policy, example_of
from hybrid_jax.runs.terminal_chat import Reply, padded, sampled


class Remembering:
    """A policy and the memory of one user.

    Args:
        policy: that answers.
        folder: of the memory.
        user: whose it is.
        seed: of the sampling.

    Raises:
        UserError: see `MemoryFolder`.
    """

    def __init__(self, policy: Policy, folder: str, user: str, seed: int = 0):
        try:
            check_seed(seed)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._policy, self._root = policy, root_key(seed, Purpose.GENERATION)
        self._file = MemoryFolder(folder, user, policy.model, policy.params)
        self._encoder = TurnEncoder(policy.tokenizer, rewriting="append")
        self.memory = self._file.read()

    def answers(self, prompts: Sequence[Any]) -> Iterator[Answer]:
        """Answers one prompt after the other, as `Policy.generate` takes them; each is remembered for the next.

        An answer is given before it is kept.

        Raises:
            UserError: a prompt is empty or too long, or the memory cannot be kept.
        """
        for number, prompt in enumerate(prompts):  # a fault is found before anything is remembered
            self._checked(prompt, self.memory, number)
        for number, prompt in enumerate(prompts):
            answer, memory = self.answer(prompt, self.memory, number)
            yield answer
            self.keep(memory)

    def answer(self, prompt: Any, memory: Memory, number: int = 0) -> tuple[Answer, Memory]:
        """Answers a prompt behind a memory, and gives the memory with both; nothing is kept yet.

        Args:
            prompt: as of `Policy.generate`.
            memory: before it.
            number: of the answer, for its noise.
        """
        policy = self._policy
        example, tokens = self._checked(prompt, memory, number)
        params = {"model": policy.params, "memory": memory.kept}
        going_on = replace(policy, model=Continued(policy.model), params=params)
        said = sampled(going_on, tokens, jax.random.fold_in(self._root, number))
        read = [*tokens, *said.tokens]
        kept = _read(policy.model, policy.params, memory.kept, *padded(read, policy.model.max_length))
        after = Memory(kept, memory.tokens + len(read), said.complete)
        return Answer(example.prompt, said.text, said.complete), after

    def keep(self, memory: Memory) -> None:
        """Writes a memory, which is the user's from now on.

        Raises:
            UserError: it cannot be written.
        """
        self._file.write(memory)
        self.memory = memory

    def reply(self, turns: Sequence[Memory], text: str, number: int = 0) -> Reply:
        """`terminal_chat.Chat.reply`: the one turn is the memory, and only the message itself is read."""
        memory = turns[0] if turns else self._file.nothing
        answer, after = self.answer([{"role": "user", "content": text}], memory, number)
        return Reply(answer, (after,), 0)

    def _checked(self, prompt: Any, memory: Memory, number: int) -> tuple[Example, list[int]]:
        """The example of a prompt and its tokens, which are some and not too many."""
        example = example_of(prompt, number + 1, self._policy.template_variables)
        tokens, room = self._tokens(example, memory), self._policy.prompt_room()
        if not 0 < len(tokens) <= (room or len(tokens)):
            most = "" if room is None else f" and at most {room}, to leave room for sampler.max_new_tokens"
            raise UserError(f"prompt {number + 1} must have at least 1 token{most}, got {len(tokens)}")
        return example, tokens

    def _tokens(self, example: Example, memory: Memory) -> list[int]:
        """The tokens of a prompt: start tokens are read once, and later messages follow an answer."""
        if not memory.tokens:
            return encode_prompt(example, self._policy.tokenizer)
        if not example.messages:
            return self._policy.tokenizer.encode(example.prompt)
        variables = example.template_variables
        return self._encoder.between(example.question, ended=memory.ended, variables=variables)


@partial(jax.jit, static_argnames="model")
def _read(model: Any, params: Any, memory: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    """Reads more tokens behind a memory; returns the memory of both."""
    cache = resumed(model, memory, model.init_cache(1, tokens.shape[1]))
    return kept_of(model, model.extend(model.cast(params), tokens, mask, cache)[1])
