"""The held-out score is what training calls the score, also of parts that score segments."""

import jax
import numpy as np
import pytest

from hybrid_jax.core.batches import Example, Samples
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.evaluation.evaluate import EvaluationConfig, Evaluator
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.segments import response_pieces
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import PrefixTable

ANSWERS = ["Good. Bad! So so.", "Good."]
LENGTH = 20


def words(prompts, responses):
    return [float(len(response.split()) ** 2) for response in responses]


@pytest.mark.parametrize(
    ("level", "scores"),
    [
        ("sequence", [16.0, 1.0]),
        ("sentence", [1.0 + 1 + 4, 1.0]),
        ("token", [14.0, 5.0]),
        ("potential", [0.0, 0.0]),
    ],
)
def test_held_out_segments_are_scored_as_in_training_and_shown_as_wholes(level, scores, monkeypatch):
    tokenizer = Bytes().build()
    rows = [[*tokenizer.encode(answer), tokenizer.eos_id] for answer in ANSWERS]
    tokens = np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)
    mask = np.array([[t < len(row) for t in range(LENGTH)] for row in rows])
    reward = CompositeReward({"words": Part(words, level=level)})
    evaluator = Evaluator(
        EvaluationConfig(num_prompts=2),
        PrefixTable(max_length=None),
        tokenizer,
        [Example(prompt, None) for prompt in "ab"],
        sampler=Ancestral(max_new_tokens=LENGTH),
        rewards={"ppo": reward},
        seed=0,
        eos_ids=(tokenizer.eos_id,),
    )
    drawn = Samples.chosen(*jax.device_put((tokens, np.zeros(tokens.shape, np.float32), mask)))
    monkeypatch.setattr(evaluator, "_sample", lambda params, prompts, prompt_mask, key: drawn)
    numbers, samples, by_prompt = evaluator.answers({})
    assert by_prompt["score"] == [sample["score"] for sample in samples[:2]] == scores
    assert numbers["score"] == np.mean(scores)
    assert by_prompt["reward/words"] == [16.0, 1.0]  # of whole responses, whatever the level
    pieces = response_pieces(tokenizer, [[]] * len(tokens), tokens, mask, (tokenizer.eos_id,))
    raw = reward.raw(["a", "b"], ANSWERS, {}, pieces, LENGTH)
    assert reward.weigh({}, raw, ["a", "b"])[0].plain.tolist() == scores  # what training logs
