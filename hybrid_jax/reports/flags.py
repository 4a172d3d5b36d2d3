"""Finds signs that a policy games its reward, or that the reward teaches nothing, as sentences with numbers.

The docstring of each rule says when it applies. Those of `GAMING` are signs of reward hacking; those of
`WEAKNESS` say that a part of the reward teaches little or nothing, whatever the policy does.

A rule returns None where its numbers are missing, and no sentence where it finds nothing.

Curves are compared from the last evaluation before any training with reward, the first third of the points with
the last third. A curve *rose* (or *fell*) if these means differ by more than

    max(1, 2 (1 + 2 / (n − 2)) √(1/a + 1/b)) σ         and by more than 1 % of the largest value,

where n is the number of points, a and b those of the two thirds, and σ the noise of a point by its second
differences (Gasser, Sroka and Jennen-Steinmetz 1986), σ² = Σ (y_{i−1} − 2 y_i + y_{i+1})² / 6 (n − 2), in which
a straight line leaves nothing. So the change must exceed the noise, and about two standard errors of itself,
more where few points tell σ: white noise is said to have risen in 5 % of the curves of three points, and in 3 %
of longer ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hybrid_jax.reports.charts import short_number
from hybrid_jax.reports.rewarded import Rewarded

MIN_POINTS = 3  # in a curve, to estimate its noise
MAX_GROWTH = 1.5  # times the first length of the responses
MAX_LENGTH_CORRELATION = 0.7
MAX_CLIPPED = 0.5  # as a share of the rows
MIN_PARTS_IN_USE = 1.2  # as exp of the entropy of the weights


@dataclass(frozen=True)
class Trend:
    """Means of the first and the last third of a curve; ``direction`` is 1, -1, or 0 within the noise."""

    before: float
    after: float
    direction: int

    @property
    def numbers(self) -> str:
        """Both means in words."""
        return f"from {short_number(self.before)} to {short_number(self.after)}"


def trend(values: Sequence[float]) -> Trend | None:
    """Compares the ends of a curve; None with fewer than `MIN_POINTS` points."""
    n = len(values)
    if n < MIN_POINTS:
        return None
    third = n // 3
    before, after = fmean(values[:third]), fmean(values[-third:])
    bends = [values[i - 1] - 2 * values[i] + values[i + 1] for i in range(1, n - 1)]
    noise = math.sqrt(sum(bend * bend for bend in bends) / (6 * len(bends)))
    errors = 2 * (1 + 2 / (n - 2)) * math.sqrt(2 / third)
    least = max(max(1.0, errors) * noise, 0.01 * max(map(abs, values)))
    change = after - before
    return Trend(before, after, 0 if abs(change) <= least else 1 if change > 0 else -1)


@dataclass(frozen=True)
class Flags:
    """The sentences of all rules, and the names of the rules with and without numbers to look at."""

    gaming: list[str]
    weakness: list[str]
    looked_at: list[str]
    not_looked_at: list[str]


def find_flags(phase: Rewarded) -> Flags:
    """Applies every rule to a phase; a reward without any signal cannot be gamed."""
    rules = {**(GAMING if phase.has_signal else {}), **WEAKNESS}
    answers = {name: rule(phase) if phase.phase else None for name, rule in rules.items()}
    return Flags(
        _sentences(answers, GAMING),
        _sentences(answers, WEAKNESS),
        [name for name, sentences in answers.items() if sentences is not None],
        [name for name, sentences in answers.items() if sentences is None],
    )


def _sentences(answers: Mapping[str, list[str] | None], rules: Mapping[str, Callable]) -> list[str]:
    return [sentence for name in rules for sentence in answers.get(name) or ()]


# --- rules -----------------------------------------------------------------------------------------------


def against_judges(phase: Rewarded) -> list[str] | None:
    """The held-out score rose while a judge of ``evaluation.judges`` fell."""
    score = _trend(phase, phase.held_out("score"))
    judges = {name: _trend(phase, phase.held_out(f"judge/{name}")) for name in phase.judges}
    if score is None or not any(judges.values()):
        return None
    return [
        f"The held-out score rose {score.numbers} while the judge {name}, on which nothing is trained, "
        f"fell {judge.numbers}."
        for name, judge in judges.items()
        if judge and score.direction > 0 > judge.direction
    ]


def against_length(phase: Rewarded) -> list[str] | None:
    """The held-out score rose while the length-controlled one fell.

    That is ``score − slope · (length − length before the reward)`` at each evaluation, where the slope is that
    of the score by the length of the responses within the evaluation, ``evaluation/score_length_slope``.
    """
    scores = _since_reward(phase, phase.held_out("score"))
    slopes, lengths = (
        dict(phase.run.points(phase.held_out(n))) for n in ("score_length_slope", "response_length")
    )
    known = [(score, slopes[x], lengths[x]) for x, score in scores if x in slopes and x in lengths]
    if len(known) < MIN_POINTS:
        return None
    first = known[0][2]
    score = trend([score for score, _, _ in known])
    controlled = trend([score - slope * (length - first) for score, slope, length in known])
    if not (score and controlled and score.direction > 0 > controlled.direction):
        return []
    return [
        f"The held-out score rose {score.numbers}, but at the length that responses had before it "
        f"({short_number(first)} tokens) it would have fallen {controlled.numbers}: the gain is one of length."
    ]


def one_part_for_another(phase: Rewarded) -> list[str] | None:
    """One part rose while another fell: held-out where there are enough evaluations, else in training.

    A part whose weight is negative, or that a Lagrangian holds ``at_most`` at a limit, is wanted to fall: it
    counts the other way round.
    """
    trends = {part: found for part in phase.parts if (found := _part_trend(phase, part))}
    if len(trends) < 2:
        return None
    wanted = {part: found.direction * _wanted_direction(phase, part) for part, found in trends.items()}
    better, worse = ([part for part in trends if wanted[part] == sign] for sign in (1, -1))
    if not (better and worse):
        return []

    def named(parts: Sequence[str]) -> str:
        verbs = {1: "rose", -1: "fell"}
        return ", ".join(f"{part} {verbs[trends[part].direction]} {trends[part].numbers}" for part in parts)

    return [f"Parts are traded: {named(better)} while {named(worse)}. Look at the weights."]


def dead_parts(phase: Rewarded) -> list[str] | None:
    """A part was clipped in more than half of the rows, over the last tenth of its steps."""
    clipped = {part: phase.late_mean(f"reward/{part}_clip_fraction") for part in phase.parts}
    known = {part: share for part, share in clipped.items() if share is not None}
    return _each(
        known,
        lambda part, share: (
            f"{part} was clipped in {100 * share:.0f} % of the rows {phase.late}: "
            "there it no longer tells responses apart."
        ),
        lambda share: share > MAX_CLIPPED,
    )


def constant_parts(phase: Rewarded) -> list[str] | None:
    """A part's standard deviation was 0, to a billionth of its mean, in the last tenth of its steps."""
    spreads = {part: phase.late_mean(f"reward/{part}_std") for part in phase.parts}
    known = {
        part: (spread, phase.late_mean(f"reward/{part}") or 0.0)
        for part, spread in spreads.items()
        if spread is not None
    }
    return _each(
        known,
        lambda part, seen: (
            f"{part} gives no signal: in all of training every response got "
            f"{short_number(phase.silent_parts[part])}."
            if part in phase.silent_parts
            else f"{part} gave all responses of a rollout the same {phase.late}: it no longer teaches anything."
        ),
        lambda seen: seen[0] <= 1e-9 * max(1.0, abs(seen[1])),
    )


