"""Time and memory of loading a Hugging Face folder, against safetensors reading the same bytes.

    python scripts/bench_loading.py
    python scripts/bench_loading.py --gigabytes 4 --stored bfloat16 --repeats 3

Writes a sharded Llama with random weights into a temporary folder and reads it once, so that the files are in
the page cache. Then each way reads it in a process of its own, in turns; the table has medians.

``ratio`` is the time over that of get_tensor; ``peak`` is the largest resident set less the one before the
reading, over the bytes of the result; pages of mapped files count. Before, imports are done and JAX has traced
another decoder: its first trace takes 0.3 seconds in any program.

    get_tensor   every tensor through safetensors.safe_open, kept as numpy arrays
    load_file    safetensors.numpy.load_file of every shard, kept
    float32 …    load_pretrained with parameters of that type
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hybrid_jax.core.cli import ArgumentParser, run_command

WIDTH, MLP_WIDTH, HEADS, VOCABULARY = 1536, 4096, 12, 32_000
READERS = ("get_tensor", "load_file", "float32", "bfloat16")


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="python scripts/bench_loading.py", description="Times load_pretrained.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the folder's weights (default 1)")
    parser.add_argument("--shards", type=int, default=4, help="files they are in (default 4)")
    parser.add_argument(
        "--stored", choices=("float32", "bfloat16"), default="float32", help="type in the files"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--read", nargs=2, metavar=("READER", "FOLDER"), help="one reading: what a turn starts")
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(measure(options.read[0], Path(options.read[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_llama(Path(name), options.gigabytes * 1e9, options.shards, options.stored)
        print(f"{size / 1e9:.3f} GB of {options.stored} weights in {options.shards} files")
        read_all = [sys.executable, __file__, "--read"]
        turns = [
            [json.loads(subprocess.check_output([*read_all, reader, name], text=True)) for reader in READERS]
            for _ in range(options.repeats + 1)
        ][1:]
    print(f"{'reader':<12}{'seconds':>9}{'GB/s':>7}{'ratio':>7}{'peak':>7}")
    for i, reader in enumerate(READERS):
        seconds = statistics.median(turn[i]["seconds"] for turn in turns)
        ratio = statistics.median(turn[i]["seconds"] / turn[0]["seconds"] for turn in turns)
        peak = statistics.median(turn[i]["peak"] for turn in turns)
        print(f"{reader:<12}{seconds:>9.2f}{size / 1e9 / seconds:>7.2f}{ratio:>7.2f}{peak:>7.2f}")


def write_llama(folder: Path, size: float, shards: int, stored: str) -> int:
    """A folder of about ``size`` bytes; returns the bytes of its tensors."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    dtype = np.dtype(jnp.dtype(stored))
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP_WIDTH
    layers = max(round((size / dtype.itemsize - 2 * VOCABULARY * WIDTH) / layer), 1)
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {at + f"mlp.{name}_proj.weight": (MLP_WIDTH, WIDTH) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (WIDTH, MLP_WIDTH)}
        shapes |= {at + f"{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    random, placed, names = np.random.default_rng(0), {}, list(shapes)
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        tensors = {name: random.random(shapes[name], np.float32).astype(dtype) for name in mine}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        placed |= dict.fromkeys(mine, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize


def measure(reader: str, folder: Path) -> dict[str, float]:
    """Seconds, and the peak of memory over the bytes of what was read."""
    import jax
    from safetensors import safe_open
    from safetensors.numpy import load_file
    from transformers import LlamaConfig

    from hybrid_jax.models.decoder import DecoderConfig
    from hybrid_jax.models.folders.hf import load_pretrained

    LlamaConfig()
    jax.eval_shape(DecoderConfig(num_layers=1, norm="rms", mlp="gated").build(8).init, jax.random.key(0))
    shards = sorted(folder.glob("*.safetensors"))

    def get_tensors():
        tensors = []
        for shard in shards:
            with safe_open(shard, "np") as file:
                tensors += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  it is no dict
        return tensors

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = _memory("VmRSS")
    started = time.perf_counter()
    if reader == "get_tensor":
        result = get_tensors()
    elif reader == "load_file":
        result = [load_file(shard) for shard in shards]
    else:
        result = load_pretrained(folder, param_dtype="float32" if reader == "float32" else "bfloat16")[1]
    seconds = time.perf_counter() - started
    peak = _memory("VmHWM") - before
    return {"seconds": seconds, "peak": peak / sum(leaf.nbytes for leaf in jax.tree.leaves(result))}


def _memory(field: str) -> int:
    """Bytes, as Linux counts them for this process: not those of the parent, as ``getrusage`` does."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    run_command(main)
