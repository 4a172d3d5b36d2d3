"""Slot coverage for the restaurants of the E2E NLG challenge (Novikova et al. 2017): which facts a review states.

The rules are lists of phrasings, found by reading what people wrote for each value. Matching is on lower-cased text; a rule is a
regular expression that must begin and end at word boundaries.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_jax.core.registry import UserError
from hybrid_jax.rewards.base import REWARDS

_SLOT = re.compile(r"([A-Za-z][A-Za-z ]*?)\s*\[([^\]]*)\]")

_FAMILY = r"(?:famil(?:y|ies)|kids?|child(?:ren)?|children's)"
_NOT = r"(?:not|no|non|never|isn't|doesn't|don't|aren't|without|unfriendly|adults?)"

_RULES: dict[str, dict[str, str]] = {}


@REWARDS.register("slot_coverage")
@dataclass(frozen=True)
class SlotCoverage:
    """Share of the slots of the prompt, ``name[The Eagle], food[French], …``, that the response states.

    Range [0, 1]; an empty response scores 0.

    Raises:
        UserError: A prompt has no ``slot[value]``.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self._score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _score(self, prompt: str, response: str) -> float:
        slots = _SLOT.findall(prompt)
        if not slots:
            raise UserError(f"a prompt has no slot[value], got {prompt[:60]!r}")
        return sum(states_slot(response, slot, value) for slot, value in slots) / len(slots)


def states_slot(response: str, slot: str, value: str) -> bool:
    """Whether ``response`` says that ``slot`` has ``value``."""
    return _pattern(slot, value).search(response.lower()) is not None


@functools.lru_cache(maxsize=4096)
def _pattern(slot: str, value: str) -> re.Pattern[str]:
    rule = _RULES.get(slot, {}).get(value.lower()) or re.escape(value.lower())
    return re.compile(rf"(?<!\w)(?:{rule})(?!\w)")
