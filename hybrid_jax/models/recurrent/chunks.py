"""Parts of cells that read rows in chunks: real tokens first, a short convolution, decays within a chunk.

Inside a chunk all tokens are read at once by matrix products; only the state goes from chunk to chunk.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Interval
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Count, Positive, settings
from hybrid_jax.models.base import Params
from hybrid_jax.models.recurrent.cell import Cell, Flow, State
from hybrid_jax.models.recurrent.model import RecurrentModel, RecurrentSettings


@settings
class ChunkedSettings(RecurrentSettings):
    """Settings of recurrent models that read rows in chunks."""

    residual: bool = True  # a layer adds to what it reads, normalised (RMS) before it
    convolution_width: Annotated[int, Interval(ge=2, le=64)] = 4  # tokens that the short convolution sees
    chunk_length: Count = 64  # tokens that are read at once by matrix products; it changes the speed alone
    norm_epsilon: Positive = 1e-6  # of the norms, added to the mean square

    @property
    def epsilon(self) -> float:
        """`RecurrentSettings.epsilon`."""
        return self.norm_epsilon

    @property
    def head_bias(self) -> bool:
        """`RecurrentSettings.head_bias`."""
        return False

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@struct.dataclass
class Stretch:
    """Rows whose padding lies behind their real tokens."""

    real: Bool[Array, "T B"]
    segment: Int[Array, "T B"]  # 0 goes on from the state before the row, then 1, 2, …


class ChunkedCell(Cell):
    """A cell of which a subclass reads rows without gaps."""

    settings: Any  # a `ChunkedSettings`

    @property
    def width(self) -> int:  # type: ignore
        """D."""
        return self.settings.width

    @abstractmethod
    def read_together(
        self, params: Params, inputs: Any, state: State, stretch: Stretch
    ) -> tuple[Float[Array, "T B D"], State]:
        """`Cell.read` of prepared inputs whose padding lies at the end."""

    def read(self, params, x, state, flow: Flow | None = None):
        """`Cell.read`: chunk by chunk."""
        if flow is None:
            shape = x.shape[:2]
            stretch = Stretch(jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32))
            return self.read_together(params, self.prepared(params, x), state, stretch)
        place = _real_first(flow.real)
        order = jnp.argsort(place, axis=0)
        begins = jnp.zeros_like(flow.real) if flow.begins is None else flow.begins & flow.real
        real, begins = (jnp.take_along_axis(each, order, axis=0) for each in (flow.real, begins))
        stretch = Stretch(real, jnp.cumsum(begins, axis=0, dtype=jnp.int32))
        inputs = self.prepared(params, _moved(x, order, place))
        y, state = self.read_together(params, inputs, state, stretch)
        return _moved(y, place, order), state


def _real_first(real: Bool[Array, "T B"]) -> Int[Array, "T B"]:
    """The place of each token of a row that puts padding behind all others and keeps their order."""
    before = jnp.cumsum(real, axis=0, dtype=jnp.int32) - real
    index = jnp.arange(len(real), dtype=jnp.int32)[:, None]
    return jnp.where(real, before, real.sum(axis=0, dtype=jnp.int32) + index - before)


@jax.custom_vjp
def _moved(x: Array, order: Int[Array, "T B"], inverse: Int[Array, "T B"]) -> Array:
    """Tokens [T B W] in another order. Its gradient gathers too, where autodiff would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=0)


_moved.defvjp(
    lambda x, order, inverse: (_moved(x, order, inverse), inverse),
    lambda inverse, dy: (jnp.take_along_axis(dy, inverse[..., None], axis=0), None, None),
)


# ------------------------------------------------------------------------------------------------ convolution


def init_convolution(key: Array, taps: int, channels: int, bias: bool) -> Params:
    """Parameters of a convolution of each channel by itself, uniform within ± 1/√taps."""
    bound = taps**-0.5
    params: Params = {"taps": jax.random.uniform(key, (taps, channels), minval=-bound, maxval=bound)}
    return {**params, "bias": jnp.zeros(channels)} if bias else params


def convolved(
    params: Params, x: Float[Array, "T B C"], window: Float[Array, "B K C"], stretch: Stretch
) -> tuple[Float[Array, "T B C"], Float[Array, "B K C"]]:
    """silu(Σ_j taps_j x_{t−K+j} + bias) over the token and the K before it in its segment, zeros before those.

    Args:
        params: of `init_convolution`, with K + 1 taps.
        x: what is read.
        window: the K tokens before it.
        stretch: of the row.

    Returns:
        The convolved row, and the window behind its last real token.
    """
    k = window.shape[1]
    longer = jnp.concatenate([window.swapaxes(0, 1), x])
    segment = jnp.pad(stretch.segment, ((k, 0), (0, 0)))
    total = jnp.zeros_like(x) + params.get("bias", 0.0)
    for j, tap in enumerate(params["taps"]):
        same = segment[j : j + len(x)] == stretch.segment
        total += tap * jnp.where(same[..., None], longer[j : j + len(x)], 0)
    last = stretch.real.sum(axis=0, dtype=jnp.int32) + jnp.arange(k, dtype=jnp.int32)[:, None]  # [K B]
    of_last = jnp.take_along_axis(segment, last, axis=0)
    after = jnp.take_along_axis(longer, last[..., None], axis=0)
    after = jnp.where((of_last == of_last[-1])[..., None], after, 0)
    return jax.nn.silu(total), after.swapaxes(0, 1)


