"""Twenty questions over a table: a small game whose best return is known.

    user        guess                              user        guess
    assistant   winged?                            assistant   bear
    user        no                                 user        right
    assistant   big?
    user        yes
    …

The secret is one of a few animals, each as likely as any other. What the policy knows is the set of those that
fit the answers so far, so dynamic programming over these sets gives the best return there is.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Interval

from hybrid_jax.core.batches import Message
from hybrid_jax.core.ranges import Finite, NonNegative, settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step

ATTRIBUTES = ("winged", "big", "tame")
TABLE = {  # does it have each of the attributes?
    "eagle": (True, True, False),
    "cat": (False, False, True),
    "bear": (False, True, False),
    "parrot": (True, False, True),
    "horse": (False, True, True),
    "bat": (True, False, False),
    "goose": (True, True, True),
    "mouse": (False, False, False),
}
START, YES, NO, UNCLEAR = "guess", "yes", "no", "what?"
_ASKED = re.compile(r"(?:is it )?(?:an? )?([a-z]+)\s*\??")

Group = tuple[str, ...]  # animals, in the order of the table


@ENVIRONMENTS.register("twenty_questions")
@settings
class TwentyQuestions:
    """A game of questions: find out which animal it is, in few questions.

    The policy asks about an attribute, ``big?`` or ``is it big?``, and is told ``yes`` or ``no``; or it guesses
    an animal, ``bear`` or ``is it a bear?``, which ends the game. Anything else is answered ``what?`` and costs
    as much as a question. A question beyond ``max_questions`` ends the game without an answer.

    Attributes:
        num_animals: how many there are, the first of the table.
        num_attributes: how many can be asked about, the first of winged, big, tame.
        max_questions: that are answered.
        question_cost: taken off for each question.
        right: the reward of the right guess.
        wrong: the reward of a wrong one.
        rules: begins with a message of the system that tells a language model how to play.
    """

    num_animals: Annotated[int, Interval(ge=2, le=8)] = 8
    num_attributes: Annotated[int, Interval(ge=1, le=3)] = 3
    max_questions: Annotated[int, Interval(ge=0, le=20)] = 3
    question_cost: NonNegative = 0.05
    right: Finite = 1.0
    wrong: Finite = 0.0
    rules: bool = False

    def make(self, answer_fn: AnswerFn | None = None) -> Game:
        """A game of its own for one conversation."""
        return Game(self)

    @property
    def animals(self) -> Group:
        """The animals that it may be."""
        return tuple(TABLE)[: self.num_animals]

    @property
    def attributes(self) -> Sequence[str]:
        """The attributes that can be asked about."""
        return ATTRIBUTES[: self.num_attributes]

    def moves(self) -> Sequence[str]:
        """All that can be asked and guessed."""
        return [*(f"{attribute}?" for attribute in self.attributes), *self.animals]

    def expert(self, messages: Sequence[Message]) -> str:
        """The best answer to a conversation so far, its own answers in it; the first of several."""
        known, asked = self.animals, [m["content"] for m in messages if m["role"] == "assistant"]
        told = [m["content"] for m in messages if m["role"] == "user"][1:]
        for question, answer in zip(asked, told, strict=False):
            attribute = meaning(question)
            if answer in (YES, NO) and attribute in self.attributes:
                known = split(known, attribute)[answer == NO]
        return _best(self, known, self.max_questions - len(asked))[1]

    def optimal_return(self) -> float:
        """The largest expected sum of the rewards of a game, by dynamic programming over what is known."""
        return _best(self, self.animals, self.max_questions)[0]

    def best_without_history(self) -> float:
        """The largest expected return of a policy that sees the last message alone and counts the questions.

        So it bounds that of every policy without the history, and of one that draws its answers, too: the
        return is linear in what is done at each message and count, of which a game meets none twice.
        """
        return _best_blind(self, frozenset({self.animals}), self.max_questions)


class Game:
    """One game."""

    def __init__(self, settings: TwentyQuestions):
        self._settings = settings

    def reset(self, seed: int) -> Sequence[Message]:
        """Draws the secret."""
        self._secret = random.Random(seed).choice(self._settings.animals)
        self._left = self._settings.max_questions
        rules = [{"role": "system", "content": _rules(self._settings)}] if self._settings.rules else []
        return [*rules, _said(START)]

    def step(self, text: str) -> Step:
        """Replies to a question or a guess."""
        asked = meaning(text)
        if asked in self._settings.animals:
            if asked == self._secret:
                return Step([_said("right")], self._settings.right, True)
            return Step([_said(f"wrong, {self._secret}")], self._settings.wrong, True)
        cost = -self._settings.question_cost
        if self._left == 0:
            return Step([_said(f"too late, {self._secret}")], cost, True)
        self._left -= 1
        if asked not in self._settings.attributes:
            return Step([_said(UNCLEAR)], cost, False, info={"unclear": 1})
        return Step([_said(YES if has(self._secret, asked) else NO)], cost, False)


def meaning(text: str) -> str:
    """The one word that a text asks about; none, "", where it is no such question."""
    match = _ASKED.fullmatch(text.strip().lower())
    return match[1] if match else ""


def has(animal: str, attribute: str) -> bool:
    """Tells whether an animal has an attribute."""
    return TABLE[animal][ATTRIBUTES.index(attribute)]


def split(animals: Group, attribute: str) -> tuple[Group, Group]:
    """Splits animals into those with the attribute and those without."""
    chosen = tuple(animal for animal in animals if has(animal, attribute))
    return chosen, tuple(animal for animal in animals if animal not in chosen)


@functools.cache
def _best(game: TwentyQuestions, known: Group, left: int) -> tuple[float, str]:
    """The best return from here on, V(known, left), and what reaches it.

        V(K, n) = max { right / |K| + wrong (1 - 1 / |K|),  max over attributes of
                        -cost + |K+| / |K| V(K+, n - 1) + |K-| / |K| V(K-, n - 1) }

    and without questions left, a question earns ``-cost`` and nothing more.
    """
    options = [(_guess(game, known) / len(known), known[0])]
    for attribute in game.attributes:
        parts = [part for part in split(known, attribute) if part] if left > 0 else []
        later = sum(len(part) * _best(game, part, left - 1)[0] for part in parts)
        options.append((later / len(known) - game.question_cost, f"{attribute}?"))
    return max(options, key=lambda option: round(option[0], 9))  # the first of equal ones


def _guess(game: TwentyQuestions, animals: Group) -> float:
    """The rewards of one guess at each of them as the secret, added up."""
    return game.right + game.wrong * (len(animals) - 1)


@functools.cache
def _best_blind(game: TwentyQuestions, met: frozenset[Group], left: int) -> float:
    """The best expected return where each group of secrets has met a last message, all there is to go by.

    What is done at a message is done for all secrets that have met it. Those of several groups that get the
    same reply cannot be told apart any more. The choices are tried in the order of what they would be worth if
    they could, until none that is left can be better than the best.
    """
    bounds = []
    for choice in itertools.product((None, UNCLEAR, *game.attributes), repeat=len(met)):
        total, later = 0.0, list[tuple[str, Group]]()
        for asked, animals in zip(choice, met, strict=True):
            if asked is None:
                total += _guess(game, animals) / game.num_animals
                continue
            total -= game.question_cost * len(animals) / game.num_animals
            if left > 0:
                parts = [animals] if asked == UNCLEAR else split(animals, asked)
                later += zip([UNCLEAR] if asked == UNCLEAR else [YES, NO], parts, strict=True)
        told_apart = sum(len(part) * _best(game, part, left - 1)[0] for _, part in later if part)
        bounds.append((total + told_apart / game.num_animals, total, later))
    best = -float("inf")
    for bound, total, later in sorted(bounds, key=lambda choice: -choice[0]):
        if bound <= best + 1e-12:
            break
        groups = {reply: [part for other, part in later if other == reply] for reply, _ in later}
        merged = [tuple(a for a in game.animals if any(a in p for p in parts)) for parts in groups.values()]
        rest = frozenset(filter(None, merged))
        best = max(best, total + (_best_blind(game, rest, left - 1) if rest else 0.0))
    return best


def _said(text: str) -> Message:
    return {"role": "user", "content": text}


def _rules(game: TwentyQuestions) -> str:
    return (
        f"Find out which animal I think of: {', '.join(game.animals)}. Answer with one word at a time. You may "
        f'ask whether it is {" or ".join(game.attributes)}, as in "{game.attributes[0]}?", at most '
        f'{game.max_questions} times; I say yes or no. Then name the animal, as in "{game.animals[0]}".'
    )
