"""Guidance by the exact soft value of the 27 sequences, by rewards of beginnings, by a value in a folder."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.classifier import Classifier, save_classifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.runs.samplers import overridden
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.guidance import Guidance
from hybrid_jax.testing import (
    SEQUENCES,
    PrefixTable,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)

BETA = 0.5


class SoftValue:
    """v(y) = β log E[exp(r / β) | y] of every beginning y, by enumeration; r of whole responses."""

    def __init__(self):
        reference, worth = sequence_probabilities(reference_params()), np.exp(true_reward() / BETA)
        self.tables = []
        for length in (1, 2, 3):
            number = SEQUENCES[:, :length] @ 3 ** np.arange(length)[::-1]
            mass, total = (np.bincount(number, weights=w) for w in (reference, reference * worth))
            self.tables.append(jnp.asarray(BETA * np.log(total / mass), jnp.float32))

    def score_tokens(self, tokens, attention_mask, response_mask):
        response, length = tokens[:, -3:], response_mask.sum(axis=1)
        found = jnp.zeros(len(tokens))
        for n, table in enumerate(self.tables, 1):
            number = response[:, :n] @ jnp.array([3**i for i in range(n)][::-1])
            found = jnp.where(length == n, table[number], found)
        return found


def draws(sampler, rows, seed=0, eos=(), tokenizer=None):
    prompts = jnp.zeros((rows, 1), jnp.int32)
    inputs = (PrefixTable(), reference_params(), prompts, prompts == 0, jax.random.key(seed))
    return sample(sampler, *inputs, eos_ids=eos, tokenizer=tokenizer)


def test_with_the_exact_soft_value_responses_come_from_the_optimum():
    """The distribution of each token is known, so the law is checked at every response that was drawn."""
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    samples = draws(Guidance(max_new_tokens=3, candidates=16, reward=SoftValue(), beta=BETA), 4096)
    drawn = np.asarray(samples.tokens) @ [9, 3, 1]
    assert len(np.unique(drawn)) > 20
    np.testing.assert_allclose(np.exp(samples.log_probs.sum(axis=1)), best[drawn], atol=1e-6)
    assert np.abs(np.bincount(drawn, minlength=27) / 4096 - best).sum() / 2 < 0.03
    # As in section 1 of the science notes.
    np.testing.assert_allclose(SoftValue().tables[0], [0.7504392, 0.6344080, 2.2372498], atol=1e-6)


def test_fewer_candidates_are_the_likeliest_and_share_all_probability():
    sampler = Guidance(max_new_tokens=3, candidates=2, reward=TokenCount(weights={2: 1.0}), beta=0.5)
    samples = draws(sampler, 256)
    first = np.asarray(samples.tokens[:, 0])
    assert set(np.unique(first)) == {0, 1}  # .5 and .3; token 2 is worth more and not a candidate
    expected = np.log(np.array([0.5, 0.3])[first] / 0.8)
    np.testing.assert_allclose(samples.log_probs[:, 0], expected, atol=1e-6)
    greedy = draws(replace(sampler, candidates=3, temperature=0.0), 2)
    np.testing.assert_array_equal(greedy.tokens, [[2, 2, 2]] * 2)  # .2 e² > .5
    assert not np.any(greedy.log_probs)


class Forbidding:
    """Minus infinity, or NaN, for a beginning with a token 1 in it."""

    def __init__(self, score=-np.inf):
        self.score = score

    def score_tokens(self, tokens, attention_mask, response_mask):
        response = tokens[:, -response_mask.shape[1] :]
        return jnp.where(jnp.any(response_mask & (response == 1), axis=1), self.score, 0.0)


def test_a_token_that_is_forbidden_is_never_drawn_and_none_that_is_allowed_is_one_line():
    sampler = Guidance(max_new_tokens=3, candidates=3, reward=Forbidding())
    found = np.asarray(draws(sampler, 64).tokens)
    assert set(np.unique(found)) == {0, 2}
    only_ones = {"table": jnp.tile(jnp.array([0.0, 1.0, 0.0]), (13, 1))}
    prompts = jnp.zeros((4, 1), jnp.int32)
    inputs = (PrefixTable(), only_ones, prompts, prompts == 0, jax.random.key(0))
    with pytest.raises(UserError, match=r"sampler\.reward is -inf for every answer that was tried"):
        sample(replace(sampler, candidates=1), *inputs)
    with pytest.raises(UserError, match=r"sampler\.reward must give numbers, got nan"):
        draws(replace(sampler, reward=Forbidding(np.nan)), 4)


class Digits:
    """Reads digits."""

    def decode(self, tokens, *args, **kwargs):
        return "".join(str(token) for token in tokens)


def test_a_reward_of_texts_gives_the_same_responses_on_the_host():
    def twos(prompts, responses):
        return [float(text.count("2")) for text in responses]

    sampler = Guidance(max_new_tokens=3, candidates=3, reward=TokenCount(weights={2: 1.0}), beta=0.5)
    device = draws(sampler, 32, eos=(1,))
    host = draws(replace(sampler, reward=twos), 32, eos=(1,), tokenizer=Digits())
    np.testing.assert_array_equal(device.tokens, host.tokens)
    np.testing.assert_array_equal(device.action_mask, host.action_mask)
    assert not device.action_mask.all()


@pytest.mark.slow
def test_a_value_of_a_folder_reads_beginnings_from_a_cache_of_its_own(tmp_path):
    config = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=16)
    model = config.build(7)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(1)))
    critic = Classifier(replace(model.config, init_std=0.5), labels=("value",), has_bias=True)
    weights = critic.init(jax.random.key(2))
    save_classifier(tmp_path / "value", critic, weights)
    prompts, mask = jnp.asarray([[0, 1, 2], [3, 3, 4]]), jnp.asarray([[False, True, True], [True, True, True]])
    sampler = Guidance(max_new_tokens=5, candidates=4, value=str(tmp_path / "value"), beta=0.3)
    traced = jax.jit(lambda *inputs: sample(replace(sampler), model, *inputs, eos_ids=(6,)))
    first = traced(params, prompts, mask, jax.random.key(0))
    found = sample(sampler, model, params, prompts, mask, jax.random.key(0), eos_ids=(6,))
    np.testing.assert_array_equal(first.tokens, found.tokens)
    read = jax.jit(lambda tokens, mask: critic.apply(weights, tokens, mask)[:, 0])
    logits_of = jax.jit(lambda tokens, mask: model.apply(params, tokens, mask).logits[:, -1])
    for row in range(2):
        before = prompts[row][mask[row]].tolist()
        for token, log_prob in zip(found.tokens[row], found.log_probs[row], strict=True):
            pad = lambda tokens: jnp.array([[0] * (12 - len(tokens)) + tokens])  # noqa: E731
            real = lambda n: jnp.arange(12)[None] >= 12 - n  # noqa: E731
            scores = np.asarray(logits_of(pad(before), real(len(before))))[0]
            likeliest = np.argsort(-scores)[:4].tolist()
            values = [
                float(read(pad(x), real(len(x)))[0])
                for x in (before if new == 6 else [*before, new] for new in likeliest)
            ]
            guided = scores[likeliest] + np.array(values) / 0.3
            expected = guided - np.log(np.exp(guided - guided.max()).sum()) - guided.max()
            assert log_prob == pytest.approx(expected[likeliest.index(int(token))], abs=1e-4)
            before.append(int(token))
            if token == 6:
                break


def test_a_value_of_other_tokens_is_one_line(tmp_path):
    critic = Classifier(DecoderConfig(num_layers=1, width=8, num_heads=1, max_length=8, vocab_size=5))
    save_classifier(tmp_path, critic, critic.init(jax.random.key(0)))
    with pytest.raises(
        UserError, match=r"sampler\.value must have one label and the model's 3 tokens, got 1 and 5"
    ):
        draws(Guidance(max_new_tokens=3, value=str(tmp_path)), 2)


def test_a_sampler_that_needs_settings_is_named_with_them_on_a_command_line():
    """It keeps what both have: here the longest answer."""
    start, reward = Ancestral(max_new_tokens=9, temperature=0.5), "sampler.reward={name: length, target: 5}"
    for name in ("rejection", "guidance"):
        found = overridden(start, [f"sampler.name={name}", reward, "sampler.beta=2"])
        assert (found.max_new_tokens, found.beta, found.reward.target) == (9, 2, 5)
    with pytest.raises(UserError, match="sampler: unknown sampler 'guidence'; did you mean 'guidance'"):
        overridden(start, ["sampler.name=guidence"])


def test_no_policy_learns_from_guidance():
    assert getattr(Guidance(value="a"), "policy_temperature", None) is None
    assert Ancestral().policy_temperature == 1.0
