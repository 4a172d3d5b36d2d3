"""A conversation with a policy in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.data.chat import encode_question
from hybrid_jax.data.turn_tokens import TurnEncoder
from hybrid_jax.runs.policy import Answer, Policy
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.responses import decode_responses, ended

HELP = "say something; /reset begins anew, Ctrl-C stops an answer, /quit or Ctrl-D ends"
SHORTEST = 32  # tokens to pad a conversation to; twice as many where it is longer, and so on: each compiles


@dataclass(frozen=True)
class Turn:
    """A text of the user, and the answer: its tokens as they were sampled, its text, and whether it ended."""

    asked: Message
    sampled: Sequence[int] = ()
    text: str = ""
    complete: bool = True


class Reply(NamedTuple):
    """An answer, and the conversation with it: ``dropped`` turns, the oldest, are left out."""

    answer: Answer
    turns: tuple[Any, ...]
    dropped: int


class Chat(Protocol):
    """A conversation that can be gone on with. Its turns are its own; none are its beginning."""

    def reply(self, turns: Sequence[Any], text: str, number: int = 0) -> Reply:
        """Answers ``text`` behind the turns; ``number`` is that of the answer, for its noise."""
        ...


class TerminalChat:
    """Answers in a conversation whose history is the tokens that were sampled and read.

    Where the chat template writes earlier turns in another way once more follow, the history is rendered anew
    for every answer, as the template wants it. The oldest turns are left out where the context is full.

    Args:
        policy: that answers.
        seed: of the sampling.
    """

    def __init__(self, policy: Policy, seed: int = 0):
        self._policy, self._key = policy, root_key(seed, Purpose.GENERATION)
        self._encoder = TurnEncoder(policy.tokenizer)
        self._grows = _is_stable(self._encoder, policy)

    def reply(self, turns: Sequence[Turn], text: str, number: int = 0) -> Reply:
        """Answers what the user says next.

        Args:
            turns: before it.
            text: of the user.
            number: of the answer, for its noise.

        Raises:
            UserError: what is said is longer than the context, or the template refuses it.
        """
        asked = Turn({"role": "user", "content": text})
        prompt, dropped = self._fitting([*turns, asked])
        answered = Turn(asked.asked, *sampled(self._policy, prompt, jax.random.fold_in(self._key, number)))
        kept = (*turns, answered)[dropped:]
        return Reply(Answer(text, answered.text, answered.complete), kept, dropped)

    def _fitting(self, turns: Sequence[Turn]) -> tuple[list[int], int]:
        """The tokens to answer, and how many turns are left out of them."""
        room = self._policy.prompt_room()
        for dropped in range(len(turns)):
            prompt = self._tokens(turns[dropped:])
            if room is None or len(prompt) <= room:
                return prompt, dropped
        raise UserError(
            f"a message must have at most {room} tokens, to leave room for sampler.max_new_tokens, got "
            f"{len(self._tokens(turns[-1:]))}; shorten it"
        )

    def _tokens(self, turns: Sequence[Turn]) -> list[int]:
        variables = self._policy.template_variables
        if not self._grows:
            answered = [[turn.asked, {"role": "assistant", "content": turn.text}] for turn in turns[:-1]]
            messages = [message for pair in answered for message in pair]
            return encode_question([*messages, turns[-1].asked], self._policy.tokenizer, variables)
        tokens = self._encoder.opening([turns[0].asked], variables)
        for before, turn in pairwise(turns):
            tokens += before.sampled
            tokens += self._encoder.between([turn.asked], ended=before.complete, variables=variables)
        return tokens


class Said(NamedTuple):
    """The tokens of an answer, its text, and whether it ended by itself."""

    tokens: list[int]
    text: str
    complete: bool


def sampled(policy: Policy, prompt: Sequence[int], key: Any) -> Said:
    """Samples the answer to the tokens of a prompt."""
    tokens, mask = padded(prompt, policy.prompt_room())
    inputs = (policy.model, policy.params, jnp.asarray(tokens), jnp.asarray(mask), key)
    drawn = sample(policy.sampler, *inputs, eos_ids=policy.eos_ids, tokenizer=policy.tokenizer)
    said, chosen = np.asarray(drawn.tokens), np.asarray(drawn.action_mask)
    (text,) = decode_responses(policy.tokenizer, [list(prompt)], said, chosen, policy.eos_ids)
    complete = bool(np.asarray(ended(drawn.tokens, drawn.action_mask, policy.eos_ids))[0])
    return Said(said[0][chosen[0]].tolist(), text, complete)


def padded(tokens: Sequence[int], most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """One left-padded row [1 T] and its mask; few different T, of at most ``most``, since each compiles."""
    width = SHORTEST
    while width < len(tokens):
        width *= 2
    width = width if most is None else min(width, most)
    row, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
    row[0, width - len(tokens) :], mask[0, width - len(tokens) :] = tokens, True
    return row, mask


def talk(
    chat: Chat,
    show: Callable[[Answer], None],
    turns: Sequence[Any] = (),
    keep: Callable[[Sequence[Any]], None] = lambda turns: None,
) -> None:
    """Reads what a user types until they end, and shows each answer.

    Args:
        chat: the conversation.
        show: prints an answer.
        turns: that the conversation begins behind.
        keep: is given the turns up to each answer that was shown.
    """
    number = 0
    _tell(HELP)
    with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C is heard while the device works
        while (text := _typed()) is not None:
            if text.strip() == "/reset":
                turns = ()
                continue
            try:
                answer, turns, dropped = pool.submit(chat.reply, turns, text, number).result()
            except UserError as error:
                _tell(str(error))
                continue
            except KeyboardInterrupt:
                _tell("\nstopped; the conversation goes on as if this had not been asked")
                continue
            finally:
                number += 1
            if dropped:
                _tell(f"the context is full: turns left out, the oldest: {dropped}")
            show(answer)
            try:
                keep(turns)
            except UserError as error:
                _tell(str(error))


def _typed() -> str | None:
    """A line of the user that says something; None at the end."""
    while True:
        try:
            text = input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            _tell(f"\n{HELP}")
            continue
        if text.strip():
            return None if text.strip() == "/quit" else text


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _is_stable(encoder: TurnEncoder, policy: Policy) -> bool:
    """Tells whether the template writes a turn in the same way whatever follows."""
    question = {"role": "user", "content": "Hi"}
    encode_question([question], policy.tokenizer, policy.template_variables)  # that it writes questions at all
    try:
        encoder.opening([question], policy.template_variables)
    except UserError:
        return False
    return True
