"""scripts/memory_tasks.py: tasks against their definitions; a stopped run goes on to the same bits."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.recurrent.lstm import LSTMCell

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def memory_tasks():
    spec = importlib.util.spec_from_file_location("memory_tasks", ROOT / "scripts" / "memory_tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_what_was_told_before_the_mark_is_asked_for_behind_it(memory_tasks):
    batch = memory_tasks.TASKS["copy"].draw(jax.random.key(0), 50, 6, False)
    inputs, targets, asked = map(np.asarray, (batch.inputs, batch.targets, batch.asked))
    marks = inputs[..., -1].argmax(0)
    assert set(marks) == {1, 2, 3, 4, 5, 6}
    for row, length in enumerate(marks):
        told = inputs[:length, row, :8]
        np.testing.assert_array_equal(targets[length + 1 : 2 * length + 1, row], told)
        np.testing.assert_array_equal(np.flatnonzero(asked[:, row]), np.arange(length + 1, 2 * length + 1))
        assert inputs[:, row].sum() == told.sum() + 1  # nothing else is told
        assert targets[:, row].sum() == told.sum()
    wrong = jnp.where(jnp.arange(8) < 3, -1.0, 1.0) * (2.0 * targets - 1.0)  # three bits of each vector
    np.testing.assert_array_equal(memory_tasks.TASKS["copy"].wrong(wrong, batch), 3 * marks)


def test_vectors_are_asked_for_as_often_as_the_mark_tells_and_then_an_end(memory_tasks):
    batch = jax.tree.map(np.asarray, memory_tasks.copies(4, 3, jax.random.key(1), 60, 5))
    seen = set()
    for row in range(60):
        (length,) = np.flatnonzero(batch.turns[:, row])
        times = round(3 * batch.inputs[length, row, -1])
        end = length * (times + 1) + 1
        said = np.tile(batch.inputs[:length, row, :4], (times, 1))
        np.testing.assert_array_equal(batch.targets[length + 1 : end, row, :4], said)
        np.testing.assert_array_equal(np.flatnonzero(batch.targets[:, row, 4]), [end])
        np.testing.assert_array_equal(np.flatnonzero(batch.asked[:, row]), np.arange(length + 1, end + 1))
        assert batch.targets[:, row].sum() == said.sum() + 1
        seen.add((length, times))
    assert seen == {(length, times) for length in range(1, 6) for times in (1, 2, 3)}


def test_the_baselines_of_adding_and_copy_memory_are_the_known_ones(memory_tasks):
    """Best answers without a memory: 1 for a sum, and one symbol in 8; 1/6 and 10 ln 8 / (T + 20)."""
    adding = memory_tasks.TASKS["adding"]
    batch = adding.draw(jax.random.key(0), 20_000, 100, True)
    np.testing.assert_array_equal(batch.inputs[..., 1].sum(axis=0), 2.0)
    marked = np.sum(batch.inputs[..., 0] * batch.inputs[..., 1], axis=0)
    np.testing.assert_allclose(batch.targets[-1, :, 0], marked, rtol=1e-6)
    ones = jnp.ones_like(batch.targets)
    assert float(adding.wrong(ones, batch).mean()) == pytest.approx(1 / 6, abs=0.004)
    memory = memory_tasks.TASKS["copy_memory"]
    batch = memory.draw(jax.random.key(0), 7, 100, True)
    shown = np.argmax(batch.inputs, axis=-1)
    np.testing.assert_array_equal(np.argmax(batch.targets, axis=-1)[-10:], shown[:10])
    np.testing.assert_array_equal(np.argmax(batch.targets, axis=-1)[:-10], 8)
    np.testing.assert_array_equal(shown[10:-11], 8)
    np.testing.assert_array_equal(shown[-11:], np.tile([[9]] + [[8]] * 10, 7))
    known = jnp.where(jnp.arange(9) == 8, 50.0, 0.0) * jnp.ones((110, 7, 1))  # blanks until the answer
    guess = jnp.where(jnp.arange(9) == 8, -50.0, 0.0) * jnp.ones((10, 7, 1))
    wrong = memory.wrong(jnp.concatenate([known, guess]), batch)
    np.testing.assert_allclose(wrong, 0.173287, atol=1e-6)
    assert memory_tasks.without_memory(memory, 200) == pytest.approx(0.094520, abs=1e-6)


def test_guessing_bits_with_a_known_end_is_the_baseline_of_repeated_copies(memory_tasks):
    """Of 16 (24) bits 8 (12) ones are guessed at length 2 with one (two) repeats, and the end is known."""
    task = memory_tasks.TASKS["repeat_copy"]
    assert memory_tasks.without_memory(task, 2) == pytest.approx((4 + 8) / (15 + 25))
    assert memory_tasks.without_memory(task, 1) == pytest.approx((2 + 4) / (10 + 15))
    assert memory_tasks.without_memory(memory_tasks.TASKS["copy"], 20) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], r"whole and in \[1, 2\^31\), got '0'"),
        (["--seed", "-1"], r"whole and in \[0, 2\^31\), got '-1'"),
        (["--width", "x"], "got 'x'"),
        (["--cell", "bank"], "--cell bank needs --task associative_recall, got copy"),
        (["--seed", "3"], "holds a run of .*'seed': 0.*; give another folder"),
    ],
)
def test_bad_arguments_and_the_folder_of_another_run_are_one_line(memory_tasks, tmp_path, arguments, message):
    memory_tasks.main(["--width", "2", "--slots", "2", "--folder", str(tmp_path), "--sequences", "1"])
    with pytest.raises(UserError, match=message):
        memory_tasks.main(["--width", "2", "--slots", "2", "--folder", str(tmp_path), *arguments])


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(memory_tasks, tmp_path, capsys):
    def end(folder, *totals):
        for total in totals:
            sizes = ["--width", "4", "--slots", "4", "--word-width", "3", "--batch", "500"]
            memory_tasks.main([*sizes, "--folder", str(tmp_path / folder), "--sequences", str(total)])
        lines = (tmp_path / folder / "curve.txt").read_text().splitlines()
        with np.load(tmp_path / folder / "state.npz") as file:
            return [re.sub(r"\d+ s$", "", line) for line in lines], [
                file[name].tobytes() for name in file.files
            ]

    assert end("whole", 20_000) == end("cut", 10_000, 20_000)
    emptied = [
        float(share) for share in re.findall(r"([\d.]+) with the state emptied", capsys.readouterr().out)
    ]
    assert emptied == pytest.approx([0.5] * len(emptied), abs=0.02)
    assert len(emptied) == 12


def looking_up(tasks, slots):
    """A bank whose query is the key that is asked for, and whose head says what was read."""
    cell = tasks.BankCell(LSTMCell(1, 1), slots)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 2 * tasks.CHOICES))
    params["query"]["kernel"] = 50.0 * jnp.eye(2 * tasks.CHOICES, tasks.CHOICES)
    head = {"kernel": jnp.eye(1 + tasks.CHOICES, tasks.CHOICES, -1), "bias": jnp.zeros(tasks.CHOICES)}
    return cell, {"cell": params, "head": head}


def test_a_full_bank_knows_exactly_slots_of_n_pairs_and_an_emptied_one_none(memory_tasks):
    cell, params = looking_up(memory_tasks, 8)
    task = memory_tasks.TASKS["associative_recall"]
    wrong = [float(memory_tasks.tested(task, cell, params, length, False)) for length in (4, 8, 16)]
    assert wrong == [0.0, 0.0, 0.5]
    assert float(memory_tasks.tested(task, cell, params, 8, True)) == pytest.approx(63 / 64, abs=0.02)
    assert memory_tasks.without_memory(task, 8) == 63 / 64


def test_a_kept_bank_answers_what_earlier_tasks_told_and_no_other(scripts, monkeypatch):
    many = scripts("many_tasks")
    monkeypatch.setattr(many, "WORLDS", 60)
    monkeypatch.setattr(many, "TASKS_IN_TURN", 5)
    cell, params = looking_up(sys.modules["memory_tasks"], 40)
    key = jax.random.key(3)
    kept, told = many.in_turn(cell, params, key, "kept")
    np.testing.assert_allclose(told, [1 - (7 / 8) ** t for t in range(5)], atol=0.06)
    np.testing.assert_allclose(kept[1:], told[1:], atol=1e-6)  # the values of others are never right
    cleared, shuffled = (many.in_turn(cell, params, key, way)[0] for way in ("cleared", "shuffled"))
    np.testing.assert_allclose(cleared, 1 / 64, atol=0.03)
    assert np.all(shuffled < 0.1)