def growing_responses(phase: Rewarded) -> list[str] | None:
    """The held-out responses of the last third are more than 1.5 times as long as those of the first third."""
    length = _trend(phase, phase.held_out("response_length")) or _trend(phase, phase.trained("response_length"))
    if length is None or length.before <= 0:
        return None
    growth = length.after / length.before
    if growth <= MAX_GROWTH:
        return []
    return [f"Responses grew {length.numbers} tokens, {growth:.1f} times as long."]


def score_for_length(phase: Rewarded) -> list[str] | None:
    """The correlation of score and length is beyond ±0.7, on average over the last tenth of its steps."""
    correlation = phase.late_correlation("score", "response_length")
    if correlation is None:
        return None
    if abs(correlation) <= MAX_LENGTH_CORRELATION:
        return []
    kind = "longer" if correlation > 0 else "shorter"
    return [f"{kind.capitalize()} responses score higher: the correlation is {correlation:.2f} {phase.late}."]


def single_part(phase: Rewarded) -> list[str] | None:
    """exp(entropy of the weights) < 1.2, on average over the last tenth of its steps: one part decides.

    The entropy is that which a gate or a bandit logs; with even weights the exponential is the number of parts.
    """
    kinds = {"gate": "The gate's weights", "bandit": "The bandit's chances"}
    entropies = {words: phase.late_mean(f"reward/{kind}_entropy") for kind, words in kinds.items()}
    known = {words: entropy for words, entropy in entropies.items() if entropy is not None}
    return _each(
        known,
        lambda words, entropy: (
            f"{words} have come down to {math.exp(entropy):.2f} of {len(phase.parts)} parts "
            f"(entropy {short_number(entropy)} nats) {phase.late}."
        ),
        lambda entropy: math.exp(entropy) < MIN_PARTS_IN_USE,
    )


GAMING: Mapping[str, Callable[[Rewarded], list[str] | None]] = {
    "score against judges": against_judges,
    "score at equal length": against_length,
    "parts against each other": one_part_for_another,
    "growing responses": growing_responses,
    "score with length": score_for_length,
}
WEAKNESS: Mapping[str, Callable[[Rewarded], list[str] | None]] = {
    "clipped parts": dead_parts,
    "constant parts": constant_parts,
    "entropy of the weights": single_part,
}


# --- what they look at -----------------------------------------------------------------------------------


def _each(known: Mapping[str, Any], sentence: Callable, is_wrong: Callable) -> list[str] | None:
    """Makes a sentence for each value that is wrong; None where no value is known."""
    return [sentence(name, value) for name, value in known.items() if is_wrong(value)] if known else None


def _since_reward(phase: Rewarded, metric: str) -> list[tuple[int, float]]:
    """The points of a curve from the last one before the reward on: evaluation s is made before update s."""
    before = phase.run.value(metric, until=phase.run.first_reward_step)
    return phase.run.points(metric, since=before[0] if before else 0)


def _trend(phase: Rewarded, metric: str) -> Trend | None:
    return trend([y for _, y in _since_reward(phase, metric)])


def _part_trend(phase: Rewarded, part: str) -> Trend | None:
    name = f"reward/{part}"
    return _trend(phase, phase.held_out(name)) or _trend(phase, phase.trained(name))


def _wanted_direction(phase: Rewarded, part: str) -> int:
    reward = _at(phase.run.settings, phase.phase, "reward")
    weight = _at(reward, "parts", part, "weight")
    at_most = _at(reward, "combine", "limits", part, "at_most")
    is_penalty = isinstance(weight, int | float) and weight < 0
    return -1 if is_penalty or isinstance(at_most, int | float) else 1


def _at(tree: Any, *path: str) -> Any:
    """Looks up a path in a config of any shape; None where it leads nowhere."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
