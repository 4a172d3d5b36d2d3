"""PPO and A2C on recurrent policies, also with a memory, reach the closed form of KL-regularised reward."""

import json

import jax
import numpy as np
import pytest

from hybrid_jax.testing import SEQUENCES, optimum, true_reward

BETA = 0.5
LSTM = {"name": "worlds:Remembering", "width": 16}
MAMBA2 = {"name": "worlds:InChunks", "width": 16, "head_width": 8, "state_width": 8, "chunk_length": 2}
DNC = {"name": "worlds:Computer", "width": 16, "num_slots": 4, "word_width": 4}
PPO = {"name": "ppo", "value_clip_range": None}


def probabilities(model, params) -> np.ndarray:
    """π(s) of the 27 responses to the prompt 0."""
    tokens = np.hstack([np.zeros((27, 1), int), SEQUENCES])
    scores = jax.jit(model.apply)(params, tokens).logits[:, :-1]
    log_probs = np.asarray(jax.nn.log_softmax(scores), np.float64)
    return np.exp(np.take_along_axis(log_probs, SEQUENCES[..., None], axis=2).sum(axis=(1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "phase", "steps"),
    [(LSTM, PPO, 250), (MAMBA2, PPO, 250), (DNC, PPO, 250), (LSTM, {"name": "a2c", "entropy_coef": 0.0}, 300)],
    ids=["ppo on an lstm", "ppo on a mamba2", "ppo on a dnc", "a2c on an lstm"],
)
def test_a_policy_with_a_state_reaches_the_optimum_and_every_first_ratio_is_one(
    built, on_policy, tmp_path, model, phase, steps
):
    optimizer = {**on_policy["optimizer"], "learning_rate": 0.01}
    rl = {**on_policy, **phase, "prompts_per_step": 256, "optimizer": optimizer}
    experiment = built({"rl": rl}, steps, model=model)
    reference = probabilities(experiment.model, experiment.init().policy)
    assert reference.sum() == pytest.approx(1.0, abs=1e-6)
    best = optimum(reference, true_reward(), BETA)
    policy = probabilities(experiment.model, experiment.train().policy)
    distances = [0.5 * np.abs(p - best).sum() for p in (reference, policy)]
    assert distances[0] > 0.5
    assert distances[1] < 0.02, distances
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    ratios = [record["rl/first_ratio"] for record in records if "rl/first_ratio" in record]
    np.testing.assert_allclose(ratios, 1.0, atol=1e-6)
