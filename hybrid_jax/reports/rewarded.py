"""One phase that learns from a reward, and what the run logged of that reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from hybrid_jax.reports.run import Run


@dataclass(frozen=True)
class Rewarded:
    """The metrics of a phase that learns from a reward.

    Attributes:
        run: whose phase it is.
        phase: its name; "" of a run whose evaluation scores answers though no phase learns from a reward.
        is_first: whether the evaluation has its numbers under no name of a phase: of the first phase that has
            a reward, or of all phases together.
    """

    run: Run
    phase: str
    is_first: bool

    def trained(self, name: str) -> str:
        """A metric as the phase logs it."""
        return f"{self.phase}/{name}"

    def held_out(self, name: str) -> str:
        """A metric as the evaluation logs it."""
        return f"evaluation/{name}" if self.is_first else f"evaluation/{self.phase}/{name}"

    def owns(self, part: str) -> bool:
        """Tells whether what a sample calls so, ``<part>`` or ``<phase>/<part>``, is a part of this reward."""
        phase = part.partition("/")[0]
        return phase == self.phase if phase in self.run.rewarded and phase != part else self.is_first

    @property
    def late(self) -> str:
        """The steps that `late_mean` looks at, in words."""
        return f"over the last tenth of the {self.phase} steps"

    @cached_property
    def parts(self) -> list[str]:
        """Names of the parts of the reward; beside each stand numbers of its distribution, in newer runs."""
        held_out = self.run.names(self.held_out("reward/"))
        trained = [name for name in self.run.names(self.trained("reward/")) if "~" not in name]
        if described := [name for name in trained if self.trained(f"reward/{name}_std") in self.run.curves]:
            trained = described
        return list(dict.fromkeys([*held_out, *trained]))

    @cached_property
    def judges(self) -> list[str]:
        """Names of the rewards that are measured held-out, and never trained on."""
        return self.run.names("evaluation/judge/") if self.is_first else []

    @cached_property
    def silent_parts(self) -> dict[str, float]:
        """Parts that gave the same to all responses of each rollout of the run, with what they gave on average.

        The same is a standard deviation of at most a billionth of the mean.
        """
        found = {}
        for part in self.parts:
            spreads = self.run.points(self.trained(f"reward/{part}_std"))
            means = dict(self.run.points(self.trained(f"reward/{part}")))
            if spreads and all(std <= 1e-9 * max(1.0, abs(means.get(step, 0.0))) for step, std in spreads):
                found[part] = fmean(means.values()) if means else 0.0
        return found

    @cached_property
    def has_signal(self) -> bool:
        """Tells whether the reward ever told two responses of a rollout apart; true where it is not logged."""
        if any(self.trained(f"reward/{part}_std") in self.run.curves for part in self.parts):
            return len(self.silent_parts) < len(self.parts)
        spreads = self.run.points(self.trained("score_std"))
        return not spreads or any(spread > 0 for _, spread in spreads)

    def late_mean(self, name: str) -> float | None:
        """The mean of a metric of the phase over the last tenth of its steps."""
        steps = [step for step, phase in self.run.training if phase == self.phase]
        if not steps:
            return None
        # Not the last tenth of the points: another phase may have taken all of the last steps.
        late = self.run.points(self.trained(name), since=steps[-math.ceil(len(steps) / 10)])
        return fmean(y for _, y in late) if late else None

    def late_correlation(self, a: str, b: str) -> float | None:
        """The `late_mean` of the correlation of two parts, "score" or "response_length", within a rollout."""
        forth, back = (self.late_mean(f"reward/{x}~{y}") for x, y in ((a, b), (b, a)))
        return back if forth is None else forth


def rewarded_phases(run: Run) -> list[Rewarded]:
    """Every phase that learns from a reward, or the held-out numbers alone where none does.

    The numbers of the first one in the config have no name of a phase in the evaluation.
    """
    listed = [phase for phase, settings in run.settings.items() if "reward" in settings]
    first = next((phase for phase in [*listed, *run.rewarded] if phase in run.rewarded), "")
    return [Rewarded(run, phase, phase == first) for phase in run.rewarded or [""]]
