"""Computes confidence intervals of differences over the same held-out prompts, prompt by prompt.

The interval is that of a paired t-test,  d̄ ± t(0.975, n − 1) · s / √n,  over the differences d of the n prompts
(Student 1908). It covers the choice of prompts and the noise of sampling, not that of another seed of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from hybrid_jax.reports.charts import short_number
from hybrid_jax.reports.run import Run

MIN_PROMPTS = 8  # with fewer prompts no interval is shown, since their spread is hardly known
METHOD = "95 % interval of the mean difference over the same {} held-out prompts, paired t"


@dataclass(frozen=True)
class Change:
    """A held-out number at one evaluation and at a later one.

    Attributes:
        before: (step, value).
        after: (step, value).
        num_prompts: answered at both; 0 where their values were not stored.
        interval: of the mean difference; None where too few prompts are known.
    """

    before: tuple[int, float]
    after: tuple[int, float]
    num_prompts: int = 0
    interval: tuple[float, float] | None = None

    @property
    def difference(self) -> float:
        """The later value less the earlier one."""
        return self.after[1] - self.before[1]

    @property
    def direction(self) -> int:
        """1 or -1 if the interval leaves out 0, else 0."""
        low, high = self.interval or (-math.inf, math.inf)
        return 1 if low > 0 else -1 if high < 0 else 0

    @property
    def is_exactly_zero(self) -> bool:
        """Tells whether no prompt scored differently."""
        return self.interval == (0.0, 0.0)

    @property
    def range(self) -> str:
        """Writes the interval: ``+0.14 to +0.19``."""
        assert self.interval is not None
        return " to ".join(signed(bound) for bound in self.interval)


def change_of(run: Run, metric: str, start: int) -> Change | None:
    """The change from the last evaluation up to step ``start`` to the final one; None if they are the same."""
    before, after = run.value(metric, until=start), run.value(metric)
    if before is None or after is None or before[0] == after[0]:
        return None
    pair = [run.by_prompt(metric, step) for step, _ in (before, after)]
    if len(pair[0]) != len(pair[1]) or not pair[0]:
        return Change(before, after)
    return Change(before, after, len(pair[0]), paired_interval(*pair))


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of ``after - before``; None with fewer than `MIN_PROMPTS` pairs."""
    n = len(before)
    if n < MIN_PROMPTS:
        return None
    from scipy.special import stdtrit  # late, since it loads slowly; JAX requires scipy anyway

    differences = [b - a for a, b in zip(before, after, strict=True)]
    half = float(stdtrit(n - 1, 0.975)) * stdev(differences) / math.sqrt(n)
    return fmean(differences) - half, fmean(differences) + half


def signed(value: float) -> str:
    """Writes a difference with its sign; 0 has none."""
    text = short_number(abs(value))
    return text if float(f"{value:.3g}") == 0 else f"{'+' if value > 0 else '−'}{text}"
