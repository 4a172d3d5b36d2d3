"""The steps that `bench.py` times: models with random weights, and phases of a built experiment."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.batches import Example
from hybrid_jax.data.preferences import Preference
from hybrid_jax.evaluation.evaluate import EvaluationConfig
from hybrid_jax.experiment import Experiment, ExperimentConfig, build
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.heads import value
from hybrid_jax.phases.grpo import GRPO
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.preference import PreferenceSettings
from hybrid_jax.phases.rloo import RLOO
from hybrid_jax.phases.sft import SFT
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.sampling.ancestral import generate
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.optimizers import AdamW
from hybrid_jax.training.scheduler import Alternation

SHAPES = {  # layers, width, heads, vocabulary
    "tiny": (2, 64, 4, 1_024),
    "mini": (4, 256, 8, 8_192),
    "small": (12, 768, 12, 50_257),
}
NUM_DOCUMENTS = 256
NUM_BATCHES = 2  # of pairs: once each was read, what the reference says of it is known
GROUP = 4  # answers to a prompt, for the methods without a critic
FAMILIES: dict[str, dict[str, Any]] = {  # switches of the decoder
    "gpt2": {},
    "qwen3": {
        **{"position": "rotary", "norm": "rms", "norm_epsilon": 1e-6, "query_key_norm": "head"},
        **{"mlp": "gated", "activation": "silu", "attention_bias": False, "mlp_bias": False},
    },
}

ValueNetwork = Literal["separate", "shared"]
Step = Callable[[], Any]  # takes one step and returns what it computed


@dataclass(frozen=True)
class Work:
    """The size of what is timed; a peer gets it as JSON."""

    kind: str
    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    rows: int  # responses; for dpo pairs
    length: int  # of a row, for sft; of a prompt otherwise
    new_tokens: int = 0  # of a response
    top_k: int | None = 50
    epochs: int = 4
    family: str = "gpt2"
    dtype: str = "float32"  # of the computation

    @property
    def tokens(self) -> int:
        """Learned or sampled in one step; of pairs, all that are read."""
        if self.kind == "dpo":
            return 2 * self.rows * (self.length + self.new_tokens)
        return self.rows * (self.new_tokens or self.length)

    def decoder(self) -> DecoderConfig:
        shape: dict[str, Any] = dict(num_layers=self.num_layers, width=self.width, num_heads=self.num_heads)
        return DecoderConfig(**shape, **FAMILIES[self.family], dtype=self.dtype)  # pyright: ignore[reportArgumentType]


def work_of(kind: str, size: str, **changes: Any) -> Work:
    if kind in ("sft", "dpo"):
        rows, length = (8, 128) if size == "small" else (16, 256)
        if kind == "sft":
            return Work(kind, *SHAPES[size], rows=rows, length=length, **changes)
        half = length // 2
        return Work(kind, *SHAPES[size], rows=rows // 2, length=half, new_tokens=half, **changes)
    return Work(kind, *SHAPES[size], rows=16, length=32, new_tokens=64, **changes)


def our_step(work: Work, value_network: ValueNetwork = "separate") -> Step:
    if work.kind == "rollout":
        return rollout_step(work)
    return experiment_step(work, phase_of(work, value_network))


def phase_of(work: Work, value_network: ValueNetwork = "separate") -> Any:
    """The settings of the phase that takes the step."""
    match work.kind:
        case "sft":
            return SFT(batch_size=work.rows, length=work.length, optimizer=AdamW(learning_rate=1e-4))
        case "dpo":
            length = work.length + work.new_tokens
            return PreferenceSettings(batch_size=work.rows, length=length, optimizer=AdamW(learning_rate=1e-6))
        case "ppo":
            return ppo(work, value_network)
    method = {"rloo": RLOO, "grpo": GRPO}[work.kind]
    groups: dict[str, Any] = dict(prompts_per_step=work.rows // GROUP, samples_per_prompt=GROUP)
    return method(reward=model_reward(work), epochs=work.epochs, **groups)


def rollout_step(work: Work) -> Step:
    model = work.decoder().build(work.vocab_size)
    params = model.init(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (work.rows, work.length), 1, work.vocab_size)
    sample = partial(generate, max_new_tokens=work.new_tokens, top_k=work.top_k)
    keys = iter(range(sys.maxsize))
    return lambda: sample(model, params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(next(keys)))


def experiment_of(work: Any, model: DecoderConfig, phase: Any) -> Experiment:
    """A run that knows one phase; nothing is written."""
    return build(
        ExperimentConfig(
            run_dir=Path(tempfile.gettempdir(), "hybrid_jax_bench"),
            steps=1_000_000,
            model=model,
            tokenizer=Numbers(work.vocab_size),
            data=RandomNumbers(work),
            phases={work.kind: phase},
            scheduler=Alternation({work.kind: 1}),
            evaluation=EvaluationConfig(num_prompts=0, num_examples=0),
            compilation_cache=None,
        )
    )


def experiment_step(work: Work, phase: Any) -> Step:
    """A step of a run that knows one phase, with its data stream, its schedule and its metrics."""
    experiment = experiment_of(work, work.decoder(), phase)
    states = [experiment.init()]

    def step():
        states[0] = take_step(experiment, experiment.phases[work.kind], states[0])
        return states[0].train

    return step


def ppo(work: Work, value_network: ValueNetwork) -> PPO:
    return PPO(
        reward=model_reward(work), prompts_per_step=work.rows, epochs=work.epochs, value_network=value_network
    )


def model_reward(work: Work) -> CompositeReward:
    return CompositeReward({"model": Part(RewardModel.random(work.decoder().build(work.vocab_size)))})


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A decoder that scores a response at its last token: the reward of TRL, as one on the device."""

    model: Decoder
    params: Any

    @classmethod
    def random(cls, model: Decoder) -> RewardModel:
        kernel = 0.02 * jax.random.normal(jax.random.key(3), (model.width, 1))
        return cls(
            model, {"model": model.init(jax.random.key(2)), "head": {"kernel": kernel, "bias": jnp.zeros(1)}}
        )

    def score_tokens(self, tokens, attention_mask, response_mask):
        return _last_scores(self.model, self.params, tokens, attention_mask)


@partial(jax.jit, static_argnames="model")
def _last_scores(model, params, tokens, attention_mask):
    scores = value(params["head"], model.hidden(params["model"], tokens, attention_mask))
    last = tokens.shape[1] - 1 - jnp.argmax(attention_mask[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


@dataclass(frozen=True)
class Numbers:
    """The tokenizer of texts that are token ids, such as "7 3 12"."""

    vocab_size: int
    eos_id: int = 0

    def build(self, texts):
        return self

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class RandomNumbers:
    """One long document to learn, prompts of one length to answer, or pairs of answers of one length."""

    work: Work

    def load(self, split: str) -> list[Example]:
        work, random = self.work, np.random.default_rng(0)

        def texts(number: int, length: int) -> list[str]:
            return [" ".join(map(str, row)) for row in random.integers(1, work.vocab_size, (number, length))]

        if work.kind == "sft":
            return [Example(prompt="", response=" ".join(texts(NUM_DOCUMENTS, work.length)))]
        if work.kind != "dpo":
            return [Example(prompt=text) for text in texts(NUM_DOCUMENTS, work.length)]
        lengths = (work.length, work.new_tokens - 1, work.new_tokens - 1)  # an end token follows an answer
        columns = [texts(NUM_BATCHES * work.rows, length) for length in lengths]
        return [Preference(p, f" {good}", f" {bad}").example for p, good, bad in zip(*columns, strict=True)]
