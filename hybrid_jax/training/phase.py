"""The one thing that the training loop knows: a phase takes a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jax import Array

from hybrid_jax.core.batches import Example
from hybrid_jax.core.registry import Registry
from hybrid_jax.models.base import Params
from hybrid_jax.parallel.rules import Placement
from hybrid_jax.training.state import RunState, ScheduleState

LM = "lm"  # the head of a language model: scores of the next token
Metrics = Mapping[str, Any]  # "<phase>/<metric>": a number, on the device or the host


@dataclass(frozen=True)
class PhaseInit:
    """The parts that a phase adds to the state of a fresh run."""

    params: Mapping[str, Params] = field(default_factory=dict)  # further parameter groups
    opt_state: Mapping[str, Any] = field(default_factory=dict)  # group -> optimizer state
    extra: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[str, Params] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """One compiled function of a step with the shapes that it is called with: what `hybrid_jax.plan` reads."""

    name: str  # "<phase>/<function>"
    function: Any  # of `jax.jit`
    arguments: tuple[Any, ...]  # trees of `jax.ShapeDtypeStruct` with shardings
    settings: Mapping[str, Any] = field(default_factory=dict)  # static keyword arguments
    loop_steps: int = 1  # the most turns of a loop that may stop early, as decoding does
    tokens: int = 0  # learned, scored or sampled in one call
    learns: bool = False  # whether it computes gradients of what it reads
    beside: Any = ()  # trees that lie on the devices meanwhile without being arguments


class Phase(Protocol):
    """One way to learn. All state goes in and out of `step`; the phase itself holds only what never changes."""

    name: str  # under which the config lists it: of its metrics and its state
    kind: str  # the name of its settings in `PHASES`: what it does, whatever it is called
    optimizer_key: str  # which of ``TrainState.opt_state`` it uses; phases may share one
    waits_for_device: bool  # whether its step reads back what it computes, as a reward on texts must
    # One that trains other heads than the language model's has `heads`, their names, and where it leaves the
    # trunk as it is `trains_trunk = False`.
    # One whose steps have several shapes may have a `shapes_setting`: the setting that decides them, in words.

    @property
    def references(self) -> Sequence[str]:
        """Names of those that it reads."""
        ...

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        """Makes what the phase adds to a fresh state, given the parameters that are there already."""
        ...

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """One step; the caller counts it. ``state.train`` is consumed (its buffers are donated)."""
        ...

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        """Lists what a step compiles, for a state of shapes (`jax.ShapeDtypeStruct` with shardings).

        Args:
            state: of a run, with all references.
            prompt_length: tokens of the longest prompts; None takes the longest that the settings allow.
        """
        ...


@runtime_checkable
class MeasuredPhase(Phase, Protocol):
    """A phase that measures what it trains on held-out data."""

    def evaluate(self, state: RunState) -> Mapping[str, float]:
        """Numbers, logged as ``evaluation/<name>``."""
        ...


@runtime_checkable
class TalkingPhase(Phase, Protocol):
    """A phase that may hold conversations to measure and to show."""

    def converse(self, state: RunState) -> tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]:
        """Numbers, logged as ``evaluation/<phase>/<name>``, and conversations for ``samples.jsonl``."""
        ...


@runtime_checkable
class ObservingPhase(Phase, Protocol):
    """A phase that learns from the evaluation too."""

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """The state once these numbers, ``evaluation/<name>``, were measured."""
        ...


@runtime_checkable
class StagedPhase(Phase, Protocol):
    """A phase that plans to go on with other programs, which its steps compile then."""

    def stage(self, state: RunState) -> str:
        """A name for the programs of the next step; empty where the name of the phase is enough."""
        ...


def with_talks(
    phases: Mapping[str, Phase], state: RunState, numbers: Mapping[str, float], samples: Sequence[Any]
) -> tuple[dict[str, float], list[Any]]:
    """Numbers and samples of an evaluation, with those of the conversations that phases hold."""
    numbers, samples = dict(numbers), list(samples)
    for phase in phases.values():
        if isinstance(phase, TalkingPhase):
            found, conversations = phase.converse(state)
            numbers |= {f"evaluation/{phase.name}/{name}": value for name, value in found.items()}
            samples += [{"of": phase.name, **each} for each in conversations]
    return numbers, samples


@dataclass(frozen=True)
class Resources:
    """The objects that an experiment hands to a phase config when it builds the phase."""

    name: str  # under which the config lists the phase
    kind: str  # the name of its settings in `PHASES`
    model: Any  # the trunk: a `LanguageModel`, or a `TextTrunk` that only heads read
    tokenizer: Any  # a `Tokenizer`; None where the phase is only planned
    examples: Sequence[Example] | None  # the training split; None where the phase is only planned
    seed: int
    horizon: float  # how many steps the scheduler plans for this phase; infinite where a metric decides
    placement: Placement
    optimizer_key: str
    eos_ids: tuple[int, ...]  # every token that ends a response
    offload: Sequence[str] = ()  # what waits in the host's memory while no phase uses it
    held_out: Callable[[], Sequence[Example]] | None = None  # loads the held-out split
    phases: Mapping[str, Any] = field(default_factory=dict)  # the settings of all phases that take steps
    following: Callable[[ScheduleState], str | None] = lambda state: None  # the phase after a step of this one
    in_a_row: Callable[[ScheduleState, int], int] = lambda state, at_most: at_most  # steps of this one to come
    heads: Mapping[str, Any] = field(default_factory=dict)  # settings of the run's heads (`HEADS`), by name
    trunk_trains: bool = True  # any phase of the run trains the trunk


class PhaseConfig(Protocol):
    """A frozen dataclass registered under `PHASES`."""

    def build(self, resources: Resources) -> Phase:
        """Builds the phase for an experiment."""
        ...


PHASES: Registry[PhaseConfig] = Registry("phase", needs=("build",))
