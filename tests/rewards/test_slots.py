import json
import random

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.slots import SlotCoverage, contradicted_slots, read_slots, stated_slots


def states(slot, value, response):
    return stated_slots({slot: value}, response) == {slot}


def test_slots_are_read_from_the_prompt():
    prompt = "name[The Eagle], eatType[coffee shop], customer rating[1 out of 5], near[Café Brazil]"
    slots = {
        "name": "The Eagle",
        "eatType": "coffee shop",
        "customer rating": "1 out of 5",
        "near": "Café Brazil",
    }
    assert read_slots(prompt) == slots


@pytest.mark.parametrize(
    ("slot", "value", "response"),
    [
        ("name", "The Eagle", "Visit the eagle."),
        ("near", "Café Sicilia", "It is near Cafe Sicilia."),
        ("food", "French", "They serve french food."),  # no rule: the value itself
        ("eatType", "coffee shop", "a coffee-shop by the river"),
        ("area", "riverside", "It lies on the river."),
        ("area", "city centre", "in the center of the city"),
        ("priceRange", "cheap", "a low-cost place"),
        ("priceRange", "less than £20", "prices are under 20 pounds"),
        ("priceRange", "moderate", "It is moderately priced."),
        ("priceRange", "£20-25", "it costs £20-£25"),
        ("priceRange", "high", "The price range is high."),
        ("priceRange", "more than £30", "expensive food"),
        ("customer rating", "low", "it has a low customer rating"),
        ("customer rating", "1 out of 5", "a one-star coffee shop"),
        ("customer rating", "average", "Its rating by customers is average."),
        ("customer rating", "3 out of 5", "rated 3 out of 5"),
        ("customer rating", "high", "a highly-rated place"),
        ("customer rating", "5 out of 5", "It is five star."),
        ("familyFriendly", "yes", "It is kid friendly."),
        ("familyFriendly", "yes", "It welcomes families."),
        ("familyFriendly", "yes", "It is not expensive, and children are welcome."),
        ("familyFriendly", "no", "It is not family-friendly."),
        ("familyFriendly", "no", "Children aren't allowed."),
        ("familyFriendly", "no", "for adults only"),
        ("familyFriendly", "no", "a non kid friendly place"),
    ],
)
def test_what_people_write_states_the_slot(slot, value, response):
    assert states(slot, value, response)


@pytest.mark.parametrize(
    ("slot", "value", "response"),
    [
        ("name", "The Eagle", "The Eagles are here."),
        ("priceRange", "high", "an inexpensive place with a high rating"),
        ("priceRange", "cheap", "It has a low customer rating."),
        ("customer rating", "low", "low prices and a high rating"),
        ("customer rating", "high", "rated 1 out of 5 stars"),
        ("customer rating", "high", "a high price and a low rating"),
        ("customer rating", "average", "moderately priced"),
        ("familyFriendly", "yes", "It is not family-friendly."),
        ("familyFriendly", "yes", "Children aren't allowed."),
        ("familyFriendly", "no", "It is kid friendly."),
        ("area", "city centre", "It is by the river."),
        ("eatType", "pub", "a public place"),
    ],
)
def test_something_else_does_not_state_the_slot(slot, value, response):
    assert not states(slot, value, response)


def test_a_neighbours_name_states_no_other_slot():
    slots = {"near": "Café Brazil", "eatType": "coffee shop"}
    assert stated_slots(slots, "It is near Café Brazil.") == {"near"}
    assert stated_slots(slots, "A café near Café Brazil.") == {"near", "eatType"}


def test_naming_every_value_does_not_pay():
    prompt = "name[The Eagle], area[riverside], priceRange[cheap]"
    hedged = "The Eagle is a cheap, moderately priced and expensive place by the river in the city centre."
    assert contradicted_slots(read_slots(prompt), hedged) == {"area", "priceRange"}
    assert SlotCoverage()([prompt], [hedged]) == [pytest.approx(1 / 3)]
    assert SlotCoverage(contradiction_penalty=0.5)([prompt], [hedged]) == [pytest.approx(2 / 3)]
    assert SlotCoverage(contradiction_penalty=0.0)([prompt], [hedged]) == [1.0]


def test_coverage_is_the_share_of_slots():
    prompt = "name[The Eagle], food[Chinese], area[riverside], familyFriendly[no]"
    assert SlotCoverage()([prompt] * 2, ["The Eagle serves Chinese food to adults.", ""]) == [0.75, 0.0]


def test_a_prompt_without_slots_is_an_error_of_the_data():
    with pytest.raises(UserError, match=r"needs prompts of the form .* got 'Hello'"):
        evaluate_reward("slots", SlotCoverage(), ["Hello"], ["x"])


def test_peoples_reviews_cover_their_own_slots_and_not_those_of_others(shared_data):
    lines = (shared_data / "e2e_nlg" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    prompts, reviews = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    assert np.mean(SlotCoverage()(prompts, reviews)) > 0.93
    random.Random(0).shuffle(reviews)
    assert np.mean(SlotCoverage()(prompts, reviews)) < 0.32  # most of it "coffee shop", true of nearly all
