"""Times our steps on GPT-2 shapes, alone or in turn with a peer on the same machine; prints one JSON line.

    python scripts/bench.py sft --size mini
    python scripts/bench.py rollout --size mini --against hf --peer-python peers/bin/python
    python scripts/bench.py rollout --size mini --against tunix --top-k none --peer-python peers/bin/python
    python scripts/bench.py ppo --size mini --value separate --against trl --peer-python peers/bin/python

sft      one optimizer step on 16 rows of 256 tokens (small: 8 of 128), packed as in any run
rollout  16 prompts of 32 tokens, 64 new tokens each, top-k 50; against tunix, which has no GPT-2, both sides
         are Qwen3 models of the same sizes
ppo      16 prompts of 32 tokens, 64 sampled tokens each, a reward model of the policy's size, 4 epochs of one
         minibatch; with --value separate the networks are those of TRL: policy, reference, value, reward

Weights are random and float32. The steps of sft and ppo are those of a built experiment. Shared machines
drift, so only ``ratio``, the median over turns of the peer's seconds by ours, compares; each turn starts with a
step that does not count, since a process that has waited is slow at first.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.batches import Example
from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.evaluation.evaluate import EvaluationConfig
from hybrid_jax.experiment import ExperimentConfig, build, environment
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.heads import value
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.sft import SFT
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.sampling.ancestral import generate
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.optimizers import AdamW
from hybrid_jax.training.scheduler import Alternation

PEERS_OF = {"sft": ("hf",), "rollout": ("hf", "tunix"), "ppo": ("trl",)}
PEER_PACKAGES = {
    "hf": "torch==2.13.0 transformers",
    "trl": "torch==2.13.0 trl==1.12.0",
    "tunix": "google-tunix==0.1.7 jax==0.10.2 flax==0.12.8",
}
PEER_PYTHON = "HYBRID_JAX_PEER_PYTHON"
SHAPES = {  # layers, width, heads, vocabulary
    "tiny": (2, 64, 4, 1_024),
    "mini": (4, 256, 8, 8_192),
    "small": (12, 768, 12, 50_257),
}
STEPS = {"tiny": 8, "mini": 4, "small": 2}  # timed ones a turn
NUM_DOCUMENTS = 256
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
    """What is timed; a peer gets it as JSON."""

    kind: str
    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    rows: int
    length: int  # of a row, for sft; of a prompt otherwise
    new_tokens: int = 0
    top_k: int | None = 50
    epochs: int = 4
    family: str = "gpt2"
    dtype: str = "float32"  # of the computation

    @property
    def tokens(self) -> int:
        """Learned or sampled in one step."""
        return self.rows * (self.new_tokens or self.length)

    def decoder(self) -> DecoderConfig:
        shape: dict[str, Any] = dict(num_layers=self.num_layers, width=self.width, num_heads=self.num_heads)
        return DecoderConfig(**shape, **FAMILIES[self.family], dtype=self.dtype)  # pyright: ignore[reportArgumentType]


def work_of(kind: str, size: str, **changes: Any) -> Work:
    if kind == "sft":
        rows, length = (8, 128) if size == "small" else (16, 256)
        return Work(kind, *SHAPES[size], rows=rows, length=length, **changes)
    return Work(kind, *SHAPES[size], rows=16, length=32, new_tokens=64, **changes)


# ------------------------------------------------------------------------------------------------ our steps


def our_step(work: Work, value_network: ValueNetwork = "separate") -> Step:
    if work.kind == "rollout":
        return rollout_step(work)
    return experiment_step(work, sft(work) if work.kind == "sft" else ppo(work, value_network))


def rollout_step(work: Work) -> Step:
    model = work.decoder().build(work.vocab_size)
    params = model.init(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (work.rows, work.length), 1, work.vocab_size)
    sample = partial(generate, max_new_tokens=work.new_tokens, top_k=work.top_k)
    keys = iter(range(sys.maxsize))
    return lambda: sample(model, params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(next(keys)))


def experiment_step(work: Work, phase: Any) -> Step:
    """A step of a run that knows one phase, with its data stream, its schedule and its metrics."""
    experiment = build(
        ExperimentConfig(
            run_dir=Path(tempfile.gettempdir(), "hybrid_jax_bench"),  # nothing is written
            steps=1_000_000,
            model=work.decoder(),
            tokenizer=Numbers(work.vocab_size),
            data=RandomNumbers(work),
            phases={work.kind: phase},
            scheduler=Alternation({work.kind: 1}),
            evaluation=EvaluationConfig(num_prompts=0, num_examples=0),
            compilation_cache=None,
        )
    )
    states = [experiment.init()]

    def step():
        states[0] = take_step(experiment, experiment.phases[work.kind], states[0])
        return states[0].train

    return step


def sft(work: Work) -> SFT:
    return SFT(batch_size=work.rows, length=work.length, optimizer=AdamW(learning_rate=1e-4))


def ppo(work: Work, value_network: ValueNetwork) -> PPO:
    reward = RewardModel.random(work.decoder().build(work.vocab_size))
    return PPO(
        reward=CompositeReward({"model": Part(reward)}),
        prompts_per_step=work.rows,
        epochs=work.epochs,
        value_network=value_network,
    )


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
    """One long document to learn, or prompts of one length to answer."""

    work: Work

    def load(self, split: str) -> list[Example]:
        shape = (NUM_DOCUMENTS, self.work.length)
        ids = np.random.default_rng(0).integers(1, self.work.vocab_size, shape)
        if self.work.kind == "sft":
            return [Example(prompt="", response=" ".join(map(str, ids.ravel())))]
        return [Example(prompt=" ".join(map(str, row))) for row in ids]


# ------------------------------------------------------------------------------------------------ turns


class Ours:
    """Our side: it runs in this process."""

    def __init__(self, step: Step):
        self._step = step

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps, one after the other."""
        return [self._timed() for _ in range(steps)]

    def _timed(self) -> float:
        started = time.perf_counter()
        jax.block_until_ready(self._step())
        return time.perf_counter() - started


