"""Counts the FLOPs of an instruction and the bytes that a collective sends."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re

from hybrid_jax.planning.hlo import Computation, Instruction, Module
from hybrid_jax.planning.traffic import COLLECTIVES

# How many products of queries and keys each kernel of splash attention computes; the compiled program does not
# say it. The gradient kernels compute the attention weights again.
_SPLASH = {"_fwd": 2, "_dkv": 4, "_dq": 3}
_SLICE = 100_000  # device d of slice s is s · 100,000 + d
_MESH_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


def flops_of(computation: Computation, instruction: Instruction) -> float | None:
    """Counts the FLOPs of matrix products, 2 for a multiply-add; None for a library call of unknown cost.

    Element-wise work counts 0: memory bounds its time.
    """
    if instruction.opcode == "dot":
        return _dot(computation, instruction, instruction.integers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "ragged-dot":
        rows, columns = instruction.shapes[0].dims[-2:]
        return 2.0 * rows * columns * computation.operands(instruction)[0].shapes[0].dims[-1]
    if instruction.opcode == "custom-call":
        return _library_call(computation, instruction)
    return 0.0


def _dot(computation: Computation, instruction: Instruction, contracted: tuple[int, ...]) -> float:
    left = computation.operands(instruction)[0].shapes[0].dims
    return 2.0 * instruction.shapes[0].elements * math.prod(left[axis] for axis in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Counts the products at positions that hold data; TPUs run batched matrix products as convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    left, kernel = (operand.shapes[0].dims for operand in computation.operands(instruction)[:2])
    result = instruction.shapes[0].dims
    left_labels, kernel_labels, result_labels = labels.groups()
    groups = int(_number(instruction, "batch_group_count") or 1)
    products = result[result_labels.index("f")] * kernel[kernel_labels.index("i")]
    products *= left[left_labels.index("b")] // groups
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(item.split("=") for item in window.group(1).split()) if window else {}
    for axis in itertools.takewhile(lambda axis: str(axis) in left_labels, itertools.count()):
        sizes = left[left_labels.index(str(axis))], result[result_labels.index(str(axis))]
        products *= _positions(*sizes, *_window(settings, axis))
    return 2.0 * products


def _window(settings: dict[str, str], axis: int) -> tuple[int, int, int, int, int]:
    """Reads size, stride, low padding, and the dilations of left side and kernel along one axis."""
    get = lambda name, default: settings[name].split("x")[axis] if name in settings else default  # noqa: E731
    numbers = (get("size", "1"), get("stride", "1"), get("pad", "0_0").split("_")[0])
    size, stride, low = map(int, numbers)
    return size, stride, low, int(get("lhs_dilate", "1")), int(get("rhs_dilate", "1"))


@functools.lru_cache(maxsize=4096)
def _positions(left: int, result: int, size: int, stride: int, low: int, dilation: int, kernel: int) -> int:
    """Counts the pairs of result and kernel positions along one axis that meet an element of the left side."""
    count = 0
    for offset in range(size):
        # result r reads r·stride + offset·kernel − low, which must be a multiple of the dilation in range
        shift = offset * kernel - low
        first = max(0, math.ceil(-shift / stride))
        last = min(result - 1, ((left - 1) * dilation - shift) // stride)
        if dilation == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((r * stride + shift) % dilation == 0 for r in range(first, last + 1))
    return count


def _library_call(computation: Computation, instruction: Instruction) -> float | None:
    target = instruction.text("custom_call_target") or ""
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if estimate:  # a Pallas kernel that says what it costs
        return float(estimate.group(1))
    if target.startswith(("__cublas$", "__onednn$matmul")):
        axes = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
        return _dot(computation, instruction, tuple(map(int, json.loads(axes.group(1))))) if axes else None
    if target.startswith("__cudnn$fmha"):
        return _attention(computation, instruction, 5 if "Backward" in target else 2, axis=1)
    for kernel, products in _SPLASH.items():
        if target == "tpu_custom_call" and "splash_m" in instruction.name and kernel in instruction.name:
            return _attention(computation, instruction, products, axis=-2)
    return None if target in ("tpu_custom_call", "__gpu$xla.gpu.triton") or "cudnn" in target else 0.0


def _attention(computation: Computation, instruction: Instruction, products: int, axis: int) -> float:
    """Estimates a fused causal attention: ``products`` of queries with half of the keys, along ``axis``.

    The kernels do not say what they skip, so the half is an assumption; a window makes it less, the blocks
    on the diagonal a little more.
    """
    arrays = [
        shape for shape in computation.operand_shapes(instruction) if len(shape.dims) >= 3 and shape.is_real
    ]
    query, key = arrays[:2]
    return products * query.elements * key.dims[axis]


def collective_kind(opcode: str) -> str | None:
    """The kind of a collective; None for other opcodes, and where an asynchronous one ends."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def bytes_sent(module: Module, computation: Computation, instruction: Instruction, kind: str) -> float:
    """Counts the bytes that each device sends, by the best algorithm on a ring of n devices:

    all-gather (n − 1) · b, reduce-scatter and all-to-all (n − 1)/n · b, all-reduce 2 (n − 1)/n · b, permute b,
    where b are the bytes of a device's operand (Thakur et al. 2005, sections 4.1-4.5).
    """
    operand = sum(shape.bytes for shape in computation.operand_shapes(instruction))
    return operand * _share_sent(kind, group_size(instruction.attributes, module.num_devices))


def bytes_between_slices(instruction: Instruction) -> float:
    """Counts the bytes that each device sends to other slices, by the formulas of `bytes_sent`.

    A TPU's compiler leaves a collective over slices to the runtime of its host, to which a ``send`` hands the
    operand; the groups are slices × devices, or lists of devices whose first digits are their slice.
    """
    kind = instruction.text("_xla_megascale_transfer_type")
    if instruction.opcode != "send" or kind is None:
        return 0.0
    target = re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', instruction.attributes)
    members = [int(number) for number in target.group(1).split(",")] if target else []
    slices = {member // _SLICE if member >= _SLICE else member for member in members}
    return instruction.shapes[0].bytes * _share_sent(kind.lower().replace("_", "-"), max(len(slices), 2))


def _share_sent(kind: str, size: int) -> float:
    """The bytes that a device sends of an operand, in a collective of so many devices."""
    factors = {"collective-permute": 1.0, "all-gather": size - 1.0, "all-reduce": 2 * (size - 1) / size}
    return factors.get(kind, (size - 1) / size)


def group_size(attributes: str, num_devices: int) -> int:
    """The number of devices that take part in a collective together."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota.group(2))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        axes = _MESH_AXIS.findall(mesh.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return num_devices


def _number(instruction: Instruction, attribute: str) -> str | None:
    found = re.search(rf"\b{attribute}=(\d+)", instruction.attributes)
    return found.group(1) if found else None
