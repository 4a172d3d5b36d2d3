"""evaluate --suite rewards as a user calls it: a file of texts, no run."""

import json

import numpy as np
import pytest
import yaml

from hybrid_jax import evaluate
from hybrid_jax.evaluation.reward_suite import TOTAL, load_rewards, read_texts, report, score_texts, summary

ROWS = [
    {"response": "the cat sat on the mat", "references": ["the cat is on the mat"], "final_answer": 1},
    {"response": "No, 5.", "references": "no", "final_answer": 5},
    {"response": "", "references": ["something"], "final_answer": 2},
    {"response": "你好，世界。🙂", "references": ["你好，世界。", "x"], "final_answer": 3},
    {"response": "word, " * 16_667, "references": ["a word"], "final_answer": "4"},
]


@pytest.fixture
def score(command, tmp_path):
    """Runs the command on a file; gives (exit code, stdout, stderr)."""

    def run(*arguments, data="data.jsonl"):
        return command(evaluate.main, "--suite", "rewards", "--data", tmp_path / data, *arguments)

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "texts.txt").write_text("one two\n\nthree\nfour five six seven\n")
    return run


def test_each_reward_gets_its_row_of_statistics_and_the_json_holds_every_score(score, tmp_path):
    call = ("--reward", "bleu", "--reward", "final_number", "--reward", "length", "length.target=6")
    code, out, err = score(*call, "--json", tmp_path / "scores.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "scores.json").read_text())
    rows = [row["scores"] for row in result["rows"]]
    assert [row["final_number"] for row in rows] == [0, 1, 0, 0, 0]
    assert rows[0]["bleu"] == pytest.approx(0.379918, abs=1e-6)
    assert [row["length"] for row in rows] == pytest.approx([0, -4 / 6, -1, -4 / 6, -16661 / 6])
    assert [row["response"] for row in result["rows"]] == [row["response"] for row in ROWS]
    numbers = result["rewards"]["length"]
    expected = np.quantile([row["length"] for row in rows], [0, 0.25, 0.5, 0.75, 1])
    assert [numbers[key] for key in ("min", "25%", "median", "75%", "max")] == pytest.approx(expected)
    header, *table = out.split("\n\n")[1].splitlines()
    assert header.split() == ["reward", "n", "mean", "std", "min", "25%", "median", "75%", "max"]
    assert table[1].split() == ["final_number", "5", "0.2", "0.4", "0", "0", "0", "0", "1"]


def test_correlations_are_pearsons_and_a_constant_has_none(tmp_path):
    (tmp_path / "t.txt").write_text("a\na b\na b c\na b c d d\n")
    texts = read_texts(tmp_path / "t.txt")
    numbers = summary(
        score_texts(load_rewards(["length", "repetition", "json_valid"], ["length.target=9"]), texts), texts
    )
    lengths, repeated = [1, 2, 3, 5], [0.0, 0.0, 0.0, 0.0]
    assert numbers["correlations"]["length"]["length in words"] == pytest.approx(1.0)
    assert numbers["correlations"]["length"]["json_valid"] is None
    assert [row["scores"]["repetition"] for row in numbers["rows"]] == repeated
    distinct = summary(score_texts(load_rewards(["distinct"], ["reward.n=1"]), texts), texts)
    values = [row["scores"]["distinct"] for row in distinct["rows"]]
    expected = np.corrcoef(values, lengths)[0, 1]
    assert distinct["correlations"]["distinct"]["length in words"] == pytest.approx(expected, abs=1e-6)
    assert "every text scores 0" in report(numbers)


def test_the_best_and_the_worst_rows_are_shown_shortened(score):
    out = score("--reward", "edit_similarity")[1].split("\n\n")[-1].splitlines()
    assert out[0] == "edit_similarity"
    assert [line.split()[0] for line in out[1:]] == ["best"] * 3 + ["worst"] * 2
    assert out[1].endswith("row 0: 'the cat sat on the mat'")
    assert out[4].startswith("  worst          0  row 2: ''")
    assert max(map(len, out)) < 120


def test_a_yaml_file_holds_a_mixture_or_one_reward(score, tmp_path):
    parts = {"near": {"reward": "chrf", "weight": 2.0}, "size": {"reward": {"name": "length", "target": 6}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"parts": parts}))
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"name": "length", "target": 6}))
    call = ("--reward", tmp_path / "mix.yaml", "--json", tmp_path / "a.json", "mix.parts.size.weight=0.5")
    assert score(*call)[::2] == (0, "")
    for row in json.loads((tmp_path / "a.json").read_text())["rows"]:
        expected = 2 * row["scores"]["near"] + 0.5 * row["scores"]["size"]
        assert row["scores"][TOTAL] == pytest.approx(expected, rel=1e-6)
    out = score("--reward", tmp_path / "mix.yaml", "--reward", tmp_path / "one.yaml")[1]
    assert [line.split()[0] for line in out.splitlines()[3:7]] == ["mix/near", "mix/size", "mix/total", "one"]


