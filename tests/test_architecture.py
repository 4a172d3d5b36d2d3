"""The layering of the package, held by parsing every file: DESIGN section 2 in code.

Rules about imports. They only go down, between folders and between files: no circle, counted with those inside
functions, so that none is hidden there. An import of our own inside a function is for the commands alone, which
answer ``--help`` and refuse a mistake before anything heavy is loaded; optional and heavy packages of others
may be imported where they are needed. Nothing is imported for the type checker only.
"""

import ast
import builtins
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping

import hybrid_jax

PACKAGE = Path(__file__).parents[1] / "hybrid_jax"
LAYERS = {
    **dict.fromkeys(["core"], 0),
    **dict.fromkeys(["parallel"], 0.5),  # a lower layer, so that models can say how activations lie
    **dict.fromkeys(["algorithms"], 0.7),  # knows no model, and models score tokens by its log-probs
    **dict.fromkeys(["metrics"], 0.8),  # numbers of texts and labels; models hold its n-grams
    **dict.fromkeys(["models", "data"], 1),
    **dict.fromkeys(["environments", "rewards"], 2),
    **dict.fromkeys(["sampling"], 2.2),  # chooses by rewards
    **dict.fromkeys(["dialogue"], 2.5),  # lets a policy and an environment talk
    **dict.fromkeys(["training"], 3),
    **dict.fromkeys(["phases", "evaluation"], 4),
    **dict.fromkeys(["planning", "runs"], 5),
    **dict.fromkeys(["reports"], 5.2),  # reads run directories, and knows no model
}
TOP = {
    "testing": 5,
    "experiment_config": 5.5,
    "experiment": 6,
    "planner": 6.5,
    "trainer": 7,
    "__init__": 9,
}
COMMANDS = {"train", "generate", "evaluate", "predict", "preferences", "compare", "sweep", "selfcheck"}
COMMANDS |= {"count", "export", "plan", "report", "serve"}
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


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, within: ast.AST | None = None) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(within or parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files_of(names: set[str]) -> set[str]:
    """Those of the package's files that these modules are."""
    found = set()
    for name in names:
        if name.startswith("hybrid_jax."):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            found |= {place(p) for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of files each of which imports, over others, all of its group."""
    reached = {}
    for file in graph:
        seen, waiting = set(), [file]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reached[file] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return [set(group) for group in found]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def layer_of(name: str) -> float:
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


def test_no_file_imports_itself_over_others():
    graph = {place(path): files_of(imports(path)) for path in modules()}
    assert not circles(graph), circles(graph)


def test_the_search_for_circles_finds_one_and_only_its_members():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]


def test_no_import_hides_in_a_function_or_from_everybody_but_the_type_checker():
    commands, hidden = {f"{name}.py" for name in COMMANDS}, set()
    for path in modules():
        late = {file for function in functions(parsed(path)) for file in files_of(imports(path, function))}
        if late and place(path) not in commands:
            hidden.add(place(path))
        if "TYPE_CHECKING" in path.read_text():
            hidden.add(place(path))
    assert not hidden, hidden


def test_an_annotation_names_what_its_file_knows():
    """In quotes, or under postponed evaluation, it could name what only a circle would import."""
    unknown = []
    for path in modules():
        known = {*dir(builtins), *bound(parsed(path))}
        for annotation in annotations(parsed(path)):
            shapes = {id(node) for part in ast.walk(annotation) for node in shape_strings(part)}
            for node in ast.walk(annotation):
                if isinstance(node, ast.Name) and node.id not in known:
                    unknown.append(f"{place(path)}:{node.lineno} {node.id}")
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in shapes:
                    unknown.append(f"{place(path)}:{node.lineno} {node.value!r}")
    assert not unknown, unknown


def bound(tree: ast.Module) -> Iterator[str]:
    """Names that a file defines or imports, also inside its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        found = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(found, ast.expr):
            yield found


def shape_strings(node: ast.AST) -> list[ast.AST]:
    """The texts in ``Float[Array, "B T"]``, in ``Literal["a", "b"]`` and in ``Annotated[str, Doc("…")]``."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return []
    if not hasattr(jaxtyping, node.value.id) and node.value.id not in ("Literal", "Annotated"):
        return []
    return [part for part in ast.walk(node.slice) if isinstance(part, ast.Constant)]


def test_keys_begin_at_a_seed_and_a_purpose_and_branch_by_names_or_running_numbers():
    """`core/keys.py` alone makes a key; shapes need one too, which draws nothing."""
    wrong = []
    for path in modules():
        shapes = {
            id(part)
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.eval_shape"
            for part in ast.walk(node)
        }
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call) or id(node) in shapes:
                continue
            name = ast.unparse(node.func)
            makes = name in ("jax.random.key", "jax.random.PRNGKey")
            if makes and place(path) not in ("core/keys.py", "testing.py"):
                wrong.append(f"{place(path)}:{node.lineno} {ast.unparse(node)}")
            if name == "jax.random.fold_in" and isinstance(node.args[1], ast.Constant):
                wrong.append(f"{place(path)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, wrong


def undocumented(path: Path) -> Iterator[str]:
    """Public functions, methods and classes of a file that have no docstring."""

    def within(body: list[ast.stmt], where: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            overloads = any(ast.unparse(wrap).endswith("overload") for wrap in node.decorator_list)
            if ast.get_docstring(node) is None and not overloads:
                yield where + node.name
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{where}{node.name}.")

    return within(parsed(path).body, f"{place(path)}:")


def test_every_public_function_method_and_class_has_a_docstring():
    missing = [name for path in modules() for name in undocumented(path)]
    assert not missing, missing


def names_used(path: Path) -> Iterator[str]:
    """Names that a file uses, other than by importing or defining them."""
    for node in ast.walk(parsed(path)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.Constant(value=str(name)):  # as in getattr
                yield name


def test_nothing_is_defined_that_nobody_calls_registers_or_can_read_of():
    scripts, pages = PACKAGE.parent / "scripts", (PACKAGE.parent / "docs").glob("*.md")
    used = {name for path in (*modules(), *scripts.rglob("*.py")) for name in names_used(path)}
    used |= {name for page in pages for name in re.findall(r"\w+", page.read_text())}
    used |= {*hybrid_jax.__all__, "setup"}  # flax calls the latter
    idle = []
    for path in modules():
        for node in ast.walk(parsed(path)) if path.stem != "testing" else ():
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("__"):
                continue
            if node.name not in used and "register" not in " ".join(map(ast.unparse, node.decorator_list)):
                idle.append(f"{place(path)}:{node.lineno} {node.name}")
    assert not idle, idle


def test_every_setting_has_a_sentence():
    spec = importlib.util.spec_from_file_location(
        "settings_docs", PACKAGE.parent / "scripts" / "settings_docs.py"
    )
    docs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = docs  # dataclasses look there
    spec.loader.exec_module(docs)
    silent = {
        f"{sys.modules[cls.__module__].__file__}: {cls.__name__}.{setting.name}"
        for cls in docs.classes()
        for setting in docs.settings_of(cls)
        if not setting.sentence
    }
    assert not silent, sorted(silent)


def test_every_public_name_is_where_the_package_says():
    for name in hybrid_jax.__all__:
        module, attribute = hybrid_jax._HOMES[name]
        assert hasattr(importlib.import_module(f"hybrid_jax.{module}"), attribute), name


def test_every_public_name_is_listed_where_extensions_are_explained():
    listed = set(re.findall(r"`(\w+)`", (PACKAGE.parent / "docs" / "extending.md").read_text()))
    assert not set(hybrid_jax.__all__) - listed


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


def test_no_file_outside_phases_goes_by_what_a_phase_is_called():
    """Names of the phases that the package registers, alone or before a metric, as in a condition or a key."""
    from hybrid_jax import experiment  # noqa: F401  registers the phases
    from hybrid_jax.training.phase import PHASES

    names = tuple(PHASES)
    assert {"sft", "ppo"} <= set(names)
    # A reward, or a setting of one, may have the same name.
    rewards = {"classifier", "reward_model", "preference"}
    wrong = []
    for path in modules():
        if folder_of(path) in ("phases", "testing"):  # `testing` writes a config of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name, slash, _ = node.value.partition("/")
                if name in names and (slash or name not in rewards):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value!r}")
    assert not wrong, wrong


def test_the_readme_leads_from_the_command_to_a_loss_in_at_most_five_hops_and_its_map_is_there():
    readme = (PACKAGE.parent / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    way = next(text for text in readme.split("\n\n") if text.startswith("From the command to a loss"))
    of_examples, of_rewards = (part.split("→") for part in way.split("Of a policy gradient"))
    assert len(of_examples) - 1 <= 5
    for hop in (*of_examples, *of_rewards):
        file, *inside = re.findall(r"`([\w./]+)`", hop)
        text = (PACKAGE / file).read_text()
        assert all(f"def {name}(" in text for name in inside), hop
    house = next(text for text in readme.split("```") if "core/batches.py" in text)
    for name in re.findall(r"\w+/[\w/]+\.py", house):
        assert (PACKAGE / name).is_file(), name
    for name in re.findall(r"\w+\.(?:py|sh)", house.partition("scripts/")[2]):
        assert (PACKAGE.parent / "scripts" / name).is_file(), name
