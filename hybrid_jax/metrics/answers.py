"""The final number of a text, read without executing anything: for problems whose answer can be verified."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_MOST_CHARACTERS = 100  # of a number; longer ones are no answers, and would take long to read
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-−+])\s?)?[$€£¥₹]?\s?(?P<late>(?<=[$€£¥₹])[-−+])?(?:"
    r"\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?:(?P<whole>\d+)\s)?(?<![\d/])(?P<numerator>\d+)\s?[/⁄]\s?(?P<denominator>\d+)(?![\d/])"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[+-]?\d{{1,2}})(?!\d))?"
    r")\s?(?P<percent>\\?%)?"
)


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction  # 50 for "50%"
    percent: bool

    def agrees(self, other: Number) -> bool:
        """Tells whether both mean the same number; with a sign on one side only, 50% is 50 or 0.5."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        percent, plain = (self, other) if self.percent else (other, self)
        return percent.value == 100 * plain.value


def final_number(text: str, marker: str | None = "####") -> Number | None:
    """The number after the last ``marker``, or the last number of a text without it; None for no number.

    Reads signs, thousands separated by commas, decimals, exponents of two digits, fractions (``3/4``,
    ``1 1/2``, ``\\\\frac{3}{4}``), currencies and percent signs, in any script's digits; a full stop after the
    number does not belong to it. Numbers of more than 100 characters and fractions over 0 do not count.
    """
    _, found, after = text.rpartition(marker) if marker else ("", "", text)
    matches = list(_NUMBER.finditer(after if found or not marker else text))
    if not matches:
        return None
    return _read(matches[0] if found else matches[-1])


def _read(match: re.Match[str]) -> Number | None:
    if len(match[0]) > _MOST_CHARACTERS:
        return None
    parts = match.groupdict()
    if parts["decimal"] is not None:
        value = Fraction(parts["decimal"].replace(",", "")) * Fraction(10) ** int(parts["exponent"] or 0)
    else:
        below = int(parts["bottom"] or parts["denominator"])
        if below == 0:
            return None
        value = int(parts["whole"] or 0) + Fraction(int(parts["top"] or parts["numerator"]), below)
    negative = (parts["sign"] or parts["late"] or "+") in "-−"
    return Number(-value if negative else value, parts["percent"] is not None)
