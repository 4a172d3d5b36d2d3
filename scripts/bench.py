"""Times our steps on GPT-2 shapes, alone or in turn with a peer on the same machine; prints one JSON line.

    python scripts/bench.py sft --size mini
    python scripts/bench.py rollout --size mini --against hf --peer-python peers/bin/python
    python scripts/bench.py rollout --size mini --against tunix --top-k none --peer-python peers/bin/python
    python scripts/bench.py ppo --size mini --value separate --against trl --peer-python peers/bin/python
    python scripts/bench.py dpo --size mini --against trl_dpo --peer-python peers/bin/python
    python scripts/bench.py iterations --size mini --epochs 1

sft         one optimizer step on 16 rows of 256 tokens (small: 8 of 128), packed as in any run
dpo         one optimizer step on 8 pairs (small: 4) of as many tokens a row, half of them prompt; what the
            reference says of each pair is known before, on both sides
rollout     16 prompts of 32 tokens, 64 new tokens each, top-k 50; against tunix, which has no GPT-2, both sides
            are Qwen3 models of the same sizes
ppo         16 prompts of 32 tokens, 64 sampled tokens each, a reward model of the policy's size, 4 epochs of
            one minibatch; with --value separate the networks are TRL's: policy, reference, value, reward
rloo, grpo  as ppo, with 4 answers to each of 4 prompts and no value
iterations  ppo, rloo and grpo in turns; a ratio is the median over turns of the seconds of ppo by those of
            the other

Weights are random and float32. All steps but those of rollout are of a built experiment (`bench_work`). Shared
machines drift, so only ratios compare: ``ratio`` is the median over turns of the peer's seconds by ours. Each
turn starts with a step that does not count, since a process that has waited is slow at first.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from bench_work import SHAPES, Step, Work, our_step, work_of

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import environment

METHODS = ("ppo", "rloo", "grpo")  # of which iterations takes turns
PEERS_OF = {"sft": ("hf",), "dpo": ("trl_dpo",), "rollout": ("hf", "tunix"), "ppo": ("trl",)}
PEERS_OF |= dict.fromkeys(("rloo", "grpo", "iterations"), ())
PEER_PACKAGES = {
    "hf": "torch==2.13.0 transformers",
    "trl": "torch==2.13.0 trl==1.12.0",
    "trl_dpo": "torch==2.13.0 trl==1.16.0",
    "tunix": "google-tunix==0.1.7 jax==0.10.2 flax==0.12.8",
}
PEER_PYTHON = "HYBRID_JAX_PEER_PYTHON"
STEPS = {"tiny": 8, "mini": 4, "small": 2}  # timed ones a turn


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
    if peer is None:
        return {"seconds": measure_all({"ours": ours}, turns, steps)["ours_seconds"]}
    numbers = measure_all({"peer": peer, "ours": ours}, turns, steps)
    return dict(zip(("peer_seconds", "seconds", "ratio"), numbers.values(), strict=True))


def measure_all(sides: Mapping[str, Ours | Peer], turns: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step of each side, and the medians over turns of (the first one's / the other's)."""
    for side in sides.values():
        side.turn(2)  # compile
    seconds = [{name: side.turn(1 + steps)[1:] for name, side in sides.items()} for _ in range(turns)]
    first, *others = sides
    return {
        **{f"{name}_seconds": statistics.median(s for turn in seconds for s in turn[name]) for name in sides},
        **{
            f"{name}_ratio": statistics.median(
                statistics.median(turn[first]) / statistics.median(turn[name]) for turn in seconds
            )
            for name in others
        },
    }


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    family = "qwen3" if options.against == "tunix" else "gpt2"
    changes = {"top_k": options.top_k, "epochs": options.epochs, "family": family, "dtype": options.dtype}
    works = [work_of(k, options.size, **changes) for k in kinds_of(options.kind)]
    steps = options.steps or STEPS[options.size]
    python = peer_python(options)
    peer = None if python is None else Peer(options.against, python, works[0])
    sides = {work.kind: Ours(our_step(work, options.value)) for work in works}
    try:
        if options.kind == "iterations":
            numbers = measure_all(sides, options.turns, steps)
        else:
            numbers = measure(sides[options.kind], peer, options.turns, steps)
    finally:
        if peer is not None:
            peer.close()
    if options.profile:
        with jax.profiler.trace(options.profile):
            for side in sides.values():
                side.turn(steps)
    print(json.dumps(record(options, works[0], numbers, steps, peer)))


def kinds_of(kind: str) -> tuple[str, ...]:
    return METHODS if kind == "iterations" else (kind,)


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench.py", description=description, epilog=epilog)
    parser.add_argument("kind", choices=PEERS_OF)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--value", choices=["separate", "shared"], default="separate", help="network, for ppo")
    parser.add_argument("--epochs", type=int, default=4, help="of ppo, rloo and grpo: updates on a rollout")
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
    for name in ("turns", "steps", "epochs"):
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
        names = " or ".join(PEERS_OF[options.kind]) or "no peer"
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
        **({"value": options.value} if "ppo" in kinds_of(options.kind) else {}),
        **({"epochs": work.epochs} if work.kind in METHODS else {}),
        **({"top_k": work.top_k} if options.kind == "rollout" else {}),
        **({"dtype": work.dtype} if work.dtype != "float32" else {}),
        **rounded,
        **({"tokens_per_second": round(work.tokens / numbers["seconds"])} if "seconds" in numbers else {}),
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
