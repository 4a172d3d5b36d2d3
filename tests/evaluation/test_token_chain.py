"""The chain over tokens of an evaluation's answers: of what was chosen, and of nothing behind it."""

import jax
import numpy as np
import pytest

from hybrid_jax.core.batches import Example, Samples
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.evaluation.evaluate import EvaluationConfig, Evaluator
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import PrefixTable


def test_the_chain_is_that_of_the_chosen_tokens(monkeypatch):
    """Three answers "aab" with padding behind them: what follows is certain, but for the second a."""
    tokenizer = Bytes().build()
    a, b = tokenizer.encode("ab")
    tokens = np.tile(np.array([[a, a, b, 0, 0]], np.int32), (3, 1))
    mask = np.tile(np.arange(5) < 3, (3, 1))
    drawn = Samples.chosen(*jax.device_put((tokens, np.zeros(tokens.shape, np.float32), mask)))

    def numbers(**settings):
        evaluator = Evaluator(
            EvaluationConfig(num_prompts=3, **settings),
            PrefixTable(max_length=None),
            tokenizer,
            [Example(prompt, None) for prompt in "abc"],
            sampler=Ancestral(max_new_tokens=5),
            rewards={},
            seed=0,
            eos_ids=(tokenizer.eos_id,),
        )
        monkeypatch.setattr(evaluator, "_sample", lambda params, prompts, prompt_mask, key: drawn)
        return evaluator.answers({})[0]

    found = {
        name: number for name, number in numbers(token_chain=True).items() if name.startswith("token_chain/")
    }
    assert found == pytest.approx(
        {
            "token_chain/spectral_gap": 1 - 0.5**0.5,
            "token_chain/period": 1,
            "token_chain/stationary_entropy": 1.5 * np.log(2),
            "token_chain/entropy_rate": 0.5 * np.log(2),
        }
    )
    assert not any(name.startswith("token_chain/") for name in numbers())
