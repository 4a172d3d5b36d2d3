from fractions import Fraction

import pytest

from hybrid_jax.data.sources import json_rows
from hybrid_jax.metrics.answers import final_number

READINGS = {
    "so it is 5.": 5,
    "#### 42": 42,
    "first #### 7, then #### 1,234.50. and 9": Fraction("1234.5"),
    "$1,000,000.00": 1_000_000,
    "it costs -$5": -5,
    "it costs $-5": -5,
    "€ 3": 3,
    "minus −3": -3,
    "10-5": 5,
    "COVID-19": 19,
    "x=-.5": Fraction(-1, 2),
    "3/4 of it": Fraction(3, 4),
    "7 1/2 cups": Fraction(15, 2),
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    "1.5e3": 1500,
    "on 12/25/2024": 2024,
    "2, 3": 3,
    "1,234,5678": 5678,  # no thousands
    "٤٢": 42,
    "答案是４２。": 42,
}
NONE = ["", "none", "####", "5 and #### none", "5/0", "9" * 5000]


@pytest.mark.parametrize(("text", "value"), READINGS.items())
def test_the_final_number_is_read(text, value):
    assert final_number(text).value == value


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number_is_none(text):
    assert final_number(text) is None


def test_without_a_marker_the_last_number_counts():
    assert final_number("#### 5 of 6", marker=None).value == 6
    assert final_number("Answer: 5 of 6", marker="Answer:").value == 5


def test_a_percent_sign_on_one_side_may_mean_hundredths():
    def agree(one, other):
        return final_number(one).agrees(final_number(other))

    assert agree("50%", "50")
    assert agree("0.5", r"50 \%")
    assert agree("50%", "50.0%")
    assert not agree("50%", "0.5%")
    assert not agree("50", "0.5")
    assert not agree("0.33", "1/3")


def test_every_solution_of_gsm8k_ends_in_its_answer(shared_data):
    for part in ("train", "validation", "test"):
        for where, row in json_rows(shared_data / "gsm8k" / f"{part}.jsonl"):
            assert final_number(row["answer"]).agrees(final_number(row["final_answer"])), where


def test_it_grades_the_solutions_of_four_models_as_their_authors_did(shared_data):
    graded = 0
    for part in ("train", "validation", "test"):
        for where, row in json_rows(shared_data / "gsm8k_solutions" / f"{part}.jsonl"):
            found, wanted = final_number(row["solution"]), final_number(row["ground_truth"])
            assert (found is not None and found.agrees(wanted)) == bool(row["label"]), where
            graded += 1
    assert graded == 1858
