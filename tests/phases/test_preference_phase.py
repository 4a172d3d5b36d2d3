"""The preference phase: what has a gradient, what is kept of references, what a run logs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.phases.answer_losses import AnswerBatch, answer_log_probs
from hybrid_jax.phases.kept_log_probs import KeptLogProbs
from hybrid_jax.training.update import gradients

DEBUG = Path(__file__).parents[2] / "configs" / "debug"


@dataclass(frozen=True)
class States:
    """A model whose hidden states are its parameters, and its logits those."""

    vocab_size: int = 5

    def hidden_and_losses(self, params, tokens, attention_mask=None, *, dropout_key=None):
        return params, {}

    def cast(self, params):
        return params

    def logits(self, params, hidden):
        return hidden


def test_only_states_before_a_token_of_an_answer_have_a_gradient():
    # prompt 1 2, answer 3 4, then text that is not learned, then padding; the second row ends with its answer
    mask = np.array([[[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]], bool)
    tokens = np.array([[[1, 2, 3, 4, 1, 0], [1, 2, 3, 4, 0, 2]]], np.int32)
    make: Any = TokenBatch
    model: Any = States()
    rows = make(tokens, (tokens > 0).astype(np.int32), mask)
    states = jax.random.normal(jax.random.key(0), (2, 6, 5))
    value, slope = jax.value_and_grad(lambda s: answer_log_probs(model, s, rows)[0].sum())(states)
    table = np.asarray(jax.nn.log_softmax(states, axis=-1), np.float64)
    expected = sum(table[k, t - 1, tokens[0, k, t]] for k, t in np.argwhere(mask[0]))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(np.abs(slope).max(axis=-1) > 0, np.roll(mask[0], -1, axis=1))


@pytest.fixture(scope="module")
def experiments():
    """A DPO and a KTO run, built."""
    made = {}
    for name in ("dpo", "kto"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(DEBUG.parents[1])
            made[name] = build(load_config(DEBUG / f"{name}.yaml", ["run_dir=/nonexistent"]))
    return made


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_parts_and_padding_change_no_gradient(experiments, name):
    experiment = experiments[name]
    phase, state = experiment.phases["preference"], experiment.init()
    params = {"model": state.policy}
    index = np.arange(4)
    rows = phase.stream.rows(index)
    good = getattr(phase.stream, "good", None)
    reference = answer_log_probs(experiment.model, state.policy, rows)[0] - jnp.array([0.5, -1.0])
    batch: Any = AnswerBatch(
        jax.tree.map(jnp.asarray, rows),
        reference,
        None if good is None else jnp.asarray(good[index]),
        None if good is None else jnp.full(4, 0.3),
    )
    longer = batch.replace(rows=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 8))), batch.rows))
    key = jax.random.key(0)
    compute = jax.jit(
        lambda batch, parts: gradients(phase.objective, params, batch, key, parts), static_argnums=1
    )
    whole = compute(batch, 1)
    for other in (compute(batch, 2), compute(longer, 1)):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_what_references_say_of_a_row_is_read_once_and_anew_for_other_references():
    order, read, asked = np.array([3, 0, 4, 1, 2]), [], np.array([3, 0])
    kept, models, others = KeptLogProbs(order, 2), {"m": np.zeros(1)}, {"m": np.ones(1)}

    def numbers(index):
        read.append(index.tolist())
        return np.stack([index, 10 * index], axis=1)

    assert kept.of(models, asked, numbers).tolist() == [[3, 30], [0, 0]]
    assert kept.of(models, np.array([2, 3, 0]), numbers)[:, 1].tolist() == [20, 30, 0]
    assert read == [[3, 0], [2, 3]]  # the last block is filled up from the start of the first epoch
    assert kept.of(models, np.array([4, 1]), numbers)[:, 0].tolist() == [4, 1]
    assert len(read) == 3
    kept.of(others, asked, numbers)
    assert read[3:] == [[3, 0]]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss=simpo", "references must be null for the loss simpo, which reads none"),
        ("references.one.weight=0", "references must be null or have a weight above 0"),
        ("length=64", "length must be at most the model's max_length 48, got 64"),
        ("loss.label_smoothing=0.5", r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_settings_that_cannot_be_are_one_line(override, line, monkeypatch):
    monkeypatch.chdir(DEBUG.parents[1])
    overrides = ["run_dir=/nonexistent", "phases.preference.references={one: {weight: 1.0}}"]
    with pytest.raises(UserError, match=line):
        build(load_config(DEBUG / "dpo.yaml", [*overrides, f"phases.preference.{override}"]))


def test_a_label_that_is_neither_true_nor_false_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(DEBUG.parents[1])
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, "no")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={tmp_path}/rows.jsonl", "data.held_out_fraction=null", "run_dir=/nonexistent"]
    overrides += [f"data.held_out={tmp_path}/rows.jsonl"]
    with pytest.raises(UserError, match=r"phases.preference: .*rows.jsonl:2: 'label' must be true or false"):
        build(load_config(DEBUG / "kto.yaml", overrides))


@pytest.mark.slow
@pytest.mark.parametrize("references", ["kept", "online"])
def test_the_first_step_compares_the_policy_with_itself_and_a_resumed_run_ends_alike(
    tmp_path, monkeypatch, references
):
    from hybrid_jax.training.loop import train

    monkeypatch.chdir(DEBUG.parents[1])
    overrides = [
        "steps=7",
        "evaluation.every=100",
        f"phases.preference.online_references={references == 'online'}",
    ]
    ends = []
    for name, stops in (("whole", [7]), ("cut", [4, 7])):
        for stop in stops:
            config = load_config(
                DEBUG / "dpo.yaml", [*overrides, f"run_dir={tmp_path}/{name}", f"steps={stop}"]
            )
            state = train(build(config))
        ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(state.train.params)])
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["phase"] == "preference")
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["preference/margin"] == pytest.approx(0.0, abs=1e-6)
