"""The bad inputs of `cases.py` each end in one clear line; `run.py`, which forks, is a process of its own."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "run.py"
KINDS = {"config", "setting", "command line", "data", "model folder", "run directory", "judge"}
COUNT = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from cases import Place, all_cases
folder = Path({scratch!r})
place = Place(*(folder / name for name in ("config.yaml", "data.jsonl", "run", "model")), "http://127.0.0.1:9")
print("\\n".join(case.kind for case in all_cases(place)))
"""


def run(*arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_there_are_at_least_400_cases_and_some_of_every_kind(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\nsteps: 3\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("phases: {ppo: {}}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    ended = run("-c", COUNT.format(folder=str(RUNNER.parent), scratch=str(tmp_path)))
    counts = Counter(ended.stdout.splitlines())
    assert counts.keys() == KINDS, ended.stderr
    assert min(counts.values()) >= 30
    assert sum(counts.values()) >= 400


def test_a_sample_of_bad_inputs_each_ends_in_one_clear_line():
    ended = run(str(RUNNER), "--every", "40")
    assert (ended.returncode, ", 0 wrong; most" in ended.stdout) == (0, True), ended.stdout + ended.stderr


@pytest.mark.slow
def test_every_bad_input_ends_in_one_clear_line():
    ended = run(str(RUNNER))
    assert (ended.returncode, ", 0 wrong; most" in ended.stdout) == (0, True), ended.stdout + ended.stderr
