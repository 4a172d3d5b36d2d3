"""Finds how many processes a run has and which one this is, from what the launcher says in the environment."""

from __future__ import annotations

import glob
import http.client
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hybrid_jax.core.errors import UserError

ADDRESS, SIZE, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_TPU_PORT = 8482
_SLICES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
_GOOGLE = "0x1ae0"  # Google's number among the makers of PCI devices
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

Environment = Mapping[str, str]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """One process among several.

    Attributes:
        address: ``host:port`` of process 0.
        size: the number of processes.
        index: the number of this process, from 0.
        found_by: where these figures come from, for errors.
        local_devices: the devices of this host that this process uses; None for all of them.
    """

    address: str
    size: int
    index: int
    found_by: str
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self):
        if not re.fullmatch(r".+:\d{1,5}", self.address):
            raise UserError(f"{ADDRESS} must be host:port of process 0, got {self.address!r}")
        if not 0 <= self.index < self.size:
            raise UserError(
                f"{self.found_by}: the process must be one of 0 to {self.size - 1}, got {self.index}"
            )

    @property
    def host(self) -> str:
        """The host of process 0, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port on which process 0 listens."""
        return int(self.address.rpartition(":")[2])


def find_cluster(environment: Environment) -> Cluster | None:
    """Finds the processes of this run; None where there is only one.

    Looks first at ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, then at Slurm,
    Open MPI and TPU VMs. Under a launcher the address alone may be given, too; ``JAX_COORDINATOR_PORT`` changes
    the port that is chosen without it.

    Raises:
        UserError: what they say is incomplete or contradicts itself.
    """
    for find in (_by_hand, _slurm, _open_mpi, _tpu):
        if (cluster := find(environment)) is not None:
            return cluster if cluster.size > 1 else None
    if environment.get(ADDRESS):
        raise UserError(f"{ADDRESS} is set, so {SIZE} and {INDEX} must be, too")
    return None


def _by_hand(environment: Environment) -> Cluster | None:
    if not any(environment.get(name) for name in (SIZE, INDEX)):
        return None
    names = (ADDRESS, SIZE, INDEX)
    if missing := [name for name in names if not environment.get(name)]:
        there = next(name for name in names if environment.get(name))
        raise UserError(f"{there} is set, so {' and '.join(missing)} must be, too")
    size, index = _number(environment, SIZE), _number(environment, INDEX)
    return Cluster(environment[ADDRESS], size, index, "the environment")


def _slurm(environment: Environment) -> Cluster | None:
    """Reads the tasks of a job step; process 0 is on the first node, its port follows from the job's number."""
    if not all(environment.get(name) for name in _SLURM):
        return None
    size, index = _number(environment, "SLURM_NTASKS"), _number(environment, "SLURM_PROCID")
    nodes = environment["SLURM_STEP_NODELIST"]  # node1, node1,b2 or node[001-004,7],b2
    prefix, first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes).groups()  # pyright: ignore
    address = f"{prefix}{first or ''}:{_port_of_job(environment, _number(environment, 'SLURM_JOB_ID'))}"
    one_a_node = environment.get("SLURM_STEP_NUM_NODES") == str(size)
    local = None if one_a_node else _number(environment, "SLURM_LOCALID")
    return _launched(environment, address, size, index, "Slurm", local)


def _open_mpi(environment: Environment) -> Cluster | None:
    """Reads the ranks of ``mpirun``; older versions name the host of the launcher, where process 0 runs."""
    if not environment.get("OMPI_COMM_WORLD_SIZE"):
        return None
    size, index = _number(environment, "OMPI_COMM_WORLD_SIZE"), _number(environment, "OMPI_COMM_WORLD_RANK")
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", launcher)
    if host is None and size > 1 and not environment.get(ADDRESS):
        raise UserError(f"this Open MPI does not say where process 0 is: set {ADDRESS} to its host:port")
    job = int(launcher.partition(".")[0]) >> 12 if host else 0
    address = f"{(host[1] or f'[{host[2]}]') if host else 'localhost'}:{_port_of_job(environment, job)}"
    alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    local = None if alone else _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    return _launched(environment, address, size, index, "Open MPI", local)


