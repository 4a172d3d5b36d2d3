"""Scores of a file of texts by rewards, without a run: what each reward thinks of them, and of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hybrid_jax.core.config import apply_overrides, load_yaml, parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING, suggest
from hybrid_jax.data.files import json_rows
from hybrid_jax.data.sources import Text
from hybrid_jax.metrics.text import words
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.composite import CompositeReward, Part

RESPONSE_FIELDS = ("response", "completion", "text")
LENGTH = "length in words"
TOTAL = "total"
Scores = dict[str, Float[np.ndarray, "B"]]


@dataclass(frozen=True)
class Texts:
    """The rows of a file.

    Attributes:
        places: ``file:line`` of each, for messages.
        prompts: "" where the file has none.
        responses: What is scored.
        columns: All other fields, None where a row has none.
    """

    places: list[str]
    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[Any]]


def read_texts(path: str | Path, response_field: str | None = None, prompt_field: str | None = None) -> Texts:
    """Reads ``.jsonl`` (``.jsonl.gz``) with an object a row, or any other file with a text a line.

    Args:
        path: The file.
        response_field: The field to score; None takes the first of ``response``, ``completion``, ``text``.
        prompt_field: The field with the prompt; None takes ``prompt`` where there is one.

    Raises:
        UserError: The file cannot be read, is empty, or a row lacks the field or holds no text in it.
    """
    path = Path(path)
    if ".jsonl" not in path.suffixes[-2:]:
        responses = [example.response or "" for example in Text(train=path, lines=True).load("train")]
        return Texts([f"{path}: text {i}" for i in range(len(responses))], [""] * len(responses), responses, {})
    rows = list(json_rows(path))
    if not rows:
        raise UserError(f"{path} has no rows")
    fields = dict.fromkeys(field for _, row in rows for field in row)
    response = response_field or next(
        (field for field in RESPONSE_FIELDS if field in fields), RESPONSE_FIELDS[0]
    )
    for field in filter(None, (response, prompt_field)):
        if field not in fields:
            option = "response" if field == response else "prompt"
            raise UserError(
                f"{path} has no field {field!r}; {suggest(field, fields)}; choose one with --{option}-field"
            )
    prompt = prompt_field or "prompt"
    return Texts(
        [where for where, _ in rows],
        [_text(row, prompt, where) if prompt in row else "" for where, row in rows],
        [_text(row, response, where) for where, row in rows],
        {field: [row.get(field) for _, row in rows] for field in fields if field not in (response, prompt)},
    )


def load_rewards(names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Part | CompositeReward]:
    """The rewards by name, each of which is a registered name, ``module:function``, or a YAML file.

    A YAML file holds ``parts:`` (a `CompositeReward`), or one reward as ``name:`` and settings.

    Args:
        names: At least one.
        overrides: ``NAME.setting=value``, where the name of a file is that without its ending; with only one
            reward also ``reward.setting=value``.

    Raises:
        UserError: A reward or a setting is unknown, or needs what only a run has.
    """
    labels = [_label(name) for name in names]
    if len(set(labels)) < len(labels):
        raise UserError(f"--reward must be given once for each reward, got {', '.join(labels)}")
    settings: dict[str, dict[str, Any]] = {}
    for label, name in zip(labels, names, strict=True):
        settings[label] = load_yaml(name) if _is_file(name) else {"name": name}
    for override in overrides:
        # A name may hold dots itself (module:function), so it is looked for as a whole.
        label = next((label for label in labels if override.startswith(f"{label}.")), None)
        if label is None and len(labels) == 1 and override.startswith("reward."):
            label, override = labels[0], labels[0] + override.removeprefix("reward")
        if label is None:
            raise UserError(f"an override of a reward is {labels[0]}.setting=value, got {override!r}")
        setting = override.removeprefix(f"{label}.")
        if "parts" in settings[label]:
            settings[label] = apply_overrides(settings[label], [setting], CompositeReward, EVERYTHING)
        else:
            part = apply_overrides({"reward": settings[label]}, [f"reward.{setting}"], Part, EVERYTHING)
            settings[label] = part["reward"]
    return {label: _build(label, settings[label]) for label in labels}


def score_texts(rewards: Mapping[str, Part | CompositeReward], texts: Texts) -> Scores:
    """The scores of every reward, float32 [B]; of a composite its parts' raw values and the total.

    A composite is scored as if the file were one rollout: its normalisers take the statistics of the file, and
    a prompt is known by its text, since a file has no other name for it.
    """
    _, groups = np.unique(np.array(texts.prompts, dtype=object).astype(str), return_inverse=True)
    scores: Scores = {}
    for label, reward in rewards.items():
        if isinstance(reward, Part):
            row = evaluate_reward(label, reward.reward, texts.prompts, texts.responses, texts.columns)
            scores[label] = row + 0.0  # -0.0 becomes 0.0
            continue
        total, _, raw = reward.score(reward.init(), texts.prompts, texts.responses, texts.columns, groups)
        prefix = f"{label}/" if len(rewards) > 1 else ""
        scores |= {f"{prefix}{part}": np.asarray(values) + 0.0 for part, values in raw.items()}
        scores[f"{prefix}{TOTAL}"] = total + 0.0
    return scores


def summary(scores: Scores, texts: Texts) -> dict[str, Any]:
    """The numbers of the table, as plain values.

    Returns:
        ``num_texts``; ``rewards``: of each n, mean, standard deviation (biased), minimum, quartiles and
        maximum; ``correlations``: Pearson's of each pair of rewards and with the length in words, None where
        one of the two is constant; ``rows``: of each row place, response and scores.
    """
    lengths = np.array([len(words(response)) for response in texts.responses], np.float64)
    series = {name: values.astype(np.float64) for name, values in scores.items()} | {LENGTH: lengths}
    return {
        "num_texts": len(texts.responses),
        "rewards": {name: _statistics(series[name]) for name in scores},
        "correlations": {
            one: {other: _pearson(series[one], series[other]) for other in series} for one in scores
        },
        "rows": [
            {"place": place, "response": response, "scores": {name: float(scores[name][i]) for name in scores}}
            for i, (place, response) in enumerate(zip(texts.places, texts.responses, strict=True))
        ],
    }


def report(numbers: Mapping[str, Any], num_rows: int = 3) -> str:
    """The summary as a text: statistics, correlations, and the best and worst rows of each reward."""
    names = list(numbers["rewards"])
    headings = list(next(iter(numbers["rewards"].values())))
    blocks = [_table(["reward", *headings], [[name, *numbers["rewards"][name].values()] for name in names])]
    others = [*names[1:], LENGTH]
    pairs = numbers["correlations"]
    lower = [
        [one, *(pairs[one][other] if _after(names, one, other) else "" for other in others)] for one in names
    ]
    blocks.append(_table(["correlation", *others], lower))
    blocks += [f"{name}\n{_extremes(name, numbers['rows'], num_rows)}" for name in names]
    return "\n\n".join(blocks)


def _label(name: str) -> str:
    return Path(name).stem if _is_file(name) else name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _build(label: str, settings: Mapping[str, Any]) -> Part | CompositeReward:
    try:
        if "parts" in settings:
            built = parse(CompositeReward, settings, trust=EVERYTHING)
        elif "name" in settings:
            built = parse(Part, {"reward": settings}, trust=EVERYTHING)
        else:
            raise UserError(
                f"a file of a reward holds 'parts' or 'name', got {', '.join(settings) or 'nothing'}"
            )
    except UserError as error:
        raise UserError(f"reward {label!r}: {error}") from error
    composite = built if isinstance(built, CompositeReward) else CompositeReward({label: built})
    if composite.on_device or composite.is_placed:
        raise UserError(f"reward {label!r} scores the tokens of a run, not texts")
    return built


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(value := row.get(field), str):
        raise UserError(f"{where}: field {field!r} must be a text, got {value!r}")
    return value


def _statistics(values: np.ndarray) -> dict[str, float]:
    quartiles = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0])
    named = zip(("min", "25%", "median", "75%", "max"), quartiles.tolist(), strict=True)
    return {"n": len(values), "mean": float(values.mean()), "std": float(values.std()), **dict(named)}


def _pearson(one: np.ndarray, other: np.ndarray) -> float | None:
    first, second = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((first @ first) * (second @ second)))
    constant = np.ptp(one) == 0 or np.ptp(other) == 0
    return None if constant else float(np.clip(first @ second / norm, -1.0, 1.0))


def _after(names: Sequence[str], one: str, other: str) -> bool:
    """Tells whether ``other`` stands to the right of ``one``: each pair is shown once."""
    return other == LENGTH or names.index(other) > names.index(one)


def _extremes(name: str, rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """The best rows and the worst, each once; rows count from 0, as in the messages of rewards."""
    ordered = sorted(enumerate(rows), key=lambda numbered: -numbered[1]["scores"][name])
    first, last = (ordered[place][1]["scores"][name] for place in (0, -1))
    if first == last:
        return f"  every text scores {first:.4g}"
    worst = ordered[max(count, len(ordered) - count) :]
    return "\n".join(
        f"  {title:<5}  {row['scores'][name]:>9.4g}  row {number}: {_shorten(row['response'])}"
        for title, chosen in (("best", ordered[:count]), ("worst", worst[::-1]))
        for number, row in chosen
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [list(headings), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "constant"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shorten(text: str, length: int = 80) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= length else f"{line[: length - 1]}…")
