"""Rules for one token against the processors of `transformers` and hand numbers, alone and in a response."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.base import RowCache
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.sampling import logits as logits_module
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.logits import response_keys, sampling_logits
from hybrid_jax.sampling.rules import History, TokenRules
from hybrid_jax.sampling.turns import TurnEngine

VOCAB, P, R = 29, 6, 9
EVERYTHING = {
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.03,
    "typical_p": 0.9,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.3,
}


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """What is traced is for this platform; a function that was traced before must not be jitted again."""
    monkeypatch.setattr(logits_module, "target_platform", lambda: request.param)


def theirs(logits, read, said, **settings):
    """Probabilities by the processors of `transformers`, in their order; the penalties of OpenAI by hand."""
    import torch
    from transformers.generation import logits_process as hf

    makers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }
    scores, ids = torch.tensor(np.array(logits))[None], torch.tensor([[*read, *said]])
    if "repetition_penalty" in settings:
        scores = hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(ids, scores)
    for token in set(said):
        scores[0, token] -= settings.get("frequency_penalty", 0.0) * said.count(token)
        scores[0, token] -= settings.get("presence_penalty", 0.0)
    for name, maker in makers.items():
        if name in settings:
            scores = maker(settings[name])(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING,
        {"typical_p": 0.2},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"min_p": 0.05},
                {"typical_p": 0.9, "temperature": 1.5},
                {"repetition_penalty": 1.5},
                {"repetition_penalty": 0.7},
                {"top_k": 9, "min_p": 0.2},
                {"top_p": 0.7, "typical_p": 0.6},
            )
        ),
    ],
    ids=str,
)
def test_a_distribution_is_that_of_transformers(platform, settings):
    random = np.random.default_rng(0)
    rules = TokenRules(**settings)
    reads, says = random.integers(0, VOCAB, (2, 4, 5)).tolist()
    logits = random.normal(0, 2, (4, VOCAB)).astype(np.float32)
    history = rules.read(rules.empty(4, VOCAB), jnp.array(reads), jnp.ones((4, 5), bool))
    for t in range(5):  # as if these had been drawn
        certain = jnp.where(jax.nn.one_hot(jnp.array(says)[:, t], VOCAB) > 0, 1e9, -1e9)
        _, _, history = rules.draw(certain, jnp.zeros((4, 2)), history, jnp.ones(4, bool))
    cut = {n: settings[n] for n in ("temperature", "top_k", "top_p", "min_p", "typical_p") if n in settings}
    ours = jax.nn.softmax(sampling_logits(rules.penalised(jnp.asarray(logits), history), **cut))
    for row in range(4):
        expected = theirs(logits[row], reads[row], says[row], **settings)
        np.testing.assert_allclose(ours[row], expected, atol=1e-6)
    assert np.any(ours == 0) == bool(cut.keys() - {"temperature"})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_p": 0.3}, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),  # .15 ≥ .3 · .5
        ({"min_p": 0.31}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        # The entropy is 1.2694; −log p .6931 1.3863 1.8971 2.6593 3.5066 is .58 .12 .63 1.39 2.24 away from it.
        ({"typical_p": 0.2}, [0, 1, 0, 0, 0]),
        ({"typical_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"typical_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        ({"typical_p": 1.0}, [0.5, 0.25, 0.15, 0.07, 0.03]),
    ],
)
def test_min_p_and_typical_keep_what_a_hand_finds(platform, settings, expected):
    p = jnp.array([0.5, 0.25, 0.15, 0.07, 0.03])
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        found = jax.nn.softmax(sampling_logits(jnp.log(p[jnp.array(order)]), **settings))
        np.testing.assert_allclose(found, np.array(expected)[order], atol=1e-6)


def test_typical_keeps_all_that_are_as_near(platform):
    np.testing.assert_allclose(sampling_logits(jnp.zeros((2, 4)), typical_p=0.3), 0.0)


def test_penalties_by_hand():
    """The counts are of the response; the repetition penalty also reads the prompt."""
    rules = TokenRules(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    history = History(jnp.array([[True, True, False, True]]), jnp.array([[0, 2, 0, 1]]))
    found = rules.penalised(jnp.array([[1.0, -1.0, 3.0, 4.0]]), history)
    np.testing.assert_allclose(found, [[0.5, -2.0 - 1.25, 3.0, 2.0 - 0.75]])


class Bigrams:
    """Scores that depend on the last token: a row of a table for each."""

    vocab_size, width, max_length = VOCAB, 1, None

    def cast(self, params):
        return params

    def init_cache(self, batch, length):
        return RowCache(jnp.zeros(batch, jnp.int32))

    def extend(self, params, tokens, mask, cache):
        last = jnp.where(mask[:, -1], tokens[:, -1], cache.state)  # left-padded: only a row that reads none
        return params[last], RowCache(last)

    prefill = extend

    def step(self, params, token, cache):
        return params[token], RowCache(token)


TABLE = np.random.default_rng(2).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    mask = np.arange(P)[None] >= np.arange(5)[:, None] % P
    prompts = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (5, P)))
    return Bigrams(), jnp.asarray(TABLE), prompts, jnp.asarray(mask), jax.random.key(0)


@pytest.fixture(scope="module")
def samples(inputs):
    return Ancestral(R, **EVERYTHING)(*inputs, eos_ids=(3,))


def test_the_log_probs_of_a_response_are_those_of_transformers_rules(inputs, samples):
    _, _, prompts, mask, _ = inputs
    for row in range(5):
        read = prompts[row][mask[row]].tolist()
        said = samples.tokens[row][samples.action_mask[row]].tolist()
        for t, token in enumerate(said):
            expected = theirs(TABLE[[*read, *said][len(read) + t - 1]], read, said[:t], **EVERYTHING)
            assert samples.log_probs[row, t] == pytest.approx(np.log(expected[token]), abs=1e-5)
    assert samples.action_mask.sum() > 30


def test_rows_that_take_one_prompt_after_the_other_forget_the_last(inputs, samples):
    few = Ancestral(R, **EVERYTHING, slots=2)(*inputs, eos_ids=(3,))
    np.testing.assert_array_equal(few.tokens, samples.tokens)
    np.testing.assert_allclose(few.log_probs, samples.log_probs, atol=1e-6)


@pytest.mark.slow
def test_in_a_conversation_an_answer_is_that_to_a_prompt_of_all_that_was_said():
    """So its counts begin anew, and the repetition penalty reads all turns."""
    model, params = Bigrams(), jnp.asarray(TABLE)
    rules = TokenRules(temperature=0, repetition_penalty=1.5, frequency_penalty=0.9)
    engine, rows = TurnEngine(model, (), 4, 20, rules), jnp.arange(2)
    prompts, replies = jnp.array([[0, 5, 6], [7, 8, 9]]), jnp.array([[1, 2], [0, 4]])
    mask, read = jnp.array([[False, True, True], [True] * 3]), jnp.array([[True, True], [False, True]])

    @jax.jit
    def talk(key):
        state = engine.admit(params, engine.init(2, 3), rows, prompts, mask, response_keys(key, rows))
        state = engine.decode(params, state, jnp.int32(3))
        state = engine.read(params, state, rows, replies, read, jnp.ones(2, bool))
        return engine.harvest(engine.decode(params, state, jnp.int32(3)))

    found = talk(jax.random.key(0))
    greedy = Ancestral(4, 0.0, repetition_penalty=1.5, frequency_penalty=0.9)
    first = greedy(model, params, prompts, mask, jax.random.key(0)).tokens
    second = greedy(
        model,
        params,
        jnp.concatenate([prompts, first, replies], 1),
        jnp.concatenate([mask, jnp.ones((2, 4), bool), read], 1),
        jax.random.key(0),
    ).tokens
    for row in range(2):
        said = found.tokens[row][found.action_mask[row]]
        np.testing.assert_array_equal(said, [*first[row], *second[row]])


def test_rules_that_are_off_keep_nothing_and_say_so():
    assert jax.tree.leaves(TokenRules(temperature=0.7, min_p=0.1).empty(2, VOCAB)) == []
    assert Ancestral(temperature=0.7).policy_temperature == 0.7
    for field in fields(TokenRules)[1:]:
        rule = {field.name: 1}
        assert Ancestral(**rule).policy_temperature is None
        with pytest.raises(
            ValueError, match=r"sampler must not truncate .*, penalise, be greedy, choose or search"
        ):
            PPO(sampler=Ancestral(**rule))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 0.0}, r"min_p must be in \(0, 1\], got 0.0"),
        ({"typical_p": 1.1}, r"typical_p must be in \(0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ({"frequency_penalty": 3.0}, r"frequency_penalty must be in \[-2, 2\], got 3.0"),
        ({"presence_penalty": float("nan")}, r"presence_penalty must be in \[-2, 2\], got nan"),
    ],
)
def test_impossible_rules_are_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Ancestral(**settings)
