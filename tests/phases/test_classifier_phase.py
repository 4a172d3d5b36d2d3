"""The phase that trains classifiers: its loss against loops, what it learns, and that it resumes to the bit."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.classification import label_cross_entropy, squared_error
from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.folders.encoder import save_encoder
from hybrid_jax.models.heads import ClassificationHead, RegressionHead
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.text_encoder import TextEncoderConfig
from hybrid_jax.parallel.mesh import MeshConfig
from hybrid_jax.phases.classifier import Classification
from hybrid_jax.runs.initial_state import fresh_state
from hybrid_jax.training.optimizers import Adam, Constant
from hybrid_jax.training.phase import MeasuredPhase, Resources

LABELS = ("dull", "bright")
HEAD = ClassificationHead(labels=LABELS)
OPTIMIZER = Adam(learning_rate=0.05, schedule=Constant())


def examples(count, seed):
    """The planted rule: a text is bright where "q" stands right before "z", dull where it stands behind it."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        letters = random.choice(list("abcdef"), 12).tolist()
        letters.insert(int(random.integers(12)), "qz" if i % 2 else "zq")
        rows.append(Example("", "".join(letters), {"label": LABELS[i % 2]}))
    return rows


def build(settings, model, train, held_out, steps=60, head=HEAD):
    placement = MeshConfig(data=1).placement(jax.devices()[:1])
    resources = Resources(
        name="classifier", kind="classifier", model=model, tokenizer=Bytes().build(), examples=train,
        eos_ids=(256,), held_out=lambda: held_out, seed=0, horizon=steps, placement=placement,
        optimizer_key="classifier", heads={"tone": head}, trunk_trains=head.trains_trunk,
    )  # fmt: skip
    phase = settings.build(resources)
    assert isinstance(phase, MeasuredPhase)
    return phase, fresh_state(model, {"classifier": phase}, placement, jax.random.key(0))


def run(phase, state, steps):
    for _ in range(steps):
        state, metrics = phase.step(state, jax.random.fold_in(jax.random.key(1), state.step))
        state = replace(state, step=state.step + 1, schedule=state.schedule.after("classifier"))
    return state, metrics


def test_the_loss_is_that_of_a_loop_with_weights_and_smoothing():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    labels, weights, smoothing = [0, 2, 1, 1, 2], [3.0, 1.0, 0.5], 0.1
    total = weight = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        norm = math.log(sum(math.exp(x) for x in row))
        for c, x in enumerate(row):
            total -= weights[label] * ((1 - smoothing) * (c == label) + smoothing / 3) * (x - norm)
        weight += weights[label]
    found = label_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights), smoothing)
    np.testing.assert_allclose([found.total, found.weight], [total, weight], rtol=1e-6)


def test_the_squared_error_by_hand():
    found = squared_error(jnp.asarray([1.0, 3.0]), jnp.asarray([2.0, 1.0]))
    assert (float(found.total), float(found.weight)) == (5.0, 2.0)


@pytest.fixture(scope="module")
def planted():
    settings = Classification(batch_size=16, calibration_fraction=0.2, optimizer=OPTIMIZER)
    model = NGrams((1, 2), bucket_bits=12, width=4).build(257)
    phase, state = build(settings, model, examples(200, 0), examples(60, 1))
    return phase, run(phase, state, 60)[0]


def test_a_planted_rule_is_learnt_and_measured(planted):
    phase, trained = planted
    report = phase.evaluate(trained)
    assert report["accuracy"] == report["macro_f1"] == report["f1_bright"] == 1.0
    assert report["loss"] < 0.2
    assert report["calibrated_brier"] < 0.05
    extra = phase.extra(trained)
    assert extra["temperature"] == report["temperature"]
    assert extra["calibration_rows"] == 40
    assert extra["reading"] == {"prompt": False, "chat": False, "max_length": None, "cut": "truncate_end"}


def test_what_is_kept_back_for_the_temperature_is_not_learnt(planted):
    phase, _ = planted
    kept = {tuple(row.tolist()) for row in phase._kept_back[0]}
    learnt = {tuple(row.tolist()) for row in phase.stream.rows}
    assert kept
    assert not kept & learnt


