"""A phase that learns from batches is a stream, an objective and the shapes of a batch; all else is here.

    rows ─ stream ─▶ batch [B ...] ─ objective ─▶ sums of losses ─ gradients ─ guarded update ─▶ state, metrics

`sft`, `classifier` and `reward_model` are such phases, and so is any loss of yours (docs/extending.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from types import MappingProxyType
from typing import Annotated, Any, Protocol

import jax
from jax import Array

from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.models.base import Params
from hybrid_jax.models.lora import whole
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.parallel.rules import shard_params, under
from hybrid_jax.phases.references import Reference, References
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import initial_loss_scale, loss_scale_of
from hybrid_jax.training.offload import without_idle
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import LM, Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import check_rows, key_shape, rate_shape
from hybrid_jax.training.state import RunState, TrainState
from hybrid_jax.training.update import Groups, Objective, update_state


@settings
class Supervised:
    """Settings that every phase has which learns from batches; those of a loss inherit them."""

    batch_size: BatchSize = 16  # rows a step
    microbatches: Count = 1  # parts in which a batch is read, to save memory; the gradient is the same
    dropout: bool = True  # apply the model's dropout, if it has any
    optimizer: Annotated[Optimizer, OPTIMIZERS] = field(  # of the parameters that train
        default_factory=lambda: AdamW(learning_rate=1e-3)
    )

    def __post_init__(self):
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size {self.batch_size}, got {self.microbatches}")


class Stream(Protocol):
    """Endless batches whose whole state is a cursor, the number of rows read so far."""

    def batch(self, cursor: int, size: int) -> Any:
        """Rows ``cursor`` to ``cursor + size``: a tree of arrays [size ...] on the host."""
        ...


def tokens_of(batch: Any) -> dict[str, Any]:
    """The metric ``tokens``: all that a batch holds, padding included."""
    return {"tokens": batch.tokens.size}


class SupervisedPhase:
    """Steps that learn from batches.

    Args:
        config: the settings of the loss, with those of `Supervised`.
        resources: what the experiment hands to a phase.
        stream: of the training data; None where the phase is only planned.
        objective: what is minimised. Its loss is given all groups of parameters, "model" whole (with what lies
            below adapters), and each reference, whole, as ``references/<name>``.
        shapes: of a batch, `jax.ShapeDtypeStruct` with shardings: what `hybrid_jax.plan` compiles a step for.
        logged: what is logged of a batch.
        groups: of parameters, those that train.
        references: frozen models that the loss reads, by name.
    """

    heads: Sequence[str] = (LM,)
    waits_for_device = False

    def __init__(
        self,
        config: Any,
        resources: Resources,
        *,
        stream: Stream | None,
        objective: Objective,
        shapes: Callable[[], Any],
        logged: Callable[[Any], Mapping[str, Any]] = tokens_of,
        groups: Sequence[str] = ("model",),
        references: Mapping[str, Reference] = MappingProxyType({}),
    ):
        self.config, self.resources, self.objective = config, resources, objective
        self.name, self.kind, self.optimizer_key = resources.name, resources.kind, resources.optimizer_key
        check_rows(resources, "batch_size / microbatches", config.batch_size // config.microbatches)
        self.stream, self._shapes, self._logged = stream, shapes, logged
        self.groups, self.trains_trunk = groups, "model" in groups
        self._frozen = References(references, self.name, resources.model, resources.placement)
        self.references = self._frozen.names
        self._rate = jax.jit(config.optimizer.rate)

        def update(*inputs):
            return self._learn(*inputs)

        update.__name__ = f"{self.name}_update"
        self._update = jax.jit(under(resources.placement, update), donate_argnums=2)

    def init(
        self, params: Mapping[str, Params], key: Array, made: Mapping[str, Params] | None = None
    ) -> PhaseInit:
        """Optimizer states of what trains, and the groups that this phase has ``made``."""
        transform = layer_by_layer(self.config.optimizer.transform())
        opt_state = {group: transform.init(params[group]) for group in self.groups}
        references = self._frozen.init(params["model"])
        scale = initial_loss_scale(self.resources.model)
        return PhaseInit(made or {}, opt_state, extra=scale, references=references)

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """One update on the next batch."""
        assert self.stream is not None, "a planned phase takes no steps"
        state = self._frozen.updated(state)
        started = time.perf_counter()
        cursor = state.cursors.get(self.name, 0)
        host, logged = self.batch(state, cursor)
        batch = put_rows(self.resources.placement, host)
        input_seconds = time.perf_counter() - started
        steps = state.schedule.steps.get(self.name, 0)
        rate = self._rate(*jax.device_put((steps, self.resources.horizon)))
        train, metrics = self._update(state.base, self._frozen.of(state), state.train, batch, key, rate)
        metrics |= {"learning_rate": rate, "input_seconds": input_seconds, **logged}
        cursors = {**state.cursors, self.name: cursor + self.config.batch_size}
        state = replace(state, train=train, cursors=cursors)
        return state, {f"{self.name}/{name}": value for name, value in metrics.items()}

    def batch(self, state: RunState, cursor: int) -> tuple[Any, Mapping[str, Any]]:
        """The batch at a cursor, on the host, and what is logged of it."""
        assert self.stream is not None, "a planned phase reads nothing"
        batch = self.stream.batch(cursor, self.config.batch_size)
        return batch, self._logged(batch)

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        """The update, for a batch of the longest rows."""
        batch, placement = self._shapes(), self.resources.placement
        state, idle = without_idle(state, self)
        read = self._frozen.shapes(state)
        inputs = (state.base, read, state.train, batch, key_shape(placement), rate_shape(placement))
        others = {name: tree for name, tree in state.references.items() if name not in self.references}
        beside = {"optimizer_states": idle, "references": others}
        beside = {name: trees for name, trees in beside.items() if name not in self.resources.offload}
        tokens = tokens_of(batch)["tokens"]
        return [Program(f"{self.name}/update", self._update, inputs, tokens=tokens, learns=True, beside=beside)]

    def _learn(
        self, base: Params, references: Groups, state: TrainState, batch: Any, key: Array, rate: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step, as a pure function of the state."""
        state, metrics, _ = update_state(
            self._above(base, references, {g: t for g, t in state.params.items() if g not in self.groups}),
            self.config.optimizer,
            state,
            batch,
            key,
            rate,
            optimizer_key=self.optimizer_key,
            groups=self.groups,
            microbatches=self.config.microbatches,
            scaling=loss_scale_of(self.resources.model),
        )
        return shard_params(state, param_axes), metrics

    def _above(self, base: Params, references: Groups, others: Groups) -> Objective:
        """The objective as a function of what trains, above a ``base`` (of adapters) and beside all else."""
        frozen = {f"references/{name}": whole(base, tree) for name, tree in references.items()}

        def loss(trained: Groups, batch: Any, key: Array):
            params = {**frozen, **others, **trained}
            return self.objective.loss({**params, "model": whole(base, params["model"])}, batch, key)

        return replace(self.objective, loss=loss)
