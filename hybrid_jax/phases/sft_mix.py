"""Examples mixed into the updates of a policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge

from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.ranges import BatchSize, Positive, settings
from hybrid_jax.data.long_rows import ChatPolicy
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.phases.sft import SFT, example_shapes, sft_stream
from hybrid_jax.training.phase import Resources


@settings
class SFTMix:
    """Examples mixed into every update: PPO-ptx (Ouyang et al. 2022), ``+ coef · cross-entropy``."""

    coef: Positive  # of their loss
    batch_size: BatchSize = 16  # rows a minibatch
    length: Annotated[int, Ge(2)] = 256  # tokens a row
    long_rows: ChatPolicy = "truncate_end"  # as in `SFT`
    packing: bool = True  # several examples a row

    def as_sft(self) -> SFT:
        """The same rows as settings of supervised fine-tuning."""
        rows: Any = {"length": self.length, "long_rows": self.long_rows, "packing": self.packing}
        return SFT(batch_size=self.batch_size, **rows)


class MixedExamples:
    """The examples of each step of one phase, read on from where the last step ended.

    Args:
        mix: how many, and how they lie.
        minibatches: updates an epoch; each has examples of its own.
        resources: of the phase.
    """

    def __init__(self, mix: SFTMix, minibatches: int, resources: Resources):
        self.rows, self.length = mix.batch_size * minibatches, mix.length
        self._placement, self._cursor = resources.placement, f"{resources.name}/examples"
        where = f"phases.{resources.name}.sft_mix"
        self.stream = None if resources.examples is None else sft_stream(mix.as_sft(), resources, where)

    def batch(self, cursors: Mapping[str, int]) -> TokenBatch:
        """The examples of this step, on the devices."""
        assert self.stream is not None, "a planned phase takes no steps"
        return put_rows(self._placement, self.stream.batch(cursors.get(self._cursor, 0), self.rows))

    def advanced(self, cursors: Mapping[str, int]) -> dict[str, int]:
        """The cursors after one more step."""
        return {self._cursor: cursors.get(self._cursor, 0) + self.rows}

    def shapes(self) -> TokenBatch:
        """Shapes of a batch, for a plan."""
        return example_shapes(self._placement, self.rows, self.length)
