import gzip
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.sources import (
    SOURCES,
    HuggingFaceDataset,
    Jsonl,
    Restaurants,
    TensorFlowDataset,
    Text,
)


def write_rows(path: Path, rows: list) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i} for i in range(20)]


def test_the_registry_names_every_source():
    assert {"huggingface", "jsonl", "restaurants", "text", "tfds"} <= set(SOURCES)


def test_restaurants_is_complete_when_held_out_and_omits_by_its_setting():
    examples = Restaurants(omission=0.0).load("train")
    assert len(examples) >= 5000
    assert examples != Restaurants(omission=0.5).load("train")
    assert Restaurants(omission=0.5).load("held_out") == Restaurants(omission=0.0).load("held_out")
    with pytest.raises(UserError, match=r"data\.omission must be in \[0, 1\], got 2"):
        parse(Restaurants, {"omission": 2}, "data")


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_jsonl_reads_plain_and_gzip_and_keeps_the_other_fields_as_columns(name, tmp_path):
    path = write_rows(tmp_path / name, ROWS)
    examples = Jsonl(train=path).load("train")
    assert examples[3] == Example("question 3", "answer 3", {"label": 3})
    assert len(examples) == 20


def test_jsonl_fields_and_templates_make_the_texts(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"q": "Why?", "a": "So.", "n": 1}])
    fields = Jsonl(train=path, prompt_field="q", response_field="a")
    assert fields.load("train") == [Example("Why?", "So.", {"n": 1})]
    templates = Jsonl(train=path, prompt_template="Q{n}: {q}\nA:", response_template=" {a}")
    assert templates.load("train") == [Example("Q1: Why?\nA:", " So.", {"q": "Why?", "a": "So.", "n": 1})]
    prompts = Jsonl(train=path, prompt_field="q", response_field=None)
    assert prompts.load("train") == [Example("Why?", None, {"a": "So.", "n": 1})]
    documents = Jsonl(train=path, prompt_field=None, response_field="a")
    assert documents.load("train") == [Example("", "So.", {"q": "Why?", "n": 1})]


def test_a_held_out_fraction_splits_by_prompt_so_that_equal_prompts_stay_together(tmp_path):
    rows = [{"prompt": f"p{i % 10}", "completion": f"c{i}"} for i in range(40)]
    source = Jsonl(train=write_rows(tmp_path / "data.jsonl", rows), held_out_fraction=0.3)
    train, held_out = source.load("train"), source.load("held_out")
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held_out)
    assert (len(train), len(held_out)) == (28, 12)
    shuffled = Jsonl(train=write_rows(tmp_path / "other.jsonl", rows[::-1]), held_out_fraction=0.3)
    assert {e.prompt for e in shuffled.load("held_out")} == {e.prompt for e in held_out}


def test_a_held_out_file_is_its_own(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ROWS[:5])
    source = Jsonl(train=train, held_out=write_rows(tmp_path / "test.jsonl", ROWS[5:8]))
    assert [e.prompt for e in source.load("held_out")] == ["question 5", "question 6", "question 7"]
    assert len(source.load("train")) == 5


