"""How good a policy is on held-out data: its loss, and its answers to held-out prompts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hybrid_jax.algorithms.supervised import next_token_targets, token_cross_entropy
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Example
from hybrid_jax.data.loader import PromptStream, SFTStream
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.metrics.text import corpus_bleu, distinct_n
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.rewards.base import columns_of
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.decode import Sampler
from hybrid_jax.sampling.responses import decode_responses, ended, join


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out split, and when.

    It always runs at the start, at the end, and before the first step of each phase.
    """

    every: int | None = None  # further steps
    num_prompts: int = 64  # answered; 0 answers none
    num_examples: int = 256  # for the loss
    num_shown: int = 8  # samples written into samples.jsonl
    batch_size: int = 64
    length: int = 256  # tokens a row for the loss
    sampler: Sampler | None = None  # None takes the one that PPO trains with
    reward: CompositeReward | None = None  # None takes the one that PPO trains with

    def __post_init__(self):
        for name, least in {
            "every": 1,
            "num_prompts": 0,
            "num_examples": 0,
            "batch_size": 1,
            "length": 2,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


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
        reward: CompositeReward | None,
        seed: int,
        eos_ids: tuple[int, ...],
    ):
        self.config = config
        self._model, self._tokenizer, self._eos_ids = model, tokenizer, eos_ids
        self.sampler, self._reward = config.sampler or sampler, config.reward or reward
        if self._reward is not None:
            self._reward = self._reward.without_normalisers()
        self._key = jax.random.key(seed)
        answered = [example for example in examples if example.response is not None][: config.num_examples]
        asked = [example for example in examples if example.prompt][: config.num_prompts]
        pairs = isinstance(model, EncoderDecoder)
        self._rows = SFTStream(answered, tokenizer, self._row_length(), pairs=pairs) if answered else None
        self._prompts = PromptStream(asked, tokenizer, self._room()) if asked and self.sampler else None
        self._loss = jax.jit(functools.partial(_loss, model))
        if self.sampler:
            self._sample = jax.jit(functools.partial(self.sampler, model, eos_ids=eos_ids))

    def run(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """All measurements as ``evaluation/<metric>``, and samples to show."""
        numbers = self.loss(params)
        answers, samples = self.answers(params)
        return {f"evaluation/{name}": value for name, value in {**numbers, **answers}.items()}, samples

    def loss(self, params: Params) -> dict[str, float]:
        """Mean cross-entropy over the tokens of the held-out responses, nats, and its exponential."""
        if self._rows is None:
            return {}
        sums = [self._loss(params, batch) for batch in self._rows.sequential(self.config.batch_size)]
        total, weight = (float(sum(float(x) for x in xs)) for xs in zip(*sums, strict=True))
        loss = total / max(weight, 1.0)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def answers(self, params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Samples an answer to each held-out prompt and scores it."""
        if self._prompts is None:
            return {}, []
        examples, responses, rows, device_scores = [], [], [], []
        for index, (prompts, count) in enumerate(self._prompts.sequential(self._batch_size())):
            key = jax.random.fold_in(self._key, index)
            asked, asked_mask = jax.device_put((prompts.tokens, prompts.mask))
            drawn = self._sample(params, asked, asked_mask, key)
            complete = ended(drawn.tokens, drawn.response_mask, self._eos_ids)
            tokens, mask = np.asarray(drawn.tokens)[:count], np.asarray(drawn.response_mask)[:count]
            examples += prompts.examples[:count]
            responses += decode_responses(self._tokenizer, tokens, mask, self._eos_ids)
            rows.append((np.asarray(complete)[:count], mask.sum(axis=1)))
            if self._reward is not None and self._reward.on_device:
                joined = join(asked, asked_mask, drawn)
                device_scores.append(
                    np.asarray(self._reward.score_tokens(*joined, drawn.response_mask))[:count]
                )
        complete, lengths = (np.concatenate(column) for column in zip(*rows, strict=True))
        numbers = {
            "eos_fraction": float(complete.mean()),
            "response_length": float(lengths.mean()),
            "distinct_2": float(distinct_n(responses, 2)),
            **_bleu(examples, responses),
        }
        scores, parts = self._scores(examples, responses, device_scores)
        if scores is not None:
            numbers["score"], numbers["score_std"] = float(scores.mean()), float(scores.std())
        numbers |= {f"reward/{name}": float(np.mean(values)) for name, values in parts.items()}
        return numbers, self._shown(examples, responses, scores, parts)

    def _scores(self, examples, responses, device_scores):
        if self._reward is None:
            return None, {}
        if self._reward.on_device:
            return np.concatenate(device_scores), {}
        prompts = [example.prompt for example in examples]
        scores, _, parts = self._reward.score({}, prompts, responses, columns_of(examples))
        return scores, parts

    def _shown(self, examples, responses, scores, parts) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "split": "held_out",
                "prompt": examples[index].prompt,
                "response": responses[index],
                "score": None if scores is None else float(scores[index]),
                "parts": {name: float(values[index]) for name, values in parts.items()},
            }
            for index in range(min(self.config.num_shown, len(responses)))
        ]

    def _batch_size(self) -> int:
        return min(self.config.batch_size, self.config.num_prompts)

    def _row_length(self) -> int:
        return min(self.config.length, self._model.max_length or self.config.length)

    def _room(self) -> int:
        """The longest prompt that leaves room for a whole response."""
        if self._model.max_length is None or self.sampler is None:
            return 2**30
        return max(self._model.max_length - self.sampler.max_new_tokens, 1)


def _loss(model: LanguageModel, params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(params, batch.tokens, batch.segment_ids)
    targets, mask = next_token_targets(batch.tokens, batch.loss_mask)
    logits_of = functools.partial(model.logits, params)
    loss: Sum = token_cross_entropy(logits_of, hidden[:, :-1], targets, mask, model.vocab_size)
    return loss.total, loss.weight


def _bleu(examples: Sequence[Example], responses: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU against the column "references", or the one response of the data."""
    references = [
        list(example.columns.get("references") or ([example.response] if example.response else []))
        for example in examples
    ]
    return {"bleu": float(corpus_bleu(list(responses), references))} if all(references) else {}
