import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel import cluster, hosts
from hybrid_jax.parallel.cluster import Cluster, find_cluster
from hybrid_jax.parallel.hosts import Peers
from hybrid_jax.parallel.meeting import PeerError, meet
from hybrid_jax.training.checksums import checksums, weighted_sum

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def test_the_processes_are_found_by_hand_under_slurm_and_under_open_mpi():
    assert find_cluster({}) is None
    assert find_cluster(BY_HAND) == Cluster("10.0.0.1:1234", 4, 3, "the environment")
    # 70000 mod 4096 = 368; the ports begin at 65536 − 4096 = 61440
    assert find_cluster(SLURM) == Cluster("gpu007:61808", 8, 5, "Slurm", (1,))
    assert find_cluster({**SLURM, "SLURM_STEP_NODELIST": "a1,b2"}).address == "a1:61808"
    # 1531576320 / 4096 = 373920 = 91 · 4096 + 1184
    assert find_cluster(OPEN_MPI) == Cluster("10.96.0.1:62624", 2, 1, "Open MPI")


def test_a_process_a_node_has_all_devices_and_what_was_given_by_hand_wins():
    assert find_cluster({**SLURM, "SLURM_STEP_NUM_NODES": "8"}).local_devices is None
    assert find_cluster({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}).local_devices is None
    assert find_cluster({**SLURM, "JAX_COORDINATOR_ADDRESS": "h:1"}).address == "h:1"
    assert find_cluster({**SLURM, "JAX_COORDINATOR_PORT": "77"}).address == "gpu007:77"


