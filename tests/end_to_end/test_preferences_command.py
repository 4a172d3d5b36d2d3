"""The command that makes pairs of what people said, divides them, and measures agreement and leaks."""

import json

import pytest

from hybrid_jax import preferences
from hybrid_jax.core.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    {"prompt": "a", "responses": ["x", "y", "z"], "ranking": [2, 1, 2], "source": "s"},
    {"prompt": "b", "responses": ["x", "y"], "ratings": [1.5, 4]},
    {"prompt": "c", "responses": ["x", "y"], "votes": [0, 1, 0, None, 0]},
    {"prompt": "d", "response": "x", "rating": 3},
    {"prompt": "d", "response": "y", "rating": 1},
    {"prompt": "d", "response": "x", "rating": 2},
]


def test_rankings_ratings_and_votes_become_pairs_with_their_margins(tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    preferences.main(["pairs", write(tmp_path / "in.jsonl", ROWS), "--output", str(out)])
    found = {(row["prompt"], row["chosen"], row["rejected"]): row["margin"] for row in read(out)}
    assert found == {
        ("a", "y", "x"): 1,
        ("a", "y", "z"): 1,
        ("b", "y", "x"): 2.5,
        ("c", "x", "y"): 0.5,
        ("d", "x", "y"): 1.5,
    }
    assert read(out)[0]["source"] == "s"
    assert "5 pairs; 1 were ties or too close" in capsys.readouterr().out


def test_a_least_margin_and_the_extremes_leave_pairs_out(tmp_path):
    data = write(tmp_path / "in.jsonl", ROWS)
    preferences.main(["pairs", data, "--output", str(tmp_path / "far.jsonl"), "--least-margin", "1.5"])
    assert [row["prompt"] for row in read(tmp_path / "far.jsonl")] == ["b"]
    preferences.main(["pairs", data, "--output", str(tmp_path / "ends.jsonl"), "--extremes"])
    assert [row["prompt"] for row in read(tmp_path / "ends.jsonl")] == ["a", "b", "c", "d"]


def test_a_split_keeps_prompts_together_and_may_match_lengths(tmp_path, capsys):
    long, short = "one two three four five six", "one two three four five"
    rows = [{"prompt": f"p{i // 3}", "chosen": long, "rejected": short, "n": i} for i in range(90)]
    rows += [{"prompt": f"p{i}", "chosen": short, "rejected": long, "n": 90 + i} for i in range(30)]
    rows += [{"prompt": f"p{i}", "chosen": long * 9, "rejected": short, "n": 120 + i} for i in range(30)]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    parts = ["--train", str(train), "--held-out", str(held_out), "--fraction", "0.2"]
    preferences.main(["split", write(tmp_path / "in.jsonl", rows), *parts, "--length-matched", "0.2"])
    sides = [{row["prompt"] for row in read(path)} for path in (train, held_out)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (24, 6, set())
    # Of 6 × (3 longer, 1 shorter, 1 far longer) one longer and one shorter of each prompt are left.
    assert sum(row["chosen"] == long for row in read(held_out)) == 6
    assert sum(row["chosen"] == short for row in read(held_out)) == 6
    assert "the longer answer wins 50.0 %" in capsys.readouterr().out


def test_leaks_are_whole_texts_and_passages_whatever_their_case(tmp_path, capsys):
    train = [{"prompt": "What is it?", "chosen": "A fine day in the old town", "rejected": "No"}]
    held_out = [
        {"prompt": "what is  it", "chosen": "Yes", "rejected": "maybe"},
        {"prompt": "Else?", "chosen": "NO!", "rejected": "maybe"},
        {"prompt": "Or: a fine day in the snow?", "chosen": "Oh", "rejected": "maybe"},
    ]
    files = [write(tmp_path / name, rows) for name, rows in (("a.jsonl", train), ("b.jsonl", held_out))]
    preferences.main(["leaks", *files, "--words", "5"])
    assert [line.split(" of ")[0] for line in capsys.readouterr().out.splitlines()] == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "responses": ["x", "y"], "votes": [2]}, r"indices of the responses, from 0 to 1"),
        ({"prompt": "a", "responses": ["x", "y"], "ratings": [1]}, r"'ratings' must be 2 numbers, got \[1\]"),
        ({"prompt": "a", "responses": ["x"], "ranking": [1]}, r"at least two texts, got 1"),
        ({"prompt": "a", "responses": ["x", "y"]}, r"expected one of 'ranking', 'ratings', 'votes'"),
        ({"responses": ["x", "y"], "ranking": [1, 2]}, r"'prompt' must be a text, got null"),
        ({"prompt": "a", "rating": True, "response": "x"}, r"a rating needs a 'response'"),
        ({"prompt": "a", "responses": ["x", "y"], "ranking": [1, 1]}, r"gives no pair: 1 comparisons"),
    ],
)
def test_a_wrong_row_is_one_line(row, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        preferences.main(["pairs", write(tmp_path / "in.jsonl", [row]), "--output", str(tmp_path / "o.jsonl")])


def test_no_file_is_written_over(tmp_path):
    data = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(UserError, match="is there already"):
        preferences.main(["pairs", data, "--output", data])


def test_agreement_is_printed_and_a_label_given_twice_is_refused(tmp_path, capsys):
    rows = [{"item": i, "annotator": who, "label": label} for i, who, label in [(1, "A", "x"), (1, "B", "y")]]
    preferences.main(["agree", write(tmp_path / "in.jsonl", rows)])
    assert "observed               0.0000" in capsys.readouterr().out
    with pytest.raises(UserError, match="'A' labels item '1' twice"):
        preferences.main(["agree", write(tmp_path / "in.jsonl", [*rows, rows[0]])])
