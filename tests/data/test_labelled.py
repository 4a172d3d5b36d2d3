"""Labelled texts: what is a label, and batches that depend on the cursor alone."""

import json

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.labelled import Labelled, LabelledStream, targets_of


def test_texts_are_read_with_what_replaces_what(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a<br />b", "label": 1, "rating": 3}))
    (example,) = Labelled(train=path, replace={"<br />": "\n"}).load("train")
    assert (example.prompt, example.response, example.columns) == ("", "a\nb", {"label": 1, "rating": 3})


def test_labels_are_names_or_numbers():
    rows = [Example("", "x", {"label": value}) for value in ("good", 0, 1, 1.0)]
    found = targets_of(rows, "label", ("bad", "good"))
    assert found.tolist() == [1, 0, 1, 1]
    assert found.dtype == np.int32
    numbers = targets_of([Example("", "x", {"score": 2.5})], "score", ("quality",))
    assert numbers.tolist() == [2.5]
    assert numbers.dtype == np.float32


@pytest.mark.parametrize("value", ["fine", 2, -1, 0.5, None, float("nan"), True])
def test_what_is_no_label_is_named_with_its_row(value):
    rows = [Example("", "x", {"label": 0}), Example("", "x", {"label": value})]
    with pytest.raises(UserError, match="row 2: label must be a name among bad, good or its number"):
        targets_of(rows, "label", ("bad", "good"))


@pytest.mark.parametrize("value", [True, "2", None, float("inf"), 1e39, 10**400])
def test_a_number_to_learn_is_a_finite_one_and_no_truth_value(value):
    rows = [Example("", "x", {"score": value}, where="a.jsonl:3")]
    with pytest.raises(UserError, match=r"^a\.jsonl:3: score must be a finite number of 32 bits, got"):
        targets_of(rows, "score", ("quality",))


def test_empty_texts_are_counted(caplog):
    targets_of([Example("", text, {"label": 0}, where="a:1") for text in ("x", " ", "")], "label", ("a", "b"))
    assert caplog.messages == ["2 of 3 rows (66.7 %) of a, first line 1, have an empty text"]


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"row 1: no column 'label'.*did you mean 'lable'"):
        targets_of([Example("", "x", {"lable": 0})], "label", ("bad", "good"))


def stream(num_rows=1003, seed=0):
    lengths = np.random.default_rng(1).integers(1, 200, num_rows)
    return LabelledStream([np.full(n, n, np.int32) for n in lengths], np.arange(num_rows), seed)


def test_an_epoch_reads_every_row_once_but_for_the_few_that_fill_no_batch():
    rows = stream()
    for epoch in range(2):
        seen = np.concatenate([rows.chosen(8 * (125 * epoch + i), 8) for i in range(125)])
        assert len(set(seen.tolist())) == 1000
    assert rows.chosen(0, 8).tolist() != rows.chosen(1000, 8).tolist()


def test_a_batch_depends_on_data_seed_and_cursor_alone():
    first, again, other = stream(), stream(), stream(seed=1)
    again.chosen(800, 8)
    assert first.chosen(4008, 8).tolist() == again.chosen(4008, 8).tolist()
    assert first.chosen(0, 8).tolist() != other.chosen(0, 8).tolist()


def test_rows_of_a_batch_have_like_lengths_and_batches_come_in_any_order():
    rows = stream()
    batches = [rows.batch(8 * i, 8) for i in range(50)]
    assert np.mean([batch.mask.mean() for batch in batches]) > 0.6  # of random batches 0.43
    widths = [batch.tokens.shape[1] for batch in batches]
    assert len(set(widths)) > 2
    assert widths != sorted(widths)
    batch = batches[0]
    assert (batch.tokens == np.where(batch.mask, batch.mask.sum(1)[:, None], 0)).all()


def test_more_rows_a_batch_than_there_are_is_refused():
    with pytest.raises(UserError, match="batch_size must be at most the 3 rows of the data, got 4"):
        stream(3).chosen(0, 4)
