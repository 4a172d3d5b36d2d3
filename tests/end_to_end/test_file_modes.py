"""Who may read what is written is for the umask to say: one rule for every file."""

import os
import stat

import numpy as np

from hybrid_jax import export
from hybrid_jax.models.folders.files import save_tensors
from hybrid_jax.rewards.judge_cache import JudgeCache, Spent, key_of


def modes(folder) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_of_a_run_and_of_its_export_has_the_mode_that_the_umask_gives(run_dir, tmp_path, command):
    assert command(export.main, "--run", run_dir, "--output", tmp_path / "out", "--value")[0] == 0
    os.umask(umask := os.umask(0))
    found = {**modes(run_dir), **modes(tmp_path / "out")}
    assert {"config.yaml", "metrics.jsonl", "report.html", "model.safetensors", "tokenizer.json"} <= {*found}
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~umask} == {}


def test_a_cache_and_weights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        cache = JudgeCache(tmp_path / "cache")
        cache.keep(key_of("a"), 0.5)
        cache.pay(Spent(1, 1, 0.0))
        save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(3)})
    finally:
        os.umask(before)
    assert set(modes(tmp_path).values()) == {0o640}
    assert len(modes(tmp_path)) == 4  # the answer, what was spent, the lock, the weights
