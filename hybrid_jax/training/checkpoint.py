"""Atomic checkpoints of a whole run, written in the background. The only file that knows Orbax.

One checkpoint holds parameters, optimizer states, references, host states, data cursors and the scheduler, or
it does not exist: Orbax writes into a temporary folder and renames it. Checksums of every array and of every
file tell a damaged checkpoint from a good one when it is read. Parameters below adapters are not in it: their
checksum tells whether they are still the same.

Several processes write and read one checkpoint together, each the parts that its devices hold; the folder must
be on a disk that all of them share, or in a bucket (``gs://``, as an `etils.epath.Path`). A bucket renames
nothing, so there a file that Orbax writes last says that a checkpoint is whole. Its files have no checksums of
ours: to make them, all would have to be read back; the bucket has its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import read_json
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.core.writing import write_text
from hybrid_jax.models.base import Params
from hybrid_jax.parallel import hosts
from hybrid_jax.training import saving_noise
from hybrid_jax.training.checkpoint_note import arrays_of, check_base, check_structure, check_sums, progress_of
from hybrid_jax.training.checksums import file_checksums, file_names
from hybrid_jax.training.state import RunState, ScheduleState, TrainState

T = TypeVar("T")
Writing = concurrent.futures.Future[None]
Folder = Any  # a Path, or the etils.epath.Path of a bucket

SEAL = "files.json"  # in the folder of a checkpoint
COMMITTED = "commit_success.txt"  # Orbax writes it, in a bucket

log = logging.getLogger(__name__)


@settings
class CheckpointConfig:
    """When to save and how much to keep."""

    every: Count = 100  # steps
    keep: Count = 2  # the newest ones
    export_every: Count | None = None  # steps; writes the language model and each head into exports/step_N


class SaveError(UserError):
    """A checkpoint could not be written; those before it are untouched."""


class Checkpoints:
    """The checkpoints of one run directory. Reading changes nothing there: it disturbs no running run.

    Args:
        folder: where they are.
        keep: how many.
        before: called before each save; what it writes is there once the checkpoint is.
        note: kept in every checkpoint, as JSON; see `saved_progress`.
    """

    # A run that was aborted in this process (Ctrl-C twice in a notebook) may still be saving: by folder.
    _saving: ClassVar[dict[Folder, Writing]] = {}

    def __init__(
        self,
        folder: Folder,
        keep: int,
        before: Callable[[], object] = lambda: None,
        note: Mapping[str, Any] | None = None,
    ):
        self._folder = _absolute(folder)
        self._note = dict(note or {})
        self._keep = keep
        self._before = before
        self._damaged: list[int] = []
        self._writer: Any = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Writing] | None = None

    def save(self, state: RunState) -> None:
        """Starts to write ``state``; returns once the caller may overwrite its buffers.

        Raises:
            SaveError: this checkpoint, or the one before that was still being written, failed.
        """
        self.wait()
        self._before()
        arrays = arrays_of(state)
        arrays = {**arrays, "train": jax.tree.map(jnp.copy, arrays["train"])}  # the next step donates them
        with _explained(state.step):
            self._writer = self._writer or self._open_writer()
            response = self._writer.save_checkpointables_async(
                state.step,
                {"state": arrays},
                custom_metadata={**progress_of(state, arrays), "note": self._note},
                force=True,
                overwrite=(self._folder / str(state.step)).exists(),
            )
        writing = self._thread.submit(self._finish, response, state.step)
        self._pending = state.step, writing
        self._saving[self._folder] = writing

    def check(self) -> None:
        """Says at once that the last save has failed, without waiting for one that is under way.

        Raises:
            SaveError: it failed.
        """
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            SaveError: it failed.
        """
        if self._pending is not None:
            # Kept while it is waited for, so that an interrupt here does not forget the save.
            step, writing = self._pending
            concurrent.futures.wait([writing])
            self._pending = None
            with _explained(step):
                writing.result()

    def close(self) -> None:
        """Waits for the save under way and ends the thread that writes.

        Raises:
            SaveError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                with contextlib.suppress(Exception):  # it repeats what `wait` has said
                    self._writer.close()
                self._writer = None

    def newest(
        self, fresh: RunState, reference: Params | None = None, step: int | None = None
    ) -> RunState | None:
        """The newest undamaged checkpoint as a state like ``fresh``, or None where there is no checkpoint.

        With ``step`` it is the one of that step and no other.

        Its references are like ``reference``, which may be shapes (`jax.ShapeDtypeStruct`); None is the policy.
        The number of devices may have changed since: every array goes to where its like lies.

        The next save removes the damaged ones that were passed over: the run will write them again.

        Raises:
            UserError: checkpoints exist, but none of them can be read.
        """
        if self._folder in self._saving:
            concurrent.futures.wait([self._saving.pop(self._folder)])
        if not self._folder.is_dir():
            return None
        with _checkpointer(self._folder) as reader:
            state, self._damaged = _newest(
                self._folder,
                functools.partial(_load_state, reader=reader, fresh=fresh, reference=reference),
                saved_steps(self._folder) if step is None else [step],
            )
        return state

    def _open_writer(self) -> Any:
        from orbax.checkpoint import v1 as ocp

        for step in self._damaged if hosts.is_first() else ():
            # Orbax would count them among the newest, and delete good ones instead.
            folder = self._folder / str(step)
            shutil.rmtree(folder) if isinstance(folder, Path) else folder.rmtree()
        hosts.barrier()
        # A folder that cannot be made in the background would be waited for by a thread for five minutes.
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False
        with context:
            return _checkpointer(
                self._folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )

    def _finish(self, response: Any, step: int) -> None:
        response.result()  # every process has written its part
        folder = self._folder / str(step)
        if isinstance(folder, Path) and hosts.is_first():
            _seal(folder)


def saved_steps(folder: Folder) -> list[int]:
    """The steps of the checkpoints there, the newest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.isdecimal())
    whole = (path for path in found if isinstance(path, Path) or (path / COMMITTED).exists())
    return sorted((int(path.name) for path in whole), reverse=True)


