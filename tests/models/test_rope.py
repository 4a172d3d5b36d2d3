"""Rotary positions: known turns, and scores that depend on the distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.rope import rotary_table, rotate


def _random(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_rotary_scores_depend_only_on_the_distance():
    q, k = _random((1, 1, 1, 8), (1, 1, 1, 8))

    @jax.jit
    def score(i, j):
        at = lambda p: rotary_table(jnp.array([[p]]), 8, 10_000.0)  # noqa: E731
        return jnp.sum(rotate(q, at(i)) * rotate(k, at(j)))

    assert score(7, 3) == pytest.approx(float(score(104, 100)), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotary_turns_the_first_pair_by_one_radian_a_position():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    turned = jax.jit(lambda x: rotate(x, rotary_table(jnp.array([[1]]), 4, 10_000.0)))(x)
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1.0), 0.0, np.sin(1.0), 0.0], atol=1e-6)


SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn truncate": {"factor": 8.0, "original_max_position_embeddings": 64, "truncate": False},
    "yarn mscale": {
        "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.5,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("case", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(case, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from hybrid_jax.models.families.llama import LLAMA

    kind = case.split()[0]
    rope = {"rope_type": kind, "rope_theta": 5000.0, **SCALINGS[case]}
    longest = 80 if kind == "dynamic" else 512
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1,
        max_position_embeddings=longest, rope_parameters=rope, tie_word_embeddings=False,
    )  # fmt: skip
    frequencies, amplification = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    ours = LLAMA.read_config(config.to_dict())
    positions = jnp.arange(length)[None]
    cos, sin = rotary_table(positions, 16, ours.rope_theta, ours.rope_scaling)
    angles = np.arange(length)[:, None] * frequencies.double().numpy()
    np.testing.assert_allclose(cos[0, :, 0], amplification * np.cos(angles), atol=2e-5)
    np.testing.assert_allclose(sin[0, :, 0], amplification * np.sin(angles), atol=2e-5)
    written = LLAMA.write_config(ours)  # and the way back
    assert LLAMA.read_config(written).rope_scaling == ours.rope_scaling


def test_interleaved_pairs_are_a_permutation_of_the_halves():
    x = _random((1, 3, 2, 8))[0]
    table = rotary_table(jnp.arange(3)[None], 8, 100.0)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    halves = rotate(x[..., order], table)
    np.testing.assert_allclose(rotate(x, table, interleaved=True)[..., order], halves, atol=1e-6)


def test_channels_beyond_the_rotary_ones_stay():
    x = _random((1, 3, 2, 8))[0]
    turned = rotate(x, rotary_table(jnp.arange(3)[None], 4, 100.0))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert np.abs(turned[:, 1:, :, :4] - x[:, 1:, :, :4]).max() > 0.1


def test_a_row_that_is_longer_than_the_original_changes_only_itself():
    from hybrid_jax.models.rope import Dynamic

    positions = jnp.stack([jnp.arange(12), jnp.minimum(jnp.arange(12), 5)])
    scaling = Dynamic(2.0, 8)
    both, _ = rotary_table(positions, 8, 100.0, scaling)
    short, _ = rotary_table(positions[1:], 8, 100.0)
    np.testing.assert_array_equal(both[1:], short)
    assert np.abs(both[0] - rotary_table(positions[:1], 8, 100.0)[0][0]).max() > 0.01
