"""Environments of skyrl-gym: a question with tools or tries, such as GSM8K over several turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.environments.factories import FACTORIES, check_one, package_of

_RUNS_ANSWERS = ("lcb", "searchcode", "text2sql")


@ENVIRONMENTS.register("skyrl_gym")
@settings
class SkyRLGym:
    """An environment of skyrl-gym; every conversation begins with a row of data.

    The columns of the row are its ``extras``. The ids ``lcb``, ``searchcode`` and ``text2sql`` are refused,
    since they run what the model writes.

    Attributes:
        id: of an environment that skyrl-gym knows, such as ``gsm8k_multi_turn``.
        factory: instead of an id, ``my_module:MyEnv``, called with ``env_config`` and ``extras``.
        env_config: of both.
        prompt_column: the question: a text, or messages.
        answer_column: the right answer, for rows without the column ``reward_spec`` of SkyRL's data sets.
        extras: further entries of ``extras``, the same for all rows, such as ``{max_turns: 3}``.
    """

    id: str | None = None
    factory: Annotated[Any, FACTORIES] | None = None
    env_config: Mapping[str, Any] = field(default_factory=dict)
    prompt_column: str = "prompt"
    answer_column: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    reads_rows = True

    def __post_init__(self) -> None:
        check_one(self.id, self.factory)
        if self.id in _RUNS_ANSWERS:
            raise ValueError(f"id must be one that runs no code of the model's, got {self.id!r}")

    def make(self, answer_fn: AnswerFn | None = None) -> SkyRLGymText:
        """An environment of its own for one conversation."""
        return SkyRLGymText(self)


class SkyRLGymText:
    """An environment of skyrl-gym over rows of data."""

    def __init__(self, settings: SkyRLGym):
        self._settings = settings
        self._env: Any = None

    def reset(self, seed: int, **row: Any) -> list[Mapping[str, Any]]:
        """Asks the question of a row. The environments of skyrl-gym take no seed."""
        settings, extras = self._settings, {**row, **self._settings.extras}
        for column in filter(None, (settings.prompt_column, settings.answer_column)):
            if column not in row:
                raise UserError(f"a row has no column {column!r}; {suggest(column, row)}")
        if settings.answer_column is not None:
            extras["reward_spec"] = {"ground_truth": str(row[settings.answer_column])}
        make = settings.factory or (
            lambda **named: package_of("skyrl_gym", "skyrl_gym").make(settings.id, **named)
        )
        self.close()
        self._env = make(env_config=dict(settings.env_config), extras=extras)
        prompt = row[settings.prompt_column]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(self._env.init(asked)[0])

    def step(self, text: str) -> Step:
        """Answers; every end is a termination, for skyrl-gym does not tell one from the other."""
        reply = self._env.step(text)
        return Step(
            list(reply["observations"]), float(reply["reward"]), bool(reply["done"]), info=reply["metadata"]
        )

    def close(self) -> None:
        """Closes the environment."""
        if self._env is not None:
            self._env.close()
