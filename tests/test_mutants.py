"""The broken rules of ``tests/mutants`` fit the code; ``scripts/mutants.py`` says whether tests see them."""

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mutants", module)  # its dataclass looks there for its module
        spec.loader.exec_module(module)
    return module


def test_every_broken_rule_still_fits_the_code(script):
    mutants = script.read_mutants()
    assert len(mutants) >= 36
    assert [name for name, count in Counter(m.name for m in mutants).items() if count > 1] == []
    moved = []
    for mutant in mutants:
        try:
            ast.parse(mutant.applied(ROOT))  # the old text stands there once, and the new is Python
        except ValueError as error:
            moved.append(str(error))
        assert mutant.old != mutant.new
        for test in mutant.tests:
            module, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / module).read_text(), mutant.name
    assert moved == []


def test_code_that_has_moved_is_named(script, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match=r"^'r': old must stand in a\.py once, got 2 times$"):
        script.Mutant("r", "a.py", "x = 1", "x = 2", ()).applied(tmp_path)