def test_a_run_goes_on_from_its_cursor_to_the_same_bits():
    model = NGrams((1, 2), bucket_bits=6, width=4).build(257)
    settings = Classification(batch_size=16, calibration_fraction=0.0, microbatches=2, optimizer=OPTIMIZER)

    def fresh():
        head = ClassificationHead(labels=LABELS, dropout=0.5)
        return build(settings, model, examples(70, 0), examples(10, 1), steps=9, head=head)

    phase, state = fresh()
    whole = run(phase, state, 9)[0].train.params
    half = run(*fresh(), 5)[0]
    saved = jax.tree.map(np.asarray, half.train)
    later, _ = fresh()
    parts = run(later, replace(half, train=jax.tree.map(jnp.asarray, saved)), 4)[0].train.params
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_one_label_is_a_regression():
    random = np.random.default_rng(0)
    counts = random.integers(0, 5, 120)
    rows = [Example("", "ab" * int(n) + "c" * (8 - int(n)), {"label": 2.0 * int(n) - 3}) for n in counts]
    model = NGrams((1,), width=4).build(257)
    settings, head = Classification(batch_size=16, optimizer=OPTIMIZER), RegressionHead(labels=("amount",))
    phase, state = build(settings, model, rows[:90], rows[90:], head=head)
    state, _ = run(phase, state, 150)
    report = phase.evaluate(state)
    assert report["pearson"] > 0.98
    assert report["loss"] == report["mse"]
    assert "temperature" not in phase.extra(state)


def test_balanced_weights_make_rare_labels_count_the_same():
    rows = examples(60, 0)
    rows = [row for row in rows if row.columns["label"] == "dull"] + rows[1::6]
    model = NGrams((1,), width=2).build(257)
    settings = Classification(batch_size=4, class_weights="balanced", calibration_fraction=0.0)
    phase, _ = build(settings, model, rows, rows)
    counts = np.array([30, len(rows) - 30])
    np.testing.assert_allclose(phase.class_weights, len(rows) / (2 * counts), rtol=1e-6)


def test_a_frozen_body_learns_on_features_and_stays_as_it_is(tmp_path):
    encoder = Encoder(EncoderConfig(vocab_size=257, num_layers=1, width=16, num_heads=2, max_length=64))
    save_encoder(tmp_path, encoder, encoder.init(jax.random.key(3)))
    model = TextEncoderConfig(path=str(tmp_path), normalize=True).build(257)
    settings = Classification(batch_size=16, calibration_fraction=0.0, optimizer=OPTIMIZER)
    rows = [Example("", word * 4, {"label": i % 2}) for i, word in enumerate(["no", "yes"] * 20)]
    head = ClassificationHead(labels=LABELS, trains_trunk=False)
    phase, state = build(settings, model, rows, rows[:8], head=head)
    before = jax.tree.map(np.asarray, state.base)
    state, _ = run(phase, state, 40)
    assert state.train.params["model"] == {}
    assert set(state.train.params) == {"model", "heads/tone"}
    jax.tree.map(np.testing.assert_array_equal, state.base, before)
    assert phase.evaluate(state)["accuracy"] == 1.0


def test_settings_and_data_that_do_not_fit_are_refused():
    model = NGrams((1,), width=2).build(257)
    rows = examples(20, 0)
    with pytest.raises(UserError, match="class_weights must be 2 numbers, got 3"):
        build(Classification(class_weights=(1.0, 1.0, 1.0)), model, rows, rows)
    with pytest.raises(UserError, match="batch_size must be at most the 19 rows"):
        build(Classification(batch_size=32), model, rows, rows)
    with pytest.raises(UserError, match="class_weights and label_smoothing need several labels"):
        build(Classification(label_smoothing=0.1), model, rows, rows, head=RegressionHead())
    with pytest.raises(
        UserError, match=r"phases\.classifier\.head must name a head of the run, got 'mood'; heads: tone"
    ):
        build(Classification(head="mood"), model, rows, rows)
    with pytest.raises(UserError, match=r"phases\.classifier: training data: row 1: no column 'tone'"):
        build(Classification(batch_size=4, label_field="tone"), model, rows, rows)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        Classification(label_smoothing=1.0)
