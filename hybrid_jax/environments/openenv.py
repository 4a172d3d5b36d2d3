"""Environments that are served by OpenEnv: the client of a server that runs somewhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from annotated_types import MinLen

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.metrics.packages import import_package


@ENVIRONMENTS.register("openenv")
@settings
class OpenEnv:
    """An environment on a server of OpenEnv 0.10; a session of its own for each conversation.

    An answer is sent as the action ``{action_field: text}``. Every end is a termination, since the protocol has
    one word for both. The server needs as many sessions as there are conversations at a time
    (``max_concurrent_envs`` there, ``slots`` here), and only one that reads the seed begins alike twice.

    Attributes:
        base_url: of the server, such as ``http://localhost:8000``.
        action_field: the field of an action that takes the answer.
        observation_field: the field of an observation that the policy reads, as JSON if it is no text.
        reset: further arguments of every reset.
    """

    base_url: Annotated[str, MinLen(1)]
    action_field: str = "message"
    observation_field: str = "message"
    reset: Mapping[str, Any] = field(default_factory=dict)

    def make(self, answer_fn: AnswerFn | None = None) -> OpenEnvSession:
        """An environment of its own for one conversation."""
        client = import_package("openenv.core", "the openenv environment", "pip install openenv")
        return OpenEnvSession(self, client.GenericEnvClient(base_url=self.base_url).sync())


class OpenEnvSession:
    """A session on the server."""

    def __init__(self, settings: OpenEnv, client: Any):
        self._settings, self._client = settings, client

    def reset(self, seed: int, **row: Any) -> list[dict[str, str]]:
        """Begins an episode."""
        return self._said(self._client.reset(**{**self._settings.reset, "seed": seed}).observation)

    def step(self, text: str) -> Step:
        """Sends an answer."""
        result = self._client.step({self._settings.action_field: text})
        return Step(self._said(result.observation), float(result.reward or 0.0), bool(result.done))

    def close(self) -> None:
        """Ends the session."""
        self._client.close()

    def _said(self, observation: Mapping[str, Any]) -> list[dict[str, str]]:
        key = self._settings.observation_field
        if key not in observation:
            raise UserError(
                f"an observation has no field {key!r}; {suggest(key, {*observation})} (observation_field)"
            )
        said = observation[key]
        return [{"role": "user", "content": said if isinstance(said, str) else json.dumps(said)}]
