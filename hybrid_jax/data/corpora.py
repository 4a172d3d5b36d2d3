"""The embedded corpus: facts about a restaurant in, a short review out, all written by this file.

A pair looks like this::

    name: The Eagle | food: Italian | price: cheap | area: riverside
    The Eagle serves affordable Italian dishes by the river.

Held-out combinations of facts never occur in training (a stable hash of the facts decides the split), so only
a model that learned to say facts, not to repeat reviews, covers them. A share of the training reviews leaves
a fact out, as people do: a model that imitates them forgets facts too, and a coverage reward has something to
teach.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal

from hybrid_jax.core.batches import Example

Facts = Mapping[str, str]  # slot -> value, always with a name

TRAIN_PAIRS = 6_000
HELD_OUT_PAIRS = 400
HELD_OUT_SHARE = 0.1  # of all combinations of facts
MAX_WORDS = 30

NAMES = (
    "The Eagle",
    "The Copper Pot",
    "Blue Lantern",
    "The Old Mill",
    "Olive Tree",
    "The Red Door",
    "Casa Rosa",
    "The Anchor",
    "Golden Spoon",
    "Luna",
    "The Fig Leaf",
    "Maple House",
)

# value -> the phrases a review may use for it. Foods are nouns, prices adjectives, areas say where,
# ratings and families are verb phrases.
SPECIALITIES = {
    "Italian": "pizza and pasta",
    "Indian": "curries",
    "French": "crepes",
    "Japanese": "sushi",
    "Mexican": "tacos",
    "Greek": "moussaka",
    "Thai": "coconut soups",
    "Turkish": "kebabs",
    "Spanish": "tapas",
    "English": "roast dinners",
}
FOODS = {
    food: (f"{food} food", f"{food} dishes", f"{food} cuisine", f"{food} meals", speciality)
    for food, speciality in SPECIALITIES.items()
}
PRICES = {
    "cheap": ("cheap", "inexpensive", "low-priced", "affordable"),
    "moderate": ("moderately priced", "mid-priced", "reasonably priced", "mid-range"),
    "high": ("pricey", "costly", "high-priced", "upmarket"),
}
AREAS = {
    "riverside": ("by the river", "on the riverside", "close to the river", "at the riverside"),
    "city centre": (
        "in the city centre",
        "downtown",
        "in the heart of the city",
        "in the middle of the city",
    ),
    "harbour": ("at the harbour", "by the harbour", "near the docks", "on the waterfront"),
    "old town": ("in the old town", "in the old quarter", "in the historic quarter", "among the old lanes"),
    "market": ("by the market", "near the market", "next to the market", "across from the market"),
    "station": ("near the station", "next to the train station", "by the station", "opposite the station"),
    "park": ("by the park", "next to the park", "beside the park", "on the edge of the park"),
    "campus": ("near the campus", "close to the university", "by the university", "on the campus"),
}
RATINGS = {
    "high": ("gets great reviews", "is highly rated", "has excellent ratings", "is loved by its guests"),
    "average": ("gets mixed reviews", "is rated as average", "has average ratings", "divides its guests"),
    "low": ("gets bad reviews", "is poorly rated", "has low ratings", "disappoints its guests"),
}
FAMILIES = {
    "yes": ("welcomes children", "is family friendly", "is great for kids", "is a good choice for families"),
    "no": ("is for adults only", "does not admit children", "turns children away", "is meant for grown-ups"),
}
SLOTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "food": FOODS,
    "price": PRICES,
    "area": AREAS,
    "rating": RATINGS,
    "family": FAMILIES,
}

PLACES = ("restaurant", "place", "spot", "eatery")
SUBJECTS = ("It", "The place", "This place", "The restaurant")
SERVES = ("serves", "offers", "makes", "has")
STANDS = ("is", "lies", "stands", "sits")
MEALS = ("food", "meals", "dishes", "plates")

# Openings, grouped by what they need.
DESCRIPTIONS = (
    "{name} is {place}{where}",
    "{name} is the name of {place}{where}",
    "there is {place} called {name}{where}",
    "you will find {place} called {name}{where}",
)
SERVINGS = (
    "{name} {serves} {meal}{where}",
    "{name}{where} {serves} {meal}",
    "{name} is known for {meal}{where}",
    "at {name}{where} you get {meal}",
)
PLACINGS = (
    "{area}, {name} {serves} {meal}",
    "{area} you will find {meal} at {name}",
    "{area}, {name} is the place for {meal}",
    "{area} there is {meal} at {name}",
)
INVITATIONS = (
    "for {meal}, try {name}{where}",
    "if you like {meal}, visit {name}{where}",
    "fans of {meal} should visit {name}{where}",
    "if you want {meal}, go to {name}{where}",
)
# A second clause may follow "and" only where the opening's subject is the restaurant itself.
JOINABLE = frozenset((DESCRIPTIONS[0], *SERVINGS[:3], PLACINGS[0]))

DROPPED_WORDS = frozenset(
    [
        "is",
        "gets",
        "has",
        "does",
        "by",
        "in",
        "on",
        "at",
        "near",
        "close",
        "next",
        "opposite",
        "across",
        "among",
        "beside",
    ]
)


def restaurants(
    split: Literal["train", "held_out"], omission: float = 0.25, seed: int = 0, size: int | None = None
) -> list[Example]:
    """Distinct prompt and review pairs, deterministic.

    ``columns["facts"]`` maps each slot to the phrases that cover it, ``columns["contradictions"]``
    to those of the slot's other values; no review contradicts its facts.

    Args:
        split: "train" (6,000 pairs) or "held_out" (400 pairs of other fact combinations, always complete).
        omission: share in [0, 1] of the training reviews that leave one or two facts out (never the name).
        seed: of the sampling; the split itself does not depend on it.
        size: number of pairs, if not the default.

    Raises:
        ValueError: for an unknown split or an omission outside [0, 1].
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, got {split!r}")
    if not 0 <= omission <= 1:
        raise ValueError(f"omission must be in [0, 1], got {omission}")
    held_out = split == "held_out"
    wanted = size if size is not None else HELD_OUT_PAIRS if held_out else TRAIN_PAIRS
    draw = random.Random(f"restaurants {split} {seed}")
    seen: set[str] = set()
    examples: list[Example] = []
    while len(examples) < wanted:
        facts = _draw_facts(draw)
        key = _key(facts)
        if key in seen or _is_held_out(key) != held_out:
            continue
        seen.add(key)
        said = facts
        if not held_out and draw.random() < omission:
            said = _leave_out(facts, draw)
        columns = {
            "facts": {slot: accepted_phrases(slot, value) for slot, value in facts.items()},
            "contradictions": {slot: _other_phrases(slot, value) for slot, value in facts.items()},
        }
        examples.append(Example(_prompt(facts), _review(said, draw), columns))
    return examples


