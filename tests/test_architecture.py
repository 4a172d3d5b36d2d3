"""The layering of the package, held by parsing every import."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hybrid_jax"
LAYERS = {
    **dict.fromkeys(["core"], 0),
    **dict.fromkeys(["parallel"], 0.5),  # a lower layer, so that models can say how activations lie
    **dict.fromkeys(["models", "data", "metrics", "algorithms"], 1),
    **dict.fromkeys(["sampling", "rewards"], 2),
    **dict.fromkeys(["training"], 3),
    **dict.fromkeys(["phases", "evaluation"], 4),
    **dict.fromkeys(["planning", "runs"], 5),
    **dict.fromkeys(["reports"], 5.2),  # reads run directories, and knows no model
}
TOP = {
    "testing": 5,
    "experiment_config": 5.5,
    "experiment": 6,
    "scorer_commands": 7,
    "trainer": 7,
    "__init__": 9,
}
COMMANDS = {"train", "generate", "evaluate", "export", "plan", "report"}
ONLY_IN = {
    "flax.linen": "models/",
    "optax": "training/",
    "orbax": "training/checkpoint.py",
    "requests": "rewards/judge.py",
    "httpx": "rewards/judge.py",
    "urllib.request": "rewards/judge.py",
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def layer_of(name: str) -> int:
    return LAYERS[name] if name in LAYERS else 8 if name in COMMANDS else TOP[name]


def test_imports_only_go_down_and_siblings_do_not_know_each_other():
    wrong = []
    for path in modules():
        here = folder_of(path)
        for module in imports(path):
            parts = module.split(".")
            if parts[0] != "hybrid_jax" or len(parts) < 2 or parts[1] == here:
                continue
            there = parts[1]
            if layer_of(there) >= layer_of(here):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong, wrong


def test_each_library_stays_in_its_room():
    wrong = []
    for path in modules():
        relative = str(path.relative_to(PACKAGE))
        for module in imports(path):
            for library, room in ONLY_IN.items():
                if (module == library or module.startswith(library + ".")) and not relative.startswith(room):
                    wrong.append(f"{relative} imports {module}")
    assert not wrong, wrong


def test_no_file_is_a_drawer_and_no_file_outgrows_its_topic():
    for path in modules():
        assert path.stem not in ("utils", "common", "helpers", "misc"), path
        assert len(path.read_text().splitlines()) <= 400, path


def test_nothing_foreign_is_executed():
    forbidden = ("flax.nnx", "pickle", "marshal", "dill", "cloudpickle")
    for path in modules():
        text = path.read_text()
        assert not imports(path) & set(forbidden), path
        for call in ("eval(", "exec(", "shell=True", "weights_only=False", "trust_remote_code=True"):
            bare = [line for line in text.splitlines() if call in line and f".{call}" not in line]
            assert not [line for line in bare if f"_{call}" not in line], (path, call)


def test_the_package_and_its_configs_import_without_heavy_libraries():
    code = "import hybrid_jax, sys; print([m for m in ('jax', 'transformers', 'torch') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
    code = (
        "import hybrid_jax.experiment, sys;"
        "print([m for m in ('transformers','torch','datasets','wandb','tensorflow','sacrebleu','flax.nnx')"
        " if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