def test_text_is_one_document_or_one_a_line(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("first\r\n\nsecond é\n".encode())
    assert Text(train=path).load("train") == [Example("", "first\n\nsecond é\n")]
    assert Text(train=path, lines=True).load("train") == [Example("", "first"), Example("", "second é")]
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert Text(train=tmp_path / "text.txt.gz").load("train") == Text(train=path).load("train")


def test_text_holds_out_its_tail_by_fraction_or_by_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("äbcdefghij")
    for source in (Text(train=path, held_out_fraction=0.2), Text(train=path, split_at=8)):
        assert source.load("train") == [Example("", "äbcdefgh")]
        assert source.load("held_out") == [Example("", "ij")]


def test_tinyshakespeare_has_the_standard_split(shared_data):
    path = shared_data / "tinyshakespeare" / "input.txt"
    for source in (Text(train=path, split_at=1_003_854), Text(train=path, held_out_fraction=0.1)):
        (train,), (held_out,) = source.load("train"), source.load("held_out")
        assert (len(train.response), len(held_out.response)) == (1_003_854, 111_540)
        assert train.response.startswith("First Citizen:")
        assert held_out.response.startswith("?\n\nGREMIO:\nGood morrow")


def test_e2e_reviews_load_with_their_references(shared_data):
    folder = shared_data / "e2e_nlg"
    source = Jsonl(train=folder / "train.jsonl", held_out=folder / "test.jsonl")
    assert len(source.load("train")) == 2365
    held_out = source.load("held_out")
    assert len(held_out) == 422
    assert held_out[0].prompt.startswith("name[Cocum], eatType[coffee shop]")
    assert held_out[0].response in held_out[0].columns["references"]


def test_a_large_gzip_file_loads(shared_data):
    source = Jsonl(train=shared_data / "imdb_full" / "test.jsonl.gz", prompt_field=None, response_field="text")
    examples = source.load("train")
    assert len(examples) == 25_000
    assert sum(example.columns["label"] for example in examples) == 12_500


def test_hugging_face_reads_local_files_saved_folders_and_splits(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train = write_rows(tmp_path / "train.jsonl", ROWS[:15])
    test = write_rows(tmp_path / "test.jsonl", ROWS[15:])
    files = {"train": str(train), "test": str(test)}
    source = HuggingFaceDataset(path="json", data_files=files, held_out_split="test")
    assert source.load("train")[0] == Example("question 0", "answer 0", {"label": 0})
    assert [e.columns["label"] for e in source.load("held_out")] == [15, 16, 17, 18, 19]

    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(str(tmp_path / "saved"))
    saved = HuggingFaceDataset(path=str(tmp_path / "saved"), held_out_fraction=0.25)
    assert (len(saved.load("train")), len(saved.load("held_out"))) == (15, 5)

    with pytest.raises(UserError, match=r"split 'validation' of the dataset .* cannot be loaded"):
        HuggingFaceDataset(path=str(tmp_path / "saved"), train_split="validation").load("train")
    with pytest.raises(UserError, match=r"split 'train' of the dataset '.*nothing' cannot be loaded"):
        HuggingFaceDataset(path=str(tmp_path / "nothing")).load("train")
    with pytest.raises(UserError, match=r"row 1: no field 'promt'; did you mean 'prompt'"):
        HuggingFaceDataset(path=str(tmp_path / "saved"), prompt_field="promt").load("train")


def test_tfds_rows_become_plain_texts_lists_and_numbers(monkeypatch):
    """A stand-in with the interface of ``tfds.data_source``: random access to dicts of bytes and arrays."""
    calls = []

    def data_source(name, split, data_dir):
        calls.append((name, split, data_dir))
        if split == "nothing":
            raise ValueError("Unknown split 'nothing'.\nMore lines.")
        return [{"text": "naïve".encode(), "label": np.int64(1), "tags": np.array([b"a", b"b"], object)}]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=data_source))
    settings = {"dataset": "tiny:1.0.0", "prompt_field": None, "response_field": "text"}
    source = TensorFlowDataset(**settings, held_out_split="test", data_dir=Path("prepared"))
    assert source.load("train") == [Example("", "naïve", {"label": 1, "tags": ["a", "b"]})]
    assert source.load("held_out")
    assert calls == [("tiny:1.0.0", "train", "prepared"), ("tiny:1.0.0", "test", "prepared")]
    with pytest.raises(UserError, match=r"split 'nothing' of the tfds dataset .*: Unknown split 'nothing'\.$"):
        TensorFlowDataset(**settings, train_split="nothing").load("train")


