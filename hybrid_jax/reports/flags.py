"""Signs that a policy games its reward or that the reward says nothing, as sentences with numbers.

Each rule says itself when it speaks. Those of `GAMING` are signs of reward hacking; those of `WEAKNESS` say
that a part of the reward teaches little or nothing, whatever the policy does.

A rule that lacks its numbers gives None, one that finds nothing gives no sentences.

Curves are compared from the last evaluation before PPO on, the first third of the points with the last third. A
curve *rose* (or *fell*) if these means differ by more than

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
from hybrid_jax.reports.run import Run

MIN_POINTS = 3  # of a curve, to speak of its noise
MAX_GROWTH = 1.5  # of the length of responses
MAX_LENGTH_CORRELATION = 0.7
MAX_CLIPPED = 0.5  # of the rows
MIN_PARTS_IN_USE = 1.2  # exp of the entropy of the weights
_LATE = "over the last tenth of the PPO steps"


@dataclass(frozen=True)
class Trend:
    """Means of the first and the last third of a curve; ``direction`` is 1, -1, or 0 within the noise."""

    before: float
    after: float
    direction: int

    @property
    def numbers(self) -> str:
        return f"from {short_number(self.before)} to {short_number(self.after)}"


def trend(values: Sequence[float]) -> Trend | None:
    """Where a curve went; None of fewer than `MIN_POINTS` points."""
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
    """What the rules found, and the names of those that had nothing to look at."""

    gaming: list[str]
    weakness: list[str]
    looked_at: list[str]
    not_looked_at: list[str]


def find_flags(run: Run) -> Flags:
    """Every rule on a run; none has anything to look at without PPO, and without a signal none is gamed."""
    rules = {**(GAMING if run.has_signal else {}), **WEAKNESS}
    answers = {name: rule(run) if run.first_ppo_step is not None else None for name, rule in rules.items()}
    return Flags(
        _sentences(answers, GAMING),
        _sentences(answers, WEAKNESS),
        [name for name, sentences in answers.items() if sentences is not None],
        [name for name, sentences in answers.items() if sentences is None],
    )


def _sentences(answers: Mapping[str, list[str] | None], rules: Mapping[str, Callable]) -> list[str]:
    return [sentence for name in rules for sentence in answers.get(name) or ()]


# --- rules -----------------------------------------------------------------------------------------------


def against_judges(run: Run) -> list[str] | None:
    """The held-out score rose while a judge of ``evaluation.judges`` fell."""
    score = _trend(run, "evaluation/score")
    judges = {name: _trend(run, f"evaluation/judge/{name}") for name in run.judges}
    if score is None or not any(judges.values()):
        return None
    return [
        f"The held-out score rose {score.numbers} while the judge {name}, on which nothing is trained, "
        f"fell {judge.numbers}."
        for name, judge in judges.items()
        if judge and score.direction > 0 > judge.direction
    ]


def against_length(run: Run) -> list[str] | None:
    """The held-out score rose while the length-controlled one fell.

    That is ``score − slope · (length − length before PPO)`` at each evaluation, where the slope is that of the
    score by the length of the responses within the evaluation, ``evaluation/score_length_slope``.
    """
    scores = _since_ppo(run, "evaluation/score")
    slopes, lengths = (dict(run.points(f"evaluation/{n}")) for n in ("score_length_slope", "response_length"))
    known = [(score, slopes[x], lengths[x]) for x, score in scores if x in slopes and x in lengths]
    if len(known) < MIN_POINTS:
        return None
    first = known[0][2]
    score = trend([score for score, _, _ in known])
    controlled = trend([score - slope * (length - first) for score, slope, length in known])
    if not (score and controlled and score.direction > 0 > controlled.direction):
        return []
    return [
        f"The held-out score rose {score.numbers}, but at the length that responses had before PPO "
        f"({short_number(first)} tokens) it would have fallen {controlled.numbers}: the gain is one of length."
    ]


def one_part_for_another(run: Run) -> list[str] | None:
    """One part rose while another fell: held-out where there are enough evaluations, else in training.

    A part whose weight is negative, or that a Lagrangian holds ``at_most`` at a limit, is wanted to fall: it
    counts the other way round.
    """
    trends = {part: found for part in run.parts if (found := _part_trend(run, part))}
    if len(trends) < 2:
        return None
    wanted = {part: found.direction * _wanted_direction(run.config, part) for part, found in trends.items()}
    better, worse = ([part for part in trends if wanted[part] == sign] for sign in (1, -1))
    if not (better and worse):
        return []

    def named(parts: Sequence[str]) -> str:
        verbs = {1: "rose", -1: "fell"}
        return ", ".join(f"{part} {verbs[trends[part].direction]} {trends[part].numbers}" for part in parts)

    return [f"Parts are traded: {named(better)} while {named(worse)}. Look at the weights."]


def dead_parts(run: Run) -> list[str] | None:
    """A part was clipped in more than half of the rows, over the last tenth of the PPO steps."""
    clipped = {part: run.late_mean(f"ppo/reward/{part}_clip_fraction") for part in run.parts}
    known = {part: share for part, share in clipped.items() if share is not None}
    return _each(
        known,
        lambda part, share: (
            f"{part} was clipped in {100 * share:.0f} % of the rows {_LATE}: "
            "there it tells responses apart no more."
        ),
        lambda share: share > MAX_CLIPPED,
    )


def constant_parts(run: Run) -> list[str] | None:
    """A part's standard deviation was 0, to a billionth of its mean, in the last tenth of the PPO steps."""
    spreads = {part: run.late_mean(f"ppo/reward/{part}_std") for part in run.parts}
    known = {
        part: (spread, run.late_mean(f"ppo/reward/{part}") or 0.0)
        for part, spread in spreads.items()
        if spread is not None
    }
    return _each(
        known,
        lambda part, seen: (
            f"{part} gives no signal: in all of training every response got {_value(run, part)}."
            if part in run.silent_parts
            else f"{part} gave all responses of a rollout the same {_LATE}: it teaches nothing more."
        ),
        lambda seen: seen[0] <= 1e-9 * max(1.0, abs(seen[1])),
    )


