"""The probe of a recurrent state, against states and gradients that are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.evaluation.evaluate import EvaluationConfig, Evaluator
from hybrid_jax.evaluation.memory_probe import _features, gradients, norms_by_distance, recalls, watched
from hybrid_jax.evaluation.suites import held_out
from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.memory.ntm import NTM
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mingru import MinGRU
from hybrid_jax.testing import PrefixTable

V = 4


told_by = jax.jit(recalls, static_argnums=3)


def rows(count: int, length: int, seed: int = 0):
    tokens = jax.random.randint(jax.random.key(seed), (count, length), 0, V)
    return tokens, jnp.ones_like(tokens)


def test_the_gradient_of_a_linear_recurrence_falls_by_its_weight_with_each_token():
    """h ← w h + x: ∂ h(at) / ∂ x(at − L) = w^L in each channel, 0 before the row and behind `at`."""
    weight, at = 0.9, np.array([9, 4])

    def loss(x):
        _, h = jax.lax.scan(lambda h, x: (weight * h + x,) * 2, jnp.zeros((2, 1)), x)
        return h[at, jnp.arange(2), 0]

    norms = norms_by_distance(loss, jnp.ones((10, 2, 1)), jnp.array(at))
    expected = [[weight**d if d <= a else 0.0 for d in range(10)] for a in at]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_gradients_of_a_model_are_those_of_finite_differences_within_a_sequence():
    """The row holds two sequences; the last loss is that of token 9, after token 8."""
    model = GRU(width=5, embedding_width=3).build(V)
    params = model.init(jax.random.key(1))
    tokens, segments = rows(1, 10)[0], jnp.array([[1] * 4 + [2] * 6])
    found = jax.jit(partial(gradients, model))(params, tokens, segments)
    assert {name for name, norm in found.items() if np.isfinite(norm)} == {
        f"gradient_{lag}" for lag in (1, 2, 4)
    }

    @jax.jit
    def loss(x):
        state = model.start(1)
        hidden, _ = model.read_embedded(params, x[4:9], state)
        return -jax.nn.log_softmax(model.logits(params, hidden[0, -1]))[tokens[0, 9]]

    x, step = model.embed(params, tokens.T), 1e-2
    for lag in (1, 2, 4):
        slopes = [
            (loss(x.at[8 - lag, 0, i].add(step)) - loss(x.at[8 - lag, 0, i].add(-step))) / (2 * step)
            for i in range(3)
        ]
        assert found[f"gradient_{lag}"] == pytest.approx(np.linalg.norm(slopes), rel=1e-2)


def test_a_delay_line_is_recalled_in_full_and_noise_by_chance():
    tokens, segments = rows(400, 20)
    told = np.eye(V)[tokens]
    line = np.concatenate([np.pad(told, ((0, 0), (d, 0), (0, 0)))[:, :20] for d in (1, 2, 4, 8)], axis=-1)
    found = told_by(jnp.asarray(line, jnp.float32), tokens, segments, V)
    assert [found[f"recall_{d}"] for d in (1, 2, 4, 8)] == [1.0] * 4
    assert found["recall_16"] == pytest.approx(0.25, abs=0.05)
    noise = told_by(jax.random.normal(jax.random.key(1), line.shape), tokens, segments, V)
    assert list(noise.values()) == pytest.approx([0.25] * len(noise), abs=0.05)


def test_chance_is_the_share_of_the_commonest_token_and_no_pair_spans_two_sequences():
    """In rows of 3, 3, 3, 1 | 2 2 2 … nothing of the first sequence counts for the second."""
    tokens = jnp.array([[3, 3, 3, 1, 2, 2, 2, 2]] * 4)
    segments = jnp.array([[1] * 4 + [2] * 3 + [0]] * 4)
    found = told_by(jnp.zeros((4, 8, 2)), tokens, segments, V)
    assert found["chance_1"] == pytest.approx(3 / 5)  # 3 3 3 and 2 2 were read one before
    assert found["recall_1"] == pytest.approx(3 / 5)  # all that is fitted to a state of 0 is the mean
    assert found["last_token_1"] == pytest.approx(1)  # 1 and 3 came behind 3, and 2 behind 2
    assert found["chance_2"] == pytest.approx(2 / 3)
    assert np.isnan(found["recall_4"])


def test_a_state_of_the_last_token_alone_recalls_no_more_than_the_baseline_of_that_token():
    """The token L before is the same one with probability 0.9^L + (1 − 0.9^L) / V."""
    repeats = jax.random.bernoulli(jax.random.key(1), 0.9, (400, 30))
    fresh, segments = rows(400, 30)
    since = np.maximum.accumulate(np.where(repeats, 0, np.arange(30)), axis=1)
    tokens = jnp.take_along_axis(fresh, jnp.asarray(since), axis=1)
    found = jax.tree.map(float, told_by(jax.nn.one_hot(tokens, V), tokens, segments, V))
    for lag in (1, 2, 4):
        expected = 0.9**lag + (1 - 0.9**lag) / V
        assert found[f"last_token_{lag}"] == pytest.approx(expected, abs=0.02)
        assert found[f"recall_{lag}"] == pytest.approx(found[f"last_token_{lag}"], abs=1e-6)
        assert found[f"chance_{lag}"] < 0.4


def test_a_last_token_that_was_not_fitted_is_guessed_as_the_commonest():
    """The rows that are tested end in 3, which no fitted one does: those say 2, twice, more often than 1."""
    tokens = jnp.array([[2, 0], [2, 3], [2, 0], [2, 3], [1, 0], [1, 3]])
    found = told_by(jnp.zeros((6, 2, 1)), tokens, jnp.ones_like(tokens), V)
    assert found["last_token_1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "bias", "gates"),
    [
        (LSTM(width=2), [2.0, 2.0, -1.0, -1.0, 0.0, 0.0, 0.5, 0.5], {"input": 2, "forget": -1, "output": 0.5}),
        (GRU(width=2), [1.0, 1.0, -2.0, -2.0, 0.0, 0.0], {"reset": 1, "update": -2}),
        (MinGRU(width=2), [1.5, 1.5, 0.0, 0.0], {"update": 1.5}),
    ],
)
def test_gates_of_hand_set_biases_have_these_means(settings, bias, gates):
    """With kernels of 0 a gate is σ(bias) at each token; padding does not count."""
    model = settings.build(V)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    params["layer_0"]["cell"]["input"]["bias"] = jnp.array(bias)
    tokens, segments = rows(2, 6)
    _, found, heads = jax.jit(partial(watched, model))(params, tokens, segments.at[1, 3:].set(0))
    assert not heads
    assert {name: float(mean) for name, mean in found.items()} == pytest.approx(
        {f"layer_0/{name}": 1 / (1 + np.exp(-x)) for name, x in gates.items()}, rel=1e-5
    )


@pytest.mark.parametrize("kind", [pytest.param(NTM, marks=pytest.mark.slow), DNC])
def test_watching_a_memory_reads_as_the_model_does_and_shows_its_heads(kind):
    model = kind(width=6, num_slots=5, word_width=3, num_reads=2).build(V)
    params = model.init(jax.random.key(0))
    tokens, segments = rows(3, 7)
    states, gates, heads = jax.jit(partial(watched, model))(params, tokens, segments)
    _, after = jax.jit(model.read)(params, tokens, model.start(3))
    flat = [np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(after)]
    np.testing.assert_allclose(states[:, -1], np.concatenate(flat, axis=1), atol=1e-6)
    (layer,) = heads
    assert [layer[name].shape for name in ("write", "read")] == [(7, 1, 5), (7, 2, 5)]
    memory = after[0][1]
    write = memory.weights[:, :1] if kind is NTM else memory.written[:, None]
    np.testing.assert_allclose(layer["write"][-1], write[0], atol=1e-6)
    own = {"gate"} if kind is NTM else {"free", "allocate", "write"}
    assert {name.removeprefix("layer_0/") for name in gates} == own | {"input", "forget", "output"}


def test_a_wide_state_is_summed_in_random_groups_with_random_signs():
    """Row i of a unit matrix shows where number i goes; 1,500 fill 1 − e^(−1500/1024) of the groups."""
    shown = np.asarray(jax.jit(_features)(jnp.eye(1500)))
    assert shown.shape == (1500, 1024)
    np.testing.assert_array_equal(np.sort(np.abs(shown), axis=1)[:, -2:], [[0.0, 1.0]] * 1500)
    assert shown.sum(axis=1).mean() == pytest.approx(0, abs=0.1)
    assert np.any(shown, axis=0).mean() == pytest.approx(1 - np.exp(-1500 / 1024), abs=0.05)


def test_a_wide_state_needs_memory_in_proportion_to_its_numbers():
    width = 2**20
    state = jax.ShapeDtypeStruct((2, width), jnp.float32)
    needed = jax.jit(_features).lower(state).compile().memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < 100 * width


def read_alone(model, params, tokens):
    """The state behind each token of one sequence, and the gates, from the equations of an NTM with an LSTM."""
    cell, own, states, gates = model.config.cell(), params["layer_0"]["cell"], [], []
    (state,) = model.start(1)
    kernel, bias = (own["controller"]["input"][name] for name in ("kernel", "bias"))
    heads = 2
    of_gate = slice(
        heads * cell.word_width + heads, heads * cell.word_width + 2 * heads
    )  # behind key, strength
    for token in tokens:
        x = params["token_embedding"]["embedding"][token]
        seen = np.concatenate([x, np.ravel(state[1].reads)]) @ kernel + bias
        of_lstm = cell.controller.gates(own["controller"], state[0], seen[None])
        state, _ = cell.step(own, state, cell.prepared(own, x[None]))
        said = state[0][1] @ own["interface"]["kernel"] + own["interface"]["bias"]
        gates.append({**of_lstm, "gate": jax.nn.sigmoid(said[:, of_gate])})
        states.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)]))
    return states, gates


def test_packed_rows_with_padding_inside_are_watched_as_each_sequence_alone():
    model = NTM(width=4, num_slots=3, word_width=2).build(V)
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(0, 0.7, x.shape).astype(np.float32),
        model.init(jax.random.key(0)),
    )
    tokens = rows(2, 8)[0]
    segments = np.array([[1, 1, 0, 1, 2, 2, 0, 0], [0, 1, 2, 2, 0, 2, 2, 3]])
    states, means, _ = jax.jit(partial(watched, model))(params, tokens, jnp.asarray(segments))
    of_all = []
    for row, segment in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        (places,) = np.nonzero(segments[row] == segment)
        expected, gates = read_alone(model, params, tokens[row, places])
        np.testing.assert_allclose(states[row, places], expected, atol=1e-5)
        of_all += gates
    np.testing.assert_array_equal(states[0, 6:], states[0, [5, 5]])
    for name in ("input", "forget", "output", "gate"):
        expected = np.mean([gates[name].mean() for gates in of_all])
        assert float(means[f"layer_0/{name}"]) == pytest.approx(expected, abs=1e-5)


def evaluator(model, texts=("ab ab ab", "ba ba ba")) -> Evaluator:
    """An evaluator of texts, a row each."""
    tokenizer = Bytes().build()
    return Evaluator(
        EvaluationConfig(memory_rows=2, num_prompts=0, length=12),
        model,
        tokenizer,
        [Example("", text) for text in texts],
        sampler=None,
        rewards={},
        seed=0,
        eos_ids=(tokenizer.eos_id,),
    )


def test_an_evaluation_and_the_suite_of_all_have_the_probe_and_samples_the_heads_of_the_first_row():
    model = NTM(width=4, num_slots=3, word_width=2).build(Bytes().build().vocab_size)
    probed, params = evaluator(model), model.init(jax.random.key(0))
    numbers, samples, _ = probed.run(params)
    assert {"evaluation/memory/gradient_1", "evaluation/memory/recall_4", "evaluation/memory/layer_0/gate"} <= {
        *numbers
    }
    assert "evaluation/memory/gradient_16" not in numbers  # no row is as long
    assert {f"evaluation/{name}" for name in held_out(probed, params)} == numbers.keys()
    (shown,) = [sample["memory"] for sample in samples]
    assert "".join(shown["read"]).startswith("ab ab ab")
    (layer,) = shown["layers"]
    weights = np.array(layer["write"])
    assert weights.shape == (1, 3, len(shown["read"]))
    np.testing.assert_allclose(weights.sum(axis=1), 100, atol=2)


def test_a_model_without_a_state_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"evaluation.memory_rows needs a recurrent model, got a PrefixTable; set it to null"
    ):
        evaluator(PrefixTable(max_length=None))


def test_one_row_says_why_it_has_no_recall(caplog):
    model = GRU(width=4).build(Bytes().build().vocab_size)
    assert evaluator(model) is not None
    assert not caplog.records
    numbers, _ = evaluator(model, ["ab ab ab"]).memory(model.init(jax.random.key(0)))
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation.memory_rows: recall needs two held-out rows, got one; it is not measured"
    ]
    assert "memory/gradient_1" in numbers
    assert not [name for name in numbers if "recall" in name]


def test_a_probe_without_any_response_is_refused_in_one_line():
    model = GRU(width=4).build(Bytes().build().vocab_size)
    with pytest.raises(
        UserError, match=r"^evaluation.memory_rows needs held-out examples with a response, got none; set it to"
    ):
        evaluator(model, [None])
