"""Likelihood under a frozen language model: known distributions, a plain loop, and the identity of GPTScore."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.tokenizer import load_tokenizer
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained
from hybrid_jax.rewards.base import RewardError, evaluate_reward
from hybrid_jax.rewards.likelihood import GptScore, Perplexity, mc1, mc2
from hybrid_jax.rewards.text import Repetition
from hybrid_jax.testing import tiny_decoder_folder

PROMPTS = ["Say it: ", "", "tell me " * 20, "Q"]
RESPONSES = ["A good answer.", "hello", "fine", "é漢 🙂 <|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_decoder_folder(tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module")
def log_probs(folder):
    """bytes before, bytes after -> log-probs of the bytes after, one by one from whole softmaxes in float64."""
    model, params = load_pretrained(folder)
    apply = jax.jit(model.apply)

    def read(before, after):
        row = [*before, *after]
        logits = np.asarray(apply(params, jnp.asarray([row + [0] * (96 - len(row))])).logits, np.float64)[0]
        found = []
        for position in range(len(before), len(row)):
            scores = logits[position - 1]
            found.append(scores[row[position]] - math.log(np.exp(scores - scores.max()).sum()) - scores.max())
        return found

    return read


def test_the_mean_log_prob_is_that_of_the_responses_tokens_alone(folder, log_probs):
    end = load_tokenizer(folder).eos_id
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        before, after = list(prompt.encode()) or [end], list(response.encode())
        before = before[max(0, len(before) + len(after) - 96) :]
        expected.append(np.mean(log_probs(before, after)))
    scores = Perplexity(folder)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    perplexities = Perplexity(folder, what="perplexity")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(perplexities, np.exp(-np.array(expected)), rtol=5e-5)
    silence = Perplexity(folder)(["Q"], [""])
    np.testing.assert_allclose(silence, log_probs(b"Q", [end]), atol=2e-5)
    cut = Perplexity(folder, max_length=8)(
        ["a long prompt"], ["a long answer"]
    )  # one token of the prompt stays
    np.testing.assert_allclose(cut, np.mean(log_probs(b"t", b"a long ")), atol=2e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder, tmp_path):
    model, params = load_pretrained(folder)
    save_pretrained(tmp_path, model, jax.tree.map(jnp.zeros_like, params), eos_ids=(256,))
    load_tokenizer(folder).save(tmp_path)
    scores = Perplexity(str(tmp_path), what="perplexity")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(scores, 257.0, rtol=1e-5)


def test_gptscore_times_its_tokens_is_a_difference_of_log_probs_of_whole_texts(folder, log_probs):
    """|h| · score = log p(instruction + h) - log p(instruction)."""
    reward = GptScore(folder, template="{aspect}? {prompt}|{topic}|{response}", aspect="Clear")
    prompts, topics = ["a {response} b", "c", "d"], ["one", ["two", "three"], "x"]
    responses = ["It is.", "{aspect}", "ok"]
    scores = reward(prompts, responses, topic=topics)
    instructions = ["Clear? a {response} b|one|", "Clear? c|two|", "Clear? d|x|"]
    for instruction, response, score in zip(instructions, responses, scores, strict=True):
        whole = sum(log_probs(b"", (instruction + response).encode())[1:])  # the first token has no predictor
        before = sum(log_probs(b"", instruction.encode())[1:])
        assert len(response.encode()) * score == pytest.approx(whole - before, abs=1e-4)


def test_repeated_words_please_a_language_model_and_not_its_sum_with_repetition(folder, tmp_path):
    """A model of words in which a word is likely after itself: the degenerate optimum of likelihood alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    real, degenerate = "the cat sat on a mat", "the the the the the the"
    words = [*dict.fromkeys(real.split()), "<|endoftext|>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore
    model, _ = load_pretrained(folder)
    # its layers add nothing, so the last state is the token itself: a tied head finds it likely again
    echo = Decoder(replace(model.config, vocab_size=len(words), num_layers=1))
    silent = jax.tree.map(jnp.zeros_like, echo.init(jax.random.key(0)))
    table = jnp.eye(len(words), 16)
    silent["token_embedding"] = {"embedding": table}
    silent["final_norm"] = {
        name: jnp.full_like(leaf, float(name == "scale")) for name, leaf in silent["final_norm"].items()
    }
    save_pretrained(tmp_path, echo, silent, eos_ids=(len(words) - 1,))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    fluency = Perplexity(str(tmp_path))(["", ""], [real, degenerate])
    assert fluency[1] > fluency[0] + 1.0
    with_repetition = np.array(fluency) + 5.0 * np.array(Repetition(n=1)(["", ""], [real, degenerate]))
    assert with_repetition[0] > with_repetition[1]


def test_multiple_choice_counts_the_mass_on_true_answers():
    log_probs = [-700.0, -701.0, -702.0]
    assert mc1(log_probs, [False, True, True]) == 0.0
    assert mc1(log_probs, [True, False, False]) == 1.0
    masses = [1.0, math.exp(-1), math.exp(-2)]
    assert mc2(log_probs, [False, True, True]) == pytest.approx((masses[1] + masses[2]) / sum(masses))
    assert mc2([-1e5, -2e5], [True, False]) == 1.0


def test_mistakes_are_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"template must end with \{response\}, its only one"):
        GptScore("x", template="{response} is good")
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        Perplexity("x", max_length=1)
    reward = GptScore(folder, template="{prompt} {source} {response}")
    with pytest.raises(RewardError, match=r"the template's \{source\} must be the name of a text or a column"):
        evaluate_reward("g", reward, ["a"], ["b"])
    with pytest.raises(RewardError, match="column 'source' must hold texts to fill the template with, got '3'"):
        evaluate_reward("g", reward, ["a"], ["b"], {"source": [3]})