def growing_responses(run: Run) -> list[str] | None:
    """The held-out responses of the last third are more than 1.5 times as long as those of the first third."""
    length = _trend(run, "evaluation/response_length") or _trend(run, "ppo/response_length")
    if length is None or length.before <= 0:
        return None
    growth = length.after / length.before
    if growth <= MAX_GROWTH:
        return []
    return [f"Responses grew {length.numbers} tokens, {growth:.1f} times as long."]


def score_for_length(run: Run) -> list[str] | None:
    """The correlation of score and length is beyond ±0.7, on average over the last tenth of the PPO steps."""
    correlation = run.late_correlation("score", "response_length")
    if correlation is None:
        return None
    if abs(correlation) <= MAX_LENGTH_CORRELATION:
        return []
    kind = "longer" if correlation > 0 else "shorter"
    return [f"{kind.capitalize()} responses score higher: the correlation is {correlation:.2f} {_LATE}."]


def single_part(run: Run) -> list[str] | None:
    """exp(entropy of the weights) < 1.2, on average over the last tenth of the PPO steps: one part decides.

    Of the entropy that a gate or a bandit logs; at even weights it is the number of the parts.
    """
    kinds = {"gate": "The gate's weights", "bandit": "The bandit's chances"}
    entropies = {words: run.late_mean(f"ppo/reward/{kind}_entropy") for kind, words in kinds.items()}
    known = {words: entropy for words, entropy in entropies.items() if entropy is not None}
    return _each(
        known,
        lambda words, entropy: (
            f"{words} have come down to {math.exp(entropy):.2f} of {len(run.parts)} parts "
            f"(entropy {short_number(entropy)} nats) {_LATE}."
        ),
        lambda entropy: math.exp(entropy) < MIN_PARTS_IN_USE,
    )


GAMING: Mapping[str, Callable[[Run], list[str] | None]] = {
    "score against judges": against_judges,
    "score at equal length": against_length,
    "parts against each other": one_part_for_another,
    "growing responses": growing_responses,
    "score with length": score_for_length,
}
WEAKNESS: Mapping[str, Callable[[Run], list[str] | None]] = {
    "clipped parts": dead_parts,
    "constant parts": constant_parts,
    "entropy of the weights": single_part,
}


# --- what they look at -----------------------------------------------------------------------------------


def _each(known: Mapping[str, Any], sentence: Callable, is_wrong: Callable) -> list[str] | None:
    """A sentence for each that is wrong, None where nothing is known."""
    return [sentence(name, value) for name, value in known.items() if is_wrong(value)] if known else None


def _since_ppo(run: Run, metric: str) -> list[tuple[int, float]]:
    """The points from the last one before PPO on: an evaluation at step s is made before update s."""
    before = run.value(metric, until=run.first_ppo_step)
    return run.points(metric, since=before[0] if before else 0)


def _trend(run: Run, metric: str) -> Trend | None:
    return trend([y for _, y in _since_ppo(run, metric)])


def _value(run: Run, part: str) -> str:
    return short_number(run.silent_parts[part])


def _part_trend(run: Run, part: str) -> Trend | None:
    return _trend(run, f"evaluation/reward/{part}") or _trend(run, f"ppo/reward/{part}")


def _wanted_direction(config: Mapping[str, Any], part: str) -> int:
    reward = _at(config, "phases", "ppo", "reward")
    weight = _at(reward, "parts", part, "weight")
    at_most = _at(reward, "combine", "limits", part, "at_most")
    is_penalty = isinstance(weight, int | float) and weight < 0
    return -1 if is_penalty or isinstance(at_most, int | float) else 1


def _at(tree: Any, *path: str) -> Any:
    """What lies at a path of a config of any shape."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
