import gzip
import json

import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.preferences import (
    HuggingFacePreferences,
    JsonlPreferences,
    Preference,
    PreferenceExamples,
)

PLAIN = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def load(tmp_path, *rows, split="train", name="rows.jsonl", **settings):
    path = tmp_path / name
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return JsonlPreferences(train=path, **settings).load(split)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_plain_row_has_a_prompt_and_two_answers_and_keeps_its_other_fields(tmp_path, name):
    row = {**PLAIN, "confidence": 3, "id": "x"}
    (found,) = load(tmp_path, row, name=name, margin_field="confidence")
    assert found == Preference("q", "good", "bad", margin=3.0, columns={"id": "x"})
    assert found.ranking == (("good", "bad"), (0, 1))


def test_all_forms_of_a_conversation_are_the_same(tmp_path):
    asked = [user("a"), assistant("b"), user("c")]
    texts, messages, prompt, whole, one = load(
        tmp_path,
        {"messages": asked, "chosen": "good", "rejected": "bad"},
        {"messages": asked, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": asked, "chosen": "good", "rejected": [assistant("bad")]},
        {"chosen": [*asked, assistant("good")], "rejected": [*asked, assistant("bad")]},
        {"prompt": asked, "chosen": assistant("good"), "rejected": [*asked, assistant("bad")]},
    )
    assert texts == Preference("c", "good", "bad", tuple(asked))
    assert texts == messages == prompt == whole == one


def test_messages_can_be_left_unread(tmp_path):
    row = {**PLAIN, "messages": [user("q")]}
    assert load(tmp_path, row)[0].messages == (user("q"),)
    assert load(tmp_path, row, messages_field=None)[0].messages == ()


def test_ties_and_rankings_of_several_responses(tmp_path):
    tie, ranked = load(
        tmp_path,
        {**PLAIN, "tie": True},
        {"prompt": "q", "responses": ["b", "a", "d", "b2"], "ranking": [2, 1, 9, 2]},
    )
    assert tie.ranking == (("good", "bad"), (0, 0))
    assert ranked.ranking == (("b", "a", "d", "b2"), (1, 0, 2, 1))
    assert (ranked.chosen, ranked.rejected, ranked.tie) == ("a", "d", False)


def test_all_pairs_of_a_prompt_are_held_out_together(tmp_path):
    rows = [{"prompt": f"question {i % 40}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    train = load(tmp_path, *rows, held_out_fraction=0.25)
    held_out = load(tmp_path, *rows, held_out_fraction=0.25, split="held_out")
    prompts = [{row.prompt for row in side} for side in (train, held_out)]
    assert prompts[0] & prompts[1] == set()
    assert [len(side) for side in prompts] == [30, 10]
    assert sorted(row.chosen for row in (*train, *held_out)) == sorted(row["chosen"] for row in rows)


def test_all_turns_of_a_conversation_are_held_out_together(tmp_path):
    rows = []
    for i in range(20):
        asked = [user(f"hello {i}"), assistant("yes?"), user("more")]
        rows += [{"messages": asked[:1], "chosen": "x", "rejected": "y"}]
        rows += [{"messages": asked, "chosen": "x", "rejected": "y"}]
    train = load(tmp_path, *rows, held_out_fraction=0.3)
    held_out = load(tmp_path, *rows, held_out_fraction=0.3, split="held_out")
    begins = [{row.messages[0]["content"] for row in side} for side in (train, held_out)]
    assert begins[0] & begins[1] == set()
    assert (len(train), len(held_out)) == (28, 12)


def test_a_dataset_gives_the_same_rows_as_a_file(tmp_path):
    load(tmp_path, {**PLAIN, "messages": [user("q")]}, name="data.jsonl")
    source = HuggingFacePreferences(path="json", data_files={"train": str(tmp_path / "data.jsonl")})
    assert source.load("train") == [Preference("q", "good", "bad", (user("q"),))]
    with pytest.raises(UserError, match="has no held-out data"):
        source.load("held_out")


def test_a_preference_is_an_example_of_a_run_and_back(tmp_path):
    (plain,) = load(tmp_path, {**PLAIN, "id": 1, "tie": True})
    assert plain.example.response == "good"
    assert Preference.of(plain.example) == plain
    chat = Preference("c", "good", "bad", (user("a"), assistant("b"), user("c")), margin=0.5)
    assert chat.example.messages[-1] == assistant("good")
    assert Preference.of(chat.example) == chat
    with pytest.raises(UserError, match="expected rows with a chosen and a rejected response"):
        Preference.of(Example("q", "a"))


def test_a_run_names_its_preferences_in_its_config(tmp_path):
    load(tmp_path, PLAIN)
    settings = {"source": {"name": "jsonl", "train": str(tmp_path / "rows.jsonl")}}
    data = parse(PreferenceExamples, settings)
    assert data.load("train") == [Preference("q", "good", "bad").example]
    assert parse(PreferenceExamples, to_dict(data)) == data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "no field 'chosen'; did you mean 'choosen'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "no field 'rejected'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be a text or messages, got 3"),
        ({"chosen": "a", "rejected": "b"}, "no prompt; give it, or set prompt_field to null"),
        ({**PLAIN, "chosen": 7}, "'chosen' must be a list of messages, got 7"),
        ({**PLAIN, "tie": "yes"}, "'tie' must be true or false, got 'yes'"),
        ({**PLAIN, "sure": "very"}, "'sure' must be a number or null, got 'very'"),
        ({**PLAIN, "chosen": [user("x")]}, "'chosen' must end with a message of the assistant, got 'user'"),
        ({**PLAIN, "messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\].role is 'usr'"),
        (
            {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
            "must differ in the last answer only",
        ),
        ({"prompt": "q", "responses": ["a"], "ranking": [1]}, "'responses' must be two texts or more"),
        ({"prompt": "q", "responses": ["a", "b"], "ranking": [1]}, "'ranking' must be 2 numbers"),
        ({"prompt": "q", "responses": ["a", "b"]}, "'ranking' must be 2 numbers, the place of each"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, PLAIN, row, margin_field="sure")
    assert "rows.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shared_preference_sets_are_read_whole(shared_data):
    counts = {"polite_pref": 575, "tldr_comparisons": 705, "hh_rlhf_harmless": 908}
    for name, count in counts.items():
        rows = JsonlPreferences(train=shared_data / name / "train.jsonl", margin_field="confidence")
        assert len(rows.load("train")) == count
