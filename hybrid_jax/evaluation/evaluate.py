"""How good a policy is on held-out data: its loss, and its answers to held-out prompts."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge

from hybrid_jax.core.batches import Example, PromptBatch, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.ranges import BatchSize, Count, Natural, settings
from hybrid_jax.data.loader import PromptStream, SFTStream
from hybrid_jax.data.long_rows import DEFAULT, ChatPolicy, LongRows
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.evaluation.answer_scores import AnswerScores
from hybrid_jax.evaluation.memory_probe import probe
from hybrid_jax.metrics.text import corpus_bleu, distinct_n
from hybrid_jax.metrics.token_chain import TokenChain
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.models.scoring import token_loss
from hybrid_jax.parallel import hosts
from hybrid_jax.parallel.mesh import fetch_rows, put_rows, rows_here, whole_array
from hybrid_jax.parallel.rules import current_placement
from hybrid_jax.rewards.base import REWARDS, DeviceReward, check_reward, column_names
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.segments import response_pieces
from hybrid_jax.sampling.base import SAMPLERS, Sampler, alone, between_programs, sample
from hybrid_jax.sampling.responses import decode_responses, ended, join

log = logging.getLogger(__name__)
_READ = 64  # tokens for which heads are shown
WITHOUT_BOUND = 1024  # tokens a row, where neither settings nor model say


@settings
class EvaluationConfig:
    """Settings of the evaluation: what is measured on the held-out split, and when.

    It always runs at the start, at the end, and before the first step of each phase.
    """

    every: Count | None = None  # steps between two evaluations; null has no further ones
    num_prompts: Natural = 64  # held-out prompts to answer; 0 answers none
    num_examples: Natural = 256  # held-out examples whose loss is measured
    num_shown: Natural = 8  # samples written into samples.jsonl
    batch_size: BatchSize = 64  # rows read or answered at once
    length: Annotated[int, Ge(2)] | None = None  # tokens a row for the loss; None takes what SFT reads
    sampler: Annotated[Any, SAMPLERS] | None = None  # None takes the one that PPO trains with
    reward: CompositeReward | None = None  # None takes the one that PPO trains with
    judges: dict[str, Annotated[Any, REWARDS]] = field(default_factory=dict)  # measured, never trained on
    memory_rows: Annotated[int, Ge(2)] | None = None  # held-out rows to probe a recurrent state on, 64 or more
    token_chain: bool = False  # measure the Markov chain over tokens that the answers make
    num_extremes: Natural = 2  # of the best and of the worst answers by each part, written into samples.jsonl

    def __post_init__(self):
        for name, judge in self.judges.items():
            if isinstance(judge, DeviceReward):
                raise ValueError(f"judges.{name} must score texts, got {judge!r}")
            try:
                check_reward(judge)
            except ValueError as error:
                raise ValueError(f"judges.{name}: {error}") from None


class Evaluator:
    """Measures a policy on the held-out split; the same noise every time, so changes are the policy's own."""

    def __init__(
        self,
        config: EvaluationConfig,
        model: LanguageModel,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        *,
        sampler: Sampler | None,
        rewards: Mapping[str, CompositeReward],
        seed: int,
        eos_ids: tuple[int, ...],
        length: int | None = None,
        long_rows: LongRows = DEFAULT,
        long_prompts: ChatPolicy = "drop",
    ):
        self.config = config
        self._model, self._tokenizer, self._eos_ids = model, tokenizer, eos_ids
        self.sampler = alone(config.sampler or sampler)
        if config.reward is not None:
            rewards = {"": config.reward}
        # The first is what the run is about: its numbers have no prefix, however many phases have a reward.
        prefixes = ("", *(f"{phase}/" for phase in [*rewards][1:]))
        self._scored = [AnswerScores(*each) for each in zip(rewards.values(), prefixes, strict=False)]
        judges = {name: Part(judge) for name, judge in config.judges.items()}
        self._judges = AnswerScores(CompositeReward(judges), "judge/") if judges else None
        self._key = root_key(seed, Purpose.EVALUATION)
        answered = [example for example in examples if example.response is not None][: config.num_examples]
        asked = [example for example in examples if example.prompt][: config.num_prompts]
        pairs = isinstance(model, EncoderDecoder)
        self._rows = self._prompts = None
        if answered:
            most, long_rows = self._row_length(length, long_rows)
            self._rows = SFTStream(answered, tokenizer, most, pairs=pairs, long_rows=long_rows)
        if asked and self.sampler:
            long = LongRows(
                long_prompts,
                "the model's max_length less sampler.max_new_tokens",
                None,
                rows="held-out prompts",
            )
            self._prompts = PromptStream(asked, tokenizer, self._room(), long_rows=long)
        self._columns = column_names(asked)
        if self._prompts is not None:
            for scored in filter(None, (*self._scored, self._judges)):
                scored.reward.check_columns(self._columns)
        self._loss = jax.jit(functools.partial(_loss, model))
        if config.memory_rows is not None:
            self._probe = jax.jit(functools.partial(probe, self._recurrent()))
            self._probed = self._rows_to_probe(config.memory_rows)
        if self.sampler:
            self._ended = jax.jit(functools.partial(ended, eos_ids=eos_ids))
            answer = functools.partial(sample, self.sampler, model, eos_ids=eos_ids, tokenizer=tokenizer)
            self._sample = answer if between_programs(self.sampler) else jax.jit(answer)

    def run(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """All measurements as ``evaluation/<metric>``, samples to show, and what each prompt has scored."""
        numbers = self.loss(params)
        answers, samples, by_prompt = self.answers(params)
        remembered, heads = self.memory(params)
        return (
            {f"evaluation/{name}": value for name, value in {**numbers, **answers, **remembered}.items()},
            samples + heads,
            {f"evaluation/{name}": values for name, values in by_prompt.items()},
        )

    def loss(self, params: Params) -> dict[str, float]:
        """Mean cross-entropy over the tokens of the held-out responses, nats, and its exponential."""
        if self._rows is None:
            return {}
        batches = self._rows.sequential(self.config.batch_size)
        sums = [self._loss(params, _on_devices(batch)) for batch in batches]
        total, weight = (float(sum(float(x) for x in xs)) for xs in zip(*sums, strict=True))
        loss = total / max(weight, 1.0)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def memory(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Probes the state over ``memory_rows`` rows; the heads of a memory are a sample, of the first row."""
        if self.config.memory_rows is None:
            return {}, []
        tokens, segments = self._probed.tokens, self._probed.segment_ids
        numbers, heads = self._probe(params, *_on_devices((tokens, segments)))
        numbers = {f"memory/{name}": float(value) for name, value in numbers.items()}
        real = tokens[0][segments[0] > 0][:_READ].tolist()
        read = [self._tokenizer.decode([token]) for token in real]
        shown = [{kind: _hundredths(weights, len(read)) for kind, weights in layer.items()} for layer in heads]
        return (
            {name: value for name, value in numbers.items() if math.isfinite(value)},
            [{"split": "held_out", "memory": {"read": read, "layers": shown}}] if shown else [],
        )

    def _recurrent(self) -> RecurrentModel:
        if not isinstance(self._model, RecurrentModel):
            kind = type(self._model).__name__
            raise UserError(f"evaluation.memory_rows needs a recurrent model, got a {kind}; set it to null")
        return self._model

    def _rows_to_probe(self, count: int) -> TokenBatch:
        if self._rows is None:
            raise UserError(
                "evaluation.memory_rows needs held-out examples with a response, got none; set it to null"
            )
        batch = next(iter(self._rows.sequential(count)))
        if np.sum(np.any(batch.segment_ids > 0, axis=1)) < 2:
            log.warning("evaluation.memory_rows: recall needs two held-out rows, got one; it is not measured")
        return batch

    def answers(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """Samples an answer to each held-out prompt and scores it.

        Returns:
            Means, samples to show, and for score, parts and judges the value of each prompt.
        """
        if self._prompts is None:
            return {}, [], {}
        examples: list[Example] = []
        answers: dict[str, list[Any]] = {}  # of the rows that this process holds
        for index, (prompts, count) in enumerate(self._prompts.sequential(self._batch_size())):
            for name, values in self._answer(params, prompts, index, count, len(examples)).items():
                answers.setdefault(name, []).extend(values)
            examples += prompts.examples[:count]
        here = [examples[row] for row in answers["row"]]
        pieces = answers.pop("pieces", None)
        length = self.sampler.max_new_tokens if self.sampler else None
        for scored in self._scored:
            answers |= scored.of_texts(here, answers["response"], self._columns, pieces, length)
        if self._judges is not None:
            answers |= self._judges.of_texts(here, answers["response"], self._columns)
        answers = _in_order(hosts.exchange(answers))
        responses, prompts = answers["response"], [example.prompt for example in examples]
        numbers = {
            "eos_fraction": float(np.mean(answers["complete"])),
            "response_length": float(np.mean(answers["length"])),
            "distinct_2": float(distinct_n(responses, 2)),
            **_bleu(examples, responses),
        }
        if self.config.token_chain:
            chain = TokenChain.of(answers["tokens"]).numbers()
            numbers |= {f"token_chain/{name}": number for name, number in chain.items()}
        by_prompt, parts = {}, {}
        for scored in self._scored:
            scores, values = scored.scores(answers, prompts)
            named = {f"{scored.prefix}reward/{name}": each for name, each in values.items()}
            numbers |= {**_of_scores(scored.prefix, scores, answers["length"]), **_means(named)}
            by_prompt |= {f"{scored.prefix}score": scores, **named}
            parts |= {f"{scored.prefix}{name}": each for name, each in values.items()}
        if self._judges is not None:
            judged = self._judges.scores(answers, prompts)[1]
            named = {f"judge/{name}": each for name, each in judged.items()}
            numbers |= _means(named)
            by_prompt |= named
            parts |= judged
        score = by_prompt.get("score")
        rows = [self._sample_row(i, examples, responses, score, parts) for i in range(len(examples))]
        shown = [*rows[: self.config.num_shown], *self._extremes(rows, parts)]
        return numbers, shown, {name: _short(values) for name, values in by_prompt.items()}

    def _answer(
        self, params: Params, prompts: PromptBatch, index: int, count: int, before: int
    ) -> dict[str, list[Any]]:
        """The answers to a batch, as far as this process holds them.

        Args:
            params: of the policy.
            prompts: the batch.
            index: its number, which decides the noise.
            count: how many of its rows count, the first ones.
            before: how many rows earlier batches had.
        """
        asked, asked_mask = _on_devices((prompts.tokens, prompts.mask))
        drawn = self._sample(params, asked, asked_mask, jax.random.fold_in(self._key, index))
        complete = self._ended(drawn.tokens, drawn.action_mask)
        rows = rows_here(drawn.tokens)
        rows = rows[rows < count]
        fetched = (fetch_rows(array)[: len(rows)] for array in (drawn.tokens, drawn.action_mask, complete))
        tokens, mask, complete = fetched
        texts = self._tokenizer, prompts.unpadded(rows), tokens, mask, self._eos_ids
        answers = {
            "row": (before + rows).tolist(),
            "response": decode_responses(*texts),
            "complete": complete.tolist(),
            "length": mask.sum(axis=1).tolist(),
        }
        if self.config.token_chain:
            answers["tokens"] = [row[chosen].tolist() for row, chosen in zip(tokens, mask, strict=True)]
        if any(scored.needs_pieces for scored in self._scored):
            answers["pieces"] = response_pieces(*texts)
        for scored in (scored for scored in self._scored if scored.reward.on_device):
            scores = scored.reward.score_tokens(*join(asked, asked_mask, drawn), drawn.action_mask)
            answers[f"{scored.prefix}score"] = fetch_rows(scores)[: len(rows)].tolist()
        return answers

    def _sample_row(self, index: int, examples, responses, scores, parts) -> dict[str, Any]:
        return {
            "index": index,
            "split": "held_out",
            "prompt": examples[index].prompt,
            "response": responses[index],
            "score": None if scores is None else float(scores[index]),
            "parts": {name: float(values[index]) for name, values in parts.items()},
        }

    def _extremes(self, rows: list[dict[str, Any]], parts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """The answers that each part likes best and least, marked as such."""
        found = []
        for name, values in parts.items():
            order = np.argsort(-values, kind="stable")
            count = min(self.config.num_extremes, len(order) // 2)
            for rank, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
                found += [{**rows[row], "extreme": {"part": name, "rank": rank}} for row in chosen]
        return found

    def _batch_size(self) -> int:
        return min(self.config.batch_size, self.config.num_prompts)

    def _row_length(self, trained: int | None, long_rows: LongRows) -> tuple[int, LongRows]:
        """Tokens a row, and what becomes of a longer one: as in training unless the settings differ."""
        context = self._model.max_length
        length = self.config.length or trained or context or WITHOUT_BOUND
        if self.config.length is not None:
            long_rows = replace(long_rows, limit="evaluation.length", advice=None)
        if context is not None and length >= context:
            length = context
            long_rows = replace(long_rows, limit="the model's max_length", advice=None)
        return length, replace(long_rows, rows="held-out rows")

    def _room(self) -> int | None:
        """The longest prompt that leaves room for a whole response."""
        if self._model.max_length is None or self.sampler is None:
            return None
        return max(self._model.max_length - self.sampler.max_new_tokens, 1)


def _of_scores(prefix: str, scores: np.ndarray, lengths: Sequence[float]) -> dict[str, float]:
    """Mean and spread of a score, and its slope over the length."""
    return {
        f"{prefix}score": float(scores.mean()),
        f"{prefix}score_std": float(scores.std()),
        f"{prefix}score_length_slope": _slope(scores, lengths),
    }


def _means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.mean(each)) for name, each in values.items()}


def _short(values: np.ndarray) -> list[float]:
    """Rounds to six digits, so that a line of the log stays short."""
    return [float(f"{value:.6g}") for value in values]


def _slope(scores: np.ndarray, lengths: Sequence[float]) -> float:
    """The least-squares slope of the score over the length, a token; 0 where all lengths are equal."""
    x = np.asarray(lengths, np.float64) - np.mean(lengths)
    return float(x @ np.asarray(scores, np.float64) / (x @ x)) if x.any() else 0.0


def _on_devices(batch: Any) -> Any:
    """A batch of host arrays, each device with its share of the rows."""
    placement = current_placement()
    return jax.device_put(batch) if placement is None else put_rows(placement, batch)


def _in_order(answers: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The answers of all processes, each row once: several may hold the same, and one may hold none."""
    holder: dict[int, tuple[int, int]] = {}
    for process, found in enumerate(answers):
        for place, row in enumerate(found["row"]):
            holder.setdefault(row, (process, place))
    places = [place for _, place in sorted(holder.items())]
    names = answers[places[0][0]]
    return {name: [answers[process][name][place] for process, place in places] for name in names}


def _hundredths(weights: jax.Array, tokens: int) -> list[list[list[int]]]:
    """The weights [T H M] of the first tokens, in per cent, [H M T]."""
    return np.rint(100 * np.moveaxis(whole_array(weights)[:tokens], 0, -1)).astype(int).tolist()


def _loss(model: LanguageModel, params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(params, batch.tokens, batch.segment_ids)
    loss = token_loss(model, params, hidden, batch)
    return loss.total, loss.weight


def _bleu(examples: Sequence[Example], responses: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU against the column "references", or the one response of the data."""
    references = [
        list(example.columns.get("references") or ([example.response] if example.response else []))
        for example in examples
    ]
    return {"bleu": float(corpus_bleu(list(responses), references))} if all(references) else {}