def _tpu(environment: Environment, ask: Callable[[str], str | None] | None = None) -> Cluster | None:
    """Reads the hosts of TPU slices: on GKE from the environment, on TPU VMs from the metadata server."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or not (ask or _has_tpu()):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    index, slices = environment.get("TPU_WORKER_ID"), {name: environment.get(name) or "" for name in _SLICES}
    if not (hosts and index) and not environment.get("TPU_SKIP_MDS_QUERY"):
        ask = ask or _metadata
        hosts, index = (ask(name) for name in ("worker-network-endpoints", "agent-worker-number"))
        if hosts and not any(slices.values()):
            slices = _slices_in(ask("tpu-env") or "")
    if not (hosts and index):
        return None
    workers = [worker.split(":") for worker in hosts.split(",")]  # host, host:port, or name:number:host
    first = workers[0][2] if len(workers[0]) == 3 else workers[0][0]
    number, count = int(index), 1
    if any(slices.values()):
        first, count, own = _place_of_slice(slices)
        number += own * len(workers)
    port = environment.get("JAX_COORDINATOR_PORT") or _TPU_PORT
    return _launched(environment, f"{first}:{port}", count * len(workers), number, "the TPU VM", None)


def _place_of_slice(slices: dict[str, str]) -> tuple[str, int, int]:
    """The host of process 0, which is in slice 0, how many slices there are, and which one this host is in."""
    if missing := [name for name, value in slices.items() if not value]:
        there = next(name for name, value in slices.items() if value)
        raise UserError(f"{there} is set, so {' and '.join(missing)} must be, too")
    return slices[_SLICES[0]].split(":")[0], _number(slices, _SLICES[1]), _number(slices, _SLICES[2])


def _slices_in(metadata: str) -> dict[str, str]:
    """Parses lines such as ``MEGASCALE_NUM_SLICES: '2'``."""
    found = dict(re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", metadata, re.MULTILINE))
    return {name: found.get(name, "") for name in _SLICES}


def _launched(
    environment: Environment, address: str, size: int, index: int, found_by: str, local: int | None
) -> Cluster:
    """Takes what a launcher says, except for an address and devices that were given by hand."""
    own = None if local is None or environment.get("JAX_LOCAL_DEVICE_IDS") else (local,)
    return Cluster(environment.get(ADDRESS) or address, size, index, found_by, own)


def _port_of_job(environment: Environment, job: int) -> int:
    """One of the 4,096 highest ports by the number of the job, so that two jobs on a host seldom share one."""
    return int(environment.get("JAX_COORDINATOR_PORT") or 2**16 - 2**12 + job % 2**12)


def _number(environment: Environment, name: str) -> int:
    try:
        return int(environment.get(name, ""))
    except ValueError:
        raise UserError(f"{name} must be a number, got {environment.get(name, '')!r}") from None


def _has_tpu() -> bool:
    """Tells whether this machine has a TPU, and JAX the library to use it."""
    return importlib.util.find_spec("libtpu") is not None and has_tpu_device()


def has_tpu_device() -> bool:
    """Tells whether this machine has a TPU."""
    vendors = (Path(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _metadata(name: str) -> str | None:
    """Asks for an attribute of this virtual machine; None where it has none, as off TPU VMs."""
    server = http.client.HTTPConnection("metadata.google.internal", timeout=5)
    try:
        path = f"/computeMetadata/v1/instance/attributes/{name}"
        server.request("GET", path, headers={"Metadata-Flavor": "Google"})
        response = server.getresponse()
        return response.read().decode() if response.status == 200 else None
    except OSError as error:
        log.warning(
            "the metadata server of this TPU VM does not answer (%s): it is taken for the only host", error
        )
        return None
    finally:
        server.close()