def test_one_process_is_no_cluster():
    assert find_cluster({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_cluster({**BY_HAND, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_the_hosts_of_a_tpu_slice_are_found_in_the_environment_or_in_the_metadata():
    answers = {"worker-network-endpoints": "u:1:10.0.0.2,u:2:10.0.0.3", "agent-worker-number": "1"}
    assert cluster._tpu({}, answers.get) == Cluster("10.0.0.2:8482", 2, 1, "the TPU VM")
    on_gke = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc", "TPU_WORKER_ID": "0"}
    assert cluster._tpu(on_gke, answers.get) == Cluster("w-0.svc:8482", 2, 0, "the TPU VM")
    assert cluster._tpu({}, {}.get) is None  # a virtual machine without a TPU
    assert cluster._tpu({"JAX_PLATFORMS": "cpu"}, answers.get) is None


def test_the_hosts_of_several_slices_are_one_run_and_process_0_is_in_the_first_slice():
    of_slices = {
        "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0.svc:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }
    on_gke = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc", "TPU_WORKER_ID": "1", **of_slices}
    assert cluster._tpu(on_gke, {}.get) == Cluster("slice-0-0.svc:8482", 6, 5, "the TPU VM")
    answers = {
        "worker-network-endpoints": "u:1:10.0.1.2,u:2:10.0.1.3",
        "agent-worker-number": "0",
        "tpu-env": "ZONE: 'us-west4-a'\n" + "".join(f"{name}: '{of_slices[name]}'\n" for name in of_slices),
    }
    assert cluster._tpu({}, answers.get) == Cluster("slice-0-0.svc:8482", 6, 4, "the TPU VM")
    with pytest.raises(
        UserError, match=r"^MEGASCALE_COORDINATOR_ADDRESS is set, so MEGASCALE_SLICE_ID must be, too"
    ):
        cluster._tpu({**on_gke, "MEGASCALE_SLICE_ID": ""}, {}.get)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set, so JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and"),
        ({**BY_HAND, "JAX_PROCESS_ID": "4"}, "must be one of 0 to 3, got 4"),
        ({**BY_HAND, "JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID must be a number, got 'two'"),
        ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": "here"}, "must be host:port of process 0, got 'here'"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_what_is_said_of_the_processes_must_be_whole(environment, message):
    with pytest.raises(UserError, match=message):
        find_cluster(environment)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def member(index, size, port):
    return Cluster(f"127.0.0.1:{port}", size, index, "a test")


def together(actions):
    """The result, or the error, of each action, run in threads."""
    results = [None] * len(actions)

    def run(i):
        try:
            results[i] = actions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def meeting(members, seconds=10.0):
    return together([lambda m=m: meet(m, seconds) for m in members])


@pytest.fixture
def three():
    """Three peers in one process, and what ended each of them."""
    port = free_port()
    members = [member(i, 3, port) for i in range(3)]
    ends: list[list[str]] = [[], [], []]
    lines = meeting(members)
    peers = [Peers(m, line, end.append) for m, line, end in zip(members, lines, ends, strict=True)]
    yield peers, ends
    for line in (line for peer in peers for line in peer._lines.values()):
        line.close()


def test_every_process_learns_what_all_have_given_in_order_of_their_index(three):
    peers, ends = three
    for turn in range(20):
        given = [{"step": turn, "by": i, "third": 1 / 3} for i in range(3)]
        assert together([lambda i=i, given=given: peers[i].exchange(given[i]) for i in range(3)]) == [given] * 3
    assert together([peer.close for peer in peers]) == [None] * 3
    assert ends == [[], [], []]


def test_one_that_is_killed_ends_all_others_at_once_with_its_number(three):
    peers, ends = three
    started = time.monotonic()
    peers[2]._lines[0].shutdown(socket.SHUT_RDWR)  # what the system does with the sockets of a killed process
    while not (ends[0] and ends[1]):
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    for end in (ends[0], ends[1]):
        assert end[0].startswith(
            "process 2 of 3 is gone: it was killed, or its machine or network failed; run the"
        )


def test_one_that_ends_by_an_error_tells_the_others_which(three):
    peers, ends = three
    peers[1].fail("reward 'length' raised")
    started = time.monotonic()
    while not (ends[0] and ends[2]):
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    assert ends[0] == ends[2] == ["process 1 of 3 has ended: reward 'length' raised"]


def test_who_is_missing_is_named_by_those_who_waited():
    port = free_port()
    first, second = meeting([member(0, 3, port), member(1, 3, port)], seconds=0.7)
    assert isinstance(first, PeerError)
    assert f"process 0 of 3 waited 0.7 s at 127.0.0.1:{port} for process 2: start the same" in str(first)
    assert isinstance(second, PeerError)
    assert "process 1 of 3 reached process 0" in str(second)


def test_a_coordinator_that_is_not_there_is_named():
    with pytest.raises(
        PeerError, match=r"process 1 of 2 waited 0.5 s for process 0 at 127.0.0.1:\d+ \(.*refused"
    ):
        meet(member(1, 2, free_port()), 0.5)


def test_processes_that_contradict_each_other_and_strangers_are_told_apart():
    port = free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as line:
                    line.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                time.sleep(0.02)

    errors = together([lambda: meet(member(0, 3, port), 5), stranger, lambda: meet(member(1, 2, port), 5)])
    assert "process 1 is one of 2 processes, process 0 one of 3" in str(errors[0])
    assert "process 1 is one of 2 processes" in str(errors[2])


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as other, pytest.raises(UserError, match="cannot listen on port"):
        meet(member(0, 2, other.getsockname()[1]), 1)


def test_alone_everything_is_agreed_at_once():
    assert hosts.exchange("x") == ["x"]
    assert hosts.is_first()
    hosts.check_same("config", {"a": 1})


def test_a_missing_peer_ends_the_command_with_one_line_and_code_2(tmp_path):
    environment = {
        **os.environ,
        **BY_HAND,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_COORDINATOR_TIMEOUT": "0.5",
    }
    command = [sys.executable, "-m", "hybrid_jax.train", "--config", "none.yaml"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: process 3 of 4 waited 0.5 s for process 0 at 127.0.0.1:")
    assert result.stderr.count("\n") == 1


def by_hand(array):
    """The weighted sum in Python's integers."""
    bits = np.ascontiguousarray(array).reshape(-1)
    bits = bits.view(f"uint{8 * bits.itemsize}") if bits.dtype != bool else bits
    return sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32


ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32),
    "bfloat16": np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.bfloat16)),
    "int32": np.arange(-40, 40, dtype=np.int32),
    "bool": np.arange(24) % 3 == 0,
    "scalar": np.float32(0.1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_checksum_is_the_weighted_sum_of_the_bits(name):
    assert int(weighted_sum(jnp.asarray(ARRAYS[name]))) == by_hand(ARRAYS[name])


def test_a_checksum_does_not_depend_on_where_the_array_lies_and_finds_any_change():
    array = ARRAYS["float32"]
    mesh = jax.make_mesh((4, 2), ("a", "b"), devices=jax.devices()[:8])
    for spec in (PartitionSpec("a", "b"), PartitionSpec(("a", "b")), PartitionSpec(None, "a"), PartitionSpec()):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert checksums({"x": placed}) == {"['x']": by_hand(array)}
    changed = array.copy()
    changed.view(np.uint32)[7, 3, 2] ^= 1 << 31
    assert checksums({"x": jnp.asarray(changed)}) != {"['x']": by_hand(array)}
    exchanged = array[::-1].copy()  # which a plain sum would not notice
    assert checksums({"x": jnp.asarray(exchanged)}) != {"['x']": by_hand(array)}
    assert json.dumps(checksums({"x": array}))  # plain numbers
