"""scripts/copy_task.py: what is told is asked for, and a stopped run goes on to the same bits."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy_task():
    spec = importlib.util.spec_from_file_location("copy_task", ROOT / "scripts" / "copy_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_told_before_the_mark_is_asked_for_behind_it(copy_task):
    inputs, targets, asked = map(
        np.asarray, jax.jit(lambda k: copy_task.sequences(k, 50, 6))(jax.random.key(0))
    )
    marks = inputs[..., -1].argmax(0)
    assert set(marks) == {1, 2, 3, 4, 5, 6}
    for row, length in enumerate(marks):
        told = inputs[:length, row, :8]
        np.testing.assert_array_equal(targets[length + 1 : 2 * length + 1, row], told)
        np.testing.assert_array_equal(np.flatnonzero(asked[:, row]), np.arange(length + 1, 2 * length + 1))
        assert inputs[:, row].sum() == told.sum() + 1  # nothing else is told
        assert targets[:, row].sum() == told.sum()
    wrong = jnp.where(jnp.arange(8) < 3, -1.0, 1.0) * (2.0 * targets - 1.0)  # three bits of each vector
    np.testing.assert_array_equal(copy_task.wrong_bits(wrong, targets, asked), 3 * marks)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(copy_task, tmp_path, capsys):
    def end(folder, *totals):
        for total in totals:
            sizes = ["--width", "4", "--slots", "4", "--word-width", "3", "--batch", "500"]
            copy_task.main([*sizes, "--folder", str(tmp_path / folder), "--sequences", str(total)])
        lines = (tmp_path / folder / "curve.txt").read_text().splitlines()
        with np.load(tmp_path / folder / "state.npz") as file:
            return [re.sub(r"\d+ s$", "", line) for line in lines], [
                file[name].tobytes() for name in file.files
            ]

    assert end("whole", 2000) == end("cut", 1000, 2000)
    emptied = [
        float(share) for share in re.findall(r"([\d.]+)% with the state emptied", capsys.readouterr().out)
    ]
    assert emptied == pytest.approx([50.0] * len(emptied), abs=2.0)
