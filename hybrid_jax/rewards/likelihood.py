"""Rewards of likelihood under a frozen language model: fluency, and GPTScore."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jaxtyping import Array, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, settings
from hybrid_jax.data.continuations import encode_continuations, start_ids
from hybrid_jax.data.packing import cut_start
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.scoring import next_token_log_probs
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import (
    CONTEXT,
    COUNTED,
    PADDING,
    TEXTS_AT_A_TIME,
    Rows,
    TextModel,
    run_in_batches,
    text_model,
)
from hybrid_jax.rewards.prompt_template import filled, places

MOST_NATS = 80.0  # a perplexity stays finite in float32


@REWARDS.register("perplexity")
@settings
class Perplexity:
    """How likely a *frozen* language model finds the response after its prompt.

        mean_log_prob = 1/|y| Σ_t log p(y_t | prompt, y_<t) <= 0          perplexity = exp(-mean_log_prob) >= 1

    Only the response's tokens count. An empty response is the model's end token, so that silence costs what
    the model thinks of it. It must be another model than the policy: under the policy itself this is minus its
    entropy. Repetition is likely under every language model; add `repetition` beside it.

    Attributes:
        path: Folder of a language model, with its tokenizer.
        what: ``mean_log_prob``, a reward, or ``perplexity``, a penalty: give it a negative weight.
        max_length: Tokens to read at most; a longer text loses the start of its prompt, then its own end.
        batch_size: Texts that the device reads at a time.
    """

    path: str
    what: Literal["mean_log_prob", "perplexity"] = "mean_log_prob"
    max_length: Annotated[int, Ge(2)] = 1024
    batch_size: BatchSize = 32

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.start(prompts, responses)()

    def start(self, prompts: Sequence[str], responses: Sequence[str]) -> Callable[[], list[float]]:
        """Starts to read the texts; returns what waits for the scores."""
        finish = start_log_probs(text_model(self.path), prompts, responses, self.max_length, self.batch_size)

        def scores() -> list[float]:
            means = [total / count for total, count in finish().astype(np.float64)]
            if self.what == "mean_log_prob":
                return means
            return [math.exp(min(-mean, MOST_NATS)) for mean in means]

        return scores


@REWARDS.register("gptscore")
@settings
class GptScore:
    """``1/|h| Σ_t log p(h_t | instruction, h_<t)``: how likely the response is where it is asked for.

    Fu et al. 2023 (arXiv:2302.04166), equation 1 with equal weights. At most 0.

    Attributes:
        path: Folder of a language model, with its tokenizer.
        template: Ends with ``{response}``; ``{prompt}``, ``{aspect}`` and the names of columns stand for texts.
        aspect: What to judge, for ``{aspect}``.
        max_length: Tokens to read at most; a longer text loses the start of its instruction, then its own end.
        batch_size: Texts that the device reads at a time.
    """

    path: str
    template: str = "Write an answer that is {aspect}.\n\n{prompt}\n\nAnswer: {response}"
    aspect: str = "fluent, correct and complete"
    max_length: Annotated[int, Ge(2)] = 1024
    batch_size: BatchSize = 32

    def __post_init__(self) -> None:
        if places(self.template).count("response") != 1 or not self.template.endswith("{response}"):
            raise ValueError(f"template must end with {{response}}, its only one, got {self.template!r}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts to read the texts; returns what waits for the scores."""
        instruction = self.template.removesuffix("{response}")
        named = {name: columns[name] for name in places(instruction) if name in columns}
        instructions = []
        for row, prompt in enumerate(prompts):
            texts = {name: _text(column[row], name) for name, column in named.items()}
            instructions.append(filled(instruction, {**texts, "prompt": prompt, "aspect": self.aspect}))
        model = text_model(self.path)
        finish = start_log_probs(model, instructions, responses, self.max_length, self.batch_size)
        return lambda: [total / count for total, count in finish().astype(np.float64)]


def start_log_probs(
    model: TextModel, prompts: Sequence[str], responses: Sequence[str], max_length: int, batch_size: int
) -> Callable[[], Float[np.ndarray, "B 2"]]:
    """Starts to read each response after its prompt; returns what waits for (Σ log-probs, number of tokens).

    A row begins with what the tokenizer puts in front of a text. One without a prompt, whose tokenizer puts
    nothing there, follows the tokenizer's BOS token, or its end token: that is what stands before a text in
    training.
    """
    longest = min(max_length, model.model.max_length or max_length)
    return run_in_batches(
        partial(_summed_log_probs, model.model, model.params),
        _rows(model, prompts, responses, longest),
        batch_size=batch_size,
        longest=longest,
    )


def mc1(log_probs: Sequence[float], is_true: Sequence[bool]) -> float:
    """1 where the most likely answer is true, else 0 (Lin et al. 2021): of one question, one true answer.

    Args:
        log_probs: log p(answer | question) of each answer, summed over its tokens, not divided by them.
        is_true: of each answer.
    """
    return float(is_true[int(np.argmax(np.asarray(log_probs, np.float64)))])


def mc2(log_probs: Sequence[float], is_true: Sequence[bool]) -> float:
    """``Σ_true p / Σ p`` over the answers to one question (Lin et al. 2021), in [0, 1]; see `mc1`."""
    shifted = np.asarray(log_probs, np.float64)
    mass = np.exp(shifted - shifted.max())
    return float(mass[np.asarray(is_true, bool)].sum() / mass.sum())


@partial(jax.jit, static_argnames="model")
def _summed_log_probs(
    model: LanguageModel, params: Params, tokens: Int[Array, "B T"], roles: Int[Array, "B T"]
) -> Float[Array, "B 2"]:
    log_probs = next_token_log_probs(model, params, tokens, roles != PADDING)
    counted = roles[:, 1:] == COUNTED
    total = jnp.sum(jnp.where(counted, log_probs, 0.0), axis=1)
    return jnp.stack([total, jnp.sum(counted, axis=1).astype(jnp.float32)], axis=1)


def _rows(model: TextModel, prompts: Sequence[str], responses: Sequence[str], longest: int) -> Iterator[Rows]:
    tokenizer = model.tokenizer
    bos = tokenizer.special_tokens.get(str(tokenizer.template_variables.get("bos_token")), tokenizer.eos_id)
    start = start_ids(tokenizer)
    for first in range(0, len(responses), TEXTS_AT_A_TIME):
        part = slice(first, first + TEXTS_AT_A_TIME)
        # a special token that a text spells out is ordinary letters
        for tokens in encode_continuations(tokenizer, prompts[part], responses[part], plain=True):
            after = (tokens.response or [tokenizer.eos_id])[: longest - 1]
            before = cut_start(np.array(tokens.prompt or [bos]), longest - len(after), start)
            roles = np.repeat([CONTEXT, COUNTED], [len(before), len(after)])
            yield np.array([*before, *after]), roles


def _text(value: Any, name: str) -> str:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not isinstance(texts[0], str):
        raise UserError(f"column {name!r} must hold texts to fill the template with, got {str(value)[:60]!r}")
    return texts[0]