def test_a_dataset_that_tensorflow_datasets_wrote_is_read(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int32})
    rows = {"train": ["naïve", "two\nlines", ""], "test": ["漢"]}

    class Written(tfds.core.GeneratorBasedBuilder):
        """Texts with a number each."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(texts) for split, texts in rows.items()}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "number": number}

    Written(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    settings = {"dataset": "written", "data_dir": tmp_path, "prompt_field": None, "response_field": "text"}
    source = TensorFlowDataset(**settings, held_out_split="test")
    for split, name in (("train", "train"), ("held_out", "test")):
        expected = [Example("", text, {"number": number}) for number, text in enumerate(rows[name])]
        assert source.load(split) == expected
    with pytest.raises(UserError, match="split 'nothing' of the tfds dataset 'written' cannot be loaded"):
        TensorFlowDataset(**settings, train_split="nothing").load("train")


def test_without_its_package_tfds_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tfds\]'"):
        TensorFlowDataset(dataset="imdb_reviews").load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.jsonl has no train examples: the data is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', r"data.jsonl:2: not JSON: .* at column 12"),
        ("\n3", "data.jsonl:2: expected an object of fields, got int"),
        ('\n["a"]', "data.jsonl, row 1: expected an object of fields, got '\"'"),
        ('{"promt": "a", "completion": "b"}', "data.jsonl:1: no field 'prompt'; did you mean 'promt'"),
        ('{"prompt": "a", "completion": 3}', "data.jsonl:1: field 'completion' must be a text, got 3"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(text, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        Jsonl(train=tmp_path / "data.jsonl").load("train")
    assert "\n" not in str(raised.value)


def test_files_that_are_missing_broken_or_not_text_are_one_line_each(tmp_path):
    with pytest.raises(UserError, match=r"no data file '.*absent\.txt'"):
        Text(train=tmp_path / "absent.txt").load("train")
    with pytest.raises(UserError, match="is a directory; expected a regular file"):
        Text(train=tmp_path).load("train")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"bad\.txt must be UTF-8 text, got byte 0xff at 3"):
        Text(train=tmp_path / "bad.txt").load("train")
    whole = gzip.compress(b"some text that is long enough to cut" * 9)
    for number, broken in enumerate((b"plain", whole[:-12], whole[:15] + b"\xff\xff" + whole[17:])):
        (tmp_path / f"{number}.txt.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"txt\.gz cannot be read"):
            Text(train=tmp_path / f"{number}.txt.gz").load("train")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="has no train examples"):
        Text(train=tmp_path / "blank.txt", lines=True).load("train")


def test_asking_for_held_out_data_that_no_one_set_aside_says_what_to_set(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(UserError, match=r"has no held-out data; set held_out .* or held_out_fraction"):
        Jsonl(train=path).load("held_out")
    with pytest.raises(UserError, match=r"has no held-out data; set held_out, held_out_fraction or split_at"):
        Text(train=path).load("held_out")
    with pytest.raises(UserError, match="has no held-out examples: the data is empty"):
        Text(train=path, split_at=10**6).load("held_out")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (Jsonl, {"held_out_fraction": 1.0}, r"data\.held_out_fraction must be in \(0, 1\), got 1.0"),
        (
            Jsonl,
            {"held_out": "b", "held_out_fraction": 0.1},
            "held_out must be alone, got held_out and held_out_fr",
        ),
        (Jsonl, {"prompt_template": "{q"}, "prompt_template must be a format of the row's fields"),
        (Jsonl, {"prompt_template": "{0} {q.x}"}, "prompt_template must name plain fields"),
        (Jsonl, {"prompt_field": None, "response_field": None}, "prompt_field must be a field name"),
        (Text, {"split_at": 0}, "split_at must be at least 1, got 0"),
        (Text, {"split_at": 5, "held_out_fraction": 0.1}, "split_at must be alone"),
        (Text, {"line": True}, "unknown setting 'data.line'; did you mean 'lines'"),
    ],
)
def test_impossible_settings_are_refused_before_any_file_is_read(source, settings, message):
    with pytest.raises(UserError, match=message):
        parse(source, {"train": "a.jsonl", **settings}, "data")


@pytest.mark.parametrize("value", [None, [1], {"a": 1}])
def test_a_template_takes_texts_and_numbers_alone(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": value, "completion": "b"}))
    source = Jsonl(train=path, prompt_template="Q: {q}")
    with pytest.raises(UserError, match="jsonl:1: field 'q' must be a text or a number for a template, got"):
        source.load("train")


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        ("{q!r}", {"q": None}, "must write its fields as they are"),
        ("{q:{n}}", {"q": "a", "n": None}, "must write its fields as they are"),
        ("{q}", {"q": True}, "must be a text or a number for a template, got True"),
        ("{q}", {"q": float("nan")}, "must be a text or a number for a template, got nan"),
        ("{q:.2f}", {"q": "a"}, "the template '{q:.2f}' does not fit the row"),
        ("{q}", {"q": None}, r"got null; leave such rows out by filter: .* or give a list of templates"),
        (["{q} {n}", "{n}"], {"q": "a", "n": None}, "field 'n' must be a text or a number .* got null"),
        ([], {}, "must hold a template"),
    ],
)  # fmt: skip
def test_no_template_writes_the_name_of_a_value_of_python(template, row, problem):
    with pytest.raises((UserError, ValueError), match=problem):
        Jsonl(train=Path("a"), prompt_template=template, response_field=None).example(row, "here")


def test_of_a_list_of_templates_the_first_whose_fields_are_all_there_makes_the_text(tmp_path):
    rows = [
        {"q": "Add.", "input": "1 2"},
        {"q": "Sing.", "input": ""},
        {"q": "Sit.", "input": None},
        {"q": "Go."},
    ]
    path = write_rows(tmp_path / "alpaca.jsonl", [{**row, "completion": "ok"} for row in rows])
    settings = {"train": str(path), "prompt_template": ["{q}\nInput: {input}\n", "{q}\n"]}
    prompts = [example.prompt for example in parse(Jsonl, settings, "data").load("train")]
    assert prompts == ["Add.\nInput: 1 2\n", "Sing.\n", "Sit.\n", "Go.\n"]
