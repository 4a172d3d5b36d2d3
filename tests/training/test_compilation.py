"""Programs in memory: how many there are levels off."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax.training import compilation
from hybrid_jax.training.compilation import free_programs

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.is_file(), reason="no Linux: memory maps cannot be counted")


def maps() -> int:
    return len(MAPS.read_text().splitlines())


def compile_programs(count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        jax.jit(lambda x, n=number: jnp.sin(x * n).sum() + jnp.sort(x)[n])(jnp.ones(300 + number))


@pytest.mark.slow
def test_a_process_that_compiles_without_end_levels_off():
    jax.clear_caches()
    free_programs(limit=10**9)
    before = maps()
    highest, compiled, let_go = 0, 0, 0
    for round_ in range(12):
        at_first = maps()
        compile_programs(4, start=4 * round_)
        compiled += maps() - at_first
        highest = max(highest, maps() - before)
        let_go += free_programs(limit=before + 20)
    assert let_go >= 3
    assert highest < compiled / 2  # without a limit they are equal


def test_a_program_that_was_let_go_is_compiled_again_with_the_same_result():
    function = jax.jit(lambda x: jnp.cumsum(x) * 3)
    expected = function(jnp.arange(4.0))
    assert free_programs(limit=0)
    assert function(jnp.arange(4.0)).tolist() == expected.tolist() == [0.0, 3.0, 9.0, 18.0]


def test_nothing_is_counted_unless_something_was_compiled(monkeypatch):
    free_programs(limit=10**9)
    monkeypatch.setattr(compilation, "_MAPS", Path("/not/to/be/opened"))
    monkeypatch.setattr(compilation, "_MOST_MAPS", Path("/not/to/be/opened"))
    assert not free_programs()
