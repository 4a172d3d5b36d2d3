"""A policy and many environments in conversation: the device samples some while the host steps the others.

    slot is free        a conversation whose environment has been reset begins: its opening is read
    answer under way    all rows draw tokens together, some at a time
    answer ended        its text goes to the environment, on a thread of its own
    reply arrived       it becomes tokens, which are read behind the answer, and the next answer begins
    conversation ended  its row is read out, and the slot is free

Nothing waits for the slowest. What a conversation says does not depend on the others, nor on the time that any
of them takes: the same seeds give the same tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.continuations import decode_behind
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.data.turn_tokens import TurnEncoder
from hybrid_jax.dialogue.conversation import Conversation, ConversationSettings, Turn
from hybrid_jax.environments.base import AnswerFn, EnvironmentSettings
from hybrid_jax.environments.pool import Reply, Worlds
from hybrid_jax.models.base import Params
from hybrid_jax.sampling.logits import response_keys
from hybrid_jax.sampling.turns import TurnEngine, TurnState

_AT_ONCE = 8  # rows that begin, or read, in one call: a call costs as much for fewer
_STEPS = 8  # tokens that rows draw before the host looks for replies
_LETTERS = 64  # of a token, at most: what is longer is not even encoded
_SHORTEST = 16  # tokens that replies are padded to, at least


class TooSmall(UserError):
    """A setting that lets no conversation go on: no failure of an environment."""


@dataclass(frozen=True)
class Opening:
    """The beginning of a conversation: the seed of its environment, and a row of data where it reads one."""

    seed: int
    row: Mapping[str, Any]


class Converser:
    """Holds conversations of one model, with one environment.

    Args:
        engine: that samples answers.
        environment: settings of the environments.
        settings: of the conversations.
        tokenizer: of the model; it has a chat template.
        prompt_length: tokens of an opening at most, P.
        slots: conversations at a time.
        compiled: makes a program of a pure function, for the devices that sample.
        where: the setting that a mistake is told of, such as "phases.ppo".
    """

    def __init__(
        self,
        engine: TurnEngine,
        environment: EnvironmentSettings,
        settings: ConversationSettings,
        tokenizer: Tokenizer,
        prompt_length: int,
        slots: int,
        compiled: Callable[..., Any] = jax.jit,
        where: str = "",
    ):
        self.settings, self.prompt_length, self.slots = settings, prompt_length, slots
        self._engine, self._environment, self._where = engine, environment, where
        self._tokenizer = tokenizer
        self._encoder = TurnEncoder(tokenizer, rewriting=settings.rewriting_template)
        longest = settings.max_reply_tokens
        self._buckets = [n for n in (longest // 4,) if n >= _SHORTEST] + [longest]
        self._is_warm = False
        self._init = compiled(lambda rows: engine.init(rows, prompt_length), static_argnums=0)
        self._admit = compiled(self._admitted, donate_argnums=1)
        self._read = compiled(engine.read, donate_argnums=1)
        self._decode = compiled(self._decoded, donate_argnums=1)
        self._harvest = compiled(engine.harvest)

    def converse(
        self,
        params: Params,
        key: Array,
        openings: Sequence[Opening],
        answer_fn: AnswerFn | None = None,
        environment: EnvironmentSettings | None = None,
    ) -> Talks:
        """Holds a conversation for each opening.

        Args:
            params: of the model, as the computation reads them.
            key: of all answers; conversation i folds i in.
            openings: how each begins.
            answer_fn: another model's answers, for environments that ask for them.
            environment: in place of the own one.

        Raises:
            UserError: an environment failed and ``on_failure`` is error, or all of them did.
        """
        worlds = Worlds(
            environment or self._environment,
            timeout_seconds=self.settings.timeout_seconds,
            retries=self.settings.retries,
            most_letters=_LETTERS * max(self.settings.max_reply_tokens, self.prompt_length),
            answer_fn=answer_fn,
        )
        try:
            return _Session(self, worlds, params, key, openings).run()
        finally:
            worlds.close()

    def _admitted(self, params, state, rows, prompts, mask, key, numbers) -> TurnState:
        return self._engine.admit(params, state, rows, prompts, mask, response_keys(key, numbers))

    def _decoded(self, params, state, steps) -> tuple[TurnState, Array]:
        state = self._engine.decode(params, state, steps)
        return state, state.talks.busy

    def opening_tokens(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """The tokens that the first answer is sampled behind.

        Raises:
            UserError: there are too many, or the chat template refuses the messages.
        """
        tokens = self._encoder.opening(messages, {"tools": list(tools)} if tools else None)
        if len(tokens) > self.prompt_length:
            raise UserError(
                f"{self._where}.max_prompt_length must hold the first messages of the environment, "
                f"{len(tokens)} tokens, got {self.prompt_length}"
            )
        return tokens

    def reply_tokens(self, messages: Sequence[Message], tools: Sequence[Any], ended: bool) -> list[int]:
        """The tokens between an answer and the next one; texts are cut until they are few enough."""
        variables = {"tools": list(tools)} if tools else None
        most, shown = self.settings.max_reply_tokens, [dict(message) for message in messages]
        while len(tokens := self._encoder.between(shown, ended=ended, variables=variables)) > most:
            longest = max(shown, key=lambda message: len(message["content"]))
            letters = len(longest["content"])
            if not letters:
                raise TooSmall(
                    f"{self._where}.conversation.max_reply_tokens must hold a reply without its text, "
                    f"{len(tokens)} tokens, got {most}"
                )
            longest["content"] = longest["content"][: min(letters - 1, letters * most // len(tokens))]
        return tokens

    def bucket(self, count: int) -> int:
        """The length that a reply of ``count`` tokens is padded to."""
        return next(length for length in self._buckets if length >= count)


@dataclass(frozen=True)
class Talks:
    """Finished conversations, and the time that they took."""

    conversations: list[Conversation]
    metrics: dict[str, float]


@dataclass
class _Read:
    """A reply that a row is to read."""

    number: int
    tokens: list[int]
    goes_on: bool


class _Session:
    """The conversations of one call, and where each of them is."""

    def __init__(self, of: Converser, worlds: Worlds, params: Any, key: Array, openings: Sequence[Opening]):
        self.of, self.worlds, self.params, self.key, self.openings = of, worlds, params, key, openings
        self.talks = [Conversation() for _ in openings]
        self.slots = of.slots
        self.free = deque(range(self.slots))
        self.slot: dict[int, int] = {}  # of each conversation under way
        self.begun = 0  # whose environments have been reset
        self.ready: deque[int] = deque()  # with an opening, waiting for a slot
        self.reading: list[_Read] = []
        self.speaking: set[int] = set()
        self.over = 0
        self.state: TurnState = of._init(self.slots)
        if not of._is_warm:  # so that no length of a reply is compiled in a later step
            for length in of._buckets:
                self._read_at_once([], length)
            of._is_warm = True
        self.seconds = {"waiting": 0.0, "sampling": 0.0}

    def run(self) -> Talks:
        while self.over < len(self.openings):
            # A few more than there are slots, so that none stays empty while an environment is made.
            while self.begun < len(self.openings) and self.begun < self.over + 2 * self.slots:
                opening = self.openings[self.begun]
                self.worlds.reset(self.begun, opening.seed, opening.row)
                self.begun += 1
            self._hear()
            self._admit()
            self._read()
            self._speak()
        return Talks(self.talks, self._metrics())

    def _hear(self) -> None:
        """Takes the replies that have arrived; waits for one only if nothing else is left to do."""
        idle = not (self.speaking or self.reading or (self.ready and self.free))
        began = time.perf_counter()
        replies = self.worlds.finished(None if idle else 0.0)
        self.seconds["waiting"] += time.perf_counter() - began
        for reply in replies:
            talk = self.talks[reply.place]
            if reply.failure is not None:
                self._fail(reply.place, reply.failure)
            elif not talk.turns:
                self._opened(reply)
            else:
                self._replied(reply)

    def _opened(self, reply: Reply) -> None:
        talk = self.talks[reply.place]
        talk.opening = tuple(reply.messages)
        try:
            talk.tokens = self.of.opening_tokens(talk.opening, self.worlds.tools(reply.place))
        except UserError as error:
            self._fail(reply.place, str(error))
            return
        self.ready.append(reply.place)

    def _replied(self, reply: Reply) -> None:
        number, talk, limits = reply.place, self.talks[reply.place], self.of.settings
        turn = talk.turns[-1]
        turn.reward, turn.replies, turn.info = float(reply.reward), tuple(reply.messages), reply.info
        if reply.terminated:
            self._end(number, "terminated")
            return
        broken_off = reply.truncated or len(talk.turns) == limits.max_turns
        tokens: list[int] = []
        if reply.messages:
            try:
                tools = self.worlds.tools(number)
                tokens = self.of.reply_tokens(reply.messages, tools, turn.complete)
            except TooSmall:
                raise
            except UserError as error:
                self._fail(number, str(error))
                return
        room = limits.max_tokens - turn.end
        if broken_off or len(tokens) >= room:
            # The last reply is part of the state that is valued, if it fits.
            if tokens and len(tokens) <= room:
                self.reading.append(_Read(number, tokens, goes_on=False))
            else:
                self._end(number, "truncated")
            return
        self.reading.append(_Read(number, tokens, goes_on=True))

    def _admit(self) -> None:
        while self.ready and self.free:
            numbers = [self.ready.popleft() for _ in range(min(_AT_ONCE, len(self.ready), len(self.free)))]
            rows = np.full(_AT_ONCE, self.slots, np.int32)
            numbered = np.zeros(_AT_ONCE, np.int32)
            prompts = np.zeros((_AT_ONCE, self.of.prompt_length), np.int32)
            mask = np.zeros(prompts.shape, bool)
            mask[:, -1] = True  # a row that is left out reads something, too
            for place, number in enumerate(numbers):
                tokens = self.talks[number].tokens
                self.slot[number] = rows[place] = self.free.popleft()
                numbered[place] = number
                prompts[place, -len(tokens) :], mask[place, -len(tokens) :] = tokens, True
            self.state = self.of._admit(self.params, self.state, rows, prompts, mask, self.key, numbered)
            self.speaking |= set(numbers)

    def _read(self) -> None:
        reading, self.reading = self.reading, []
        for length in self.of._buckets:
            those = [item for item in reading if self.of.bucket(len(item.tokens)) == length]
            for start in range(0, len(those), _AT_ONCE):
                self._read_at_once(those[start : start + _AT_ONCE], length)

    def _read_at_once(self, items: Sequence[_Read], length: int) -> None:
        rows = np.full(_AT_ONCE, self.slots, np.int32)
        replies = np.zeros((_AT_ONCE, length), np.int32)
        mask, goes_on = np.zeros(replies.shape, bool), np.zeros(_AT_ONCE, bool)
        for place, item in enumerate(items):
            rows[place], goes_on[place] = self.slot[item.number], item.goes_on
            replies[place, -len(item.tokens) :], mask[place, -len(item.tokens) :] = item.tokens, True
        self.state = self.of._read(self.params, self.state, rows, replies, mask, goes_on)
        for item in items:
            if item.goes_on:
                self.speaking.add(item.number)
            else:
                self._end(item.number, "truncated")

    def _speak(self) -> None:
        """Draws tokens of all answers under way, and sends off those that have ended."""
        if not self.speaking:
            return
        began = time.perf_counter()
        self.state, busy = self.of._decode(self.params, self.state, np.int32(_STEPS))
        busy = np.asarray(busy)
        self.seconds["sampling"] += time.perf_counter() - began
        ended = sorted(number for number in self.speaking if not busy[self.slot[number]])
        if not ended:
            return
        talks = self.state.talks
        tokens, length, spoken = (np.asarray(x) for x in (talks.tokens, talks.length, talks.spoken))
        for number in ended:
            self.speaking.remove(number)
            row = self.slot[number]
            said = tokens[row, : length[row]]
            end = int(length[row])
            start = end - int(spoken[row])
            eos_ids, talk = self.of._engine.eos_ids, self.talks[number]
            words = [token for token in said[start:].tolist() if token not in eos_ids]
            text = decode_behind(self.of._tokenizer, [*talk.tokens, *said[:start].tolist()], words)
            talk.turns.append(Turn(text, start, end, complete=int(said[-1]) in eos_ids))
            self.worlds.step(number, text)

    def _fail(self, number: int, why: str) -> None:
        if self.of.settings.on_failure == "error":
            raise UserError(f"{self.of._where}.environment: {why}")
        self.talks[number].failure = why
        self._end(number, "failed")

    def _end(self, number: int, how: Any) -> None:
        """Reads out the row of a conversation, which makes room for another."""
        talk = self.talks[number]
        talk.end = how
        self.over += 1
        self.worlds.close(number)
        if number not in self.slot:
            return
        row = self.slot.pop(number)
        samples = jax.device_get(self.of._harvest(self.state))
        count = int(samples.attention_mask[row].sum())
        talk.said, talk.log_probs = samples.tokens[row, :count], samples.log_probs[row, :count]
        self.free.append(row)

    def _metrics(self) -> dict[str, float]:
        counts = {f"world_{name}": float(count) for name, count in self.worlds.take_counts().items()}
        return counts | {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
