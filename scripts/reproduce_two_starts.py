"""Starts two trainers in one run directory, again and again, and shows that no record is lost.

    python scripts/reproduce_two_starts.py [--trials 10] [--seed 0]

The second start comes a random time after the first, from the same moment to after its end. In every second
trial ``kill -9`` meets whichever trains, at a random moment, and a third start follows at once. Each directory
must end with the state, metrics.jsonl and samples.jsonl of a run that was alone, timings aside; whoever was
refused must have ended with 2 and one line. Prints a table; the exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from reproduce_resume import CONFIG, _differences, _records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cache", type=Path, help="a folder for compiled programs, to keep them")
    options = parser.parse_args()
    draw, wrong = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or Path(folder, "compiled")
        alone = Path(folder, "alone")
        _expect(_Start(alone, options).wait(), 0)  # compiles
        started = time.monotonic()
        _expect(_Start(Path(folder, "again"), options).wait(), 0)
        length = time.monotonic() - started
        print(f"alone: {len(_records(alone / 'metrics.jsonl'))} records in {length:.0f} s")
        print(f"{'trial':>5} {'distance':>9} {'killed':>9}  exit codes  records")
        for trial in range(1, options.trials + 1):
            run_dir = Path(folder, str(trial))
            distance = draw.choice((0.0, draw.uniform(0, 3), draw.uniform(0, 1.1 * length)))
            kill_after = draw.uniform(0, length) if trial % 2 == 0 else None
            starts = _trial(run_dir, options, distance, kill_after)
            found = _problems(starts, killed=kill_after is not None)
            found += _differences(alone, run_dir, options)
            wrong += [f"trial {trial}: {problem}" for problem in found]
            killed = "-" if kill_after is None else f"{kill_after:.1f} s"
            codes = " ".join(str(start.code) for start in starts)
            records = len(_records(run_dir / "metrics.jsonl"))
            print(f"{trial:>5} {distance:>7.1f} s {killed:>9}  {codes:<11} {records}", flush=True)
    print("\n".join(wrong) or "no difference: every record and number is that of a run that was alone")
    return 1 if wrong else 0


def _trial(
    run_dir: Path, options: argparse.Namespace, distance: float, kill_after: float | None
) -> list[_Start]:
    starts = [_Start(run_dir, options)]
    time.sleep(distance)
    starts.append(_Start(run_dir, options))
    if kill_after is not None:
        time.sleep(kill_after)
        for start in starts:
            start.process.kill()
        for start in starts:
            start.wait()
        starts.append(_Start(run_dir, options))
    for start in starts:
        start.wait()
    return starts


@dataclass
class _Start:
    """One process of ``python -m hybrid_jax.train``."""

    run_dir: Path
    options: argparse.Namespace
    code: int | None = None
    said: str = ""

    def __post_init__(self):
        settings = {
            "run_dir": self.run_dir,
            "steps": self.options.steps,
            "compilation_cache": self.options.cache,
        }
        command = [sys.executable, "-m", "hybrid_jax.train", "--config", str(CONFIG)]
        command += [f"{name}={value}" for name, value in settings.items()]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait(self) -> _Start:
        if self.code is None:
            self.said = self.process.communicate()[1]
            self.code = self.process.returncode
        return self


def _problems(starts: list[_Start], *, killed: bool) -> list[str]:
    """The faults in how the processes of a trial ended."""
    found = []
    for number, start in enumerate(starts, start=1):
        errors = [line for line in start.said.splitlines() if line.startswith("error:")]
        refused = start.code == 2 and len(errors) == 1 and " is being trained by process " in errors[0]
        fine = start.code == 0 or refused or (killed and start.code == -signal.SIGKILL)
        if not fine or "Traceback" in start.said:
            found.append(f"start {number} ended with {start.code}: {start.said[-500:]}")
    if starts[-1].code != 0 and killed:
        found.append("the start after the kill did not end well")
    return found


def _expect(start: _Start, code: int) -> None:
    if start.code != code:
        raise SystemExit(f"a run that is alone ended with {start.code}: {start.said[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
