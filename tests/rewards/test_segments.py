"""Segments of a response, found on the tokens that were sampled."""

import numpy as np
import pytest

from hybrid_jax.phases.ppo import PPO
from hybrid_jax.rewards.combine import Hierarchy, Product
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.postprocess import Running
from hybrid_jax.rewards.segments import segments, token_texts

VOCABULARY = ["Good", " food", ".", " Bad", " se", "rvice", "! ", "Dr", "<eos>", "…"]


def decode(ids):
    return "".join(VOCABULARY[i] for i in ids if i != 8)


def letters(prompts, responses):
    return [float(len(response)) for response in responses]


def pieces_of(rows, length=9):
    tokens = np.array([row + [0] * (length - len(row)) for row in rows])
    mask = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    return token_texts([decode] * len(tokens), tokens, mask)


def test_a_sentence_ends_at_the_token_that_ends_it():
    (pieces,) = pieces_of([[0, 1, 2, 3, 4, 5, 6, 8]])
    assert pieces == ["Good", " food", ".", " Bad", " se", "rvice", "! ", ""]
    assert segments(pieces, "sentence") == [(2, "Good food."), (6, "Bad service!")]
    assert segments(pieces, "sequence") == [(7, "Good food. Bad service! ")]
    assert [last for last, _ in segments(pieces, "token")] == [0, 1, 2, 3, 4, 5, 6]


def test_text_without_an_end_is_a_sentence_and_no_text_is_none():
    assert segments(["Good", " food"], "sentence") == [(1, "Good food")]
    assert segments([], "sentence") == segments(["", " "], "sentence") == segments([], "sequence") == []


def test_two_sentences_within_one_token_are_one_segment():
    assert segments(["Hi. Ho", "."], "sentence") == [(0, "Hi."), (1, "Ho.")]
    assert segments(["Hi. Ho. ", "He."], "sentence") == [(0, "Hi. Ho."), (1, "He.")]


def test_a_letter_of_several_tokens_belongs_to_the_last_of_them():
    letter = "é".encode()

    def decode_bytes(ids):
        return bytes(ids).decode("utf-8", "replace")

    tokens = np.array([[*letter, ord("a")]])
    assert token_texts([decode_bytes], tokens, np.ones((1, 3), bool)) == [["", "é", "a"]]
    assert token_texts([decode_bytes], tokens[:, :1], np.ones((1, 1), bool)) == [["\ufffd"]]


def test_the_pieces_together_are_the_text_of_the_response():
    rng = np.random.default_rng(0)
    rows = [list(rng.integers(0, 10, 9)) for _ in range(20)]
    for row, pieces in zip(rows, pieces_of(rows), strict=True):
        assert "".join(pieces) == decode(row)
        assert len(pieces) == 9


def composite(**combine):
    parts = {
        "whole": Part(letters, weight=0.1),
        "sentences": Part(letters, weight=2.0, level="sentence"),
        "tokens": Part(letters, weight=-1.0, level="token", clip=(0.0, 4.0)),
    }
    return CompositeReward(parts, **combine)


ROWS = [[0, 1, 2, 3, 4, 5, 6, 8], [0], [8]]
TEXTS = ["Good food. Bad service! ", "Good", ""]


def test_what_is_placed_and_what_is_not_add_up_to_the_total():
    reward = composite()
    raw = reward.raw([""] * 3, TEXTS, {}, pieces_of(ROWS), 9)
    scores, _ = reward.weigh(reward.init(), raw, [""] * 3)
    # sentences of 10 and 12 letters on tokens 2 and 6; tokens of 4 5 1 4 3 5 2 letters, at most 4 of each
    expected = np.array([-4.0, -4, 20 - 1, -4, -3, -4, 24 - 2, 0, 0])
    assert scores.placed[0].tolist() == expected.tolist()
    assert scores.placed[1].tolist() == [8.0 - 4.0] + [0.0] * 8
    assert scores.placed[2].tolist() == [0.0] * 9
    assert scores.totals == pytest.approx([expected.sum() + 2.4, 4.4, 0.0])
    assert scores.metrics["sentences_mean"] == pytest.approx((10 + 12 + 4) / 3)  # of a segment


def test_a_closed_gate_closes_what_is_placed_too():
    reward = composite(combine=Hierarchy(holistic="whole", threshold=10.0))
    raw = reward.raw([""] * 3, TEXTS, {}, pieces_of(ROWS), 9)
    scores, _ = reward.weigh(reward.init(), raw, [""] * 3)
    assert np.abs(scores.placed[0]).sum() > 0
    assert np.abs(scores.placed[1]).sum() == 0
    assert scores.totals[1:] == pytest.approx([0.4, 0.0])


def test_segments_are_normalised_among_all_segments():
    reward = CompositeReward({"sentences": Part(letters, level="sentence", normalise=Running())})
    raw = reward.raw([""] * 3, TEXTS, {}, pieces_of(ROWS), 9)
    scores, state = reward.weigh(reward.init(), raw, [""] * 3)
    values = np.array([10.0, 12.0, 4.0])
    normal = (values - values.mean()) / values.std()
    assert scores.placed[0, [2, 6]] == pytest.approx(normal[:2], abs=1e-6)
    assert scores.placed[1, 0] == pytest.approx(normal[2], abs=1e-6)
    assert state["sentences"]["count"] == 3


def test_a_product_cannot_be_placed():
    with pytest.raises(ValueError, match=r"combine must be a sum of parts, for sentences has a level"):
        composite(combine=Product())


def test_a_potential_gives_differences_that_add_up_to_nothing():
    reward = CompositeReward({"so far": Part(letters, weight=0.5, level="potential")})
    raw = reward.raw([""] * 3, TEXTS, {}, pieces_of(ROWS), 9)
    scores, _ = reward.weigh(reward.init(), raw, [""] * 3)
    # "Good food." has 10 letters at token 2, with " Bad service! " 24 at token 6; the end at 7 gives all back
    assert scores.placed[0].tolist() == [0, 0, 5, 0, 0, 0, 7, -12, 0]
    assert scores.placed[1].tolist() == [0] * 9  # what ends with the response has no time to count
    assert scores.totals.tolist() == [0, 0, 0]
    before = np.array([[0, 0, 0, 5, 5, 5, 5, 12, 0]], np.float32)  # Φ of the state before each token
    after = np.append(before[0, 1:8], [0.0, 0.0])  # Φ of the end is 0, and padding has none
    assert (after - before[0]).tolist() == scores.placed[0].tolist()  # Ng et al. 1999, eq. 2, at γ = 1
    with pytest.raises(ValueError, match="level potential takes a weight alone"):
        Part(letters, level="potential", clip=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"discount must be 1 for a reward with level: potential, got 0.9"):
        PPO(reward=reward, discount=0.9)


def test_a_segment_ends_in_the_column_of_its_token_where_the_policy_was_told_others_between():
    tokens, mask = np.array([[0, 1, 7, 7, 2, 3, 7]]), np.array([[1, 1, 0, 0, 1, 1, 0]], bool)
    words = ["Good", " food", ".", " Bad", "", "", "", "told"]
    (pieces,) = token_texts([lambda ids: "".join(words[i] for i in ids)], tokens, mask)
    assert pieces == ["Good", " food", "", "", ".", " Bad"]
    assert segments(pieces, "sentence") == [(4, "Good food."), (5, "Bad")]
    assert segments(pieces, "sequence") == [(5, "Good food. Bad")]
