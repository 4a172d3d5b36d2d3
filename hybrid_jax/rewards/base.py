"""Rewards: callables on texts, or pure functions on tokens that stay on the device.

A text reward is any callable ``reward(prompts, responses, **columns) -> scores``, one number a row: a plain
function, or a frozen dataclass registered in `REWARDS` whose fields are its settings. Its arguments are passed
by name (see `arguments`): ``columns`` are the other columns of the data, each a list of length B; a reward gets
those it names, or all if it takes ``**columns``, as copies of its own.
"""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import Registry, suggest
from hybrid_jax.rewards.arguments import TOKENS, Arguments, check_places

REWARDS = Registry("reward")

Reward = Callable[..., Sequence[float]]  # reward(prompts, responses, **columns)


class RewardError(UserError):
    """Raised for a reward that failed or did not give one finite number for each row."""


@runtime_checkable
class DeviceReward(Protocol):
    """A reward on tokens, written in JAX: it runs inside jit and vmap, and nothing leaves the device."""

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        """Scores float32 [B]; the response is ``tokens[:, -R:]`` where ``response_mask``."""
        ...


@runtime_checkable
class StartedReward(Protocol):
    """A reward that waits for a device or a network; other rewards are computed meanwhile."""

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], Sequence[float]]:
        """Starts scoring; returns what waits for the scores."""
        ...


def column_names(examples: Iterable[Example]) -> list[str]:
    """The columns that any row has."""
    return list(dict.fromkeys(name for example in examples for name in example.columns))


def columns_of(examples: Sequence[Example], names: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a batch as rewards receive them: lists of length B, None where a row has none.

    ``names`` are those of the whole data, of which a batch may hold none; None takes those that it holds.
    """
    names = column_names(examples) if names is None else names
    return {name: [example.columns.get(name) for example in examples] for name in names}


def evaluate_reward(
    name: str,
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> np.ndarray:
    """Calls a reward and checks what it returns.

    Args:
        name: What to call the reward in an error.
        reward: A callable on texts.
        prompts: B texts.
        responses: B texts.
        columns: Further columns of the data, each of length B.

    Returns:
        Scores, float32 [B], all finite.

    Raises:
        RewardError: In one line: a column that the reward needs is missing, it raised (with the line of the
            user's file), or it returned anything but B finite numbers.
    """
    return start_reward(name, reward, prompts, responses, columns)()


def start_reward(
    name: str,
    reward: Reward | StartedReward,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[], np.ndarray]:
    """`evaluate_reward` in two steps: a `StartedReward` begins now, any other when the result is called for."""
    begin = _begin(reward)
    try:
        arguments = Arguments.of(begin)
    except ValueError as error:
        raise RewardError(f"reward {name!r} {error}") from None
    _check_columns(name, arguments, columns or {})
    places, named = arguments.fill(prompts, responses, columns or {})
    call = partial(begin, *_copied(places), **_copied(named))
    finish = _explained(name, call) if isinstance(reward, StartedReward) else call
    return lambda: _check_scores(name, _explained(name, finish), responses)


def _copied(value: Any) -> Any:
    """Copies nested lists and mappings, so that a reward may change its columns.

    A list that several rows share, as the answers to one prompt do, is copied for each of them.
    """
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item) for item in value)
    return value.copy() if isinstance(value, np.ndarray) else value


def check_reward(reward: Any) -> None:
    """Checks that a reward can be called, before anything is sampled.

    Raises:
        ValueError: it is not callable, or takes other arguments than a reward.
    """
    if not (callable(reward) or isinstance(reward, StartedReward | DeviceReward)):
        raise ValueError(f"reward must be callable or have start or score_tokens, got {reward!r}")
    try:
        if isinstance(reward, DeviceReward):
            check_places(reward.score_tokens, TOKENS)
        else:
            Arguments.of(_begin(reward))
    except ValueError as error:
        raise ValueError(f"reward {error}") from None


def check_columns(name: str, reward: Any, columns: Iterable[str]) -> None:
    """Checks that the data has the columns that a text reward needs.

    Raises:
        RewardError: One is missing.
    """
    if not isinstance(reward, DeviceReward):
        _check_columns(name, Arguments.of(_begin(reward)), columns)


def _begin(reward: Any) -> Callable[..., Any]:
    """The callable of a text reward that is called first."""
    return reward.start if isinstance(reward, StartedReward) else reward


def _check_columns(name: str, arguments: Arguments, columns: Iterable[str]) -> None:
    known = list(columns)
    for needed in arguments.needed_columns:
        if needed not in known:
            raise RewardError(
                f"reward {name!r} needs the column {needed!r}, which the data lacks; {suggest(needed, known)}"
            )


def _explained(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too: a reward does not end the run, least of all with success
        raise RewardError(f"reward {name!r} raised {_describe_error(error)}") from error


def _describe_error(error: BaseException) -> str:
    """Describes an error in one line: type, message, and the innermost line outside installed packages."""
    message = _shorten(str(error), 300)
    if isinstance(error, UserError):
        return message
    if isinstance(error, TypeError) and "string indices" in message:
        message += " (prompts and responses are texts here, not lists of messages)"
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is ours
    own = [f for f in frames if not f.filename.startswith((*installed, "<"))]
    innermost = (own or frames or [None])[-1]
    place = f" at {innermost.filename}:{innermost.lineno}" if innermost else ""
    return f"{type(error).__name__}: {message}{place}"


def _check_scores(name: str, values: Any, responses: Sequence[str]) -> np.ndarray:
    expected = f"expected one number for each of {len(responses)} responses"
    if isinstance(values, str | bytes | Mapping | set) or not hasattr(values, "__len__"):
        raise RewardError(f"reward {name!r} returned {_describe_value(values)}; {expected}")
    if len(getattr(values, "shape", "1")) != 1:
        raise RewardError(f"reward {name!r} returned an array of shape {tuple(values.shape)}; {expected}")
    if len(values) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(values)} scores; {expected}")
    items = values.tolist() if hasattr(values, "tolist") else list(values)  # tolist: numpy, jax, torch, pandas
    scores = np.zeros(len(items), np.float32)
    for row, (value, response) in enumerate(zip(items, responses, strict=True)):
        where = f"for response {row} {_shorten(repr(response))}"
        number = _as_float(value)
        if number is None:
            raise RewardError(f"reward {name!r} gave {_describe_value(value)} {where}; expected a number")
        with np.errstate(over="ignore"):  # too large for float32 becomes inf
            scores[row] = number
        if not np.isfinite(scores[row]):
            raise RewardError(f"reward {name!r} gave {number} {where}; a score must be finite in float32")
    return scores


def _as_float(value: Any) -> float | None:
    """Reads a number of any library as a float; None for anything else."""
    if isinstance(value, str | bytes | complex | np.complexfloating) or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _describe_value(value: Any) -> str:
    return "None" if value is None else f"{_shorten(repr(value))} of type {type(value).__name__}"


def _shorten(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
