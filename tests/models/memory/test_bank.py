"""A bank of slots, and the neural cache that is made of one, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.memory.bank import Bank
from hybrid_jax.models.memory.neural_cache import NeuralCacheSettings
from hybrid_jax.models.recurrent.elman import Elman

SLOTS, HARD = 6, 1e4  # a scale at which attention is a look-up
written = jax.jit(Bank.written)


def filled(pairs, *, rows=1):
    """A bank with pairs of one-hot keys and the numbers 1, 2, … as values."""
    keys = jnp.broadcast_to(jnp.eye(pairs)[None], (rows, pairs, pairs))
    values = jnp.broadcast_to(1.0 + jnp.arange(pairs)[None], (rows, pairs))
    return written(Bank.empty(rows, SLOTS, pairs), keys, values)


@pytest.mark.parametrize("pairs", [1, 5, 6, 9, 24])
def test_every_pair_is_recalled_until_it_overflows_then_exactly_slots_of_them(pairs):
    bank = filled(pairs)
    found = [float(bank.read(jnp.eye(pairs)[i : i + 1], HARD)[0]) for i in range(pairs)]
    right = [value == i + 1 for i, value in enumerate(found)]
    assert sum(right) == min(SLOTS, pairs)
    assert all(right[-SLOTS:])  # the last that were written


def test_an_empty_bank_reads_zero_and_has_no_gradient_of_nan():
    def loss(query, keys):
        return Bank.empty(1, 3, 2, (2,)).replace(keys=keys).read(query, 5.0).sum()

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(jnp.ones((1, 2)), jnp.ones((1, 3, 2)))
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


def test_weights_are_a_softmax_over_the_slots_that_hold_something_in_any_order():
    bank = filled(4)
    query = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4)), jnp.float32)
    weights = bank.weights(query, 2.0)[0]
    np.testing.assert_allclose(weights[:4], jax.nn.softmax(2.0 * query[0]), rtol=1e-6)
    assert not weights[4:].any()
    order = jnp.array([5, 2, 0, 4, 1, 3])
    shuffled = Bank(bank.keys[:, order], bank.values[:, order], bank.used[:, order], bank.clock)
    np.testing.assert_allclose(shuffled.read(query, 2.0), bank.read(query, 2.0), rtol=1e-6)


def test_where_reading_counts_the_slot_that_was_not_read_goes_first():
    bank = filled(SLOTS)
    bank = bank.touched(bank.weights(jnp.eye(SLOTS)[:1], HARD))  # the oldest is read
    bank = written(bank, jnp.zeros((1, 1, SLOTS)), jnp.full((1, 1), 99.0))
    np.testing.assert_array_equal(bank.values[0], [1, 99, 3, 4, 5, 6])
    empty = Bank.empty(1, SLOTS, SLOTS)
    np.testing.assert_array_equal(empty.touched(empty.weights(jnp.ones((1, SLOTS)), 1.0)).used, empty.used)


def test_nothing_of_one_row_reaches_another():
    bank = Bank.empty(2, SLOTS, 3)
    bank = written(bank, jnp.ones((2, 2, 3)), jnp.full((2, 2), 7.0), jnp.array([[True, True], [False, False]]))
    np.testing.assert_array_equal(bank.read(jnp.ones((2, 3)), 1.0), [7.0, 0.0])
    np.testing.assert_array_equal(bank.take(jnp.array([1, 0])).read(jnp.ones((2, 3)), 1.0), [0.0, 7.0])
    again = bank.with_rows(jnp.array([[0]]), Bank.empty(1, SLOTS, 3))
    jax.tree.map(np.testing.assert_array_equal, again, Bank.empty(2, SLOTS, 3))


# ------------------------------------------------------------------------------------------------ neural cache

V, T, SHARE, SCALE = 7, 10, 0.3, 1.7
BASE = Elman(width=5)
MODEL = NeuralCacheSettings(BASE, SHARE, SCALE, slots=4).build(V)
PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, V, (2, T)))
APPLY = jax.jit(MODEL.apply)


def test_the_mixture_is_that_of_a_plain_loop_and_sums_to_one():
    segments = np.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2], [1] * T])
    base = BASE.build(V).apply(PARAMS, TOKENS, jnp.asarray(segments))
    probabilities = np.exp(np.float64(APPLY(PARAMS, TOKENS, jnp.asarray(segments)).logits))
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-5)
    model = np.float64(jax.nn.softmax(base.logits))
    for row in range(2):
        for t in range(T):
            expected, found = model[row, t], np.zeros(V)
            for i in range(max(0, t - 4), t):  # four slots
                if segments[row, i] == segments[row, i + 1] == segments[row, t] > 0:
                    likeness = np.float64(base.hidden[row, t]) @ np.float64(base.hidden[row, i])
                    found[TOKENS[row, i + 1]] += np.exp(SCALE * likeness)
            if found.sum():
                expected = (1 - SHARE) * expected + SHARE * found / found.sum()
            if segments[row, t]:
                np.testing.assert_allclose(probabilities[row, t], expected, atol=2e-6)


def test_what_is_said_later_changes_nothing_before_it():
    before = APPLY(PARAMS, TOKENS, jnp.ones((2, T), jnp.int32)).logits
    for t in (1, 5, T - 1):
        changed = TOKENS.at[:, t].set((TOKENS[:, t] + 1) % V)
        after = APPLY(PARAMS, changed, jnp.ones((2, T), jnp.int32)).logits
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_without_a_share_it_is_the_model_itself_and_it_has_its_parameters():
    plain = BASE.build(V)
    alone = NeuralCacheSettings(BASE, 0.0).build(V)
    np.testing.assert_array_equal(alone.apply(PARAMS, TOKENS).logits, plain.apply(PARAMS, TOKENS).logits)
    jax.tree.map(np.testing.assert_array_equal, PARAMS, plain.init(jax.random.key(0)))


def test_a_model_without_states_to_remember_is_refused():
    with pytest.raises(UserError, match="a decoder or a recurrent one, got neural_cache"):
        NeuralCacheSettings(NeuralCacheSettings(BASE)).build(V)
