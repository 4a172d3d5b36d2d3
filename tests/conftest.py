"""Eight fake devices on the CPU, so that sharded = single is tested everywhere; set before JAX starts."""

import gc
import importlib
import logging
import os
import signal
import sys

# A test compiles far longer than it computes: the compiler skips what is dear, unless it is told not to.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Two workers share two cores: a second thread of torch would only wait for the first, at full speed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import jax
import pytest

from hybrid_jax.training.compilation import free_programs

# Tracing makes millions of small objects: looking through all that lives for garbage so often costs a tenth.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_let_go_before_they_are_too_many():
    """JAX keeps every compiled program, in memory maps of its own; a process may have 65,530 of them.

    Until then they stay: modules compile many of the same small ones.
    """
    yield
    free_programs(limit=3_000)  # beyond it, a worker needs more than 3 GB


@pytest.fixture(autouse=True, scope="module")
def what_commands_let_be_heard_ends_with_their_module():
    """A command lets the package speak; a test that counts what is said must not depend on those before it."""
    yield
    logging.getLogger("hybrid_jax").setLevel(logging.NOTSET)


@pytest.fixture
def shared_data() -> Path:
    """Real data beside the checkout; a test that needs it skips where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data folder")
    return folder


@pytest.fixture(scope="module")
def scripts():
    """``scripts(name)`` imports one of the scripts with its modules, as where it runs."""
    folder, before = str(Path(__file__).parents[1] / "scripts"), {*sys.modules}
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(folder)
        for name in {*sys.modules} - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C: a process started in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
