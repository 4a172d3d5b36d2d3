import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.rewards.postprocess import clip_scores, has_eos, penalise_missing_eos

EOS, OTHER_EOS, PAD = 9, 8, 9  # padding is the end-of-sequence token, as in GPT-2
TOKENS = np.array([[1, EOS, PAD], [1, 2, 3], [1, 2, OTHER_EOS], [1, 2, PAD]])
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_an_eos_in_the_padding_is_none(library):
    assert has_eos(library(TOKENS), library(MASK), (EOS, OTHER_EOS)).tolist() == [True, False, True, False]
    assert has_eos(library(TOKENS), library(MASK), (EOS,)).tolist() == [True, False, False, False]
    assert has_eos(library(TOKENS), library(MASK), ()).tolist() == [False] * 4


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_missing_eos_costs_the_penalty(library):
    scores, ended = library(np.float32([0.7, 0.7, -1.0])), library(np.array([True, False, False]))
    punished = penalise_missing_eos(scores, ended, 1.5)
    assert punished.dtype == np.float32
    assert np.asarray(punished).tolist() == [np.float32(0.7), np.float32(0.7) - np.float32(1.5), -2.5]
    assert penalise_missing_eos(scores, ended, None) is scores


@pytest.mark.parametrize("library", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_scores_are_limited_to_their_range(library):
    scores = library(np.float32([-9.0, 0.7, 9.0]))
    clipped = clip_scores(scores, (-1.0, 2.0))
    assert clipped.dtype == np.float32
    assert np.asarray(clipped).tolist() == [-1.0, np.float32(0.7), 2.0]
    assert clip_scores(scores, None) is scores


def test_postprocessing_runs_inside_jit():
    def process(scores, tokens, mask):
        return clip_scores(penalise_missing_eos(scores, has_eos(tokens, mask, (EOS,)), 1.0), (-1.0, 1.0))

    scores = jax.jit(process)(jnp.float32([3.0, 1.5, 0.25, -0.5]), TOKENS, MASK)
    assert scores.tolist() == [1.0, 0.5, -0.75, -1.0]
