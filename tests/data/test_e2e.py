"""Placeholders for the names of E2E restaurants."""

import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.e2e import E2E, delexicalised, recombine, slots_of
from hybrid_jax.rewards.slots import SlotCoverage


def test_names_become_placeholders_wherever_they_are_written():
    example = Example(
        prompt="name[The Eagle], food[French], near[Burger King]",
        response="Near the burger king, Eagle serves French food. The Eagle is no Eagles club.",
        columns={"references": ["The Eagle is French."]},
    )
    expected = Example(
        prompt="name[X-name], food[French], near[X-near]",
        response="Near X-near, X-name serves French food. X-name is no Eagles club.",
        columns={
            "references": ["X-name is French."],
            "values": {"X-name": "The Eagle", "X-near": "Burger King"},
        },
    )
    assert delexicalised(example, ("name", "near")) == expected
    assert delexicalised(example, ()).response == example.response


def test_people_cover_as_many_slots_with_placeholders_as_with_names(shared_data):
    folder = shared_data / "e2e_nlg"
    means = []
    for slots in ((), ("name", "near")):
        rows = E2E(train=folder / "train.jsonl", held_out=folder / "test.jsonl", delexicalise=slots).load(
            "train"
        )
        scores = SlotCoverage()([row.prompt for row in rows], [row.response for row in rows])
        means.append(sum(scores) / len(scores))
    assert len(rows) == 2365
    assert abs(means[0] - means[1]) < 0.005
    assert means[1] > 0.93


def test_recombined_prompts_are_new_mixtures_of_known_values():
    examples = [Example("name[A], food[French]"), Example("name[B], food[Thai], customer rating[low]")]
    every = {
        f"name[{n}], food[{f}]{r}"
        for n in "AB"
        for f in ("French", "Thai")
        for r in ("", ", customer rating[low]")
    }
    held_out = {"name[A], food[Thai]"}
    assert set(recombine(examples, 7, held_out)) == every - held_out
    assert slots_of("name[B], customer rating[low]") == [("name", "B"), ("customer rating", "low")]
    with pytest.raises(UserError, match="recombined must be at most the 7 prompts that there are, got 8"):
        recombine(examples, 8, held_out)