def saved_progress(folder: Folder, step: int) -> dict[str, Any]:
    """The data that a checkpoint holds beside its arrays (`progress_of`), with the ``note`` of the run."""
    with _checkpointer(_absolute(folder)) as reader:
        return _read_progress(reader, step)


def newest_policy(folder: Folder, policy: Params, base: Params | None = None) -> tuple[int, Params] | None:
    """`newest_params` of the policy alone."""
    found = newest_params(folder, {"model": policy}, base)
    return None if found is None else (found[0], found[1]["model"])


def newest_params(
    folder: Folder, groups: dict[str, Params], base: Params | None = None
) -> tuple[int, dict[str, Params]] | None:
    """The step and some parameters alone of the newest undamaged checkpoint; None where there is none.

    It only reads, so a run that is still training is not disturbed.

    Args:
        folder: the checkpoints of a run.
        groups: by the names in `TrainState`: shapes and dtypes, as `jax.eval_shape` gives them.
        base: the parameters below, if those are an adapter's.

    Raises:
        UserError: checkpoints exist, but none of them can be read; or the base is not theirs.
    """
    if not folder.is_dir():
        return None
    from orbax.checkpoint import v1 as ocp

    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    groups = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one_device), groups)
    options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=options), _checkpointer(_absolute(folder)) as reader:
        load = functools.partial(_load_params, reader=reader, groups=groups, base=base or {})
        return _newest(folder, load, saved_steps(folder))[0]


def _absolute(folder: Folder) -> Folder:
    return folder.absolute() if isinstance(folder, Path) else folder


