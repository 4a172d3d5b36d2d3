"""The note in a checkpoint beside its arrays: the progress of the run, and checksums."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.training.checksums import checksums, differing, shapes, sum_of_bits
from hybrid_jax.training.state import RunState


def arrays_of(state: RunState) -> dict[str, Any]:
    """The part of a checkpoint that Orbax writes."""
    return {"train": state.train, "references": dict(state.references), "host": dict(state.host)}


def progress_of(state: RunState, arrays: Any) -> dict[str, Any]:
    """The rest of a state, and checksums, as JSON."""
    return {
        "step": state.step,
        "schedule": dataclasses.asdict(state.schedule),
        "cursors": dict(state.cursors),
        "references": list(state.references),
        "sums": checksums(arrays),
        "shapes": shapes(arrays),
        **({"base_sum": sum_of_bits(state.base)} if state.base else {}),
    }


def check_base(base: Params, progress: dict[str, Any]) -> None:
    """A run from before version 0.3 kept another sum of its base, which is not looked at."""
    if base and "base_sum" in progress and sum_of_bits(base) != progress["base_sum"]:
        raise UserError(
            "the model below the adapter is no longer the one that the run was trained on; "
            "restore model.path as it was, or choose another run_dir"
        )


def check_sums(arrays: Any, progress: dict[str, Any]) -> None:
    """Checkpoints from before version 0.3 hold other checksums of arrays; the seal of their files remains."""
    if "sums" in progress and (path := differing(arrays, progress["sums"])):
        raise ValueError(f"checksum of {path} differs")


def check_structure(wanted: Any, progress: dict[str, Any]) -> None:
    """Settings that were changed on purpose may need another state than there is."""
    here = shapes(wanted)
    if "value" in param_groups(progress) - param_groups({"shapes": here}):
        raise UserError(
            f"checkpoint {progress['step']} is from before version 0.5, which keeps its state otherwise: "
            "export the model, and begin another run from that folder"
        )
    there = progress.get("shapes") or dict.fromkeys(progress.get("sums", here))  # before 0.4.1 without shapes
    for path in {**there, **here}:
        if path not in there or path not in here or there[path] not in (None, here[path]):
            raise UserError(
                f"these settings need another state than checkpoint {progress['step']} holds: "
                f"{_dotted(path)} is {there.get(path, 'nothing')} there and {here.get(path, 'nothing')} here; "
                "undo the change, or give another run_dir"
            )


def param_groups(progress: dict[str, Any]) -> set[str]:
    """The groups of parameters that a checkpoint holds; of a network beside a head, ``<group>/model`` too."""
    paths = (re.findall(r"[^][.']+", path) for path in progress.get("shapes") or ())
    found = [path[2:4] for path in paths if path[:2] == ["train", "params"]]
    return {group for group, *_ in found} | {f"{group}/model" for group, *rest in found if rest == ["model"]}


def _dotted(path: str) -> str:
    """Writes the path ``['host']['ppo/reward'].mean`` as ``host.ppo/reward.mean``."""
    return ".".join(re.findall(r"[^][.']+", path))
