"""Slot coverage for the restaurants of the E2E NLG challenge (Novikova et al. 2017): what a review states.

The phrasings were collected by reading what people wrote for each value in the training split. Values that
people use for one another (``high`` and ``5 out of 5``) share a rule.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Share, settings
from hybrid_jax.rewards.base import REWARDS

_SLOT = re.compile(r"([A-Za-z][A-Za-z ]*?)\s*\[([^\]]*)\]")

_PRICE = r"(?:pric\w*|cost\w*)"
_RATING = (
    r"(?:rat(?:ed?|es|ing|ings)|reviews?|reviewed|rank\w*|reputation|recommended|regarded|satisfaction"
    r"|feedback|quality)"
)
_FAMILY = r"(?:famil(?:y|ies)|kids?|child(?:ren)?s?)"

# Up to two words between a level and its noun, "low customer rating": no other level, no other topic.
_OTHER_TOPIC = r"(?:low|high|average|moderate|good|great|bad|poor|pric|cost|and|but|with|food)"
_GAP = rf"(?:(?!{_OTHER_TOPIC}\w*)[\w'’]+[- ]){{0,2}}"
# What links a noun to its level: "the rating by customers is only average".
_LINK = (
    r"(?:[ :]+(?:range|point|bracket|customers?|for|this|establishment|is|are|of|as|in|at|from|by|very|quite"
    r"|only|an?|the)){0,5}[ :-]+"
)
# Up to 35 characters that do not start another clause.
_SAME_CLAUSE = r"(?:(?!\b(?:but|and|yet|though)\b)[^.,;]){0,35}?"


def _level(adjectives: str, noun: str) -> str:
    """``low customer rating``, ``low-rated`` or ``the rating by customers is low``."""
    return rf"(?:{adjectives})[- ]+{_GAP}{noun}|{noun}{_LINK}(?:{adjectives})"


def _stars(number: str) -> str:
    """``1 out of 5``, ``one star``, ``rated 1``; not the last words of ``1 out of 5 stars``."""
    return (
        rf"(?:{number})(?:[- ](?:points?|stars?))?(?:[- ]ou[tr])?[- ]?(?:of|/|-|from)?[- ]?(?:5|five)"
        rf"|(?<!of )(?<!out )(?<!/)(?:{number})[- ]?star(?:s|red)?|{_RATING}{_LINK}(?:{number})(?!\w)"
    )


_LOW_PRICE = (
    _level(r"low(?:er|est)?|cheap", _PRICE),
    r"cheap(?:ly|er|est)?|inexpensive(?:ly)?|affordabl[ey]|budget|economical|low[- ]end|great value|bargain",
    r"(?:less than|under|below|lower than|up to|within) ?[£€$]? ?20",
)
_MODERATE_PRICE = (
    _level(r"moderate(?:ly)?|medium|mid|middle|average|averagely|fair|decent|normal|good", _PRICE),
    r"moderate(?:ly)?[- ](?:priced?|expensive|cost)|moderate(?!ly| \w* ?rat)",
    r"mid(?:dle)?[- ]?(?:range|priced?)|reasonabl[ey]|fair(?:ly)?[- ]priced?",
    r"20 ?(?:to|-|–|and|or)? ?[£€$]?25|20 (?:pounds|euros) (?:to|-|and) 25",
)
_HIGH_PRICE = (
    _level(r"high(?:er|ly|est)?|upper|expensive|steep", _PRICE),
    r"(?<!not )(?<!moderately )(?<!somewhat )(?<!less )expensive",
    r"pric(?:e?y|ier)|costly|high[- ]end|upscale|upmarket|higher[- ]than[- ]average",
    r"(?:over|above|more than|upwards of|exceed\w*|at least|around) ?[£€$]? ?(?:30|thirty)",
)
_LOW_RATING = (
    _level(r"low(?:est|er|ly)?|poor(?:ly)?|bad(?:ly)?|terrible|below average|not[- ]high(?:ly)?", _RATING),
    _stars("1|one"),
)
_AVERAGE_RATING = (
    _level(r"average|averagely|moderate(?:ly)?|medium|mid|mediocre|decent(?:ly)?|fair(?:ly)?|okay?", _RATING),
    _stars("3|three"),
    r"(?:average|decent) (?:restaurant|place|venue|establishment|coffee shop)",
)
_HIGH_RATING = (
    _level(r"high(?:est|er|ly)?|excellent|top|perfect|great|good|well|best|outstanding|fantastic", _RATING),
    _stars("5|five"),
    r"popular|well[- ]liked",
)
_CITY_CENTRE = (
    r"(?:city|cities|town)(?:['’]s)?[- ]cent(?:re|er|ral)\w*",
    r"cent(?:re|er) of (?:the |\w+ )?(?:city|town|cambridge)",
    r"downtown|(?:heart|middle) of (?:the )?(?:city|town)|central(?:ly)?|in the (?:city|centre|center)",
)
_NOT_FOR_FAMILIES = (
    rf"(?:not|no|non|nor|never|\w+n['’]t|cannot|unfriendly|unsuitable)\b{_SAME_CLAUSE}\b{_FAMILY}",
    rf"{_FAMILY}\b{_SAME_CLAUSE}\b(?:not|no|\w+n['’]t|unfriendly|unwelcome|prohibited|banned|discouraged)",
    r"adults?|couples|grown[- ]?ups?|(?:kid|child)[- ]?(?:free|less)",
)

# slot -> groups of values that mean the same, each with the regular expressions of which any one states it
_RULES: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "priceRange": {
        ("cheap", "less than £20"): _LOW_PRICE,
        ("moderate", "£20-25"): _MODERATE_PRICE,
        ("high", "more than £30"): _HIGH_PRICE,
    },
    "customer rating": {
        ("low", "1 out of 5"): _LOW_RATING,
        ("average", "3 out of 5"): _AVERAGE_RATING,
        ("high", "5 out of 5"): _HIGH_RATING,
    },
    "area": {
        ("riverside",): (r"river(?:[- ]?(?:side|bank|front|s))?|waterfront",),
        ("city centre",): _CITY_CENTRE,
    },
    "food": {
        ("english",): (r"english|british|breakfasts?|fish and chips",),
        ("chinese",): (r"chinese|chines|china",),
    },
    "eatType": {
        ("coffee shop",): (r"coffee[- ]?(?:shops?|house|place|bar)|caf[eé]",),
        ("pub",): (r"pubs?|public house|tavern",),
        ("restaurant",): (r"restaurants?|eatery|diner|bistro",),
    },
    "familyFriendly": {
        ("yes",): (rf"{_FAMILY}|all ages|everyone",),
        ("no",): _NOT_FOR_FAMILIES,
    },
}
# Two values of these cannot both be true; a coffee shop may well be called a restaurant.
_EXCLUSIVE = frozenset(("priceRange", "customer rating", "area", "food", "familyFriendly"))


@REWARDS.register("slot_coverage")
@settings
class SlotCoverage:
    """Share of the slots of the prompt, ``name[The Eagle], food[French], …``, that the response states.

    Slots are those of the E2E NLG challenge; any other slot is stated by its value. Range [0, 1]; an empty
    response scores 0. People's own reviews score 0.93 on the training split, because they leave facts out.

    Attributes:
        contradiction_penalty: What a stated slot loses, in [0, 1], when the response states another value
            too, so that naming every value does not pay.

    Raises:
        UserError: A prompt has no ``slot[value]``.
    """

    contradiction_penalty: Share = 1.0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self._score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _score(self, prompt: str, response: str) -> float:
        slots = read_slots(prompt)
        stated = stated_slots(slots, response)
        contradicted = contradicted_slots(slots, response) if self.contradiction_penalty else set()
        return (len(stated) - self.contradiction_penalty * len(stated & contradicted)) / len(slots)


def read_slots(prompt: str) -> dict[str, str]:
    """``{"name": "The Eagle", "food": "French"}`` of ``name[The Eagle], food[French]``."""
    slots = dict(_SLOT.findall(prompt))
    if not slots:
        form = "'name[The Eagle], food[French]'"
        raise UserError(f"slot_coverage needs prompts of the form {form}, got {prompt[:60]!r}")
    return slots


def stated_slots(slots: dict[str, str], response: str) -> set[str]:
    """The slots whose value ``response`` states."""
    texts = _texts(slots, response)
    return {slot for slot, value in slots.items() if _states(texts[slot], slot, value)}


def contradicted_slots(slots: dict[str, str], response: str) -> set[str]:
    """The slots for which ``response`` states a value that excludes theirs."""
    texts = _texts(slots, response)
    return {slot for slot in slots.keys() & _EXCLUSIVE if _states_another(texts[slot], slot, slots[slot])}


def _texts(slots: dict[str, str], response: str) -> dict[str, str]:
    """The text to search for each slot: without the names, since Café Brazil is no café."""
    text = response.lower()
    names = [slots[slot].lower() for slot in ("name", "near") if slot in slots]
    others = functools.reduce(lambda rest, name: rest.replace(name, "it"), names, text)
    return {slot: text if slot in ("name", "near") else others for slot in slots}


def _states(text: str, slot: str, value: str) -> bool:
    if slot == "familyFriendly" and value.lower() == "yes" and _states(text, slot, "no"):
        return False  # "not family friendly" names families too
    for values, expressions in _RULES.get(slot, {}).items():
        if value.lower() in values:
            return _pattern(expressions).search(text) is not None
    return _pattern((_verbatim(value),)).search(text) is not None


def _states_another(text: str, slot: str, value: str) -> bool:
    others = [values[0] for values in _RULES[slot] if value.lower() not in values]
    return any(_states(text, slot, other) for other in others)


def _verbatim(value: str) -> str:
    """The value itself, its article optional, with or without accents."""
    return re.escape(value.lower().removeprefix("the ")).replace("é", "[eé]").replace("crowne", "crowne?")


@functools.lru_cache(maxsize=4096)
def _pattern(expressions: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(expressions)})(?!\w)")
