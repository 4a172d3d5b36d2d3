"""Rollouts: prompts → samples → scored by the models → rewarded. What every on-policy phase learns from.

The pure functions are in `rollout_functions`; here is the host's side of them, which reads the prompts, gives
the texts to the reward and keeps what the reward remembers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from hybrid_jax.core.batches import PromptBatch, Rollout, Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Branch
from hybrid_jax.parallel.mesh import fetch_rows, gather_rows, put_rows, rows_here
from hybrid_jax.parallel.rules import ROLLOUTS, Placement, under
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.played import Answered, Played, ReadTexts
from hybrid_jax.phases.prompts import DataAnswers, prompt_stream, repeated, shared_with
from hybrid_jax.phases.references import References
from hybrid_jax.phases.refill import Refill
from hybrid_jax.phases.rollout_ahead import RolloutAhead
from hybrid_jax.phases.rollout_functions import RolloutFunctions
from hybrid_jax.phases.rollout_settings import RolloutSettings
from hybrid_jax.rewards.base import column_names, columns_of
from hybrid_jax.rewards.segments import response_pieces
from hybrid_jax.sampling.base import between_programs
from hybrid_jax.sampling.responses import decode_responses, ended
from hybrid_jax.training.phase import Program, Resources
from hybrid_jax.training.shapes import key_shape, like_rows, row_shape
from hybrid_jax.training.state import RunState, TrainState


class Rollouts:
    """The rollouts of one phase, on the host.

    Args:
        functions: those that the programs are made of.
        resources: of the phase.
        program: makes one of the functions a program's, with the base as its first argument.
    """

    def __init__(
        self,
        functions: RolloutFunctions,
        resources: Resources,
        program: Callable[[str], Callable[..., Any]],
    ):
        config: RolloutSettings = functions.config
        self.config, self.functions, self.name = config, functions, functions.name
        self._tokenizer, self._placement = resources.tokenizer, resources.placement
        self.references = References(config.references, self.name, functions.model, resources.placement)
        functions.check_opponent()
        self._ahead = (
            RolloutAhead(self.name, self._placement, resources.following) if config.rollout_ahead else None
        )
        refill = Refill(self._placement, config.prompts_per_step, config.samples_per_prompt)
        self._refill = None if config.refill_rounds is None else refill
        self.prompts, self._learner, self._columns, self._data_answers = None, None, [], None
        if resources.examples is not None:
            self.prompts, self._learner = prompt_stream(config, resources), shared_with(config, resources)
            self._columns = column_names(self.prompts.examples)
            config.reward.check_columns([*self._columns, *(["opponents"] if config.opponent else [])])
            if config.rivals == "example":
                self._data_answers = DataAnswers(self.prompts, config, resources)
        self._program = program
        self._compile()

    def _compile(self) -> None:
        sampling = self._placement.with_rules(ROLLOUTS[self.config.rollout_weights])
        sample, other = (under(sampling, self._program(name)) for name in ("sample", "sample_opponent"))
        self._on_host = between_programs(self.config.sampler)
        ready = jax.jit if not self._on_host else lambda answer: partial(answer, tokenizer=self._tokenizer)
        self._sample, self._sample_opponent = ready(sample), ready(other)
        scoring = (jax.jit(under(self._placement, self._program(name))) for name in ("score", "rewarded"))
        self._score, self._reward_on_device = scoring

    def on(self, placement: Placement) -> Rollouts:
        """The same rollouts on other devices."""
        other = copy.copy(self)
        other._placement, other.references = placement, self.references.on(placement)
        other._compile()
        return other

    @property
    def reward_key(self) -> str:
        """The key in ``RunState.host`` of what the reward remembers."""
        return f"{self.name}/reward"

    def init_host(self) -> dict[str, Any]:
        """The entries that it adds to ``RunState.host``."""
        return {self.reward_key: self.config.reward.init()}

    def init_extra(self) -> dict[str, Any]:
        """The entries that it adds to ``TrainState.extra``."""
        return {} if self._ahead is None else self._ahead.init(self.config)

    def play(self, state: RunState, key: Array, sample_key: Array, clock: Clock) -> Played:
        """One rollout: the prompts of this step, answered, scored and rewarded, in rounds where it is refilled.

        Args:
            state: with the references of this step.
            key: of the step; opponents, and further rounds, draw from branches of it.
            sample_key: of the policy's answers.
            clock: told what the host waits for.
        """
        rounds = [self._round(state, key, sample_key, clock)]
        if self._refill is None:
            return rounds[0]
        batch = self._refill.begin()
        batch.add(rounds[0].rollout)
        while not batch.is_full and len(rounds) < (self.config.refill_rounds or 1):
            host = {**state.host, self.reward_key: rounds[-1].reward_state}
            state = replace(state, host=host, cursors={**state.cursors, **rounds[-1].cursors})
            round_key, round_sample_key = _round_keys(key, len(rounds))
            rounds.append(self._round(state, round_key, round_sample_key, clock))
            batch.add(rounds[-1].rollout)
        metrics = batch.metrics([played.metrics for played in rounds])
        return replace(rounds[-1], rollout=batch.rollout(), metrics=metrics)

    def _round(self, state: RunState, key: Array, sample_key: Array, clock: Clock) -> Played:
        """A batch of prompts, answered, scored and rewarded."""
        answered = self.answer(state, key, sample_key, clock)
        return self.weigh(answered, state, state.host[self.reward_key], clock)

    def answer(self, state: RunState, key: Array, sample_key: Array, clock: Clock) -> Answered:
        """A batch of prompts, answered and scored, by the models and by each part of the reward.

        The programs are only started where nothing needs their results: while the device scores the tokens, the
        host scores the texts.

        Args:
            state: with the references of this step.
            key: of the step; opponents draw from a branch of it.
            sample_key: of the policy's answers.
            clock: told what the host waits for.
        """
        cursor = self._cursor(state)
        asked, prompts = self._prompt_batch(cursor)
        clock.lap("input")
        # Both are only started. The device works on them while the host reads and rewards the texts.
        samples, following = self._answers(state, cursor, prompts, sample_key)
        score = partial(self._score, state.base, state.train.params, self.references.of(state), *prompts)
        rollout = score(samples)
        # Before the reward is asked, which waits: the device then goes on with the opponent's answers.
        opponents = self._opponents(state, prompts, key)
        rivals = [score(answers) for answers in self._rivals(cursor, opponents)]
        texts = self._read(asked, samples, opponents, clock)
        return Answered(asked, samples, rollout, rivals, texts, following, cursor)

    def weigh(self, answered: Answered, state: RunState, reward_state: Any, clock: Clock) -> Played:
        """The rollout with its scores, and what it changes.

        Args:
            answered: of `answer`, with the same ``state`` and ``clock``.
            state: as it was answered.
            reward_state: what the reward remembers of earlier rollouts.
            clock: told what the host waits for.
        """
        following, samples, cursor = answered.following, answered.samples, answered.cursor
        (rollout, *rivals), reward_state, metrics = self._rewarded(state, answered, reward_state, clock)
        # Shared prompts have no cursor of their own: whoever learns them moves on.
        cursors = {} if self._learner else {self.name: cursor + self.config.prompts_per_step}
        waiting = None
        if self._ahead is not None:
            metrics["staleness"] = self._ahead.staleness(state)
            waiting = self._ahead.waiting(state) if following is None else following
            cursors |= {} if following is None else self._ahead.cursor(cursors[self.name])
        return Played(rollout, samples, reward_state, metrics, waiting, cursors, tuple(rivals))

    def lent(self, train: TrainState) -> TrainState:
        """The state for an update, which deletes it: without the responses that wait."""
        return train if self._ahead is None else self._ahead.without(train)

    def kept(self, state: RunState, train: TrainState, played: Played, clock: Clock) -> RunState:
        """The state once the update, which gives ``train``, has been started; waits for the device's shares."""
        if self.config.reward.on_device:
            jax.block_until_ready(played.samples.tokens)
            clock.lap("rollout")
        else:
            clock.restart()
        if self._ahead is not None and played.waiting is not None:
            train = self._ahead.keep(train, played.waiting)
            jax.block_until_ready(played.waiting.tokens)
            clock.lap("rollout")
        jax.block_until_ready((played.rollout, played.rivals))
        clock.lap("score")
        return replace(
            state,
            train=train,
            host={**state.host, self.reward_key: played.reward_state},
            cursors={**state.cursors, **played.cursors},
        )

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """The state once these numbers of the evaluation were measured."""
        remembered = self.config.reward.observe(state.host[self.reward_key], numbers)
        return replace(state, host={**state.host, self.reward_key: remembered})

    def _cursor(self, state: RunState) -> int:
        """The start of the prompts: behind the last ones, or with the batch that was learned last."""
        if self._learner is None:
            return state.cursors.get(self.name, 0)
        if not (learned := state.cursors.get(self._learner, 0)):
            raise UserError(
                f"phases.{self.name}.prompts: shared needs a step of {self._learner} before the first of "
                f"{self.name}: begin with it, by scheduler.warmup for instance"
            )
        return learned - self.config.prompts_per_step

    def _prompt_batch(self, cursor: int) -> tuple[PromptBatch, tuple[Any, Any]]:
        """The prompts of a step, each as often as it is answered; their tokens and mask on the devices."""
        assert self.prompts is not None, "a planned phase takes no steps"
        # Rounds of one step lie side by side, so they have one length.
        widest = self._refill is not None
        batch = self.prompts.batch(cursor, self.config.prompts_per_step, widest=widest)
        prompts = repeated(batch, self.config.samples_per_prompt)
        return prompts, put_rows(self._placement, (prompts.tokens, prompts.mask))

    def _answers(
        self, state: RunState, cursor: int, prompts: tuple[Array, Array], key: Array
    ) -> tuple[Samples, Samples | None]:
        """Responses to the prompts of this step and, if they are sampled ahead, to those of the next."""
        sample = partial(self._sample, state.base, state.train.params["model"])
        if self._ahead is None:
            return sample(*prompts, key), None
        now_key, next_key = jax.random.split(key)
        samples = self._ahead.of(state)
        if samples is None:  # the first step, or one after another phase: what waits is of too old a policy
            samples = sample(*prompts, now_key)
        if not self._ahead.is_wanted(state):
            return samples, None
        _, following = self._prompt_batch(cursor + self.config.prompts_per_step)
        return samples, self._ahead.settled(sample(*following, next_key))

    def _opponents(self, state: RunState, prompts: tuple[Array, Array], key: Array) -> list[Samples]:
        """Answers of the opponent to the same prompts."""
        if self.config.opponent is None:
            return []
        keys = _opponent_keys(key, self.config.opponent.num_samples)
        return [self._other_answers(state, prompts, each) for each in keys]

    def _other_answers(self, state: RunState, prompts: tuple[Any, Any], key: Array) -> Samples:
        """Answers of the reference that answers, too."""
        name = self.config.answered_by
        assert name is not None
        sample = self._sample if self.config.references[name].path is None else self._sample_opponent
        return sample(state.base, self.references.of(state)[name], *prompts, key)

    def _rivals(self, cursor: int, opponents: Sequence[Samples]) -> Sequence[Samples]:
        """Other answers to the same prompts that the references are to score."""
        if self.config.rivals == "opponent":
            return opponents
        if self._data_answers is None:
            return []
        answers = self._data_answers.batch(cursor, self.config.prompts_per_step)
        return [put_rows(self._placement, answers)]

    def _read(
        self, asked: PromptBatch, samples: Samples, opponents: Sequence[Samples], clock: Clock
    ) -> list[ReadTexts]:
        """The answers, and those of opponents that are rivals, read by the parts of a reward on the host."""
        if self.config.reward.on_device:
            return []
        fetched = [(fetch_rows(each.tokens), fetch_rows(each.action_mask)) for each in (samples, *opponents)]
        clock.lap("rollout")
        rows = rows_here(samples.tokens)
        here, before = [asked.examples[row] for row in rows], asked.unpadded(rows)
        eos_ids = self.functions.eos_ids
        own, *others = [decode_responses(self._tokenizer, before, *arrays, eos_ids) for arrays in fetched]

        def read(texts: list[str], against: list[list[str]], tokens: np.ndarray, mask: np.ndarray) -> ReadTexts:
            reward, columns = self.config.reward, columns_of(here, self._columns)
            if against:
                columns["opponents"] = [list(others) for others in zip(*against, strict=True)]
            placed = (self._tokenizer, before, tokens, mask, eos_ids) if reward.is_placed else None
            pieces = placed and response_pieces(*placed)
            raw = reward.raw([example.prompt for example in here], texts, columns, pieces, mask.shape[1])
            return ReadTexts(raw, mask.sum(axis=1).astype(np.float32), ended(tokens, mask, eos_ids))

        found = [read(own, others, *fetched[0])]
        if self.config.rivals == "opponent":
            # A reward that compares reads the policy's answer beside the opponent's.
            found += [read(texts, [own], *arrays) for texts, arrays in zip(others, fetched[1:], strict=True)]
        return found

    def _rewarded(
        self, state: RunState, answered: Answered, reward_state: Any, clock: Clock
    ) -> tuple[list[Rollout], Any, dict[str, Any]]:
        """The rollout and its rivals with scores, what the reward remembers now, and what it says of itself."""
        reward, asked, texts = self.config.reward, answered.asked, answered.texts
        rollouts = [answered.rollout, *answered.rivals]
        if reward.on_device:
            return [self._reward_on_device(state.base, rollout) for rollout in rollouts], reward_state, {}
        # A few numbers a row, from every process: statistics are over the whole rollout, and over its rivals,
        # so that all are measured alike.
        gather = partial(gather_rows, self._placement, num_rows=len(asked.examples))
        groups = np.arange(len(asked.examples)) // self.config.samples_per_prompt

        def gathered(of: Callable[[ReadTexts], Any]) -> np.ndarray:
            return np.concatenate([gather(of(each)) for each in texts])

        scores, reward_state = reward.weigh(
            reward_state,
            {name: gathered(lambda each, name=name: each.raw[name]) for name in texts[0].raw},
            [example.prompt for example in asked.examples] * len(texts),
            groups=np.tile(groups, len(texts)),
            lengths=gathered(lambda each: each.lengths),
            penalties=gathered(lambda each: self.functions.penalties(each.complete)),
        )
        metrics: dict[str, Any] = {
            f"reward/{name.removesuffix('_mean')}": number for name, number in scores.metrics.items()
        }
        if scores.baseline is not None:
            metrics["baseline"] = float(scores.baseline.mean())
        received = {"scores": scores.totals, "plain_scores": scores.plain, "placed": scores.placed}
        split = {n: np.split(array, len(texts)) for n, array in received.items() if array is not None}
        clock.lap("reward")
        for place in range(len(texts)):
            own = {name: arrays[place] for name, arrays in split.items()}
            rollouts[place] = replace(rollouts[place], **put_rows(self._placement, own))
        return rollouts, reward_state, metrics

    def longest_prompt(self, given: int | None) -> int:
        """Tokens of the longest prompts, for a plan: as given, else what the settings or the data allow."""
        config = self.config
        length = given or max(config.prompt_buckets or (0,)) or config.max_prompt_length
        length = length or (self.prompts and self.prompts.batch(0, config.prompts_per_step).tokens.shape[1])
        if length is None:
            raise UserError(
                f"phases.{self.name}.max_prompt_length must be set to plan without data; or use --prompt-length"
            )
        return length

    def programs(self, state: RunState, length: int, waiting: Any) -> tuple[list[Program], Rollout]:
        """The programs that sample and score, and the shapes of the rollout that they make.

        Args:
            state: of a run, as shapes.
            length: of the prompts.
            waiting: what lies on the devices beside all programs.
        """
        placement, rows, train = self._placement, self.config.rows, self.lent(state.train)
        responses = self.config.response_length
        prompts = tuple(row_shape(placement, rows, length, dtype=dtype) for dtype in ("int32", "bool"))
        key, references = key_shape(placement), self.references.shapes(state)
        policy = train.params["model"]
        answers: Any = jax.eval_shape(lambda: Samples.empty(rows, responses))
        if not self._on_host:  # into which no plan can look
            answers = jax.eval_shape(self._sample, state.base, policy, *prompts, key)
        samples = like_rows(placement, answers)
        inputs = (state.base, state.train.params, references, *prompts, samples)
        scored = like_rows(placement, jax.eval_shape(self._score, *inputs))
        scores = row_shape(placement, rows, dtype="float32")
        others = {name: tree for name, tree in train.params.items() if name != "model"}
        programs = [
            Program(
                f"{self.name}/sample",
                self._sample,
                (state.base, policy, *prompts, key),
                loop_steps=responses - 1,
                tokens=rows * responses,
                beside=(others, train.opt_state, train.extra, references, waiting),
            ),
            Program(
                f"{self.name}/score",
                self._score,
                inputs,
                tokens=rows * (length + responses),
                beside=(train.opt_state, train.extra, waiting),
            ),
        ]
        programs = programs[1:] if self._on_host else programs
        rollout = replace(scored, scores=scores, plain_scores=scores)
        if self._refill is None:
            return programs, rollout
        sources = row_shape(placement, rows, dtype="int32")
        refill = Program(f"{self.name}/refill", self._refill.merge, (rollout, rollout, sources), beside=train)
        counts = row_shape(placement, rows, dtype="bool")
        return [*programs, refill], replace(rollout, counts=counts)


@partial(jax.jit, static_argnums=1)
def _opponent_keys(key: Array, count: int) -> list[Array]:
    """Noise that the policy's own answers do not share."""
    return list(jax.random.split(jax.random.fold_in(key, Branch.OPPONENTS), count))


@jax.jit
def _round_keys(key: Array, number: int) -> Array:
    """Keys of the opponents and of the answers in a further round of a step."""
    rounds = jax.random.fold_in(key, Branch.ROUNDS)
    return jax.random.split(jax.random.fold_in(rounds, number))