@cache
def accepted_phrases(slot: str, value: str) -> list[str]:
    """Lower-case phrases of which any one, found in a lower-cased review, covers the fact."""
    if slot == "name":
        return [value.lower()]
    if slot == "food":
        return [value.lower(), SPECIALITIES[value]]
    return [_core(phrase) for phrase in SLOTS[slot][value]]


@cache
def _other_phrases(slot: str, value: str) -> list[str]:
    values = NAMES if slot == "name" else SLOTS[slot]
    return [phrase for other in values if other != value for phrase in accepted_phrases(slot, other)]


def _core(phrase: str) -> str:
    first, _, rest = phrase.partition(" ")
    return rest if rest and first in DROPPED_WORDS else phrase


def _draw_facts(draw: random.Random) -> Facts:
    slots = draw.sample(list(SLOTS), k=draw.choice((2, 3, 3, 4, 4, 5)))
    values = {slot: draw.choice(list(SLOTS[slot])) for slot in SLOTS if slot in slots}
    return {"name": draw.choice(NAMES), **values}


def _key(facts: Facts) -> str:
    return " | ".join(f"{slot}: {facts[slot]}" for slot in sorted(facts))


def _is_held_out(key: str) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _leave_out(facts: Facts, draw: random.Random) -> Facts:
    slots = [slot for slot in facts if slot != "name"]
    count = min(draw.choice((1, 1, 2)), len(slots) - 1)
    gone = draw.sample(slots, k=count)
    return {slot: value for slot, value in facts.items() if slot not in gone}


def _prompt(facts: Facts) -> str:
    return " | ".join(f"{slot}: {value}" for slot, value in facts.items())


