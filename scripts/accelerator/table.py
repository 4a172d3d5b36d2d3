"""The table in docs/results.md of what `bench_accelerator.py` measured; a row without a measurement says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MODELS = {"qwen2.5-0.5b": "Qwen2.5-0.5B", "qwen2.5-1.5b": "Qwen2.5-1.5B", "llama-3.2-1b": "Llama-3.2-1B"}
KINDS = {"sft": "SFT step", "rollout": "rollout", "ppo": "PPO iteration"}
NOT_MEASURED = "not measured yet: no GPU was at hand"
HEADER = ("", "shape", "hybrid_jax", "share of the peak", "against torch", "peak memory (plan)", "on")


def render(records: Sequence[dict[str, Any]]) -> str:
    """Markdown; of several records of a kind and a model the last counts, those of a CPU do not."""
    measured = {(r["kind"], r["size"]): r for r in records if r["platform"] != "cpu"}
    rows = [
        (title, model, *_cells(measured.get((kind, size))))
        for kind, title in KINDS.items()
        for size, model in MODELS.items()
    ]
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines)


def _cells(r: dict[str, Any] | None) -> tuple[str, ...]:
    if r is None:
        return (NOT_MEASURED, *[""] * (len(HEADER) - 3))
    return _speed(r), _share(r), _against(r), _memory(r["memory"]), f"{r['device']}, {(r['commit'] or '?')[:7]}"


def _speed(r: dict[str, Any]) -> str:
    new = f" + {r['new_tokens']}" if r["new_tokens"] else ""
    return f"{r['seconds']:.3g} s, {r['tokens_per_second']:,.0f} tokens/s at {r['rows']} × ({r['length']}{new})"


def _share(r: dict[str, Any]) -> str:
    if r["kind"] == "rollout":
        whole, decode = _percent(r["roofline"]), _percent(r["decode_roofline"])
        return f"{whole} of the bandwidth, {decode} without the prompts"
    split = ", ".join(f"{part} {_percent(share)}" for part, share in r.get("split", {}).items())
    return f"{_percent(r['mfu'])} MFU" + (f"; {split}" if split else "")


def _against(r: dict[str, Any]) -> str:
    return "" if "ratio" not in r else f"{r['peer']}: {r['peer_seconds']:.3g} s, **{r['ratio']:.2f}×**"


def _memory(m: dict[str, Any]) -> str:
    if not m["ratio"]:
        return "not counted"
    return f"{m['peak_bytes'] / 2**30:.1f} GiB ({m['plan_bytes'] / 2**30:.1f} GiB, {m['ratio']:.2f})"


def _percent(share: float | None) -> str:
    return "peak unknown" if share is None else f"{100 * share:.0f} %"
