"""Measures of style for English: readability and formality."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from hybrid_jax.metrics.packages import import_package
from hybrid_jax.metrics.text import sentences, words

_LONGEST_WORD = 50  # characters; what is longer is no word

# The words of the closed classes, and the commonest of those whose class their ending does not show. A word of
# two classes stands in the one that it is more often.
_CLASSES = {
    "article": """
        a an the
    """,
    "preposition": """
        about above across after against along amid among around at before behind below beneath beside
        besides between beyond by despite down during except for from in inside into like near of off on
        onto out outside over past per since through throughout till to toward towards under until up upon
        via with within without
    """,
    "pronoun": """
        i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it
        its itself we us our ours ourselves they them their theirs themselves this that these those who
        whom whose which what whoever whatever someone somebody something anyone anybody anything everyone
        everybody everything nobody nothing none one each other i'm i've i'd i'll you're you've you'd
        you'll he's he'd he'll she's she'd she'll it's it'd it'll we're we've we'd we'll they're they've
        they'd they'll that's that'll there's who's what's u ur
    """,
    "verb": """
        am is are was were be been being do does did done doing have has had having will would shall
        should can could may might must ain't isn't aren't wasn't weren't don't doesn't didn't haven't
        hasn't hadn't won't wouldn't shan't shouldn't can't cannot couldn't mustn't let let's go goes went
        gone get gets got gotten give gives gave given make makes made take takes took taken come comes
        came see sees saw seen know knows knew known think thinks thought say says said tell tells told
        want wants find finds found use uses keep keeps kept put puts feel feels felt become becomes
        became leave leaves left bring brings brought begin begins began hold holds held write writes
        wrote stand stands stood hear hears heard mean means meant meet meets met run runs ran pay pays
        paid sit sits sat lose loses lost send sends sent build builds built understand understands
        understood speak speaks spoke spend spends spent need needs seem seems ask asks try tries call
        calls love loves hate hates likes look looks help helps start starts show shows eat eats ate buy
        buys bought hope hopes guess believe believes wanna gonna gotta
    """,
    "adverb": """
        not n't very too also just only never always often sometimes here there now then so well again
        already still yet soon perhaps maybe quite rather almost even ever away back how when where why
        thus hence however therefore moreover furthermore nevertheless indeed instead far much more most
        less least really
    """,
    "interjection": """
        oh ah wow hey hi hello bye yes yeah yep no nope ok okay please thanks ouch oops hmm huh ugh yay
        hurray lol omg haha uh um
    """,
    "conjunction": """
        and or but nor if because although though while whereas unless than as whether
    """,
    "adjective": """
        good new old great big small large long high low little own same different few many several some
        any all both such next last first second bad best better early young important public able free
        real full sure true right wrong short hard easy nice happy sad whole main certain strong cheap
        poor rich
    """,
}
_ENDINGS = (  # the first that fits a word of at least 5 letters
    ("adverb", ("ly",)),
    ("noun", ("tion", "sion", "ment", "ness", "ity", "ance", "ence", "ship", "ism", "hood", "ings", "ture")),
    ("adjective", ("able", "ible", "ful", "less", "ous", "ive", "ical", "ic", "ish", "ary", "ial", "ual")),
    ("verb", ("ing", "ed", "ize", "ise", "izes", "ises", "ify", "ifies", "n't", "'ll", "'ve")),
)
_SIGNS = {  # of the F-score; a conjunction counts for neither side
    "noun": 1,
    "adjective": 1,
    "preposition": 1,
    "article": 1,
    "pronoun": -1,
    "verb": -1,
    "adverb": -1,
    "interjection": -1,
    "conjunction": 0,
}


def flesch_reading_ease(num_words: int, num_sentences: int, num_syllables: int) -> float:
    """``206.835 - 1.015 words / sentences - 84.6 syllables / words`` (Flesch 1948).

    About 100 is very easy, 60 plain English, 30 difficult; unbounded on both sides. At least one word and one
    sentence.
    """
    return 206.835 - 1.015 * num_words / num_sentences - 84.6 * num_syllables / num_words


def reading_ease(text: str) -> float | None:
    """`flesch_reading_ease` of an English text; None for a text without words."""
    found = words(text)
    if not found:
        return None
    num_sentences = sum(1 for sentence in sentences(text) if words(sentence))
    return flesch_reading_ease(len(found), num_sentences, sum(map(syllables, found)))


@functools.lru_cache(maxsize=65536)
def syllables(word: str) -> int:
    """Syllables of an English word by hyphenation (pyphen, en_US), at least 1; it misses a few."""
    return 1 if len(word) > _LONGEST_WORD else len(_hyphenation().positions(word)) + 1


def formality(text: str) -> float:
    """The F-score of Heylighen and Dewaele (1999) with guessed word classes, in [0, 100].

    ``(nouns + adjectives + prepositions + articles - pronouns - verbs - adverbs - interjections + 100) / 2``,
    in percent of the words: a text of nouns scores high, one of pronouns and verbs low. The classes are
    guessed for each word alone, from short lists of the closed classes and common verbs, then from its ending;
    an unknown word counts as a noun. So it is a proxy for English: on 65 documents of the English Web Treebank
    with at least 100 words it correlates 0.93 with the score of the true classes; on a sentence it is noisy.
    50 for a text without words.
    """
    signs = [_SIGNS[word_class(word)] for word in words(text)]
    return 50.0 + 50.0 * sum(signs) / len(signs) if signs else 50.0


def word_class(word: str) -> str:
    """The guessed class of a lower-case word, one of those of `formality`."""
    word = word.replace("’", "'")
    if word in _lexicon():
        return _lexicon()[word]
    for name, endings in _ENDINGS:
        if len(word) > 4 and word.endswith(endings):
            return name
    return "noun"


@functools.cache
def _lexicon() -> Mapping[str, str]:
    return {word: name for name, listed in _CLASSES.items() for word in listed.split()}


@functools.cache
def _hyphenation() -> Any:
    return import_package("pyphen", "counting syllables").Pyphen(lang="en_US")
