"""Conversations on the device: what was sampled is what is kept, whatever the pace of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.scoring import response_log_probs
from tests.dialogue.talkers import Counting, converser, model_and_params, openings


@pytest.fixture(scope="module")
def talker():
    return model_and_params()


def arrays(talks, opening=40, length=600):
    """Tokens, and which are real, of each conversation, padded as in a rollout."""
    tokens = np.zeros((len(talks), opening + length), np.int32)
    read = np.zeros(tokens.shape, bool)
    for row, talk in enumerate(talks):
        whole = [*talk.tokens, *talk.said]
        start = opening - len(talk.tokens)
        tokens[row, start : start + len(whole)], read[row, start : start + len(whole)] = whole, True
    return tokens, read


def same(a, b):
    return all(
        x.said.tolist() == y.said.tolist()
        and x.log_probs.tolist() == y.log_probs.tolist()
        and [(t.start, t.end, t.text, t.reward) for t in x.turns]
        == [(t.start, t.end, t.text, t.reward) for t in y.turns]
        for x, y in zip(a, b, strict=True)
    )


def test_log_probs_over_ten_turns_are_those_of_one_reading_of_the_whole(talker):
    model, params, tokenizer = talker
    talks = converser(model, tokenizer, Counting(turns=10)).converse(params, jax.random.key(1), openings(5))
    assert [len(talk.turns) for talk in talks.conversations] == [10] * 5
    tokens, read = arrays(talks.conversations)
    expected = response_log_probs(model, params, jnp.asarray(tokens), jnp.asarray(read), 600, 1.0)
    for row, talk in enumerate(talks.conversations):
        own = np.flatnonzero(talk.chosen)
        np.testing.assert_allclose(talk.log_probs[own], expected[row, own], atol=1e-4)
        assert not talk.log_probs[~talk.chosen].any()


def test_a_conversation_is_the_same_bits_however_long_it_and_the_others_take(talker):
    model, params, tokenizer = talker
    quick, slow = (
        converser(model, tokenizer, Counting(turns=0, seconds=seconds), slots=4).converse(
            params, jax.random.key(1), openings(13)
        )
        for seconds in (0.0, 0.02)
    )
    assert same(quick.conversations, slow.conversations)
    assert len({len(talk.turns) for talk in quick.conversations}) > 1
