"""Times SFT, rollouts and PPO of published shapes in bfloat16 on the local accelerator; prints one JSON line.

On a machine with one H100 or H200 (nobody has run these commands on one yet):

    python -m venv ours && ours/bin/pip install -e '.[cuda]'
    python -m venv peers && peers/bin/pip install torch==2.13.0 'transformers>=5'
    export HYBRID_JAX_PEER_PYTHON=$PWD/peers/bin/python
    for size in qwen2.5-0.5b qwen2.5-1.5b llama-3.2-1b; do
      ours/bin/python scripts/bench_accelerator.py sft --size $size --against torch >> accelerator.jsonl
      ours/bin/python scripts/bench_accelerator.py rollout --size $size --against torch >> accelerator.jsonl
      ours/bin/python scripts/bench_accelerator.py ppo --size $size >> accelerator.jsonl
    done
    ours/bin/python scripts/bench_accelerator.py --table accelerator.jsonl

The table takes the last line of a kind and a size. Then sft with --peer-compile, --attention cudnn, --remat
dots, --scan-layers and other --rows: on 80 GB, beside torch, the two larger shapes may need --remat dots or
--rows 4 (an estimate). "--size smoke" runs anywhere in seconds. Weights are random; parameters and optimizer
states are float32, the computation is bfloat16.

sft      ``mfu`` = needed FLOPs (`models.flops`) / seconds / peak. ``--burst`` updates are started one after the
         other and waited for once, as in a run, whose host is a step ahead; seconds are those of one update
rollout  plain sampling over the whole vocabulary, all rows to the end. Each token after the first costs a pass
         over the weights, and over the keys and values so far. With b bytes a number in the dtype of the
         computation, N matmul parameters (head included), L layers, K key/value heads of C channels, B rows,
         P prompt tokens and R new ones

             needed bytes = (R - 1) · b · N  +  B · b · 2·L·K·C · Σ_{t=1}^{R-1} (P + t)

         and ``roofline`` = needed bytes / bandwidth / seconds of the whole rollout, with the reading of the
         prompts and the cast of the weights; ``decode_roofline`` leaves out ``prefill_seconds``, those of a
         rollout of one token. ``bandwidth_used`` counts what a turn reads in place of what it needs: every slot
         of the cache, in use or not. Activations, scores and samples are not counted
ppo      one iteration, by the run's own records: where the seconds went, MFU; the reward reads texts, on the
         host

Peaks are those of `planning.accelerators`, or of --peaks, or, on a CPU, measured in float32 (``source`` says
which); without them shares are null. ``memory`` sets the runtime's peak, that of the whole process with what
XLA takes to tune kernels, beside the largest peak of the plan's programs for the same device. Against torch
(`peers/torch_bf16.py`) turns alternate in two processes on one card; ``ratio`` is the median over turns of its
seconds by ours.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from accelerator.roofline import Peaks, find_peaks, needed_bytes, slot_bytes
from accelerator.shapes import DEFAULTS, SHAPES, SMOKE
from accelerator.table import render
from bench import PEER_PYTHON, Ours, Peer, measure
from bench_work import Step, experiment_of

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import Experiment, environment, plan_phases
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.flops import train_flops
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.sft import SFT
from hybrid_jax.planning.step import compile_step
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.sampling.ancestral import Ancestral, cache_lengths
from hybrid_jax.training.compilation import Compilations, summary
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.machine import Machine, peak_memory
from hybrid_jax.training.optimizers import AdamW
from hybrid_jax.training.phase import Program
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.recorder import PARTS, Recorder

log = logging.getLogger("hybrid_jax.bench")

WARM_UP = 2  # steps that may compile; `bench.measure` takes as many
TORCH = "torch==2.13.0 'transformers>=5'"


@dataclass(frozen=True)
class Work:
    """The work that is timed; a peer gets it as JSON."""

    kind: str
    rows: int
    length: int  # of a row, for sft; of a prompt otherwise
    new_tokens: int
    burst: int  # updates that are waited for once
    vocab_size: int
    config: dict[str, Any] = field(default_factory=dict)  # config.json, for a peer
    compile: bool = False  # whether a peer does
    master: str = "float32"  # what the peer's optimizer updates


# ------------------------------------------------------------------------------------------------ our steps


class Watched:
    """A step that notices what is compiled after the warm-up."""

    def __init__(self, step: Step):
        self.recompiled = ""
        self._step, self._calls, self._compilations = step, 0, Compilations()

    def __call__(self) -> Any:
        self._compilations.new()
        result = self._step()
        self._calls += 1
        if self._calls > WARM_UP and (compiled := self._compilations.new()):
            self.recompiled = summary(compiled)
            log.warning("step %d compiled %s: its seconds are among those timed", self._calls, self.recompiled)
        return result


@dataclass(frozen=True)
class Bench:
    """One kind of work on our side: how to time it, and its programs."""

    work: Work
    config: DecoderConfig
    peaks: Peaks

    def sft(self, peer: Peer | None, turns: int, steps: int) -> tuple[dict[str, Any], list[Program], str]:
        w = self.work
        settings = SFT(batch_size=w.rows, length=w.length, optimizer=AdamW(learning_rate=1e-5))
        experiment = experiment_of(self.work, self.config, settings)
        states = [experiment.init()]

        def step():
            for _ in range(w.burst):
                states[0] = take_step(experiment, experiment.phases["sft"], states[0])
            return states[0].train

        watched = Watched(step)
        numbers = of_one(measure(Ours(watched), peer, turns, steps), w.burst)
        flops = train_flops(self.config, w.rows * w.length, w.length)
        numbers["tokens_per_second"] = w.rows * w.length / numbers["seconds"]
        numbers |= {"flops": flops, "mfu": self.peaks.share_of_flops(flops, numbers["seconds"])}
        return numbers, self._programs(experiment), watched.recompiled

    def rollout(self, peer: Peer | None, turns: int, steps: int) -> tuple[dict[str, Any], list[Program], str]:
        w, model = self.work, self.config.build()
        params = model.init(jax.random.key(0))
        prompts = jax.random.randint(jax.random.key(1), (w.rows, w.length), 1, w.vocab_size)
        inputs, keys = (prompts, jnp.ones(prompts.shape, bool)), iter(range(sys.maxsize))

        def rollout(new_tokens: int) -> Callable[..., Any]:
            return jax.jit(partial(Ancestral(new_tokens), model))

        sample, first = rollout(w.new_tokens), rollout(1)
        watched = Watched(lambda: sample(params, *inputs, jax.random.key(next(keys))))
        numbers = measure(Ours(watched), peer, turns, steps)
        prefill = measure(Ours(lambda: first(params, *inputs, jax.random.key(0))), None, turns, steps)[
            "seconds"
        ]
        decode = max(numbers["seconds"] - prefill, 1e-9)
        needed = needed_bytes(self.config, w.rows, w.length, w.new_tokens)
        read = slot_bytes(self.config, w.rows, w.length, cache_lengths(model, w.length, w.new_tokens))
        numbers |= {
            "tokens_per_second": w.rows * w.new_tokens / numbers["seconds"],
            "prefill_seconds": prefill,
            "needed_bytes": needed,
            "slot_bytes": read,
            "roofline": self.peaks.share_of_bandwidth(needed, numbers["seconds"]),
            "decode_roofline": self.peaks.share_of_bandwidth(needed, decode),
            "bandwidth_used": self.peaks.share_of_bandwidth(read, decode),
        }
        arguments = jax.eval_shape(lambda *x: x, params, *inputs, jax.random.key(0))
        program = Program("rollout/sample", sample, arguments, loop_steps=w.new_tokens - 1)
        return numbers, [program], watched.recompiled

    def ppo(self, peer: None, turns: int, steps: int) -> tuple[dict[str, Any], list[Program], str]:
        w = self.work
        settings = PPO(
            reward=CompositeReward({"different": Part(different)}),
            prompts_per_step=w.rows,
            max_prompt_length=w.length,
            sampler=Ancestral(w.new_tokens),
            minibatches=4,
        )
        experiment = experiment_of(self.work, self.config, settings)
        records, states = Records(), [experiment.init()]
        machine = Machine(jax.devices()[:1], None if self.peaks.flops is None else self.peaks.flops / 1e12)
        recorder = Recorder(records, Progress(1, stream=io.StringIO()), machine=machine)

        def step():
            states[0] = take_step(experiment, experiment.phases["ppo"], states[0], recorder)
            recorder.flush()  # waits for it

        watched = Watched(step)
        for _ in range(WARM_UP + turns * steps):
            watched()
        return records.medians(WARM_UP), self._programs(experiment), watched.recompiled

    def _programs(self, experiment: Experiment) -> list[Program]:
        phases, state = plan_phases(experiment.config, jax.devices()[:1])
        return phases[self.work.kind].programs(state, self.work.length)


class Records:
    """A logger that keeps what a run says of its steps."""

    def __init__(self):
        self.all: list[dict[str, Any]] = []

    def metrics(self, record: dict[str, Any]) -> None:
        self.all.append(record)

    def samples(self, records: list[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...

    def medians(self, first: int) -> dict[str, Any]:
        """The medians of PPO's steps from ``first`` on; ``split`` are shares of the seconds."""
        timed = self.all[first:]
        median = lambda name: statistics.median(r[f"ppo/{name}"] for r in timed)  # noqa: E731
        split = {part: median(part) for part in (*PARTS, "update_seconds")}
        numbers = {name: median(name) for name in ("seconds", "tokens_per_second")}
        mfu = median("mfu") if "ppo/mfu" in timed[0] else None
        shares = {part.removesuffix("_seconds"): s / numbers["seconds"] for part, s in split.items()}
        return {**numbers, **split, "mfu": mfu, "split": shares}


