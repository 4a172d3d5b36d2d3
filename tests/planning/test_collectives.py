"""Bytes that collectives send, on 8 fake devices and in HLO as a TPU's compiler writes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.planning.hlo import Module
from hybrid_jax.planning.operations import group_size
from hybrid_jax.planning.program_cost import program_cost

ROWS, COLUMNS = 16, 24
BYTES = 4 * ROWS * COLUMNS  # of one device's operand


def sent(function, mesh, spec, out_spec):
    shape = (ROWS * 8, COLUMNS)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec, check_vma=False)
    return program_cost(jax.jit(mapped).lower(x).compile().as_text(), "cpu").total.collectives


@pytest.fixture
def ring():
    return Mesh(np.array(jax.devices()[:8]), ("d",))


@pytest.fixture
def grid():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))


def test_a_sum_over_all_sends_twice_seven_eighths(ring):
    assert sent(lambda x: lax.psum(x, "d"), ring, P("d"), P()) == {"all-reduce": 2 * 7 / 8 * BYTES}


def test_a_gather_sends_its_part_to_each_of_the_others(ring):
    assert sent(lambda x: lax.all_gather(x, "d"), ring, P("d"), P()) == {"all-gather": 7 * BYTES}


def test_a_scattered_sum_sends_seven_eighths(ring):
    scatter = partial(lax.psum_scatter, axis_name="d", tiled=True)
    assert sent(scatter, ring, P("d"), P("d")) == {"reduce-scatter": 7 / 8 * BYTES}


def test_an_exchange_sends_all_but_its_own_part(ring):
    exchange = partial(lax.all_to_all, axis_name="d", split_axis=0, concat_axis=1, tiled=True)
    assert sent(exchange, ring, P("d"), P(None, "d")) == {"all-to-all": 7 / 8 * BYTES}


def test_a_permutation_sends_everything(ring):
    shift = partial(lax.ppermute, axis_name="d", perm=[(i, (i + 1) % 8) for i in range(8)])
    assert sent(shift, ring, P("d"), P("d")) == {"collective-permute": BYTES}


@pytest.mark.parametrize(("axis", "size"), [("a", 2), ("b", 4)])
def test_only_the_devices_of_a_group_count(grid, axis, size):
    total = sent(lambda x: lax.psum(x, axis), grid, P(("a", "b")), P("b" if axis == "a" else "a"))
    assert total == {"all-reduce": pytest.approx(2 * (size - 1) / size * BYTES)}


def test_collectives_in_a_loop_count_on_every_turn(ring):
    def five(x):
        return lax.fori_loop(0, 5, lambda _, x: lax.psum(x, "d") / 8, x)

    assert sent(five, ring, P("d"), P("d")) == {"all-reduce": pytest.approx(5 * 2 * 7 / 8 * BYTES)}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 4),
        ("replica_groups=[4,2]<=[8], dimensions={0}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", 4),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, d={1}",
            4,
        ),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, use_global_device_ids=true", 8),
        ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}, use_global_device_ids=true", 4),
        ("replica_groups={}, dimensions={0}", 8),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(attributes, size):
    assert group_size(attributes, 8) == size


ASYNCHRONOUS = """\
HloModule step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %p = f32[2,8]{1,0} parameter(0)
  %gather.0 = f32[8,8]{1,0} all-gather(%p), channel_id=6, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %call.0 = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%beside (q: f32[2,8], r: f32[8,8], a: f32[8,8]) -> (f32[8,8], f32[2,8], f32[8,8]) {
  %q = f32[2,8]{1,0} parameter(0)
  %r = f32[8,8]{1,0} parameter(1)
  %a = f32[8,8]{1,0} parameter(2)
  %product = f32[8,8]{1,0:S(1)} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather.1 = f32[8,8]{1,0} all-gather(%q), channel_id=6, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %results = (f32[8,8]{1,0:S(1)}, f32[2,8]{1,0}, f32[8,8]{1,0}) tuple(%product, %q, %gather.1)
}

