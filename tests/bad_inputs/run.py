"""Gives every bad input to the command that meets it: one clear line, exit code 2, within seconds and memory.

    python tests/bad_inputs/run.py [--every N] [--kind KIND] [--verbose]

A case runs in a child of a process that has imported the package, so that an input costs what it costs and not
the imports. Prints what is wrong, then the number of cases by kind.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import transformers
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from cases import Case, Place, all_cases
from judge_server import serve

import hybrid_jax
from hybrid_jax.testing import TINY, tiny_rows

SECONDS = 5.0  # of processor time, which other work on the machine does not change
WALL_SECONDS = 120.0  # before a case counts as one that hangs
MEGABYTES = 1024.0  # at the peak


@dataclass(frozen=True)
class Ending:
    """How a case ended."""

    code: int
    out: str
    err: str
    seconds: float  # of processor time
    wall_seconds: float
    megabytes: float

    def fault(self) -> str | None:
        """What is wrong with it, if anything is."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code == -signal.SIGKILL:
            return f"did not end within {WALL_SECONDS:.0f} s"
        if "Traceback" in self.err:
            return "a traceback: " + self.err.strip().splitlines()[-1]
        if self.code != 2:
            return f"exit code {self.code}: {self.err.strip()[-200:]!r}"
        if len(errors) != 1 or not self.err.rstrip("\n").endswith(errors[0]):
            return f"not one line at the end: {self.err[-300:]!r}"
        if len(errors[0]) > 600:
            return f"a line of {len(errors[0])} characters: {errors[0][:200]!r}"
        if not errors[0].isprintable():
            return f"a line that steers a terminal: {errors[0][:200]!r}"
        if self.out:
            return f"something on stdout: {self.out[:100]!r}"
        if self.seconds > SECONDS:
            return f"{self.seconds:.1f} s of processor time"
        if self.megabytes > MEGABYTES:
            return f"{self.megabytes:.0f} MB"
        return None


def attempt(case: Case, folder: Path) -> Ending:
    """Runs a case in a child process of its own."""
    folder.mkdir(parents=True)
    arguments = [str(argument) for argument in case.plant(folder)]
    main = importlib.import_module(f"hybrid_jax.{case.command}").main
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(main, arguments, folder)
    timer = threading.Timer(WALL_SECONDS, os.kill, (pid, signal.SIGKILL))
    timer.start()
    _, status, usage = os.wait4(pid, 0)
    timer.cancel()
    return Ending(
        os.waitstatus_to_exitcode(status),
        (folder / "stdout").read_text(errors="replace"),
        (folder / "stderr").read_text(errors="replace"),
        usage.ru_utime + usage.ru_stime,
        time.monotonic() - started,
        usage.ru_maxrss / 1024,
    )


def _child(main, arguments: list[str], folder: Path) -> None:
    """Never returns."""
    from hybrid_jax.core.cli import _exit_code

    code = 1
    try:
        os.chdir(folder)
        os.setsid()
        # Beyond this a case is out of bounds anyway, and the machine has other work to do.
        resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = _exit_code(main, arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(folder: Path, judge: str) -> Place:
    """Trains a tiny run and exports it."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    source = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out_fraction": 0.2}
    settings = {"run_dir": str(folder / "run"), "data": source, **TINY}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    place = Place(folder / "config.yaml", folder / "data.jsonl", folder / "run", folder / "model", judge)
    for command, arguments in (
        ("train", ["--config", place.config]),
        ("export", ["--run", place.run, "--output", place.model]),
    ):
        ending = attempt(Case("good", command, lambda _, given=arguments: given, command), folder / command)
        if ending.code:
            raise RuntimeError(f"{command} of the tiny run: {ending.err}")
    return place


def load_everything() -> None:
    """What commands import late, here once for all cases."""
    for module in pkgutil.walk_packages(hybrid_jax.__path__, "hybrid_jax."):
        importlib.import_module(module.name)
    for name in ("datasets", "tokenizers"):
        importlib.import_module(name)
    _ = transformers.AutoTokenizer, transformers.CONFIG_MAPPING  # each imports much, at its first use


def run(
    every: int = 1, kind: str | None = None, verbose: bool = False
) -> tuple[Counter, list[str], list[Ending]]:
    """Every ``every``-th case; returns how many there were by kind, the faults and all endings."""
    load_everything()
    counts, faults, endings = Counter(), [], []
    with tempfile.TemporaryDirectory() as scratch, serve() as judge:
        folder = Path(scratch)
        place = prepare(folder, judge)
        cases = [case for case in all_cases(place) if kind in (None, case.kind)][::every]
        for number, case in enumerate(cases):
            ending = attempt(case, folder / f"case_{number}")
            shutil.rmtree(folder / f"case_{number}")
            counts[case.kind] += 1
            endings.append(ending)
            if fault := ending.fault():
                faults.append(f"{case.kind}: {case.name}: {fault}")
                print(faults[-1], flush=True)
            elif verbose:
                print(f"{ending.seconds:.1f} {case.kind}: {case.name}: {ending.err.strip()}", flush=True)
    return counts, faults, endings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th case")
    parser.add_argument("--kind", help="only those of one kind")
    parser.add_argument("--verbose", action="store_true", help="print the line of every case")
    options = parser.parse_args()
    counts, faults, endings = run(options.every, options.kind, options.verbose)
    for name, count in counts.items():
        wrong = sum(fault.startswith(f"{name}: ") for fault in faults)
        print(f"{name:16} {count:4} cases, {wrong} wrong")
    slowest, largest = max(e.seconds for e in endings), max(e.megabytes for e in endings)
    print(
        f"{'all':16} {sum(counts.values()):4} cases, {len(faults)} wrong; most {slowest:.1f} s of processor "
        f"time, {max(e.wall_seconds for e in endings):.1f} s of wall clock, {largest:.0f} MB"
    )
    sys.exit(1 if faults else 0)
