"""Breaks one rule after the other, in a copy of the tree, and says which the tests do not see.

    python scripts/mutants.py [--only TEXT]

A broken rule is an entry of ``tests/mutants/*.toml``: ``old`` text, which stands in ``file`` once, gives way to
``new``, and ``tests`` (modules, or single tests) must fail. The exit code is 1 if they pass for some rule.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = 1  # what pytest returns when tests failed; other codes say that they could not be run


@dataclass(frozen=True)
class Mutant:
    """A broken rule."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """The file's text with the rule broken.

        Raises:
            ValueError: the code has moved.
        """
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name!r}: old must stand in {self.file} once, got {count} times")
        return text.replace(self.old, self.new)


def read_mutants(folder: Path = ROOT / "tests" / "mutants") -> list[Mutant]:
    found = []
    for path in sorted(folder.glob("*.toml")):
        found += [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in _entries(path)]
    return found


def _entries(path: Path) -> list[dict]:
    return tomllib.loads(path.read_text())["mutant"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Breaks one rule after the other; lists those that no test sees."
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in their name or file")
    options = parser.parse_args()
    chosen = [m for m in read_mutants() if options.only in m.name or options.only in m.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(
            ["tar", "cf", copy / "tree.tar", "--null", "-T", "-"], cwd=ROOT, input=listed, check=True
        )
        subprocess.run(["tar", "xf", "tree.tar"], cwd=copy, check=True)
        unseen = [mutant.name for mutant in chosen if not _is_seen(mutant, copy)]
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} broken rules were seen")
    for name in unseen:
        print(f"unseen: {name}")
    return 1 if unseen else 0


def _is_seen(mutant: Mutant, copy: Path) -> bool:
    started, file = time.monotonic(), copy / mutant.file
    whole, broken = file.read_text(), mutant.applied(copy)
    file.write_text(broken)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *mutant.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(whole)
    seen = run.returncode == FAILED
    first = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    if run.returncode > FAILED:
        print(run.stdout[-2000:], run.stderr[-2000:], file=sys.stderr)
    print(
        f"{'seen' if seen else 'UNSEEN'} in {time.monotonic() - started:.0f} s: {mutant.name}  {first[:160]}",
        flush=True,
    )
    return seen


if __name__ == "__main__":
    sys.exit(main())