def of_one(numbers: dict[str, Any], burst: int) -> dict[str, Any]:
    """Seconds of one update, from those of ``burst`` updates; a ratio stays."""
    return {name: x / burst if name.endswith("seconds") else x for name, x in numbers.items()}


def different(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward on texts: the share of the words that are not repeated."""
    return [len({*text.split()}) / max(len(text.split()), 1) for text in responses]


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.table:
        print(render(read_records(options.table)))
        return
    set_up_logging()
    if options.against:  # two processes share the card, so none may take it all
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = replace(SHAPES[options.size], execution=execution(options))
    work = work_of(options, config)
    bench = Bench(work, config, find_peaks(options.peaks))
    peer = Peer("torch_bf16", options.peer_python, work, TORCH) if options.against else None
    try:
        numbers, programs, recompiled = getattr(bench, options.kind)(peer, options.turns, options.steps)
    finally:
        if peer is not None:
            peer.close()
    print(json.dumps(record(options, arguments, bench, numbers, memory_and_plan(programs), recompiled, peer)))


def read_records(file: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in Path(file).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--table must be a file of JSON lines, got {file}: {error}") from error


def execution(options: Any) -> Execution:
    return Execution(scan_layers=options.scan_layers, remat=options.remat, attention=options.attention)


def work_of(options: Any, config: DecoderConfig) -> Work:
    sizes = (SMOKE if options.size == "smoke" else DEFAULTS)[options.kind]
    given = {name: getattr(options, name) for name in sizes}
    sizes = {name: given[name] or size for name, size in sizes.items()}
    theirs = FAMILIES[config.family or ""].write_config(config) if options.against else {}
    assert config.vocab_size is not None
    return Work(
        options.kind,
        **sizes,
        vocab_size=config.vocab_size,
        config=theirs,
        compile=options.peer_compile,
        master=options.peer_master,
    )


def memory_and_plan(programs: Sequence[Program]) -> dict[str, Any]:
    """The peak so far, and then, by compiling again, that of the plan."""
    device = jax.devices()[0]
    taken = peak_memory([device])
    steps = [compile_step(program, device.platform) for program in programs]
    planned = {step.name: step.peak for step in steps if step.peak is not None}
    fullest = max(planned, key=lambda name: planned[name], default=None)
    plan = None if fullest is None else planned[fullest]
    measured = taken.get("memory/peak_bytes")  # a CPU's runtime does not count
    ratio = measured / plan if measured and plan else None
    return {"peak_bytes": measured, "plan_bytes": plan, "plan_program": fullest, "ratio": ratio}


def record(
    options: Any,
    arguments: list[str],
    bench: Bench,
    numbers: dict[str, Any],
    memory: dict[str, Any],
    recompiled: str,
    peer: Peer | None,
) -> dict[str, Any]:
    here, work = environment(), bench.work
    packages = ("hybrid_jax", "jax", "jaxlib", "flax", "optax")
    return {
        "kind": work.kind,
        "size": options.size,
        **{name: getattr(work, name) for name in ("rows", "length", "new_tokens", "burst")},
        "dtype": bench.config.dtype,
        "execution": vars(bench.config.execution),
        **_rounded(numbers),
        **({"peer": f"torch, compile {work.compile}, master {work.master}"} if peer else {}),
        "peaks": vars(bench.peaks),
        "memory": _rounded(memory),
        "recompiled": recompiled or None,
        "turns": options.turns,
        "steps": options.steps,
        "platform": jax.devices()[0].platform,
        "device": f"{here['devices'][0]}, {here['cpu_count']} cores",
        "commit": here["commit"],
        "versions": {name: here["packages"][name] for name in packages} | (peer.versions if peer else {}),
        "command": shlex.join(["python", "scripts/bench_accelerator.py", *arguments]),
    }


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Four digits of times and shares; whole numbers are exact."""
    rounded = lambda x: float(f"{x:.4g}") if isinstance(x, float) and not x.is_integer() else x  # noqa: E731
    return {n: _rounded(x) if isinstance(x, dict) else rounded(x) for n, x in numbers.items()}


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_accelerator.py", description=description, epilog=epilog)
    parser.add_argument("kind", nargs="?", choices=DEFAULTS)
    parser.add_argument("--size", choices=SHAPES, default="qwen2.5-0.5b")
    for name in ("rows", "length", "new-tokens", "burst"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--remat", choices=["none", "full", "dots", "named"], default="none")
    parser.add_argument("--attention", choices=["einsum", "blocked", "cudnn", "splash"])
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--peaks", type=float, nargs=2, metavar=("TFLOPS", "GB/S"), help="of one device")
    parser.add_argument("--against", choices=["torch"], help="take turns with a peer on the same device")
    parser.add_argument("--peer-python", default=os.environ.get(PEER_PYTHON), help=f"or {PEER_PYTHON}")
    parser.add_argument("--peer-compile", action="store_true", help="torch.compile; a static cache in rollouts")
    parser.add_argument("--peer-master", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed ones a turn")
    parser.add_argument(
        "--table", metavar="FILE", help="print the rows of docs/results.md from a file of such JSON lines"
    )
    options = parser.parse_args(arguments)
    if (options.kind is None) == (options.table is None):
        parser.error("give either a kind of work or --table")
    for name in ("rows", "length", "new_tokens", "burst", "turns", "steps"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    if options.against and options.kind == "ppo":
        raise UserError("ppo has no peer here, got --against torch; bench.py ppo --against trl has one")
    if options.against and not options.peer_python:
        raise UserError(f"--against torch needs --peer-python, or {PEER_PYTHON}: a Python with {TORCH}")
    return options


if __name__ == "__main__":
    run_command(main)
