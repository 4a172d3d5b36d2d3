"""Costs counted from compiled programs, against numbers that are counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hybrid_jax.planning.program_cost import Cost, program_cost

N, M = 32, 48
PRODUCT = 2 * N * N * N


def compiled(function, *shapes):
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return jax.jit(function).lower(*arguments).compile()


def cost(function, *shapes, loop_steps=1):
    return program_cost(compiled(function, *shapes).as_text(), "cpu", loop_steps)


def test_a_product_of_matrices_costs_two_flops_a_multiply_add_and_moves_its_three_arrays():
    counted = cost(jnp.matmul, (8, 16), (16, 4)).total
    assert counted == Cost(flops=2 * 8 * 16 * 4, bytes=4 * (8 * 16 + 16 * 4 + 8 * 4))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b @ a, [(N, N), (N, N)]),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(3, 8, 16), (3, 16, 4)]),
        (lambda a, b: jnp.einsum("bijh,bkjh->bhik", a, b), [(2, 8, 16, 3), (2, 4, 16, 3)]),
        (lambda x, w: lax.conv(x, w, (1, 1), "SAME"), [(2, 3, 9, 7), (5, 3, 3, 3)]),
        (lambda x, w: lax.conv(x, w, (2, 1), "VALID"), [(2, 3, 9, 7), (5, 3, 3, 2)]),
        (
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), ((1, 2), (0, 1)), (2, 1), (1, 2)),
            [(1, 4, 5, 6), (3, 4, 2, 2)],
        ),
    ],
    ids=["chain", "batched", "transposed", "same", "strided", "dilated"],
)
def test_without_loops_flops_are_those_of_xla(function, shapes):
    program = compiled(function, *shapes)
    assert program_cost(program.as_text(), "cpu").total.flops == program.cost_analysis()["flops"]


def test_the_body_of_a_scan_counts_once_a_turn():
    def layers(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(layers, (N, N), (7, N, N))
    assert program_cost(program.as_text(), "cpu").total.flops == 7 * PRODUCT
    assert program.cost_analysis()["flops"] < 2 * PRODUCT  # why this is not taken


def test_scans_in_scans_multiply():
    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0], None

    assert cost(lambda x, w: lax.scan(inner, x, w)[0], (N, N), (3, N, N)).total.flops == 15 * PRODUCT


def test_loops_may_count_down_and_in_steps():
    def down(x):
        return lax.while_loop(lambda s: s[0] > 3, lambda s: (s[0] - 2, jnp.tanh(s[1] @ s[1])), (20, x))[1]

    assert cost(down, (N, N)).total.flops == 9 * PRODUCT  # 20, 18, …, 4


def test_rematerialisation_reads_the_layer_again():
    def loss(policy):
        def layer(x, w):
            return jnp.tanh(jnp.tanh(x @ w) @ w), None

        return lambda x, w: lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0].sum()

    keep, again = jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable
    shapes = (N, N), (6, N, N)
    plain, remat = (cost(jax.grad(loss(policy), (0, 1)), *shapes).total.flops for policy in (keep, again))
    assert plain == 6 * (2 + 4) * PRODUCT
    assert remat == 6 * (2 + 2 + 4) * PRODUCT


def test_a_scanned_model_costs_what_it_costs_unrolled():
    def loss(unroll):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return lambda x, w: (lax.scan(layer, x, w, unroll=unroll)[0] ** 2).sum()

    x = jax.ShapeDtypeStruct((N, N), jnp.float32)
    w = {n: jax.ShapeDtypeStruct((4, *s), jnp.float32) for n, s in {"up": (N, M), "down": (M, N)}.items()}
    texts = (jax.jit(jax.grad(loss(u), (0, 1))).lower(x, w).compile().as_text() for u in (1, 4))
    scanned, unrolled = (program_cost(text, "cpu").total for text in texts)
    assert scanned.flops == unrolled.flops == 4 * 6 * 2 * N * N * M
    # Bytes differ by what is fused, but not by the number of turns: a turn reads its slice, not the stack.
    assert unrolled.bytes < scanned.bytes < 2.5 * unrolled.bytes


def test_a_loop_that_may_stop_early_is_told_apart_from_what_is_before_it():
    def decode(prompt, w):
        def unfinished(state):
            return (state[0] < 12) & (state[1].sum() > 0)

        read = jnp.tanh(prompt @ w)
        return lax.while_loop(unfinished, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (1, read[:1]))[1]

    counted = cost(decode, (64, N), (N, N))
    assert counted.once.flops == 2 * 64 * N * N
    assert counted.turns == 11
    assert [loop.body.flops for loop in counted.loops] == [2 * N * N]
    assert counted.total.flops == 2 * 64 * N * N + 11 * 2 * N * N


def test_loops_one_after_the_other_go_on_from_the_same_counter():
    def decode(x):
        state = (0, x)
        for end in (5, 9):
            go = lambda s, end=end: (s[0] < end) & (s[1].sum() > 0)  # noqa: E731
            state = lax.while_loop(go, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[1])), state)
        return state[1]

    assert sorted(loop.turns for loop in cost(decode, (N, N)).loops) == [4, 5]


def test_a_loop_without_any_bound_turns_as_often_as_the_caller_says():
    def grow(x):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ x), x)

    assert cost(grow, (N, N), loop_steps=30).total.flops == 30 * PRODUCT


def test_of_branches_the_dearest_counts():
    def choose(i, x):
        return lax.switch(i.astype(jnp.int32), [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert cost(choose, (), (N, N)).total.flops == 2 * PRODUCT


def test_a_slice_of_a_large_array_reads_the_slice_and_a_replaced_part_writes_the_part():
    large, row = (1000, 256), 4 * 256

    def read(x, i):
        return lax.dynamic_slice(x, (i.astype(jnp.int32), 0), (1, 256)) * 2.0

    assert cost(read, large, ()).total.bytes < 5 * row

    def write(x, rows):
        return lax.fori_loop(0, 10, lambda i, x: lax.dynamic_update_slice(x, rows * i, (i, 0)), x)

    assert cost(write, large, (1, 256)).total.bytes < 2 * 1000 * row + 10 * 4 * row  # one copy, ten rows
