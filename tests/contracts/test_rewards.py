"""What every registered reward promises: one finite float32 a row, the same whatever the other rows are."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.folders.scorer import save_scorer
from hybrid_jax.models.heads import RegressionHead
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.rewards.base import REWARDS, DeviceReward, evaluate_reward
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.learned_metrics import Head, save_head
from hybrid_jax.testing import tiny_decoder_folder, tiny_encoder_folder


@functools.cache
def scorer_folder() -> str:
    """A scorer of two labels, such as a run leaves behind."""
    folder, tokenizer = Path(tempfile.mkdtemp()), Bytes().build([])
    trunk = NGrams(bucket_bits=4, width=2).build(tokenizer.vocab_size)
    model = TextScorer(trunk, RegressionHead(labels=("first", "second")))
    params = jax.jit(
        lambda key: jax.tree.map(lambda x: x + jnp.linspace(0.2, 1.0, x.shape[-1]), model.init(key))
    )(jax.random.key(0))
    save_scorer(folder, model, params, tokenizer.save)
    return str(folder)


@functools.cache
def model_folder(write) -> str:
    return str(write(Path(tempfile.mkdtemp())))


def with_encoder(**settings):
    return lambda: {"path": model_folder(tiny_encoder_folder), "batch_size": 4, **settings}


def with_language_model(**settings):
    return lambda: {"path": model_folder(tiny_decoder_folder), "batch_size": 4, **settings}


def with_head(kind):
    """A head of random weights on the tiny encoder."""

    def settings():
        folder, encoder = tempfile.mkdtemp(), model_folder(tiny_encoder_folder)
        size = 96 if kind == "comet_style" else 33
        save_head(folder, Head(kind, np.random.default_rng(0).normal(size=size), 0.5))
        return {"path": folder, "encoder": encoder, "batch_size": 4}

    return settings


@functools.cache
def ordered_texts() -> str:
    path = Path(tempfile.mkdtemp()) / "texts.txt"
    path.write_text("We met Ann in 1990. She had a dog. The dog died in 1995.\nBob came. He left.\n")
    return str(path)


REQUIRED = {  # settings without a default
    "bertscore": with_encoder(),
    "bleurt_style": with_head("bleurt_style"),
    "classifier": lambda: {"path": scorer_folder(), "label": "second"},
    "coherence": lambda: {"path": ordered_texts()},
    "comet_style": with_head("comet_style"),
    "cosine_similarity": with_encoder(),
    "facility_coverage": with_encoder(),
    "gptscore": with_language_model(template="{prompt}{response}"),
    "perplexity": with_language_model(),
    "truthful_contrast": with_encoder(),
    "relevance": {"path": __file__},
    "win_rate": {"reward": {"name": "length", "target": 5}},
    "domain_relevance": {"path": __file__, "general": str(Path(__file__).parents[1] / "conftest.py")},
    "json_schema": {"schema": {"type": "object", "required": ["stars"]}},
    "keyword_coverage": {"keywords": ["food", "parking"]},
    "length": {"target": 5},
    "ngram_fluency": {"path": __file__},
    "reward_model": lambda: {"path": scorer_folder(), "normalised": False},
    "regex": {"pattern": r".*\bfood\b.*"},
    "token_count": {"weights": {1: 0.7, 2: -1.0}, "first_token_weights": {3: 0.1}},
    "token_length": {"target": 2},
}
PROMPTS = ["name[The Eagle], food[French]", "name[Cotto], area[riverside]", "near[Ranch]", "familyFriendly[no]"]
RESPONSES = ["The Eagle serves good French food.", "", "\n \t…£é漢字 🙂 [x] (", "awful " * 200]
FIRST_RESPONSE = {  # where the usual first one gets the same score as the others
    "final_number": "It costs $5.",
    "json_schema": '{"stars": 5}',
    "json_valid": '{"stars": 5}',
    "exact_match": "Good food",
    "coherence": "Ann came in 1990. She had a dog. The dog left in 1995.",
}
COLUMNS = {
    "references": [["Good food.", "The Eagle serves food."], "nothing", ["漢字"], ["awful food", "good"]],
    "opponents": [["Good food.", ""], "a", ["b"], ["c d e f g", "h"]],
    "source": ["The Eagle serves food. It is good.", "A river.", "漢字", "Awful food, they say."],
    "correct_answers": [["good food", "a cat"], ["two"], ["漢字"], ["good"]],
    "incorrect_answers": [["bad food"], ["one"], ["a tree", "a dog"], ["awful"]],
    "concepts": [["french", "serve"], ["area"], ["漢字"], ["park"]],
    "turns_left": [3, 0, 1, 9],
    "final_answer": ["5", 7, "1/2", 3.5],
    "facts": [{"name": ["the eagle"]}, {"name": ["cotto"], "area": ["river"]}, [["ranch"]], {"x": "awful"}],
}
TOKENS = jnp.array([[1, 2, 3, 1], [3, 3, 3, 3], [0, 0, 2, 1], [1, 1, 1, 0]])
RESPONSE_MASK = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
ORDER = np.array([2, 0, 3, 1])


def build(name):
    settings = REQUIRED.get(name, {})
    named = {"name": name, **(settings() if callable(settings) else settings)}
    return parse(Part, {"reward": named}, trust=EVERYTHING).reward


def scorer(name):
    """The registered reward as a function of the rows to score."""
    reward = build(name)
    responses = [FIRST_RESPONSE.get(name, RESPONSES[0]), *RESPONSES[1:]]

    def score_texts(rows):
        columns = {key: [column[row] for row in rows] for key, column in COLUMNS.items()}
        return evaluate_reward(name, reward, [PROMPTS[r] for r in rows], [responses[r] for r in rows], columns)

    def score_tokens(rows):
        mask = jnp.ones_like(TOKENS, bool)
        return np.asarray(jax.jit(reward.score_tokens)(TOKENS[rows], mask[rows], RESPONSE_MASK[rows]))

    return score_tokens if isinstance(reward, DeviceReward) else score_texts


NEED_A_SERVER = {"pairwise_judge", "rubric_judge"}  # tests/rewards/test_judge.py has one


# Which do not go with ours, or are an extra: tests/rewards/test_adapters.py, test_reasoning_gym.py
NEED_A_PACKAGE = {"bleurt", "comet", "detoxify", "reasoning_gym"}


@pytest.fixture(params=[name for name in REWARDS if name not in NEED_A_SERVER | NEED_A_PACKAGE])
def name(request):
    return request.param


def test_it_gives_one_finite_float32_a_row_for_any_text(name):
    scores = scorer(name)(np.arange(4))
    assert scores.dtype == np.float32
    assert scores.shape == (4,)
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) > 1  # it looks at the response


def test_it_gives_the_same_each_time(name):
    score = scorer(name)
    assert (
        score(np.arange(4)).tobytes() == score(np.arange(4)).tobytes() == scorer(name)(np.arange(4)).tobytes()
    )


def test_a_rows_score_does_not_depend_on_the_other_rows(name):
    score = scorer(name)
    scores = score(np.arange(4))
    assert score(ORDER).tobytes() == scores[ORDER].tobytes()
    assert [score(np.array([row]))[0] for row in range(4)] == scores.tolist()


def test_no_rows_give_no_scores(name):
    if not isinstance(build(name), DeviceReward):
        assert evaluate_reward(name, build(name), [], [], {key: [] for key in COLUMNS}).shape == (0,)


def test_its_config_survives_a_round_trip(name):
    composite = CompositeReward({"part": Part(build(name), clip=(-1.0, 1.0))})
    assert parse(CompositeReward, to_dict(composite, CompositeReward), trust=EVERYTHING) == composite


def test_it_says_what_it_is(name):
    assert (REWARDS[name].__doc__ or "").strip()