def test_a_function_of_the_user_scores_lines_of_text(score, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def size(prompts, responses):\n    return [len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = score("--reward", "mine:size", data="texts.txt")
    assert code == 0
    assert "mine:size  3  10.33" in out
    assert "row 2: 'four five six seven'" in out


def test_any_field_can_be_the_response_or_the_prompt(score, tmp_path):
    (tmp_path / "qa.jsonl").write_text(
        '{"question": "name[A B]", "answer": "A B is a pub.", "response": "x"}\n'
    )
    call = ("--reward", "slot_coverage", "--response-field", "answer", "--prompt-field", "question")
    code, out, _ = score(*call, data="qa.jsonl")
    assert code == 0
    assert "every text scores 1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reward", "blue"), "unknown reward 'blue'; did you mean 'bleu'?"),
        (("--reward", "length"), "reward 'length': reward.target is missing"),
        (("--reward", "length", "length.taget=3"), "unknown setting 'reward.taget'; did you mean 'target'?"),
        (("--reward", "bleu", "rouge.variant=rouge1"), "an override of a reward is bleu.setting=value"),
        (
            ("--reward", "bleu", "--reward", "bleu"),
            "--reward must be given once for each reward, got bleu, bleu",
        ),
        (("--reward", "concept_coverage"), "no column 'concepts'; known: final_answer, references"),
        (("--reward", "fact_coverage"), "needs the column 'facts'"),
        (
            ("--reward", "token_length", "reward.target=3"),
            "'token_length' scores the tokens of a run, not texts",
        ),
        (("--reward", "no.yaml"), "no config file 'no.yaml'"),
        (("--reward", "bleu", "--response-field", "respons"), "no field 'respons'; did you mean 'response'?"),
        (("--reward", "bleu", "--response-field", "references"), "field 'references' must be a text"),
        (("--reward", "bleu", "--json", "/no/such/file"), "/no/such/file cannot be written"),
        (("--reward", "bleu", "--run", "runs/x"), "it takes neither --run nor --num-prompts"),
        ((), "--suite rewards needs --reward NAME and --data FILE"),
    ],
)
def test_mistakes_are_one_line(score, arguments, message):
    code, _, err = score(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no data file"),
        (b"", "has no rows"),
        (b"\xff\xfe", "must be UTF-8 text, got byte 0xff at 0"),
        (b'{"response": "a"', "bad.jsonl:1: not JSON"),
        (b'{"response": "a"}\n{"other": 1}\n', "bad.jsonl:2: field 'response' must be a text, got None"),
        (b'{"respnse": "a"}\n', "no field 'response'; did you mean 'respnse'?"),
        (b'{"response": "a", "references": ["a"]}\n{"response": "b"}\n', "row 1 has no references"),
    ],
)
def test_a_file_that_cannot_be_scored_is_one_line(score, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.jsonl").write_bytes(content)
    code, _, err = score("--reward", "bleu", data="bad.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_run_is_still_needed_for_the_other_suites(command):
    assert "--run is missing" in command(evaluate.main, "--suite", "answers")[2]
    assert "belong to --suite rewards" in command(evaluate.main, "--run", "r", "--reward", "bleu")[2]
