"""Atomic checkpoints of a whole run, written in the background. The only file that knows Orbax.

One checkpoint holds parameters, optimizer states, references, host states, data cursors and the scheduler, or
it does not exist: Orbax writes into a temporary folder and renames it. A checksum of every array tells a
damaged checkpoint from a good one when it is read.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.registry import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.training.state import RunState, ScheduleState, TrainState

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    every: int = 100  # steps
    keep: int = 2  # the newest ones
    export_every: int | None = None  # steps; writes the policy as a Hugging Face folder

    def __post_init__(self):
        for name in ("every", "keep", "export_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, state: RunState) -> None:
        """Starts to write ``state``; returns once the caller may overwrite its buffers."""
        self.wait()
        arrays = _arrays(state)
        arrays = {**arrays, "train": jax.tree.map(jnp.copy, arrays["train"])}  # the next step donates them
        try:
            self._orbax.save_checkpointables_async(
                state.step,
                {"state": arrays},
                custom_metadata=_progress(state, _checksums(arrays)),
                force=True,
            )
        except OSError as error:
            _explain(error, state.step)

    def wait(self) -> None:
        """Until the last save is on the disk."""
        try:
            self._orbax.wait()
        except OSError as error:
            _explain(error, None)
        except Exception as error:  # Orbax and TensorStore wrap what the file system said in their own types
            if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
                _explain(OSError(errno.ENOSPC, str(error).splitlines()[0]), None)
            raise

    def close(self) -> None:
        self.wait()
        self._orbax.close()

    def newest(self, fresh: RunState) -> RunState | None:
        """The newest undamaged checkpoint as a state like ``fresh``, or None where there is no checkpoint.

        Raises:
            UserError: checkpoints exist, but none of them can be read.
        """
        return _newest(self._orbax, functools.partial(self._load, fresh=fresh))

    def _load(self, step: int, fresh: RunState) -> RunState:
        progress: Any = self._orbax.metadata(step).custom_metadata
        names = progress["references"]
        references = {name: fresh.train.params["model"] for name in names}
        wanted = _arrays(dataclasses.replace(fresh, references=references))
        arrays = self._orbax.load_checkpointables(step, {"state": jax.tree.map(_abstract, wanted)})["state"]
        _check(arrays, progress["checksums"])
        return RunState(
            step=progress["step"],
            train=arrays["train"],
            references=arrays["references"],
            schedule=ScheduleState(**progress["schedule"]),
            cursors=progress["cursors"],
            host=arrays["host"],
        )


def newest_policy(folder: Path, policy: Params) -> tuple[int, Params] | None:
    """The step and the policy's parameters alone of the newest undamaged checkpoint; None where there is none.

    It only reads, so a run that is still training is not disturbed.

    Args:
        folder: the checkpoints of a run.
        policy: shapes and dtypes of the parameters, as `jax.eval_shape` gives them.

    Raises:
        UserError: checkpoints exist, but none of them can be read.
    """
    if not folder.is_dir():
        return None
    from orbax.checkpoint import v1 as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    policy = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one_device), policy)
    options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=options), ocp.training.Checkpointer(folder.absolute()) as reader:
        return _newest(reader, functools.partial(_load_policy, reader, policy))


def _load_policy(reader: Any, policy: Params, step: int) -> tuple[int, Params]:
    progress: Any = reader.metadata(step).custom_metadata
    wanted = {"state": {"train": {"params": {"model": policy}}}}
    params = reader.load_checkpointables(step, wanted)["state"]["train"]["params"]
    _check({"train": TrainState(params=params, opt_state={}, extra={})}, progress["checksums"])
    return progress["step"], params["model"]


def _newest(reader: Any, load: Callable[[int], T]) -> T | None:
    steps = sorted((saved.step for saved in reader.checkpoints), reverse=True)
    for step in steps:
        try:
            return load(step)
        except Exception as error:  # whatever a torn file makes of itself
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            log.warning("checkpoint %d is damaged (%s); falling back to the one before", step, reason)
    if steps:
        raise UserError(
            f"none of the checkpoints {steps} in {reader.directory} can be read; "
            "move the folder away to start again, or choose another run_dir"
        )
    return None


def _arrays(state: RunState) -> dict[str, Any]:
    return {"train": state.train, "references": dict(state.references), "host": dict(state.host)}


def _progress(state: RunState, checksums: dict[str, int]) -> dict[str, Any]:
    return {
        "step": state.step,
        "schedule": dataclasses.asdict(state.schedule),
        "cursors": dict(state.cursors),
        "references": list(state.references),
        "checksums": checksums,
    }


def _checksums(arrays: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf)) for path, leaf in leaves}


def _check(arrays: Any, checksums: dict[str, int]) -> None:
    for path, checksum in _checksums(arrays).items():
        if checksum != checksums.get(path):
            raise ValueError(f"checksum of {path} differs")


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _explain(error: OSError, step: int | None) -> NoReturn:
    what = "a checkpoint" if step is None else f"checkpoint {step}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"no space left on the disk for {what}; earlier checkpoints are kept: free space, rerun"
        ) from error
    raise UserError(f"{what} cannot be written: {error}") from error