def _review(facts: Facts, draw: random.Random) -> str:
    """One to three sentences that say exactly these facts, in at most `MAX_WORDS` words."""
    while len((review := _sentences(facts, draw)).split()) > MAX_WORDS:
        pass
    return review


def _sentences(facts: Facts, draw: random.Random) -> str:
    """An opening, then a verb phrase for each fact left."""
    opening, joinable, left = _opening(facts, draw)
    clauses = [_clause(slot, facts[slot], draw) for slot in left]
    draw.shuffle(clauses)
    if clauses and joinable and draw.random() < 0.5:
        opening = f"{opening} and {clauses.pop(0)}"
    sentences = [opening]
    if clauses:
        sentences.append(f"{draw.choice(SUBJECTS)} {_enumerate(clauses[:2])}")
    if clauses[2:]:
        sentences.append(f"It {_enumerate(clauses[2:])}")
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _opening(facts: Facts, draw: random.Random) -> tuple[str, bool, list[str]]:
    """The first clause, whether a verb phrase may follow it, and the slots that it did not say."""
    kinds: list[Callable[[Facts, random.Random], tuple[str, bool, set[str]]]] = [_plain]
    if "food" in facts:
        kinds = [_with_meal, _with_meal, _with_meal, _describing, _plain]
    elif {"price", "area"} & facts.keys():
        kinds = [_describing, _describing, _plain]
    text, joinable, said = draw.choice(kinds)(facts, draw)
    return text, joinable, [slot for slot in facts if slot not in said | {"name"}]


def _with_meal(facts: Facts, draw: random.Random) -> tuple[str, bool, set[str]]:
    groups = (SERVINGS, INVITATIONS, PLACINGS) if "area" in facts else (SERVINGS, INVITATIONS)
    pattern = draw.choice(draw.choice(groups))
    said = {"food"}
    meal = draw.choice(FOODS[facts["food"]])
    if "price" in facts and draw.random() < 0.6:
        said.add("price")
        meal = f"{draw.choice(PRICES[facts['price']])} {meal}"
    area = where = ""
    if "area" in facts and ("{area}" in pattern or draw.random() < 0.6):
        said.add("area")
        area = draw.choice(AREAS[facts["area"]])
        where = f" {area}"
    serves = draw.choice(SERVES)
    text = pattern.format(name=facts["name"], serves=serves, meal=meal, area=area, where=where)
    return text, pattern in JOINABLE, said


def _describing(facts: Facts, draw: random.Random) -> tuple[str, bool, set[str]]:
    """The Eagle is a cheap Italian place by the river."""
    usable = [slot for slot in ("price", "food", "area") if slot in facts]
    said = {slot for slot in usable if draw.random() < 0.7} or {draw.choice(usable)}
    words = [draw.choice(PRICES[facts["price"]])] if "price" in said else []
    words += [facts["food"]] if "food" in said else []
    words.append(draw.choice(PLACES))
    where = f" {draw.choice(AREAS[facts['area']])}" if "area" in said else ""
    pattern = draw.choice(DESCRIPTIONS)
    return (
        pattern.format(name=facts["name"], place=_with_article(" ".join(words)), where=where),
        pattern in JOINABLE,
        said,
    )


def _plain(facts: Facts, draw: random.Random) -> tuple[str, bool, set[str]]:
    """The name, then any one fact as a verb phrase."""
    slot = draw.choice([slot for slot in facts if slot != "name"])
    return f"{facts['name']} {_clause(slot, facts[slot], draw)}", True, {slot}


def _clause(slot: str, value: str, draw: random.Random) -> str:
    """A verb phrase, third person singular."""
    phrase = draw.choice(SLOTS[slot][value])
    if slot == "food":
        return f"{draw.choice(SERVES)} {phrase}"
    if slot == "price":
        return draw.choice((f"is {phrase}", f"{draw.choice(SERVES)} {phrase} {draw.choice(MEALS)}"))
    if slot == "area":
        return f"{draw.choice(STANDS)} {phrase}"
    return phrase


def _enumerate(clauses: Sequence[str]) -> str:
    return " and ".join(clauses)


def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0].lower() in 'aeiou' else 'a'} {noun_phrase}"