def _checkpointer(folder: Folder, **settings: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    saving_noise.silence()
    return ocp.training.Checkpointer(str(folder), **settings)


def _newest(folder: Folder, load: Callable[[int], T], steps: list[int]) -> tuple[T | None, list[int]]:
    """Loads the first checkpoint of ``steps`` that can be read, and lists the damaged ones before it.

    Several processes take the same one: a checkpoint that one of them cannot read is damaged for all.
    """
    hosts.check_same(f"list of checkpoints in {folder} (is it on a shared disk?)", steps)
    for tried, step in enumerate(steps):
        _, reason = _together(functools.partial(_check_seal, folder / str(step)))
        loaded = None
        if reason is None:
            loaded, reason = _together(functools.partial(load, step))
        if reason is None:
            return loaded, steps[:tried]
        if hosts.is_first():
            log.warning("checkpoint %d is damaged (%s); falling back to the one before", step, reason)
    if steps:
        raise UserError(
            f"none of the checkpoints {steps} in {folder} can be read; "
            "move the folder away to start again, or choose another run_dir"
        )
    return None, []


def _together(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of ``action`` and, if it failed in any of the processes, why."""
    result, reason = None, None
    try:
        result = action()
    except UserError:
        raise
    except Exception as error:  # whatever a torn file makes of itself
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return result, next(filter(None, hosts.exchange(reason)), None)


def _load_state(step: int, *, reader: Any, fresh: RunState, reference: Params | None) -> RunState:
    progress = _read_progress(reader, step)
    names = progress["references"]
    references = {n: fresh.train.params["model"] if reference is None else reference for n in names}
    wanted = arrays_of(dataclasses.replace(fresh, references=references))
    check_structure(wanted, progress)
    arrays = reader.load_checkpointables(step, {"state": jax.tree.map(_abstract, wanted)})["state"]
    check_sums(arrays, progress)
    check_base(fresh.base, progress)
    return RunState(
        step=progress["step"],
        train=arrays["train"],
        references=arrays["references"],
        schedule=ScheduleState(**progress["schedule"]),
        cursors=progress["cursors"],
        host=arrays["host"],
        base=fresh.base,
    )


def _load_params(
    step: int, *, reader: Any, groups: dict[str, Params], base: Params
) -> tuple[int, dict[str, Params]]:
    progress = _read_progress(reader, step)
    wanted = {"state": {"train": {"params": groups}}}
    params = reader.load_checkpointables(step, wanted)["state"]["train"]["params"]
    train: Any = TrainState  # pyright does not see the fields of a flax.struct.dataclass
    check_sums({"train": train(params=params, opt_state={}, extra={})}, progress)
    check_base(base, progress)
    return progress["step"], params


def _read_progress(reader: Any, step: int) -> dict[str, Any]:
    progress = reader.metadata(step).custom_metadata
    if not progress:
        raise ValueError("its metadata is missing")
    return progress


def _seal(folder: Path) -> None:
    """Writes the size and checksum of every file of a finished checkpoint beside them.

    Orbax reads in threads that print a traceback for every damaged file; the seal finds such files before.
    A checkpoint without one, since a kill came between its last file and the seal, is as good as any.
    """
    write_text(folder / SEAL, json.dumps(file_checksums(folder, file_names(folder, SEAL))))


def _check_seal(folder: Folder) -> None:
    if not isinstance(folder, Path) or not (folder / SEAL).is_file():
        return
    try:
        sealed = read_json(folder / SEAL)
    except (
        UserError
    ) as error:  # a torn seal is damage like any other, and no reason to give up older checkpoints
        raise ValueError(str(error)) from error
    here = sorted(sealed)[hosts.index() :: hosts.size()]  # the processes share the reading
    for name in here:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    for name, checksum in file_checksums(folder, here).items():
        if sealed[name] != checksum:
            raise ValueError(f"{name} has changed")


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


@contextlib.contextmanager
def _explained(step: int) -> Iterator[None]:
    """Says in one line why a checkpoint could not be written."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore wrap what the file system said in their own types
        if _says_disk_is_full(error):
            reason = "no space left on the disk; earlier checkpoints are kept: free space, then rerun to resume"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SaveError(f"checkpoint {step} cannot be written: {reason}") from error


def _says_disk_is_full(error: BaseException | None) -> bool:
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    texts = ("RESOURCE_EXHAUSTED", "No space left", "quota exceeded")
    return full or any(t in str(error) for t in texts) or _says_disk_is_full(error.__cause__)
