"""Connects the processes of a run over the coordinator's port, before JAX uses it.

JAX's own runtime ends a process by a C++ abort when a peer is missing, and cannot say which. Over plain sockets
the process that waits can name those that are missing, and say what to check.
"""

from __future__ import annotations

import contextlib
import socket
import time

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.cluster import Cluster

_GREETING = "hybrid_jax"
_HELLO_SECONDS = 5.0  # for the first line of a connection, which may come from a foreign program


class PeerError(UserError):
    """Raised where another process is missing."""


def meet(cluster: Cluster, seconds: float) -> dict[int, socket.socket]:
    """Opens the sockets of a process to its peers and returns them once all processes are there.

    Raises:
        PeerError: a process is missing after ``seconds``.
        UserError: the port is taken, or the processes contradict each other.
    """
    return _call(cluster, seconds) if cluster.index else _gather(cluster, seconds)


def _gather(cluster: Cluster, seconds: float) -> dict[int, socket.socket]:
    """Waits, in process 0, until every other process has connected, then answers all of them at once."""
    deadline, lines = time.monotonic() + seconds, {}
    with _listen(cluster.port) as listener, contextlib.ExitStack() as until_all_are_there:
        while len(lines) < cluster.size - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                line, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, cluster.size) if i not in lines]
                raise PeerError(
                    f"process 0 of {cluster.size} waited {seconds:g} s at {cluster.address} for process "
                    f"{', '.join(missing)}: start the same command on all workers, and check that they reach "
                    "this address (JAX_COORDINATOR_TIMEOUT sets the seconds)"
                ) from None
            if (index := _greeted(line, cluster, lines)) is not None:
                lines[index] = until_all_are_there.enter_context(line)
        until_all_are_there.pop_all()
    for line in lines.values():
        line.sendall(b"go\n")
    return {index: _lifeline(line) for index, line in lines.items()}


def _greeted(line: socket.socket, cluster: Cluster, lines: dict[int, socket.socket]) -> int | None:
    """Reads the index of the process that has connected; None for a foreign program."""
    line.settimeout(_HELLO_SECONDS)
    try:
        greeting, index, size = _read_line(line).split()
        if greeting != _GREETING:
            raise ValueError(greeting)
        index, size = int(index), int(size)
    except (OSError, ValueError):
        line.close()
        return None
    problem = None
    if size != cluster.size:
        problem = f"process {index} is one of {size} processes, process 0 one of {cluster.size}"
    elif not 0 < index < size or index in lines:
        problem = f"there are two processes {index} of {size}"
    if problem:
        for other in (line, *lines.values()):
            with contextlib.suppress(OSError):
                other.sendall(f"{problem}\n".encode())
        line.close()
        raise UserError(f"{problem}: check how the processes are started")
    return index


def _call(cluster: Cluster, seconds: float) -> dict[int, socket.socket]:
    """Connects, in any other process, to process 0, and waits until all have connected."""
    deadline = time.monotonic() + seconds
    line, trouble = None, "no answer"
    while line is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise PeerError(
                f"process {cluster.index} of {cluster.size} waited {seconds:g} s for process 0 at "
                f"{cluster.address} ({trouble}): start the same command on all workers, and check that this "
                "address is right and reachable (JAX_COORDINATOR_TIMEOUT sets the seconds)"
            )
        try:
            line = socket.create_connection((cluster.host, cluster.port), timeout=min(left, 5.0))
        except OSError as error:
            trouble = error.strerror or str(error)
            time.sleep(min(0.2, max(left, 0.0)))
    line.sendall(f"{_GREETING} {cluster.index} {cluster.size}\n".encode())
    line.settimeout(max(deadline - time.monotonic(), 0.0) + 2.0)  # process 0 knows who is missing
    try:
        answer = _read_line(line)
    except OSError:
        answer = ""
    if answer == "go":
        return {0: _lifeline(line)}
    line.close()
    if answer:
        raise UserError(f"{answer}: check how the processes are started")
    raise PeerError(
        f"process {cluster.index} of {cluster.size} reached process 0 at {cluster.address}, but it gave up "
        "waiting for the others: start the same command on all workers"
    )


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}): give another JAX_COORDINATOR_ADDRESS, "
            "or end what uses the port"
        ) from error


def _lifeline(line: socket.socket) -> socket.socket:
    """Lets a socket wait without end, yet notice within 90 s that the other machine has vanished."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}.items():
        if hasattr(socket, option):  # macOS has not all of them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line


def _read_line(line: socket.socket) -> str:
    """Reads up to the first newline, byte by byte, since what follows is for another reader."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 1000:
        byte = line.recv(1)
        if not byte:
            break
        text += byte
    return text.decode(errors="replace").strip()
