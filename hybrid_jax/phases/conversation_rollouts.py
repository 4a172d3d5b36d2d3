"""Rollouts of conversations: openings → turns of policy and environment → scored by the models → rewarded.

A conversation is one row: its opening is the prompt, everything behind it the response, of which the policy
chose its own turns. What a turn earned is received with its last token. A conversation that was broken off goes
on in the value of its last state; one whose environment failed is left out.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybrid_jax.core.batches import Message, PromptBatch, Rollout, Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.data.chat import encode_question
from hybrid_jax.data.loader import visits
from hybrid_jax.dialogue.conversation import Conversation, Turn
from hybrid_jax.dialogue.converse import Converser, Opening, Talks
from hybrid_jax.environments.base import AnswerFn, reads_rows
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.parallel.rules import ROLLOUTS, under
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.played import Played
from hybrid_jax.phases.references import shortest_context
from hybrid_jax.phases.rollout import Rollouts
from hybrid_jax.phases.rollout_functions import RolloutFunctions
from hybrid_jax.rewards.base import column_names, columns_of
from hybrid_jax.sampling.responses import decode_responses
from hybrid_jax.sampling.rules import TokenRules
from hybrid_jax.sampling.turns import TurnEngine
from hybrid_jax.training.phase import Program, Resources
from hybrid_jax.training.shapes import row_shape
from hybrid_jax.training.state import RunState

log = logging.getLogger(__name__)

_SHOWN = 8  # conversations of an evaluation that are kept in samples.jsonl
_TURN_COLUMNS = ("turn", "turns_left")  # of the policy's answers: the number of each, and of those behind it


@dataclass(frozen=True)
class Talked:
    """Conversations that the parts of the reward have read, and that have not been weighed yet."""

    talks: Talks
    samples: Samples
    rollout: Rollout
    turns: Sequence[tuple[int, Turn]]  # the row and the turn of every answer that counts
    prompts: Sequence[str]  # of those, the text of the message that each replies to
    raw: dict[str, np.ndarray]  # of those, the score by each part of the reward
    cursor: int


class ConversationRollouts(Rollouts):
    """The conversations of one phase, on the host."""

    def __init__(
        self, functions: RolloutFunctions, resources: Resources, program: Callable[[str], Callable[..., Any]]
    ):
        config, here = functions.config, f"phases.{resources.name}"
        if config.max_prompt_length is None:
            raise UserError(
                f"{here}.max_prompt_length must be set with an environment: tokens of its first messages"
            )
        self._opening: int = config.max_prompt_length
        self._environment: Any = config.environment
        self._other_environment: Any = config.held_out_environment or config.environment
        whole = config.max_prompt_length + config.conversation.max_tokens
        most = resources.model.max_length
        if most is not None and whole > most:
            raise UserError(
                f"{here}: max_prompt_length + conversation.max_tokens must be at most the model's {most} "
                f"tokens, got {config.max_prompt_length} + {config.conversation.max_tokens}"
            )
        if jax.process_count() > 1:
            raise UserError(f"{here}.environment needs one process, got {jax.process_count()}")
        self._seed = resources.seed
        self._load_held_out: Callable[[], Sequence[Any]] = resources.held_out or (lambda: ())
        self._held_out: list[Opening] | None = None  # made once, for the first evaluation
        super().__init__(functions, replace(resources, examples=None), program)
        self._examples: Sequence[Any] = ()
        if reads_rows(self._environment):
            rows = config.source.load("train") if config.source is not None else resources.examples
            self._examples = rows or ()
            self._columns = column_names(self._examples) if self._examples else []
        if resources.examples is not None:
            config.reward.check_columns([*self._columns, *_TURN_COLUMNS])

    def _compile(self) -> None:
        super()._compile()
        config, functions = self.config, self.functions
        sampling = self._placement.with_rules(ROLLOUTS[config.rollout_weights])

        def compiled(function: Callable[..., Any], **settings: Any) -> Any:
            return jax.jit(under(sampling, function), **settings)

        self._speaker = compiled(self._program("speaker"))
        self._engine = engine = TurnEngine(
            functions.model,
            functions.eos_ids,
            config.sampler.max_new_tokens,
            config.conversation.max_tokens,
            TokenRules(config.sampler.policy_temperature or 1.0),
        )
        self._slots = config.conversation.slots or config.rows
        self._decode = compiled(engine.decode)
        if self._tokenizer is None:  # only planned
            return
        self._converser = Converser(
            engine,
            self._environment,
            config.conversation,
            self._tokenizer,
            self._opening,
            self._slots,
            compiled,
            f"phases.{self.name}",
        )

    def answer(self, state: RunState, key: Array, sample_key: Array, clock: Clock) -> Talked:
        """The conversations of a step, scored by the models and by each part of the reward."""
        cursor = state.cursors.get(self.name, 0)
        openings = self._openings(cursor)
        params = self._speaker(state.base, state.train.params["model"])
        talks = self._converser.converse(params, sample_key, openings, self._answer_fn(state))
        clock.lap("rollout")
        if all(talk.end == "failed" for talk in talks.conversations):
            count, first = len(talks.conversations), talks.conversations[0].failure
            raise UserError(
                f"phases.{self.name}.environment: all {count} conversations failed; the first: {first}"
            )
        prompts, samples = self._arrays(talks.conversations)
        prompts, samples = put_rows(self._placement, prompts), put_rows(self._placement, samples)
        references = self.references.of(state)
        rollout = self._score(state.base, state.train.params, references, *prompts, samples)
        return Talked(talks, samples, rollout, *self._read_turns(talks, openings), cursor)

    def weigh(self, answered: Any, state: RunState, reward_state: Any, clock: Clock) -> Played:
        """The rollout with what every turn has earned, and what it changes."""
        talks = answered.talks.conversations
        earned, plain, reward_state, metrics = self._earned(answered, reward_state)
        counts = np.array([talk.end != "failed" for talk in talks])
        if not counts.all():
            first = next(talk.failure for talk in talks if talk.end == "failed")
            left_out = f"{(~counts).sum()} of {len(talks)} conversations are left out"
            log.warning("phases.%s.environment: %s; the first: %s", self.name, left_out, first)
        placed = np.zeros((len(talks), self.config.conversation.max_tokens), np.float32)
        scores = np.zeros(len(talks), np.float32)
        shown = np.zeros(len(talks), np.float32)
        for (row, turn), reward, raw in zip(answered.turns, earned, plain, strict=True):
            scores[row] += reward
            shown[row] += raw
            # The last turn's is received with the last token anyway.
            if turn is not talks[row].turns[-1]:
                placed[row, turn.end - 1] = reward
        received = {
            "scores": scores,
            "plain_scores": shown,
            "placed": placed,
            "counts": counts,
            "truncated": np.array([talk.end == "truncated" for talk in talks]),
        }
        clock.lap("reward")
        rollout = replace(answered.rollout, **put_rows(self._placement, received))
        cursors = {self.name: answered.cursor + self.config.prompts_per_step}
        metrics = {**metrics, **conversation_metrics(talks), **answered.talks.metrics}
        return Played(rollout, answered.samples, reward_state, metrics, None, cursors, ())

    def held_out(self, state: RunState) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Numbers and records of conversations that training never has, the same ones each time."""
        count = self.config.conversation.num_held_out
        if not count:
            return {}, []
        if self._held_out is None:
            own = self.config.source
            load = self._load_held_out if own is None else partial(own.load, "held_out")
            rows = load() if reads_rows(self._other_environment) else ()
            self._held_out = [
                Opening(episode_seed(self._seed, i, held_out=True), _row(rows[i % len(rows)]) if rows else {})
                for i in range(count)
            ]
        if self.config.answered_by is not None:  # before the first step it may not be frozen yet
            state = self.references.updated(state)
        params = self._speaker(state.base, state.train.params["model"])
        key = root_key(self._seed, Purpose.CONVERSATIONS)
        found = self._converser.converse(
            params, key, self._held_out, self._answer_fn(state), self._other_environment
        )
        talks, numbers = found.conversations, conversation_metrics(found.conversations)
        if self.config.has_reward and numbers["failed_fraction"] < 1:
            turns, prompts, raw = self._read_turns(found, self._held_out)
            for (_, turn), score in zip(turns, self.config.reward.plain_scores(raw, prompts), strict=True):
                turn.reward += float(score)
        if fine := [talk.reward for talk in talks if talk.end != "failed"]:
            numbers["score"] = float(np.mean(fine))
        return numbers, [{"index": i, **talk.record} for i, talk in enumerate(talks[:_SHOWN])]

    def _answer_fn(self, state: RunState) -> AnswerFn | None:
        """The answers of the reference that plays a part in the environment; the same to the same messages."""
        if self.config.answered_by is None:
            return None
        context = shortest_context(self.config.references, self.functions.model)
        # It reads its instruction beside the conversation, whose texts may be other tokens than those sampled.
        length = 2 * (self._opening + self.config.conversation.max_tokens)
        length = length if context is None else min(length, context - self.config.sampler.max_new_tokens)
        root = root_key(self._seed, Purpose.CONVERSATIONS)

        def answer(messages: Sequence[Message]) -> str:
            asked = encode_question(messages, self._tokenizer)
            if len(asked) > length:
                raise UserError(
                    f"{self.config.answered_by} reads {length} tokens, the conversation has {len(asked)}"
                )
            rows = np.zeros((self._placement.mesh.size, length), np.int32)  # one for each device, all alike
            mask = np.zeros(rows.shape, bool)
            rows[:, -len(asked) :], mask[:, -len(asked) :] = asked, True
            # Of the messages alone: whoever says them again, after a failure too, hears the same.
            key = jax.random.fold_in(root, zlib.crc32(rows.tobytes()))
            samples = self._other_answers(state, put_rows(self._placement, (rows, mask)), key)
            tokens, chosen = (np.asarray(x)[:1] for x in (samples.tokens, samples.action_mask))
            return decode_responses(self._tokenizer, [asked], tokens, chosen, self.functions.eos_ids)[0]

        answer([{"role": "user", "content": "Hi"}])  # compiled before any time-out counts
        return answer

    def _openings(self, cursor: int) -> list[Opening]:
        """How the conversations of a step begin; those of one group alike."""
        config, size = self.config, self.config.prompts_per_step
        rows: list[dict[str, Any]] = [{} for _ in range(size)]
        if self._examples:
            _, index = visits(len(self._examples), self._seed, cursor, size)
            rows = [_row(self._examples[i]) for i in index]
        openings = [Opening(episode_seed(self._seed, cursor + i), row) for i, row in enumerate(rows)]
        return [opening for opening in openings for _ in range(config.samples_per_prompt)]

    def _arrays(self, talks: Sequence[Conversation]) -> tuple[tuple[np.ndarray, np.ndarray], Samples]:
        """Openings, left-padded, and what followed them, right-padded."""
        config, count = self.config, len(talks)
        shape = (count, config.conversation.max_tokens)
        tokens = np.zeros((count, self._opening), np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, -1] = True  # of a conversation that never began
        said, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        chosen, read = np.zeros((2, *shape), bool)
        for row, talk in enumerate(talks):
            if talk.tokens:
                tokens[row, -len(talk.tokens) :], mask[row, -len(talk.tokens) :] = talk.tokens, True
            own = np.s_[row, : len(talk.said)]
            said[own], log_probs[own], chosen[own], read[own] = talk.said, talk.log_probs, talk.chosen, True
        arrays: Any = (said, log_probs, chosen, read)
        return (tokens, mask), Samples(*arrays)

    def _read_turns(
        self, talks: Talks, openings: Sequence[Opening]
    ) -> tuple[list[tuple[int, Turn]], list[str], dict[str, np.ndarray]]:
        """The answers, what each replies to, and their scores by the parts of the reward."""
        turns, prompts, columns = [], [], {name: [] for name in (*self._columns, *_TURN_COLUMNS)}
        for row, talk in enumerate(talks.conversations):
            if talk.end == "failed":
                continue
            asked = talk.opening
            for number, turn in enumerate(talk.turns):
                turns.append((row, turn))
                prompts.append(asked[-1]["content"])
                for name in self._columns:
                    columns[name].append(openings[row].row.get(name))
                columns["turn"].append(number)
                columns["turns_left"].append(len(talk.turns) - 1 - number)
                asked = turn.replies
        texts = [turn.text for _, turn in turns]
        raw = self.config.reward.raw(prompts, texts, columns) if self.config.has_reward else {}
        return turns, prompts, dict(raw)

    def _earned(self, talked: Talked, reward_state: Any) -> tuple[np.ndarray, np.ndarray, Any, dict[str, Any]]:
        """Rewards of every turn, the same without penalties, and the state and the metrics of the reward."""
        turns = talked.turns
        given = np.array([turn.reward for _, turn in turns], np.float32)
        penalties = self.functions.penalties(np.array([turn.complete for _, turn in turns], bool))
        if not self.config.has_reward:
            return given - penalties, given, reward_state, {"penalty": float(penalties.mean())}
        groups = np.array([row // self.config.samples_per_prompt for row, _ in turns])
        scores, reward_state = self.config.reward.weigh(
            reward_state,
            talked.raw,
            list(talked.prompts),
            groups=groups,
            lengths=np.array([turn.end - turn.start for _, turn in turns], np.float32),
            penalties=penalties,
        )
        metrics = {f"reward/{n.removesuffix('_mean')}": number for n, number in scores.metrics.items()}
        metrics["penalty"] = float(penalties.mean())
        return given + scores.totals, given + scores.plain, reward_state, metrics

    def longest_prompt(self, given: int | None) -> int:
        """`Rollouts.longest_prompt`: what the settings say."""
        return given or self._opening

    def _prompt_batch(self, cursor: int) -> tuple[PromptBatch, tuple[Any, Any]]:
        raise NotImplementedError("a conversation begins with its environment")

    def programs(self, state: RunState, length: int, waiting: Any) -> tuple[list[Program], Rollout]:
        """`Rollouts.programs`, with the program that draws the tokens of all answers."""
        (sample, *programs), rollout = super().programs(state, length, waiting)
        config, slots = self.config, self._slots
        talks = jax.eval_shape(lambda: self._engine.init(slots, length))
        talks = jax.tree.map(self._rows_of_slots, talks)
        speaker = jax.eval_shape(self._speaker, state.base, state.train.params["model"])
        inputs = (self._placement.shapes(speaker, param_axes), talks, self._rows_of_slots(jnp.int32(0)))
        tokens = config.conversation.max_tokens
        in_turn = -(-config.rows // slots)  # conversations that a slot holds, one after the other
        drawn = replace(sample, function=self._decode, arguments=inputs, loop_steps=in_turn * tokens)
        mask = rollout.action_mask
        row = jax.ShapeDtypeStruct((mask.shape[0],), bool, sharding=rollout.scores.sharding)
        placed = jax.ShapeDtypeStruct(mask.shape, np.float32, sharding=mask.sharding)
        return [drawn, *programs], replace(rollout, counts=row, truncated=row, placed=placed)

    def _rows_of_slots(self, x: Any) -> Any:
        """The shape of something of each slot, split like rows; of anything else, whole on every device."""
        if x.shape and x.shape[0] == self._slots:
            return row_shape(self._placement, *x.shape, dtype=x.dtype)
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=self._placement.sharding(x.shape, (None,) * x.ndim)
        )


def episode_seed(seed: int, number: int, held_out: bool = False) -> int:
    """The seed of the environment of a conversation: below 2^31, or from there on if it is held out."""
    drawn = int(np.random.SeedSequence([seed, int(held_out), number]).generate_state(1)[0])
    return drawn % 2**31 + 2**31 * held_out


def _row(example: Any) -> dict[str, Any]:
    """The columns of an example, with what it is made of."""
    row = {**columns_of([example], list(example.columns)), "prompt": [example.prompt]}
    row |= {"response": [example.response], "messages": [example.messages]}
    return {name: values[0] for name, values in row.items()}


def conversation_metrics(talks: Sequence[Conversation]) -> dict[str, float]:
    """Numbers of conversations to log: means over those that did not fail, and the share of those that did."""
    fine = [talk for talk in talks if talk.end != "failed"]
    if not fine:
        return {"failed_fraction": 1.0}
    turns = [turn for talk in fine for turn in talk.turns]
    infos: dict[str, list[float]] = {}
    for talk in fine:
        totals: dict[str, float] = {}
        for turn in talk.turns:
            for name, number in turn.info.items():
                if isinstance(number, bool | int | float):
                    totals[name] = totals.get(name, 0.0) + float(number)
        for name, number in totals.items():
            infos.setdefault(name, []).append(number)
    return {
        "return": float(np.mean([talk.reward for talk in fine])),
        "turns": len(turns) / len(fine),
        "turn_tokens": float(np.mean([turn.end - turn.start for turn in turns])),
        "truncated_fraction": float(np.mean([talk.end == "truncated" for talk in fine])),
        "failed_fraction": 1 - len(fine) / len(talks),
        **{f"world/{name}": sum(numbers) / len(fine) for name, numbers in infos.items()},
    }
