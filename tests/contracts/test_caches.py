"""The caches of all language models: what is read in pieces, taken and reordered scores as read whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.base import BACKBONES, Cache, LanguageModel, RefillCache, SlotCache
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.folders import hf  # noqa: F401  this fills BACKBONES
from hybrid_jax.models.markov import FeedForwardSettings, MarkovSettings
from hybrid_jax.models.markov.counts import count_tokens
from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.memory.knn import KnnLMSettings
from hybrid_jax.models.memory.neural_cache import NeuralCacheSettings
from hybrid_jax.models.memory.ntm import NTM
from hybrid_jax.models.recurrent.elman import Elman
from hybrid_jax.models.recurrent.gated_deltanet import GatedDeltaNet
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lru import LRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mamba2 import Mamba2
from hybrid_jax.models.recurrent.mingru import MinGRU
from hybrid_jax.models.recurrent.rg_lru import RGLRU
from hybrid_jax.testing import PrefixTable, tiny_decoder_folder

V, P, T = 29, 5, 14
STARTS = np.array([0, 3, 1])  # the first real token of each row
ROWS = jnp.array([2, 0, 0, 1])


@dataclass
class Case:
    model: Any
    params: Any
    tokens: jax.Array
    mask: jax.Array

    def __post_init__(self):
        self.prefill, self.extend, self.step = map(
            jax.jit, (self.model.prefill, self.model.extend, self.model.step)
        )

    def cache(self, rows: int = 3):
        return self.model.init_cache(rows, self.tokens.shape[1])

    @cached_property
    def expected(self) -> np.ndarray:
        """Scores after each token, as reading everything in one go gives them."""
        mask = self.mask
        if isinstance(self.model, EncoderDecoder):
            mask = jnp.where(jnp.arange(mask.shape[1]) < P, 1, 2) * mask  # the prompt is a source
        return np.asarray(jax.jit(self.model.apply)(self.params, self.tokens, mask).logits)


def _random(config) -> tuple[Any, Any, int]:
    model = config.build(V)
    random = np.random.default_rng(0)

    def draw(leaf) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # the tokens of a datastore
            return jnp.asarray(random.integers(0, V, leaf.shape))
        return jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32)

    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0))), T


def _decoder(**settings) -> Callable[..., tuple[Any, Any, int]]:
    sizes: dict[str, Any] = {"num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "max_length": 32}
    return lambda folder: _random(DecoderConfig(**(sizes | settings)))


def _encoder_decoder(folder) -> tuple[Any, Any, int]:
    return _random(EncoderDecoderConfig(num_layers=1, width=16, num_heads=2, num_buckets=8, max_distance=20))


def _pretrained(folder) -> tuple[Any, Any, int]:
    model = BACKBONES["pretrained"](str(tiny_decoder_folder(folder))).build(None)
    return model, model.init(jax.random.key(0)), T


def _table(folder) -> tuple[Any, Any, int]:
    model = PrefixTable()
    return model, model.init(jax.random.key(0)), P + 2  # no prefix is longer than two tokens


def _counts(folder) -> tuple[Any, Any, int]:
    texts = np.random.default_rng(3).integers(0, V, (4, 50))
    return *count_tokens(texts, 2, V), T


MODELS: dict[str, Callable[..., tuple[Any, Any, int]]] = {
    "decoder, rotary with a window": _decoder(position="rotary", window=4, attention_sinks=True),
    "decoder, scanned with slopes": _decoder(position="alibi", execution=Execution(scan_layers=True)),
    "encoder_decoder": _encoder_decoder,
    "pretrained": _pretrained,
    "lstm, two with projections": lambda _: _random(LSTM(num_layers=2, width=9, projection_width=6)),
    "gru, residual with an MLP": lambda _: _random(GRU(num_layers=2, width=8, residual=True, mlp_width=12)),
    "elman, normed and tied": lambda _: _random(Elman(width=8, layer_norm=True, tie_embeddings=True)),
    "mingru": lambda _: _random(MinGRU(width=8)),
    "rg_lru": lambda _: _random(RGLRU(width=8, state_width=5)),
    "lru, with an MLP": lambda _: _random(LRU(width=8, state_width=5, mlp_width=12)),
    "mamba2, in chunks of four": lambda _: _random(
        Mamba2(num_layers=2, width=8, head_width=4, state_width=5, groups=2, chunk_length=4)
    ),
    "gated_deltanet, in chunks of four": lambda _: _random(
        GatedDeltaNet(width=8, key_heads=1, value_heads=2, key_width=4, value_width=3, chunk_length=4)
    ),
    "ntm, over an LSTM": lambda _: _random(NTM(width=6, num_slots=5, word_width=4)),
    "dnc, over Elman's": lambda _: _random(DNC(controller="elman", width=6, num_slots=5, word_width=4)),
    "neural_cache, of Elman's": lambda _: _random(NeuralCacheSettings(Elman(width=8), 0.4, 0.3, slots=4)),
    "neural_cache, of a decoder": lambda _: _random(
        NeuralCacheSettings(DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=32), 0.4, 0.3)
    ),
    "knn_lm, of Elman's": lambda _: _random(KnnLMSettings(Elman(width=8), 9, 0.4, neighbours=3)),
    "markov, of a decoder": lambda _: _random(
        MarkovSettings(DecoderConfig(num_layers=2, width=8, num_heads=2, max_length=32), order=3)
    ),
    "markov, of Elman's": lambda _: _random(MarkovSettings(Elman(width=8), order=4)),
    "counts": _counts,
    "feed_forward": lambda _: _random(FeedForwardSettings(order=3, embedding_width=4, width=8)),
    "prefix table": _table,
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    model, params, length = MODELS[request.param](tmp_path_factory.mktemp("model"))
    starts = np.array([4, 4, 4]) if isinstance(model, PrefixTable) else STARTS
    tokens = np.random.default_rng(1).integers(0, min(model.vocab_size, V), (3, length))
    mask = np.arange(length) >= starts[:, None]
    return Case(model, params, jnp.asarray(tokens), jnp.asarray(mask))


def _close(scores, expected):
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_every_registered_language_model_is_here():
    """A new name in the registry must enter this file, unless what it builds scores texts."""
    scorers = {"encoder", "ngrams", "classifier"}
    known = {name.partition(",")[0] for name in MODELS} | {"pretrained_encoder_decoder"} | scorers
    assert set(BACKBONES) <= known


def test_the_protocols_are_kept(case):
    assert isinstance(case.model, LanguageModel)
    assert isinstance(case.cache(), Cache)


def test_a_prompt_read_and_the_rest_step_by_step_score_as_the_whole(case):
    scores, cache = case.prefill(case.params, case.tokens[:, :P], case.mask[:, :P], case.cache())
    step, expected = case.step, case.expected
    for t in range(P, case.tokens.shape[1]):
        _close(scores, expected[:, t - 1])
        scores, cache = step(case.params, case.tokens[:, t], cache)
    _close(scores, expected[:, -1])


def test_pieces_of_any_length_score_as_the_whole(case):
    cache, extend, expected = case.cache(), case.extend, case.expected
    ends = sorted({P, P + 1, P + 2, case.tokens.shape[1]})
    for start, end in zip([0, *ends], ends, strict=False):
        scores, cache = extend(case.params, case.tokens[:, start:end], case.mask[:, start:end], cache)
        _close(scores, expected[:, end - 1])


def test_a_piece_padded_on_the_left_scores_as_one_without(case):
    extend, end = case.extend, P + 2
    _, cache = extend(case.params, case.tokens[:, :P], case.mask[:, :P], case.model.init_cache(3, T + 4))
    padded = jnp.concatenate([jnp.full((3, 3), 2), case.tokens[:, P:end]], 1)
    real = jnp.broadcast_to(jnp.arange(5) >= 3, (3, 5))
    scores, cache = extend(case.params, padded, real, cache)
    expected = case.expected
    _close(scores, expected[:, end - 1])
    for t in range(end, case.tokens.shape[1]):
        scores, cache = case.step(case.params, case.tokens[:, t], cache)
        _close(scores, expected[:, t])


def test_rows_that_read_more_than_others_score_as_each_alone(case):
    """One row reads two tokens, one reads one: the scores after them are those of the row by itself."""
    extend = case.extend
    _, cache = extend(case.params, case.tokens[:, :P], case.mask[:, :P], case.cache())
    piece = case.tokens[:, P : P + 2].at[1, 1].set(case.tokens[1, P])
    real = jnp.ones((3, 2), bool).at[1, 0].set(False)
    scores, cache = extend(case.params, piece, real, cache)
    expected = case.expected
    _close(scores[0], expected[0, P + 1])
    _close(scores[1], expected[1, P])
    _close(scores[2], expected[2, P + 1])


def test_rows_taken_before_a_step_score_as_those_taken_after_it(case):
    _, cache = case.prefill(case.params, case.tokens[:, :P], case.mask[:, :P], case.cache())
    step = case.step
    scores, after = step(case.params, case.tokens[:, P], cache)
    taken, taken_after = step(case.params, case.tokens[ROWS, P], cache.take(ROWS))
    _close(taken, scores[ROWS])
    following, _ = step(case.params, case.tokens[:, P + 1], after)
    for kept in (taken_after, after.take(ROWS)):
        _close(step(case.params, case.tokens[ROWS, P + 1], kept)[0], following[ROWS])


def test_a_row_given_over_to_a_new_prompt_scores_as_that_prompt_alone(case):
    if not isinstance(case.cache(), RefillCache):
        pytest.skip("all rows of this cache begin together")
    _, cache = case.prefill(case.params, case.tokens[:, :P], case.mask[:, :P], case.cache())
    _, cache = case.step(case.params, case.tokens[:, P], cache)
    _, fresh = case.prefill(case.params, case.tokens[2:, :P], case.mask[2:, :P], case.cache(1))
    cache = cache.with_rows(jnp.array([[0]]), fresh)
    scores, _ = case.step(case.params, case.tokens[jnp.array([2, 1, 2]), jnp.array([P, P + 1, P + 1])], cache)
    expected = case.expected
    _close(scores, expected[jnp.array([2, 1, 2]), jnp.array([P, P + 1, P + 1])])


def test_a_cache_that_grows_scores_as_a_whole_one(case):
    whole = case.cache()
    if not isinstance(whole, SlotCache):
        pytest.skip("this cache has no slots")
    _, cache = case.prefill(case.params, case.tokens[:, :P], case.mask[:, :P], case.model.init_cache(3, P))
    scores, _ = case.extend(case.params, case.tokens[:, P:], case.mask[:, P:], cache.grown(T))
    _close(scores, case.expected[:, -1])


@pytest.mark.slow
def test_an_extension_goes_on_at_the_first_slot_behind_the_last():
    """In a ring of six slots a row that begins anew reads over the end of the slots."""
    model, params, _ = _random(DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=32))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (1, 6)))
    prefill = jax.jit(model.prefill)
    whole = jax.jit(model.apply)(params, tokens).logits
    _, cache = prefill(params, tokens[:, :4], jnp.ones((1, 4), bool), model.init_cache(1, 6))
    _, fresh = prefill(params, tokens[:, :2], jnp.ones((1, 2), bool), model.init_cache(1, 6))
    cache = cache.with_rows(jnp.array([[0]]), fresh)  # its two tokens lie in slots 2 and 3
    scores, _ = jax.jit(model.extend)(params, tokens[:, 2:], jnp.ones((1, 4), bool), cache)
    _close(scores, whole[:, -1])
