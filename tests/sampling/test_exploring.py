"""A policy mixed with a Markov chain: its law, its log-probs, and that what is learned accounts for it."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.folders.ours import save_ours
from hybrid_jax.models.markov.counts import count_tokens
from hybrid_jax.phases.rloo import RLOO
from hybrid_jax.sampling.base import alone, sample
from hybrid_jax.sampling.exploring import Exploring
from hybrid_jax.testing import PrefixTable, reference_params

ROWS = 4000


def law(sampler: Exploring, chain=None) -> np.ndarray:
    """b of the 27 responses to the prompt 0, by the definition, token by token."""
    table = np.asarray(reference_params()["table"], float) / sampler.temperature
    policy = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    found = np.zeros((3, 3, 3))
    for tokens in np.ndindex(3, 3, 3):
        p, place, before = 1.0, 0, 0
        for token in tokens:
            other = 1 / 3 if chain is None else chain[before, token]
            m = sampler.repeat * (token == before) + (1 - sampler.repeat) * other
            p *= (1 - sampler.share) * policy[place, token] + sampler.share * m
            place, before = min(3 * place + 1 + token, 12), token
        found[tokens] = p
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A folder of bigrams of three tokens, and the bigrams."""
    folder = tmp_path_factory.mktemp("chain")
    texts = [np.array([0, 1, 1, 2, 0, 1, 2, 2, 2, 1, 0, 0])]
    model, params = count_tokens(texts, 1, 3, "witten_bell")
    save_ours(folder, model, params)
    scores = model.apply(params, jnp.arange(3)[:, None]).logits[:, 0]
    return folder, np.exp(np.asarray(scores, float))


@pytest.mark.parametrize(
    "settings", [{"share": 0.4, "repeat": 0.5, "temperature": 0.7}, {"share": 0.3}, "counted"]
)
def test_responses_have_the_law_of_the_mixture_and_their_log_probs_are_its_own(settings, counted):
    folder, chain = counted
    given = {"share": 0.5, "repeat": 0.2, "path": folder} if settings == "counted" else settings
    sampler = Exploring(max_new_tokens=3, **given)
    expected = law(sampler, chain if settings == "counted" else None)
    assert expected.sum() == pytest.approx(1)
    prompts = jnp.zeros((ROWS, 1), jnp.int32)
    inputs = (PrefixTable(), reference_params(), prompts, prompts == 0, jax.random.key(0))
    samples = sample(sampler, *inputs)
    assert samples.log_probs is not None
    told = np.exp(np.asarray(samples.log_probs, float).sum(axis=1))
    np.testing.assert_allclose(told, expected[tuple(np.asarray(samples.tokens).T)], rtol=1e-5)
    drawn = np.zeros((3, 3, 3))
    np.add.at(drawn, tuple(np.asarray(samples.tokens).T), 1)
    error = np.abs(drawn / ROWS - expected) / np.sqrt(expected * (1 - expected) / ROWS)
    assert error.max() < 4.5


def test_learning_needs_a_weight_by_ratios_and_evaluation_asks_the_policy_alone():
    reward = {"parts": {"length": {"reward": {"name": "length", "target": 3}}}}
    settings: dict[str, Any] = {"reward": reward, "sampler": {"name": "exploring", "max_new_tokens": 4}}
    with pytest.raises(UserError, match="correction must be given, or advantage be vtrace, with a sampler"):
        parse(RLOO, settings)
    made = parse(RLOO, {**settings, "correction": {"kind": "sequence_mask", "cap": 10}})
    assert alone(made.sampler).policy_temperature == 1
    assert not hasattr(alone(made.sampler), "share")


def test_a_folder_of_another_vocabulary_or_without_an_order_is_one_line(counted, tmp_path):
    model: Any = SimpleNamespace(vocab_size=5, max_length=None)
    prompts = jnp.zeros((1, 1), jnp.int32)
    inputs = ({}, prompts, prompts == 0, jax.random.key(0))
    with pytest.raises(UserError, match=r"sampler.path .* must hold a model of the policy's 5 tokens, got 3"):
        Exploring(path=counted[0])(model, *inputs)
    decoder = Decoder(DecoderConfig(num_layers=1, width=8, num_heads=1, vocab_size=5, max_length=8))
    save_ours(tmp_path / "decoder", decoder, decoder.init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"must hold a model that sees k tokens, .* got a Decoder"):
        Exploring(path=tmp_path / "decoder")(model, *inputs)