%done (s: f32[2,8], t: f32[8,8]) -> f32[8,8] {
  %s = f32[2,8]{1,0} parameter(0)
  %t = f32[8,8]{1,0} parameter(1)
  %gather.2 = f32[8,8]{1,0} all-gather(%s), channel_id=6, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
  ROOT %call.1 = f32[8,8]{1,0} custom-call(%s, %t, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (u: f32[8,8]) -> f32[2,8] {
  %u = f32[8,8]{1,0:S(1)} parameter(0)
  %reduced = f32[8,8]{1,0} all-reduce(%u), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[2,8]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: f32[2,8], y: f32[8,8]) -> (f32[8,8], f32[2,8]) {
  %x.1 = f32[2,8]{1,0} parameter(0)
  %y.1 = f32[8,8]{1,0} parameter(1)
  %begin = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) fusion(%x.1), kind=kCustom, calls=%start
  %b.0 = f32[2,8]{1,0} get-tuple-element(%begin), index=0
  %b.1 = f32[8,8]{1,0} get-tuple-element(%begin), index=1
  %middle = (f32[8,8]{1,0:S(1)}, f32[2,8]{1,0}, f32[8,8]{1,0}) fusion(%b.0, %b.1, %y.1), kind=kOutput, calls=%beside
  %m.0 = f32[8,8]{1,0:S(1)} get-tuple-element(%middle), index=0
  %m.1 = f32[2,8]{1,0} get-tuple-element(%middle), index=1
  %m.2 = f32[8,8]{1,0} get-tuple-element(%middle), index=2
  %end = f32[8,8]{1,0} fusion(%m.1, %m.2), kind=kCustom, calls=%done
  %scattered = f32[2,8]{1,0} fusion(%m.0), kind=kCustom, calls=%all-reduce-scatter.1
  %permute = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%scattered), channel_id=8, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %moved = f32[2,8]{1,0} collective-permute-done(%permute)
  ROOT %out = (f32[8,8]{1,0}, f32[2,8]{1,0}) tuple(%end, %moved)
}
"""  # noqa: E501


def test_a_collective_in_steps_counts_once_and_a_sum_that_keeps_a_slice_is_a_scattered_one():
    counted = program_cost(ASYNCHRONOUS, "tpu").total
    assert Module.parse(ASYNCHRONOUS).num_devices == 4
    assert counted.collectives == {
        "all-gather": 3 * 2 * 8 * 4,
        "collective-permute": 2 * 8 * 4,
        "reduce-scatter": 3 / 4 * 8 * 8 * 4,
    }
    assert counted.flops == 2 * 8 * 8 * 8


def test_on_a_tpu_the_memory_on_the_chip_costs_no_bytes():
    everywhere, main = (program_cost(ASYNCHRONOUS, platform).total.bytes for platform in ("cpu", "tpu"))
    # The product is written to S(1) and read from there by the scattered sum: 8·8 floats, twice; and two flags.
    assert everywhere - main == 2 * 8 * 8 * 4 + 2 * 4


OTHER_CORE = """\
HloModule step, is_scheduled=true, num_partitions=4

%called (p: f32[2,8], after: token[]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  %after = token[] parameter(1)
  ROOT %gather = f32[8,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start = ((f32[2,8]{1,0}, token[]), f32[8,8]{1,0}) call-start(%x, %ready), async_execution_thread="sparsecore", to_apply=%called, frontend_attributes={kernel_metadata={
"note":"attributes may go on {in another line}"
}}
  ROOT %end = f32[8,8]{1,0} call-done(%start)
}
"""  # noqa: E501


def test_a_collective_on_another_core_is_counted_where_it_is_called():
    counted = program_cost(OTHER_CORE, "tpu").total
    assert counted.collectives == {"all-gather": 3 * 2 * 8 * 4}
    assert counted.bytes == 2 * 8 * 4 + 8 * 8 * 4


@pytest.mark.parametrize(
    ("kind", "target", "factor"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:15}"', 1),  # 2 · (2 − 1)/2
        ("ALL_GATHER", '"{1,2,3}x{0:3}"', 2),
        ("ALL_REDUCE", "{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}", 1),
        ("ALL_TO_ALL", "{{100000,100003,200000,200003},{100001,100002,200001,200002}}", 1 / 2),
    ],
)
def test_what_the_host_sends_to_other_slices_is_counted_apart(kind, target, factor):
    text = f"""\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[16,8,128]) -> bf16[16,8,128] {{
  %x = bf16[16,8,128]{{2,1,0}} parameter(0)
  %after = token[] after-all()
  %send = (bf16[16,8,128]{{2,1,0}}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %recv = (bf16[16,8,128]{{2,1,0}}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, \
frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %got = (bf16[16,8,128]{{2,1,0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = bf16[16,8,128]{{2,1,0}} get-tuple-element(%got), index=0
}}
"""
    counted = program_cost(text, "tpu").total
    assert counted.between_slices == factor * 2 * 16 * 8 * 128
    assert counted.collectives == {}
