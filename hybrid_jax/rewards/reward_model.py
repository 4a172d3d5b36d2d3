"""The reward of a trained reward model, or of an ensemble of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jaxtyping import Array, Float, Int

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, NonNegative, settings
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.preference_stream import Reading
from hybrid_jax.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_jax.models.base import Params
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.scorer import load_scorer, read_extra
from hybrid_jax.models.scorer import SequenceScorer
from hybrid_jax.models.vocabulary import own_tokenizer_of
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import (
    COUNTED,
    PADDING,
    TEXTS_AT_A_TIME,
    Rows,
    run_in_batches,
)


@REWARDS.register("reward_model")
@settings
class RewardModelReward:
    """The score of a reward model that was trained on preferences, or of an ensemble.

        score = mean_m r_m − uncertainty_penalty · std_m r_m        over the members m of an ensemble

    The members are the labels of all folders together. Each is (r − mean) / std of its own reference samples,
    measured after its training, so that members have a common zero and unit, which preferences do not fix. The
    penalty lowers scores where the members disagree (Coste et al. 2023, 2310.02743, section 4; theirs takes the
    variance).

    Attributes:
        path: Folder of a scorer that the phase ``reward_model`` trained, or a ``*ForSequenceClassification``;
            or a list of them.
        uncertainty_penalty: At least 0; needs more than one member.
        normalised: Subtract mean and divide by standard deviation, as saved beside the scorer. False takes raw
            numbers.
        max_length: Tokens to read at most of a model that does not say what it was trained with.
        batch_size: Texts that the device reads at a time.

    Raises:
        UserError: A folder holds no scorer, or no normaliser although ``normalised``.
    """

    path: str | tuple[str, ...]
    uncertainty_penalty: NonNegative = 0.0
    normalised: bool = True
    max_length: Annotated[int, Ge(8)] = 512
    batch_size: BatchSize = 32
    _spread: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self._paths:
            raise ValueError("path must be a folder, or at least one, got none")

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Message] | None] | None = None,
    ) -> list[float]:
        return self.start(prompts, responses, messages)()

    def start(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Message] | None] | None = None,
    ) -> Callable[[], list[float]]:
        """Sends all texts to all models; ``messages`` are the conversations that they answer, if any."""
        models = [_reward_model(find_folder(path).resolve()) for path in self._paths]
        members = sum(len(model.scorer.labels) for model in models)
        if self.uncertainty_penalty > 0 and members < 2:
            raise UserError(
                "uncertainty_penalty needs two members or more: give several paths or labels, got 1"
            )
        asked = [None] * len(prompts) if messages is None else messages
        running = [self._started(model, prompts, responses, asked) for model in models]

        def scores() -> list[float]:
            rewards = np.concatenate([finish() for finish in running], axis=1)  # [B members]
            spread = rewards.std(axis=1)
            self._spread.extend(spread.tolist() if members > 1 else ())
            return (rewards.mean(axis=1) - self.uncertainty_penalty * spread).tolist()

        return scores

    def diagnostics(self) -> dict[str, float]:
        """``uncertainty``: the mean standard deviation over the members, of the texts since the last call."""
        spread, number = float(np.mean(self._spread or 0.0)), len(self._spread)
        self._spread.clear()
        return {"uncertainty": spread} if number else {}

    @property
    def _paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    def _started(
        self,
        model: _RewardModel,
        prompts: Sequence[str],
        responses: Sequence[str],
        messages: Sequence[Sequence[Message] | None],
    ) -> Callable[[], Float[np.ndarray, "B M"]]:
        reading = model.reading(self.max_length)
        mean, std = model.scale() if self.normalised else (0.0, 1.0)
        finish = run_in_batches(
            functools.partial(_scores, model.scorer, model.params),
            _rows(reading, model.tokenizer, prompts, responses, messages),
            batch_size=self.batch_size,
            longest=reading.max_length or self.max_length,
        )
        shape = len(responses), len(model.scorer.labels)
        return lambda: (finish().reshape(shape).astype(np.float64) - mean) / std


class _RewardModel(NamedTuple):
    """A scorer with its tokenizer and the settings that its training saved."""

    folder: Path
    scorer: SequenceScorer
    params: Params
    tokenizer: Tokenizer
    extra: dict[str, Any]

    def reading(self, max_length: int) -> Reading:
        """How it read texts in training; if not saved, prompt and response in ``max_length`` tokens."""
        limit = min(max_length, self.scorer.max_length or max_length)
        known = self.extra.get("reading")
        return Reading(max_length=limit) if known is None else Reading.of(known)

    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each member on its reference samples."""
        saved = self.extra.get("normaliser")
        if saved is None:
            raise UserError(
                f"{self.folder}: expected a reward model with its normaliser, got one without; "
                "set normalised to false"
            )
        mean, std = (np.asarray(saved[name], np.float64) for name in ("mean", "std"))
        if mean.shape != (len(self.scorer.labels),) or std.shape != mean.shape or not (std > 0).all():
            raise UserError(
                f"{self.folder}: normaliser must have a mean and a positive std for each of "
                f"{len(self.scorer.labels)} labels, got {saved}"
            )
        return mean, std


@functools.cache
def _reward_model(folder: Path) -> _RewardModel:
    scorer, params = load_scorer(folder)
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = bounded(load_tokenizer(folder), scorer.vocab_size, own_tokenizer_of(folder))
    return _RewardModel(folder, scorer, params, tokenizer, read_extra(folder))


@functools.partial(jax.jit, static_argnames="scorer")
def _scores(
    scorer: SequenceScorer, params: Params, tokens: Int[Array, "B T"], roles: Int[Array, "B T"]
) -> Float[Array, "B M"]:
    return scorer.apply(scorer.cast(params), tokens, roles != PADDING)


def _rows(
    reading: Reading,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    responses: Sequence[str],
    messages: Sequence[Sequence[Message] | None],
) -> Iterator[Rows]:
    for start in range(0, len(responses), TEXTS_AT_A_TIME):
        part = slice(start, start + TEXTS_AT_A_TIME)
        for row in reading.rows(tokenizer, prompts[part], responses[part], messages[part]):
            yield row, np.full(len(row), COUNTED)
