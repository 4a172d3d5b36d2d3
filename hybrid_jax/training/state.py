"""Holds all that a run consists of between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import struct

from hybrid_jax.models.base import Params
from hybrid_jax.models.lora import whole


@struct.dataclass
class TrainState:
    """Everything that an update changes: donated to it and returned by it."""

    params: dict[str, Params]  # what trains, by group: "model", and "value" once PPO is among the phases
    opt_state: dict[str, dict[str, Any]]  # by optimizer, then by the group that it trains
    extra: dict[str, Any]  # named sub-states that live on the device, such as the KL coefficient


@dataclass(frozen=True)
class ScheduleState:
    """The memory of a scheduler, in plain numbers, so that a checkpoint holds it as JSON."""

    steps: Mapping[str, int] = field(default_factory=dict)  # steps taken by each phase
    entries: Mapping[str, int] = field(default_factory=dict)  # times that each phase was entered
    last: str | None = None  # the phase of the step before
    credit: float = 0.0  # what the second phase of a ratio is owed, in steps
    triggered: bool = False  # a metric has crossed its threshold

    def after(self, phase: str) -> ScheduleState:
        """The state once ``phase`` has taken a step."""
        entered = int(phase != self.last)
        return ScheduleState(
            steps={**self.steps, phase: self.steps.get(phase, 0) + 1},
            entries={**self.entries, phase: self.entries.get(phase, 0) + entered},
            last=phase,
            credit=self.credit,
            triggered=self.triggered,
        )


@dataclass(frozen=True)
class RunState:
    """A run between two steps. With the config it decides every later bit.

    One checkpoint holds all of it but ``base``, the parameters below an adapter: they are what
    `LanguageModel.init` gives, on every start the same.
    """

    step: int  # steps taken
    train: TrainState
    references: Mapping[str, Params] = field(default_factory=dict)  # frozen copies, never donated
    schedule: ScheduleState = ScheduleState()
    cursors: Mapping[str, int] = field(default_factory=dict)  # rows read so far from each data stream
    host: Mapping[str, Any] = field(default_factory=dict)  # named sub-states that live on the host (numpy)
    base: Params = field(default_factory=dict)  # below adapters: shared by policy, value and references

    @property
    def policy(self) -> Params:
        """The whole parameters of the policy."""
        return whole(self.base, self.train.params["model"])