def convolved_one(
    params: Params, x: Float[Array, "B C"], window: Float[Array, "B K C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B K C"]]:
    """`convolved` for one token a row."""
    longer = jnp.concatenate([window, x[:, None]], axis=1)
    total = jnp.einsum("bkc,kc->bc", longer, params["taps"], precision=lax.Precision.HIGHEST)
    return jax.nn.silu(total + params.get("bias", 0.0)), longer[:, 1:]


# ------------------------------------------------------------------------------------------------ chunks


def in_chunks(length: int, x: Array, fill: str = "constant") -> Array:
    """A row [T …] as chunks [n length …]; ``fill`` is how `jnp.pad` makes the end of the last one."""
    missing = -len(x) % length
    x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), mode=fill)  # type: ignore
    return x.reshape(-1, length, *x.shape[1:])


def init_decay(key: Array, heads: int, low: float, high: float) -> Params:
    """Parameters of `log_decay`: rates uniform in [1, 16], time steps log-uniform in [low, high]."""
    of_step, of_rate = jax.random.split(key)
    log_step = jax.random.uniform(of_step, (heads,), minval=math.log(low), maxval=math.log(high))
    step = jnp.maximum(jnp.exp(log_step), 1e-4)
    return {
        "time_step": {"bias": step + jnp.log(-jnp.expm1(-step))},  # softplus of it is the step
        "decay": {"log_rate": jnp.log(jax.random.uniform(of_rate, (heads,), minval=1.0, maxval=16.0))},
    }


def time_step(params: Params, delta: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """softplus(δ + bias)."""
    return jax.nn.softplus(delta + params["time_step"]["bias"])


def log_decay(params: Params, delta: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """log a = −exp(A) softplus(δ + bias), of what a token leaves of the state before it."""
    return -jnp.exp(params["decay"]["log_rate"]) * time_step(params, delta)


@struct.dataclass
class Decays:
    """Shares of a state that are left between two tokens of a chunk, and between its edges and a token.

    Attributes:
        between: from behind token s up to behind token t, 0 where s is later or of another segment.
        from_start: from the state before the chunk to behind token t.
        to_end: from behind token s to the end of the chunk.
        across: from the state before the chunk to its end.
    """

    between: Float[Array, "n B H t s"]
    from_start: Float[Array, "n t B H"]
    to_end: Float[Array, "n s B H"]
    across: Float[Array, "n B H"]


def decays(log_decay: Float[Array, "n t B H"], segment: Int[Array, "n t B"]) -> Decays:
    """The `Decays` of chunks, of the logarithm of what each token leaves of the state before it.

    Each is a sum of its own decays alone: a difference of sums from the start would lose its digits behind a
    decay that all but empties a state. Sums are masked before the exponent: above the diagonal is no decay.
    """
    total = jnp.cumsum(log_decay, axis=1)
    length = total.shape[1]
    behind = jnp.pad(jnp.cumsum(log_decay[:, :0:-1], axis=1)[:, ::-1], ((0, 0), (0, 1), (0, 0), (0, 0)))
    before = jnp.pad(segment[:-1, -1], ((1, 0), (0, 0)))  # [n B], of the state before the chunk
    earlier = jnp.tril(jnp.ones((length, length), bool))[:, :, None]
    seen = (earlier & (segment[:, :, None] == segment[:, None])).transpose(0, 3, 1, 2)[:, :, None]
    later = jnp.tril(jnp.ones((length, length), bool), -1)
    gaps = jnp.cumsum(jnp.where(later, log_decay.transpose(0, 2, 3, 1)[..., None], 0), axis=-2)
    at_start = (segment == before[:, None])[..., None]
    at_end = (segment == segment[:, -1:])[..., None]
    return Decays(
        jnp.exp(jnp.where(seen, gaps, -jnp.inf)),
        jnp.where(at_start, jnp.exp(total), 0),
        jnp.exp(jnp.where(at_end, behind, -jnp.inf)),
        jnp.where(at_start[:, -1], jnp.exp(total[:, -1]), 0),
    )