class Peer:
    """A program of ``scripts/peers`` in its own process and Python; between its turns it sleeps on a pipe."""

    def __init__(self, name: str, python: str, work: Any, packages: str | None = None):
        program = shutil.which(python)
        if program is None:
            raise UserError(f"--peer-python must be a program, got {python}")
        script = Path(__file__).resolve().parent / "peers" / f"{name}.py"
        task = json.dumps({**asdict(work), "threads": os.cpu_count()})
        self._name, self._folder = name, tempfile.TemporaryDirectory()
        self._packages = packages or PEER_PACKAGES[name]
        self._errors = Path(self._folder.name, "stderr")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [os.path.abspath(program), "-W", "ignore", str(script), task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder.name,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()

    def turn(self, steps: int) -> list[float]:
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        with self._process:
            self._process.kill()
        self._folder.cleanup()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        last = (self._errors.read_text().strip().splitlines() or ["no message"])[-1]
        self.close()
        raise UserError(f"the peer {self._name} ended: {last}; it needs {self._packages}")


def measure(ours: Ours, peer: Peer | None, turns: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step and, against a peer, the median over turns of (its seconds / ours)."""
    sides: list[Ours | Peer] = [ours] if peer is None else [peer, ours]
    for side in sides:
        side.turn(2)  # compile
    seconds = [[side.turn(1 + steps)[1:] for side in sides] for _ in range(turns)]
    numbers: dict[str, Any] = {"seconds": statistics.median(s for turn in seconds for s in turn[-1])}
    if peer is not None:
        numbers["peer_seconds"] = statistics.median(s for turn in seconds for s in turn[0])
        numbers["ratio"] = statistics.median(
            statistics.median(theirs) / statistics.median(own) for theirs, own in seconds
        )
    return numbers


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    family = "qwen3" if options.against == "tunix" else "gpt2"
    work = work_of(options.kind, options.size, top_k=options.top_k, family=family, dtype=options.dtype)
    steps = options.steps or STEPS[options.size]
    python = peer_python(options)
    peer = None if python is None else Peer(options.against, python, work)
    ours = Ours(our_step(work, options.value))
    try:
        numbers = measure(ours, peer, options.turns, steps)
    finally:
        if peer is not None:
            peer.close()
    if options.profile:
        with jax.profiler.trace(options.profile):
            ours.turn(steps)
    print(json.dumps(record(options, work, numbers, steps, peer)))


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench.py", description=description, epilog=epilog)
    parser.add_argument("kind", choices=PEERS_OF)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--value", choices=["separate", "shared"], default="separate", help="network, for ppo")
    parser.add_argument("--top-k", type=top_k, default=50, help='for rollout; "none" samples all tokens')
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of our computation"
    )
    parser.add_argument("--against", choices=PEER_PACKAGES, help="a peer to alternate with")
    parser.add_argument(
        "--peer-python", default=os.environ.get(PEER_PYTHON), help=f"or the variable {PEER_PYTHON}"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed ones a turn; by default fewer for the larger sizes")
    parser.add_argument(
        "--profile", metavar="DIR", help="also write a trace of our steps for xprof or Perfetto"
    )
    options = parser.parse_args(arguments)
    for name in ("turns", "steps"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name} must be at least 1, got {number}")
    return options


def top_k(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise UserError(f'--top-k must be a number or "none", got {text}')
    return None if text == "none" else int(text)


def peer_python(options: Any) -> str | None:
    """The interpreter that runs the peer; None without a peer."""
    if options.against is None:
        return None
    if options.against not in PEERS_OF[options.kind]:
        names = " or ".join(PEERS_OF[options.kind])
        raise UserError(f"{options.kind} is compared with {names}, got --against {options.against}")
    if not options.peer_python:
        packages = PEER_PACKAGES[options.against]
        raise UserError(
            f"--against {options.against} needs a Python with {packages}: python -m venv peers; "
            f"peers/bin/pip install {packages}; then --peer-python peers/bin/python, or set {PEER_PYTHON}"
        )
    return options.peer_python


def record(options: Any, work: Work, numbers: dict[str, Any], steps: int, peer: Peer | None) -> dict[str, Any]:
    here = environment()
    rounded = {name: float(f"{number:.4g}") for name, number in numbers.items()}
    return {
        "kind": options.kind,
        "size": options.size,
        **({"value": options.value} if options.kind == "ppo" else {}),
        **({"top_k": work.top_k} if options.kind == "rollout" else {}),
        **({"dtype": work.dtype} if work.dtype != "float32" else {}),
        **rounded,
        "tokens_per_second": round(work.tokens / numbers["seconds"]),
        **({"peer": options.against} if peer else {}),
        "turns": options.turns,
        "steps": steps,
        "device": f"{here['devices'][0]}, {here['cpu_count']} cores",
        "commit": here["commit"],
        "versions": {
            **{name: here["packages"][name] for name in ("jax", "jaxlib", "flax", "optax")},
            **(peer.versions if peer else {}),
        },
    }


if __name__ == "__main__":
    run_command(main)
