"""Where the devices of a mesh are: within a TPU slice, and over several."""

from dataclasses import dataclass
from itertools import product

import jax
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.mesh import MeshConfig, arrange, split_over_slices
from hybrid_jax.planning.search import meshes

# device_kind and, for so many chips, the chips along each axis
V4, V5E, V5P, V6E, TPU7X = "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"
SQUARES = {16: (4, 4, 1), 64: (8, 8, 1), 256: (16, 16, 1)}
CUBES = {16: (2, 2, 4), 64: (4, 4, 4), 256: (4, 8, 8)}
SLICES = {V4: CUBES, V5E: SQUARES, V5P: CUBES, V6E: SQUARES, TPU7X: CUBES}


@dataclass(frozen=True)
class Chip:
    """What JAX reads of a device to arrange it."""

    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int
    slice_index: int
    id: int
    platform: str = "tpu"
    process_index: int = 0


def chips(kind: str, shape: tuple[int, int, int], slices: int = 1) -> list[Chip]:
    places = [
        ((x, y, z), core)
        for z, y, x in product(*map(range, reversed(shape)))
        for core in range(2 if kind == TPU7X else 1)
    ]
    return [
        Chip(kind, coords, core, number, number * len(places) + i)
        for number in range(slices)
        for i, (coords, core) in enumerate(places)
    ]


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("kind", SLICES)
def test_every_mesh_of_the_search_has_every_device_once(kind, slices):
    built = 0
    for shape in SLICES[kind].values():
        devices = chips(kind, shape, slices)
        for mesh in meshes(len(devices)):
            arranged = arrange(tuple(mesh.values()), devices, "mesh")
            assert arranged.shape == tuple(mesh.values())
            assert sorted(device.id for device in arranged.flat) == list(range(len(devices)))
            built += 1
    assert built == {(1, 1): 66, (1, 2): 78, (2, 1): 78, (2, 2): 90}[1 + (kind == TPU7X), slices]


@pytest.mark.parametrize(
    ("shape", "slices", "between"),
    [
        ((4, 8, 1), 2, (2, 1, 1)),  # data goes first
        ((1, 32, 1), 2, (1, 2, 1)),
        ((2, 4, 4), 4, (2, 2, 1)),  # what data cannot take goes to fsdp
        ((1, 1, 8), 2, (1, 1, 2)),
        ((4, 9, 1), 6, (2, 3, 1)),
    ],
)
def test_data_goes_over_the_slices_first(shape, slices, between):
    assert split_over_slices(shape, slices) == between


def test_the_parts_of_an_axis_that_spans_slices_are_slice_after_slice():
    arranged = arrange((4, 4, 2), chips(V5E, (4, 4, 1), slices=2), "mesh")
    slices = np.vectorize(lambda device: device.slice_index)(arranged)
    np.testing.assert_array_equal(slices, np.broadcast_to(np.array([0, 0, 1, 1])[:, None, None], (4, 4, 2)))
    # Neighbours in the mesh's last axis are neighbours on the chips' network.
    ends = np.array([[device.coords for device in pair] for pair in arranged.reshape(-1, 2)])
    np.testing.assert_array_equal(np.abs(ends[:, 0] - ends[:, 1]).sum(-1), 1)


def test_hosts_of_gpus_are_slices_too():
    gpus = [Chip("NVIDIA H100", (0, 0, 0), 0, i // 8, i, platform="gpu") for i in range(16)]
    arranged = arrange((2, 4, 2), gpus, "mesh")
    assert [device.id for device in arranged.flat] == list(range(16))


def test_chips_that_form_no_block_and_slices_with_unequal_parts_are_one_clear_line():
    with pytest.raises(
        UserError, match=r"^mesh 1 × 3 × 1 takes 3 devices of a TPU slice, which form no block; use"
    ):
        MeshConfig(fsdp=3).placement(chips(V5E, (2, 2, 1)))
    with pytest.raises(
        UserError,
        match=r"^mesh 3 × 8 × 1 must use equally many devices of each of the 2 slices, got 8 and 16; make ",
    ):
        MeshConfig(data=3, fsdp=8).placement(chips(V5E, (4, 4, 1), slices=2))


def test_devices_without_a_slice_keep_their_order():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).placement().mesh
    assert list(mesh.devices.flat) == jax.devices()[:8]
