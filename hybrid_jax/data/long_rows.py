"""Policies for rows with more tokens than are read, and the line that counts them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.places import line_of, share_of

log = logging.getLogger(__name__)

Policy = Literal["truncate_end", "truncate_start", "drop", "error"]
ChatPolicy = Literal["truncate_end", "truncate_start", "drop_turns", "drop", "error"]  # of conversations, too


@dataclass(frozen=True)
class LongRows:
    """A policy for rows that are too long, with the words to report it.

    Attributes:
        policy: "truncate_end" cuts a row at its end, "truncate_start" at its start, "drop_turns" between two
            turns of a conversation, "drop" leaves it out, "error" stops.
        limit: the setting that bounds the tokens of a row.
        choice: the setting that holds the policy; None where there is none.
        advice: how to read longer rows; None says to raise ``limit``.
        rows: what they are.
    """

    policy: ChatPolicy = "truncate_end"
    limit: str = "max_length"
    choice: str | None = "long_rows"
    advice: str | None = None
    rows: str = "rows"

    @staticmethod
    def of_phase(name: str, policy: ChatPolicy, rows: str = "rows") -> LongRows:
        """Makes the policy for ``rows`` from the settings ``length`` and ``long_rows`` of a phase."""
        return LongRows(policy, f"phases.{name}.length", f"phases.{name}.long_rows", rows=rows)

    def report(
        self,
        lengths: Sequence[int],
        left_out: Sequence[bool],
        places: Sequence[str],
        most: int,
        why: str = "cut, nothing to learn would remain",
    ) -> None:
        """Says, once for all rows, how many are longer than ``most`` tokens and what becomes of them.

        Args:
            lengths: tokens of each row, uncut.
            left_out: whether a row is left out.
            places: where each row stands, as ``file:line`` or the like.
            most: tokens that are read.
            why: a row that is cut may be left out nevertheless.

        Raises:
            UserError: there is such a row and the policy is "error", or no row is left.
        """
        long = [row for row, length in enumerate(lengths) if length > most]
        if not long:
            return
        longest = max(long, key=lambda row: lengths[row])
        have = "has" if len(long) == 1 else "have"
        advice = self.advice or f"raise {self.limit}"
        found = (
            f"{share_of(len(long), places, self.rows)} {have} more than {most:,} tokens ({self.limit}), "
            f"the longest {lengths[longest]:,} ({line_of(places[longest])})"
        )
        if self.policy == "error":
            choice = f", or let {self.choice} be drop or truncate" if self.choice else ""
            raise UserError(f"{found}; {advice}{choice}")
        if all(left_out):
            raise UserError(f"{found}, so that none is left; {advice}")
        dropped = sum(left_out[row] for row in long)
        fate = self._fate(len(long) - dropped, dropped, why)
        choice = f"; {self.choice} is {self.policy}, or {advice}" if self.choice else ""
        log.warning("%s: %s%s", found, fate, choice)

    def _fate(self, cut: int, dropped: int, why: str) -> str:
        if self.policy == "drop":
            return f"{dropped:,} left out"
        where = {"truncate_end": "at the end", "drop_turns": "between turns"}.get(self.policy, "at the start")
        parts = [f"{cut:,} cut {where}"] if cut else []
        return ", ".join([*parts, *([f"{dropped:,} left out ({why})"] if dropped else [])])


DEFAULT = LongRows()
