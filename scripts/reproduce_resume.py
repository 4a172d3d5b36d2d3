"""Kills a run again and again with ``kill -9`` and shows that it ends with the bits of an unbroken one.

    python scripts/reproduce_resume.py [--kills 12] [--steps 24] [--seed 0]

Every kill goes to a place of its own (see `PLACES`) at a random step and moment; two of the twelve are a
SIGTERM during an evaluation and a step that fails right after one, where the run saves itself. Parameters,
optimizer states, references, statistics of the reward (EMA, Lagrangian, bandit), KL coefficient, cursors,
schedule, metrics.jsonl and samples.jsonl are compared, timings aside. Prints a table; the exit code is 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# A second phase of PPO, for a reward has one combiner: the first one's is a Lagrangian, this one's learns from
# evaluations.
BANDIT = {"name": "bandit", "metric": "reward/coverage", "exploration": 0.5, "gain_range": 0.1}
CYCLE = {"ppo": 1, "bandit": 1, "sft": 1}
CONFIG = Path(__file__).parents[1] / "configs" / "debug" / "resume.yaml"
PLACES = {  # what the kill interrupts, and how many seconds it may wait there
    "PPO, between minibatches": 0.02,
    "checkpoint, being written": 0.1,
    "SFT step": 0.05,
    "evaluation, SIGTERM": 0.0,
    "step after an evaluation, fails": 0.0,
    "PPO, sampling": 0.02,
    "PPO, reward": 0.0,
    "checkpoint, before its seal": 0.0,
    "metrics, half a line": 0.0,
    "evaluation": 0.1,
    "logs, on resume": 0.0,
    "anywhere": 8.0,
}
CODES = {
    "evaluation, SIGTERM": 128 + signal.SIGTERM,
    "step after an evaluation, fails": 1,
}  # of those not killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=len(PLACES))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cache", type=Path, help="a folder for compiled programs, to keep them")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, place, step, wait = options.child
        _child(Path(folder), options, place, int(step), float(wait))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or Path(folder, "compiled")
        unbroken, killed = Path(folder, "unbroken"), Path(folder, "killed")
        if _run(unbroken, options) != 0:
            raise SystemExit("the run that nobody kills failed")
        _kill_repeatedly(killed, options)
        differences = _differences(unbroken, killed, options)
    print("\n".join(differences) or "no difference: every array, number and sample is the same, bit for bit")
    return 1 if differences else 0


def _kill_repeatedly(folder: Path, options: argparse.Namespace) -> None:
    """Kills processes at random moments, later and later in the run, and then lets one end."""
    draw = random.Random(options.seed)
    places = [list(PLACES)[i % len(PLACES)] for i in range(options.kills)]
    steps = sorted(draw.randrange(options.steps - 4) for _ in places)  # the next evaluation is 3 steps away
    print(f"{'kill':>4}  {'place':<31} {'from step':>9} {'logged':>6} {'checkpoints left'}")
    for number, (place, step) in enumerate(zip(places, steps, strict=True), start=1):
        start = max(_checkpoints(folder), default=0)
        code = _run(folder, options, place, step, draw.uniform(0, PLACES[place]))
        if code != CODES.get(place, -signal.SIGKILL):
            raise SystemExit(f"the process was to end at {place!r}, step {step}, but its code is {code}")
        left = sorted(path.name for path in (folder / "checkpoints").glob("*"))
        logged = max((r["step"] for r in _records(folder / "metrics.jsonl")), default=-1)
        print(f"{number:>4}  {place:<31} {start:>9} {logged:>6} {' '.join(left)}", flush=True)
    if (code := _run(folder, options)) != 0:
        raise SystemExit(f"the last process ended with {code}")


def _run(
    folder: Path, options: argparse.Namespace, place: str = "nowhere", step: int = 0, wait: float = 0.0
) -> int:
    child = ["--steps", str(options.steps), "--cache", str(options.cache)]
    child += ["--child", str(folder), place, str(step), str(wait)]
    result = subprocess.run([sys.executable, __file__, *child], stderr=subprocess.PIPE, text=True)
    if result.returncode not in (0, CODES.get(place, -signal.SIGKILL)):
        print(result.stderr[-4000:], file=sys.stderr)
    return result.returncode


def _child(folder: Path, options: argparse.Namespace, place: str, step: int, wait: float) -> None:
    """Trains, and kills itself ``wait`` seconds into ``place``, when that is first met from ``step`` on."""
    if place == "anywhere":
        threading.Timer(2 + wait, _kill).start()
    from hybrid_jax.training.loop import train

    experiment = _experiment(folder, options)
    _arm(experiment, place, step, wait)
    train(experiment)


def _arm(experiment: Any, place: str, step: int, wait: float) -> None:
    from hybrid_jax.training import checkpoint, loggers

    now = [-1]  # the step that is being taken
    evaluated = []  # the steps before which there was an evaluation
    for phase in experiment.phases.values():
        _wrap(phase, "step", before=lambda state, key: now.__setitem__(0, state.step))

    def kill(*_: Any) -> None:
        if now[0] >= step:
            time.sleep(wait)
            _kill()

    def tear(_: Any, name: str, records: list[dict[str, Any]]) -> None:
        if now[0] >= step and name == loggers.METRICS_FILE:
            with (experiment.config.run_dir / name).open("a") as file:
                file.write(json.dumps(loggers.strict(records[0]))[:50])
            _kill()

    def fail(state: Any, key: Any) -> None:
        if state.step >= step and evaluated[-1:] == [state.step]:
            raise RuntimeError("as asked")

    def kill_while_running(*_: Any, **__: Any) -> None:
        if now[0] >= step:
            threading.Timer(wait, _kill).start()

    sft, ppo = experiment.phases["sft"], experiment.phases["ppo"]
    match place:
        case "SFT step":
            _wrap(sft, "_update", before=kill_while_running)
        case "PPO, sampling":
            _wrap(ppo.rollouts, "_sample", after=kill)
        case "PPO, reward":
            _wrap(ppo.rollouts, "_rewarded", before=kill)
        case "PPO, between minibatches":
            _wrap(ppo, "_learn", after=kill)  # it returns as soon as the device has begun
        case "checkpoint, being written":
            _wrap(checkpoint.Checkpoints, "save", after=kill)
        case "checkpoint, before its seal":
            _wrap(checkpoint, "_seal", before=kill)
        case "metrics, half a line":
            _wrap(loggers._JsonLinesLogger, "_append", before=tear)
        case "evaluation":
            _wrap(type(experiment), "evaluate", before=kill_while_running)
        case "evaluation, SIGTERM":
            _wrap(type(experiment), "evaluate", before=lambda *_: now[0] >= step and _kill(signal.SIGTERM))
        case "step after an evaluation, fails":
            _wrap(type(experiment), "evaluate", after=lambda _, state: evaluated.append(state.step))
            for phase in experiment.phases.values():
                _wrap(phase, "step", before=fail)
        case "logs, on resume":
            _wrap(loggers.os, "replace", before=lambda source, _: str(source).endswith("kept") and _kill())


def _wrap(owner: Any, name: str, before: Any = None, after: Any = None) -> None:
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(*arguments)
        result = function(*arguments, **named)
        if after is not None:
            after(*arguments)
        return result

    setattr(owner, name, wrapped)


def _kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def _experiment(folder: Path, options: argparse.Namespace) -> Any:
    import jax

    from hybrid_jax.core.config import load_yaml, parse
    from hybrid_jax.experiment import ExperimentConfig, build

    settings = load_yaml(CONFIG)
    ppo = settings["phases"]["ppo"]
    settings["phases"]["bandit"] = {**ppo, "name": "ppo", "reward": {**ppo["reward"], "combine": BANDIT}}
    settings["scheduler"]["cycle"] = CYCLE
    settings["evaluation"]["every"] = 3
    settings |= {"run_dir": folder, "steps": options.steps, "compilation_cache": options.cache}
    experiment = build(parse(ExperimentConfig, settings))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a dozen processes share it
    return experiment


def _differences(one: Path, other: Path, options: argparse.Namespace) -> list[str]:
    """The differences between two finished runs, one line each."""
    from hybrid_jax.training.checkpoint import Checkpoints
    from hybrid_jax.training.loggers import without_timings

    if not all(max(_checkpoints(folder), default=0) == options.steps for folder in (one, other)):
        return ["a run has no checkpoint of its last step"]
    fresh = _experiment(one, options).init()
    states = [_parts(Checkpoints(folder / "checkpoints", 2).newest(fresh)) for folder in (one, other)]
    lines = [f"state: {name}" for name in states[0] | states[1] if states[0].get(name) != states[1].get(name)]
    print(f"compared {len(states[0])} parts of the final state, {sum(map(len, states[0].values()))} bytes")
    for name in ("metrics.jsonl", "samples.jsonl"):
        logs = [[without_timings(record) for record in _records(folder / name)] for folder in (one, other)]
        print(f"compared {len(logs[0])} lines of {name}")
        if logs[0] != logs[1] or not logs[0]:
            lines.append(f"{name}: {len(logs[0])} and {len(logs[1])} lines, not the same")
    return lines


def _parts(state: Any) -> dict[str, bytes]:
    """Every part of a state by its path, as bytes that say type and value."""
    import jax
    import numpy as np

    arrays = {"train": state.train, "references": dict(state.references), "host": dict(state.host)}
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        parts[jax.tree_util.keystr(path)] = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    numbers = {"step": state.step, "cursors": dict(state.cursors), "schedule": vars(state.schedule)}
    return parts | {name: json.dumps(value, sort_keys=True).encode() for name, value in numbers.items()}


def _records(path: Path) -> list[dict[str, Any]]:
    """All records; a torn line, which must be gone once the run has ended, is shown as one."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            records.append({"step": -1, "torn": line})
    return records


def _checkpoints(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]


if __name__ == "__main__":
    sys.exit(main())
