"""Addressing of NTM and DNC against numbers by hand, plain loops and the invariants of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.memory import dnc_addressing as dnc
from hybrid_jax.models.memory import ntm_addressing as ntm
from hybrid_jax.models.memory.content import content_weights, read, write

RNG = np.random.default_rng(0)


def weights(*shape):
    """Random weights that sum to less than 1."""
    drawn = RNG.random(shape)
    return jnp.asarray(drawn / drawn.sum(-1, keepdims=True) * RNG.random((*shape[:-1], 1)), jnp.float32)


# ------------------------------------------------------------------------------------------------ NTM


def test_the_stages_of_the_ntm_are_those_of_a_calculation_by_hand():
    memory = jnp.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    content = content_weights(memory, jnp.array([[1, 0.2, 0]]), jnp.array([5.0]))[0]
    np.testing.assert_allclose(content, [0.665305, 0.01317, 0.00494, 0.316586], atol=1e-5)
    before = jnp.array([0.0, 1, 0, 0])
    gated = ntm.interpolated(content, before, jnp.array(0.8))
    moved = ntm.shifted(gated, jnp.array([0.1, 0.2, 0.7]))  # mostly to the next slot
    np.testing.assert_allclose(moved, [0.30479, 0.415073, 0.173492, 0.106644], atol=1e-5)
    final = ntm.sharpened(moved, jnp.array(2.0))
    np.testing.assert_allclose(final, [0.302936, 0.561822, 0.098154, 0.037087], atol=1e-5)
    written = write(memory, final[None], jnp.array([[1, 0.5, 0]]), jnp.array([[0, 0.3, 0.9]]))
    np.testing.assert_allclose(written[0], [0.697064, 0.090881, 0.272643], atol=1e-5)


def test_a_shift_by_one_moves_the_focus_to_the_next_slot_and_around():
    focus = jnp.eye(5)[jnp.array([1, 4])]
    np.testing.assert_array_equal(ntm.shifted(focus, jnp.eye(3)[jnp.array([2, 2])]), np.eye(5)[[2, 0]])
    np.testing.assert_array_equal(ntm.shifted(focus, jnp.eye(3)[jnp.array([0, 0])]), np.eye(5)[[0, 3]])
    np.testing.assert_array_equal(ntm.shifted(focus, jnp.eye(5)[jnp.array([4, 4])]), np.eye(5)[[3, 1]])


def test_sharpening_is_exact_where_powers_would_underflow_and_at_zeros():
    flat = jnp.full(128, 1 / 128)
    np.testing.assert_allclose(ntm.sharpened(flat, jnp.array(50.0)), flat, rtol=1e-5)  # (1/128)^50 is 0
    focus = jnp.eye(4)[1]
    value, grad = jax.value_and_grad(lambda w: ntm.sharpened(w, jnp.array(3.0))[1])(focus)
    assert value == 1.0
    assert np.isfinite(grad).all()


def test_two_heads_erase_before_either_adds():
    memory, w = RNG.random((4, 3)), weights(2, 4)
    erase, add = RNG.random((2, 3)), RNG.random((2, 3))
    expected = memory.copy()
    for i in range(4):
        for k in range(3):
            expected[i, k] *= (1 - w[0, i] * erase[0, k]) * (1 - w[1, i] * erase[1, k])
            expected[i, k] += w[0, i] * add[0, k] + w[1, i] * add[1, k]
    np.testing.assert_allclose(write(jnp.asarray(memory, jnp.float32), w, erase, add), expected, atol=1e-6)
    np.testing.assert_allclose(read(memory, w), np.asarray(w) @ memory, atol=1e-6)


def test_an_empty_memory_is_addressed_evenly_and_with_a_gradient():
    def loss(memory, key):
        return content_weights(memory, key, jnp.array([9.0]))[0, 0]

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(jnp.zeros((4, 3)), jnp.zeros((1, 3)))
    assert value == pytest.approx(0.25)
    assert all(np.isfinite(grad).all() for grad in grads)


# ------------------------------------------------------------------------------------------------ DNC


def test_the_least_used_slot_is_allocated_first():
    np.testing.assert_allclose(dnc.allocation(jnp.array([0.9, 0.1, 0.5])), [0.005, 0.9, 0.05], atol=1e-6)
    np.testing.assert_array_equal(dnc.allocation(jnp.zeros(3)), [1, 0, 0])
    np.testing.assert_array_equal(dnc.allocation(jnp.ones(3)), [0, 0, 0])
    usage = jnp.asarray(RNG.random((6, 20)), jnp.float32)
    given = dnc.allocation(usage)
    np.testing.assert_array_equal(given.argmax(-1), usage.argmin(-1))
    np.testing.assert_allclose(given.sum(-1), 1 - np.prod(usage, -1), atol=1e-6)


def test_the_gradient_of_an_allocation_is_that_of_differences():
    usage = np.linspace(0.1, 0.9, 5)[[3, 0, 4, 1, 2]]  # apart, so that no difference changes the order
    of = RNG.normal(size=5)

    def loss(u):
        return float((np.float64(dnc.allocation(jnp.asarray(u, jnp.float32))) * of).sum())

    grad = jax.grad(lambda u: jnp.sum(dnc.allocation(u) * of))(jnp.asarray(usage, jnp.float32))
    differences = [(loss(usage + step) - loss(usage - step)) / 2e-2 for step in 1e-2 * np.eye(5)]
    np.testing.assert_allclose(grad, differences, atol=1e-3)  # exact: each factor is linear


def test_a_full_write_makes_a_slot_used_and_a_full_free_unused():
    usage, one = jnp.full(4, 0.3), jnp.eye(4)[2]
    written = dnc.usage_after(usage, one, jnp.zeros((2, 4)), jnp.ones(2))
    np.testing.assert_allclose(written, [0.3, 0.3, 1.0, 0.3], rtol=1e-6)
    reads = jnp.eye(4)[jnp.array([2, 0])]
    freed = dnc.usage_after(written, jnp.zeros(4), reads, jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(freed, [0.15, 0.3, 0.0, 0.3], rtol=1e-6)


def test_links_follow_a_plain_loop_and_keep_their_bounds():
    m = 6
    link, precedence = np.zeros((m, m)), np.zeros(m)
    ours, our_precedence = jnp.zeros((m, m)), jnp.zeros(m)
    after = jax.jit(lambda link, p, w: (dnc.link_after(link, p, w), dnc.precedence_after(p, w)))
    for _ in range(12):
        w = np.asarray(weights(m))
        for i in range(m):
            for j in range(m):
                link[i, j] = 0 if i == j else (1 - w[i] - w[j]) * link[i, j] + w[i] * precedence[j]
        precedence = (1 - np.sum(w)) * precedence + w
        ours, our_precedence = after(ours, our_precedence, w)
        np.testing.assert_allclose(ours, link, atol=1e-6)
        np.testing.assert_allclose(our_precedence, precedence, atol=1e-6)
        assert (ours >= 0).all()
        assert (ours <= 1).all()
        assert not np.diag(ours).any()
        assert (ours.sum(0) <= 1 + 1e-6).all()
        assert (ours.sum(1) <= 1 + 1e-6).all()
    np.testing.assert_array_equal(dnc.precedence_after(our_precedence, jnp.zeros(m)), our_precedence)


def test_reading_on_and_back_follows_the_order_of_writing():
    one = jnp.eye(4)
    link, precedence = jnp.zeros((4, 4)), jnp.zeros(4)
    for slot in (0, 1):
        link, precedence = (
            dnc.link_after(link, precedence, one[slot]),
            dnc.precedence_after(precedence, one[slot]),
        )
    assert link[1, 0] == 1
    assert link.sum() == 1
    at = one[jnp.array([0, 1, 0])]  # of three heads
    modes = jnp.eye(3)[jnp.array([2, 0, 1])]  # forward, backward, by content
    then = dnc.read_weights(link, at, one[jnp.array([3, 3, 3])], modes)
    np.testing.assert_array_equal(then, one[jnp.array([1, 0, 3])])


def test_writing_mixes_content_and_allocation():
    content, free = jnp.array([0.5, 0.5, 0]), jnp.array([0.0, 0, 1])
    mixed = dnc.write_weights(content, free, jnp.array(0.25), jnp.array(0.8))
    np.testing.assert_allclose(mixed, [0.3, 0.3, 0.2], rtol=1e-6)
