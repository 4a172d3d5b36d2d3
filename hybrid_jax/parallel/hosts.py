"""Lets several processes act as one run: they agree, end together, and notice when one of them is gone.

JAX's own runtime ends a process by a C++ abort, minutes later, when a peer dies. So the sockets over which the
processes have met (`meeting`) stay open for the whole run: those of a killed process close at once, and a small
exchange between hosts needs no device.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from hybrid_jax.core.cli import Ended
from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.cluster import Cluster, find_cluster
from hybrid_jax.parallel.meeting import meet

_GRACE_SECONDS = 10.0  # that a process which ends by an error waits for its threads before it cuts them off
_ADVICE = "run the same command on all workers again: it goes on from the newest checkpoint"

log = logging.getLogger(__name__)


class Peers:
    """The open sockets of one process to its peers: to all others in process 0, to process 0 in the others.

    Args:
        cluster: says which process this is.
        lines: a connected socket for each peer, by its index.
        end: ends this process with a message; called from the thread that watches the sockets.
    """

    def __init__(
        self,
        cluster: Cluster,
        lines: dict[int, socket.socket],
        end: Callable[[str], object] | None = None,
    ):
        self.cluster = cluster
        self._lines = lines
        self._end = end or _end_now
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {index: queue.SimpleQueue() for index in lines}
        self._sending = threading.Lock()
        self._leaving = False
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watcher.start()

    def exchange(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by index; all must call it equally often and in the same order.

        Args:
            value: anything that JSON can hold.
        """
        if self.cluster.index:
            self._send(0, {"value": value})
            return self._inbox[0].get()
        values = [value, *(self._inbox[index].get() for index in sorted(self._lines))]
        for index in self._lines:
            self._send(index, {"value": values})
        return values

    def close(self) -> None:
        """Closes the sockets once every process has called this."""
        self.exchange(None)
        for index in self._lines:
            self._send(index, {"bye": True})
        self._watcher.join()  # until all have said so
        for line in self._lines.values():
            line.close()

    def fail(self, reason: str) -> None:
        """Tells the others why this process ends by an error, so that they end too."""
        self._leaving = True
        self._tell(reason, self._lines)

    def _tell(self, reason: str, indices: Any) -> None:
        for index in indices:
            with contextlib.suppress(OSError):
                self._send(index, {"failed": reason})

    def _send(self, index: int, message: Any) -> None:
        with self._sending:
            self._lines[index].sendall(json.dumps(message).encode() + b"\n")

    def _watch(self) -> None:
        selector, partial = selectors.DefaultSelector(), dict.fromkeys(self._lines, b"")
        for index, line in self._lines.items():
            selector.register(line, selectors.EVENT_READ, index)
        with selector:
            while selector.get_map():
                for key, _ in selector.select():
                    received = _receive(self._lines[key.data])
                    if not received:
                        self._lost(key.data, None)
                        return
                    *messages, partial[key.data] = (partial[key.data] + received).split(b"\n")
                    for message in map(json.loads, messages):
                        if "failed" in message:
                            self._lost(key.data, message["failed"])
                            return
                        if "bye" in message:
                            selector.unregister(key.fileobj)
                        else:
                            self._inbox[key.data].put(message["value"])

    def _lost(self, index: int, reason: str | None) -> None:
        """Ends this process, and from process 0 all others: none can go on without the rest."""
        if self._leaving:
            return
        who = f"process {index} of {self.cluster.size}"
        if reason is None:
            reason = f"{who} is gone: it was killed, or its machine or network failed; {_ADVICE}"
        elif not reason.startswith("process "):
            reason = f"{who} has ended: {reason}"
        self._tell(reason, [other for other in self._lines if other != index])
        self._end(reason)


_peers: Peers | None = None


def initialize() -> Peers | None:
    """Joins the processes of the run, if there are several; call it before a device is used.

    They are found on TPU VMs, under Slurm and Open MPI, and by ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` (`cluster.find_cluster`).

    Raises:
        UserError: a process is missing after ``JAX_COORDINATOR_TIMEOUT`` seconds (300), or they contradict
            each other.
    """
    global _peers
    if _peers is None and (cluster := find_cluster(os.environ)) is not None:
        seconds = _timeout(os.environ.get("JAX_COORDINATOR_TIMEOUT", "300"))
        lines = meet(cluster, seconds)
        import jax

        # Else JAX would catch SIGTERM, and `training.interrupts` could not.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            cluster.address,
            cluster.size,
            cluster.index,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(seconds), 60),
        )
        _peers = Peers(cluster, lines)
        if cluster.index:
            logging.getLogger("hybrid_jax").setLevel(logging.WARNING)
        log.info("%d processes, found by %s", cluster.size, cluster.found_by)
    return _peers


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Wraps a whole program: joins the processes before it, and ends all of them together.

    An `Ended` counts as an end that all have agreed on. Any other error ends the other processes with a
    message.
    """
    peers = initialize()
    try:
        yield
    except Ended:
        _part(peers)
        raise
    except BaseException as error:
        if peers is not None:
            _leave_alone(peers, error)
        raise
    _part(peers)


def is_first() -> bool:
    """Tells whether this is the process that writes logs and files, and shows progress."""
    return index() == 0


def index() -> int:
    """The number of this process, from 0."""
    return 0 if _peers is None else _peers.cluster.index


def size() -> int:
    """The number of processes of the run."""
    return 1 if _peers is None else _peers.cluster.size


def exchange(value: Any) -> list[Any]:
    """Returns the values of all processes, as `Peers.exchange`; of a single process, its own."""
    return [value] if _peers is None else _peers.exchange(value)


def barrier() -> None:
    """Returns once every process has called it."""
    exchange(None)


def check_same(what: str, value: Any) -> None:
    """Checks that every process has the same ``value`` (for JSON).

    Raises:
        UserError: they differ.
    """
    values = exchange(value)
    if other := next((i for i, theirs in enumerate(values) if theirs != values[0]), None):
        raise UserError(
            f"process {other} has another {what} than process 0: start the same command, with the same files "
            "and versions, on all workers"
        )


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(1 << 16)
    except OSError:
        return b""


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"JAX_COORDINATOR_TIMEOUT must be seconds above 0, got {text!r}")
    return seconds


def _part(peers: Peers | None) -> None:
    """Ends a run that all processes have finished."""
    global _peers
    if peers is not None:
        import jax

        peers.close()
        jax.distributed.shutdown()
        _peers = None


def _leave_alone(peers: Peers, error: BaseException) -> None:
    """Ends this process by an error, without JAX's own shutdown, which would wait for the others."""
    expected = isinstance(error, UserError | KeyboardInterrupt)
    if not expected:  # a collective fails when a peer is gone; then the watching thread ends this process
        time.sleep(1.0)
    what = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}"
    peers.fail(" ".join(what.split()) or type(error).__name__)
    code = 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1
    end = functools.partial(_exit, code)
    atexit.register(end)  # the last to come is the first to run
    timer = threading.Timer(_GRACE_SECONDS, end)
    timer.daemon = True
    timer.start()


def _end_now(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _exit(2)


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
