"""Gymnasium environments that can be played in text (Towers et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.environments.factories import FACTORIES, check_one, package_of


@ENVIRONMENTS.register("gymnasium")
@settings
class Gymnasium:
    """A gymnasium environment whose observations and actions are texts, or numbers that stand for texts.

    An action space is ``Text``, or ``Discrete`` with ``actions``; an observation space is one of them, or
    anything with ``render``. An answer that is no action changes nothing and earns 0: the reply says so.

    Attributes:
        id: of an environment that gymnasium knows, such as ``FrozenLake-v1``.
        factory: instead of an id, ``my_module:make``, which returns an environment.
        arguments: of both, by name.
        actions: words for the numbers of a ``Discrete`` action space, in order.
        observations: words for the numbers of a ``Discrete`` observation space; the numbers where empty.
        render: reads what the environment renders as text, mode ``ansi``, in place of its observation.
        instructions: what the policy reads first.
    """

    id: str | None = None
    factory: Annotated[Any, FACTORIES] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    render: bool = False
    instructions: str | None = None

    def __post_init__(self) -> None:
        check_one(self.id, self.factory)
        if len(set(self.actions)) < len(self.actions):
            raise ValueError(f"actions must differ, got {', '.join(self.actions)}")

    def make(self, answer_fn: AnswerFn | None = None) -> GymnasiumText:
        """An environment of its own for one conversation."""
        make = self.factory or (lambda **named: package_of("gymnasium", "gymnasium").make(self.id, **named))
        mode = {"render_mode": "ansi"} if self.render and self.id is not None else {}
        return GymnasiumText(self, make(**{**mode, **self.arguments}))


class GymnasiumText:
    """A gymnasium environment over messages."""

    def __init__(self, settings: Gymnasium, env: Any):
        self._settings, self._env, kind = settings, env, type(env.action_space).__name__
        size = int(env.action_space.n) if kind == "Discrete" else 0
        if kind not in ("Text", "Discrete") or len(settings.actions) != size:
            space = (
                f"{size} actions of {env.action_space}" if size else f"a Text space, not {env.action_space},"
            )
            raise UserError(f"actions must be words for {space}, got {len(settings.actions)}")

    def reset(self, seed: int, **row: Any) -> list[dict[str, str]]:
        """Begins an episode."""
        first = self._text(self._env.reset(seed=seed)[0])
        return [{"role": "user", "content": "\n\n".join(filter(None, [self._settings.instructions, first]))}]

    def step(self, text: str) -> Step:
        """Takes the action that the answer names."""
        words, space = self._settings.actions, self._env.action_space
        action = text
        if words:
            action = int(space.start) + words.index(text.strip()) if text.strip() in words else None
        if action is None or not space.contains(action):
            known = f"Answer with one of: {', '.join(words)}." if words else f"Expected {space}."
            reply = {"role": "user", "content": f"This is no action. {known}"}
            return Step([reply], 0.0, False, info={"invalid_actions": 1})
        observation, reward, terminated, truncated, _ = self._env.step(action)
        reply = {"role": "user", "content": self._text(observation)}
        return Step([reply], float(reward), bool(terminated), bool(truncated), {"invalid_actions": 0})

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    def _text(self, observation: Any) -> str:
        if self._settings.render:
            observation = self._env.render()
        elif type(space := self._env.observation_space).__name__ == "Discrete":
            words, number = self._settings.observations, int(observation) - int(space.start)
            observation = words[number] if words else str(observation)
        if not isinstance(observation, str):
            space = self._env.observation_space
            raise UserError(
                f"an observation must be a text, got {type(observation).__name__} of {space}; set render"
            )
        return observation
