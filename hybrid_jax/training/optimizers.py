"""Optimizers and learning-rate schedules by name.

An optimizer says how a gradient becomes a direction; `training/update.py` clips the gradient before (one norm
over every parameter group) and scales the direction after:

    param ← param − rate(step, horizon) · update
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import field
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval
from jaxtyping import Array, Float, Int

from hybrid_jax.core.ranges import Count, Natural, NonNegative, Positive, Rate, Share, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.models.param_axes import is_vector, path_of
from hybrid_jax.training.muon import muon_or_adam, scale_by_muon
from hybrid_jax.training.rounding import StateDtype, stored_in

Step = int | Int[Array, ""] | Float[Array, ""]


class Schedule(Protocol):
    """A function of the step: what the peak learning rate is multiplied by."""

    def __call__(self, step: Step, horizon: Step) -> Float[Array, ""]:
        """The multiplier, in [0, 1], of update number ``step`` (from 0) of ``horizon`` planned ones.

        The horizon is infinite where nobody knows it, since a metric decides which phase comes next.
        """
        ...


SCHEDULES: Registry[Schedule] = Registry("schedule")


@settings(kw_only=True)
class _WarmedUp:
    warmup_steps: Natural = 0  # updates over which the rate rises to its peak

    def __call__(self, step: Step, horizon: Step) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / (self.warmup_steps + 1), 1.0)
        return jnp.where(
            step < self.warmup_steps, warmup, self.after_warmup(step, jnp.asarray(horizon, jnp.float32))
        )

    def after_warmup(self, step: Float[Array, ""], horizon: Float[Array, ""]) -> Float[Array, ""]:
        """The factor at an update after the warm-up."""
        return jnp.ones_like(step)


@settings(kw_only=True)
class _Decaying(_WarmedUp):
    end: Share = 0.0  # multiplier of the peak that is left at the horizon

    def decayed(self, remaining: Float[Array, ""]) -> Float[Array, ""]:
        """Goes from 1 (``remaining`` 1) to ``end`` (``remaining`` 0)."""
        return self.end + (1 - self.end) * remaining


@settings(kw_only=True)
class _ToHorizon(_Decaying):
    steps: Count | None = None  # updates of this phase until ``end``; None: as many as are planned

    def __call__(self, step: Step, horizon: Step) -> Float[Array, ""]:
        return super().__call__(step, horizon if self.steps is None else self.steps)


@SCHEDULES.register("constant")
@settings(kw_only=True)
class Constant(_WarmedUp):
    """Linear warm-up (update number ``warmup_steps`` is the first at the peak), then 1."""


@SCHEDULES.register("linear")
@settings(kw_only=True)
class Linear(_ToHorizon):
    """Warm-up, then a straight line from 1 to ``end`` at the horizon; without a horizon it stays 1."""

    def after_warmup(self, step: Float[Array, ""], horizon: Float[Array, ""]) -> Float[Array, ""]:
        """The factor at an update after the warm-up."""
        return self.decayed(1 - _progress(step, self.warmup_steps, horizon))


@SCHEDULES.register("cosine")
@settings(kw_only=True)
class Cosine(_ToHorizon):
    """Warm-up, then half a cosine from 1 to ``end`` at the horizon (Loshchilov, Hutter, arXiv 1608.03983).

    Without a horizon it stays 1.
    """

    def after_warmup(self, step: Float[Array, ""], horizon: Float[Array, ""]) -> Float[Array, ""]:
        """The factor at an update after the warm-up."""
        return self.decayed(0.5 + 0.5 * jnp.cos(jnp.pi * _progress(step, self.warmup_steps, horizon)))


@SCHEDULES.register("inverse_sqrt")
@settings(kw_only=True)
class InverseSqrt(_Decaying):
    """Warm-up, then sqrt(w / (w + steps since)) with w = max(``warmup_steps``, 1), never below ``end``.

    It does not look at the horizon.
    """

    def after_warmup(self, step: Float[Array, ""], horizon: Float[Array, ""]) -> Float[Array, ""]:
        """The factor at an update after the warm-up."""
        scale = max(self.warmup_steps, 1)
        since = jnp.maximum(step - self.warmup_steps, 0.0)
        return jnp.maximum(jnp.sqrt(scale / (scale + since)), self.end)


@SCHEDULES.register("warmup_stable_decay")
@settings(kw_only=True)
class WarmupStableDecay(_ToHorizon):
    """Warm-up, then 1, then a straight line to ``end`` over the last ``decay_fraction`` of the horizon.

    Without a horizon it stays 1.
    """

    decay_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.2  # share of the horizon that decays

    def after_warmup(self, step: Float[Array, ""], horizon: Float[Array, ""]) -> Float[Array, ""]:
        """The factor at an update after the warm-up."""
        return self.decayed(1 - _progress(step, horizon * (1 - self.decay_fraction), horizon))


def _progress(step, start, stop):
    """The share in [0, 1] of the way from ``start`` to ``stop`` at ``step``; 0 if ``stop`` is infinite."""
    done = jnp.clip((step - start) / jnp.maximum(stop - start, 1.0), 0.0, 1.0)
    return jnp.where(jnp.isinf(stop), 0.0, done)


def waits_for_horizon(schedule: Schedule, horizon: float) -> bool:
    """Tells whether a schedule stays constant because its horizon is not known."""
    return isinstance(schedule, _ToHorizon) and schedule.steps is None and math.isinf(horizon)


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")


@settings(kw_only=True)
class Optimizer(ABC):
    """Settings that all optimizers share. A subclass adds `transform`."""

    learning_rate: Positive = 1e-4  # at its peak
    schedule: Annotated[Schedule, SCHEDULES] = field(default_factory=Linear)  # course of the rate over updates
    max_grad_norm: Positive | None = 1.0  # of all parameter groups together; null does not clip

    def rate(self, step: Step, horizon: Step) -> Float[Array, ""]:
        """The learning rate of update number ``step`` (from 0) of the ``horizon`` that this phase plans."""
        return self.learning_rate * self.schedule(step, horizon)

    @abstractmethod
    def transform(self) -> optax.GradientTransformation:
        """Gradient to direction, to be *subtracted*; no learning rate, no clipping. Needs the parameters."""


@settings(kw_only=True)
class _WithMoments(Optimizer):
    """An optimizer with as many moments as parameters, kept in float32 or, in half the memory, in bfloat16.

    In bfloat16 every moment is rounded stochastically (see `rounding`), and computed with in float32.
    """

    state_dtype: StateDtype = "float32"  # of the moments; bfloat16 halves their memory

    def _stored(self, transform: optax.GradientTransformation) -> optax.GradientTransformation:
        return stored_in(self.state_dtype, transform)


@OPTIMIZERS.register("adam")
@settings(kw_only=True)
class Adam(_WithMoments):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980). See `scale_by_adam` for the two placements of ε."""

    beta1: Rate = 0.9  # decay of the mean of gradients
    beta2: Rate = 0.999  # decay of the mean of their squares
    epsilon: Positive = 1e-8  # added to the root of the second moment
    epsilon_placement: Literal["pytorch", "tensorflow"] = "pytorch"  # ε joins √v corrected, or as it is

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        return self._stored(scale_by_adam(self.beta1, self.beta2, self.epsilon, self.epsilon_placement))


@OPTIMIZERS.register("adamw")
@settings(kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    Biases, scales of norms (also one for each head) and sinks do not decay, matrices and embeddings do.
    """

    weight_decay: NonNegative = 0.01  # share of a matrix that an update takes away, times the learning rate

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        return optax.chain(super().transform(), _decay(self.weight_decay))


@OPTIMIZERS.register("adafactor")
@settings(kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), without momentum.

    Second moments are kept a row and a column of each matrix. With ``relative_step_size`` the learning rate
    is relative to each parameter's root mean square (at least 1e-3), so larger than Adam's: 1e-2 is usual.
    """

    decay_exponent: Annotated[float, Interval(gt=0, le=1)] = 0.8  # second-moment decay 1 − t^(−exponent)
    clipping_threshold: Positive | None = 1.0  # of each update's root mean square
    relative_step_size: bool = True  # whether the rate is relative to the size of each parameter
    min_factored_size: Count = 128  # smaller matrices keep their full second moment
    weight_decay: NonNegative = 0.0  # as in adamw

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        steps = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_exponent, min_dim_size_to_factor=self.min_factored_size
            )
        ]
        if self.clipping_threshold is not None:
            steps.append(optax.clip_by_block_rms(self.clipping_threshold))
        if self.relative_step_size:
            steps.append(optax.scale_by_param_block_rms())
        return optax.chain(*steps, _decay(self.weight_decay))


@OPTIMIZERS.register("lion")
@settings(kw_only=True)
class Lion(_WithMoments):
    """Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675).

    Every parameter moves by the whole learning rate, so it wants a 3–10 times smaller one than Adam.
    """

    learning_rate: Positive = 2e-5  # at its peak; 3 to 10 times smaller than for adam
    beta1: Rate = 0.9  # weight of the momentum in the direction
    beta2: Rate = 0.99  # decay of the momentum
    weight_decay: NonNegative = 0.0  # as in adamw

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        return optax.chain(self._stored(optax.scale_by_lion(self.beta1, self.beta2)), _decay(self.weight_decay))


@OPTIMIZERS.register("sgd")
@settings(kw_only=True)
class SGD(_WithMoments):
    """Stochastic gradient descent with heavy-ball momentum m ← μ m + g (not damped), update m."""

    momentum: Rate = 0.0  # decay of the sum of gradients; 0 has none
    weight_decay: NonNegative = 0.0  # as in adamw

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        momentum = self._stored(optax.trace(self.momentum)) if self.momentum else optax.identity()
        return optax.chain(momentum, _decay(self.weight_decay))


@OPTIMIZERS.register("muon")
@settings(kw_only=True)
class Muon(_WithMoments):
    """Muon for matrices, Adam for vectors, embeddings and heads (Jordan 2024; Liu et al., arXiv 2502.16982).

    A matrix, and each expert's, moves by its orthogonalised momentum, scaled to the size of an Adam update (by
    0.2 · sqrt(longer side)), so that one learning rate serves both.
    """

    beta: Rate = 0.95  # decay of the momentum of matrices
    num_iterations: Annotated[int, Interval(ge=1, le=100)] = 5  # of Newton–Schulz
    adam_beta1: Rate = 0.9  # of Adam, for what is no matrix
    adam_beta2: Rate = 0.999  # of Adam, for what is no matrix
    epsilon: Positive = 1e-8  # of Adam, for what is no matrix
    weight_decay: NonNegative = 0.01  # as in adamw

    def transform(self) -> optax.GradientTransformation:
        """Returns the transformation from gradient to direction; see `Optimizer.transform`."""
        muon = scale_by_muon(self.beta, self.num_iterations)
        adam = scale_by_adam(self.adam_beta1, self.adam_beta2, self.epsilon)
        by_kind = optax.partition({"muon": muon, "adam": adam}, muon_or_adam)
        return optax.chain(self._stored(by_kind), _decay(self.weight_decay))


def scale_by_adam(
    beta1: float,
    beta2: float,
    epsilon: float,
    epsilon_placement: Literal["pytorch", "tensorflow"] = "pytorch",
) -> optax.GradientTransformation:
    """Adam's direction, with either placement of ε.

        m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²      m̂ = m/(1 − β1^t)      v̂ = v/(1 − β2^t)

        pytorch       m̂ / (√v̂ + ε)
        tensorflow    m̂ / (√v̂ + ε/√(1 − β2^t)), that is √(1 − β2^t)/(1 − β1^t) · m / (√v + ε)

    TensorFlow's ("epsilon hat", end of section 2 of the paper) is up to 1/√(1 − β2) ≈ 32 times larger in the
    first steps and damps the parameters with tiny gradients, as OpenAI's first language-model PPO did.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None):
        count: Any = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.nu, updates)
        correction1, correction2 = _one_minus_power(beta1, count), _one_minus_power(beta2, count)
        damping = epsilon / jnp.sqrt(correction2) if epsilon_placement == "tensorflow" else epsilon
        updates = jax.tree.map(lambda m, v: m / correction1 / (jnp.sqrt(v / correction2) + damping), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def sums_of_squares(grads: Any) -> Any:
    """Σ g² of each leaf, in float32."""
    return jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), grads)


def global_norm(squares: Any) -> Float[Array, ""]:
    """The Euclidean norm over all leaves, from their `sums_of_squares`."""
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def clip_by_global_norm(
    grads: Any, max_norm: float | Float[Array, ""] | None, squares: Any = None
) -> tuple[Any, Float[Array, ""]]:
    """Scales ``grads`` down to Euclidean norm ``max_norm`` if above; also returns the norm before.

    ``squares`` are the `sums_of_squares`, where they are known already.
    """
    norm = global_norm(sums_of_squares(grads) if squares is None else squares)
    if max_norm is None:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / norm)  # 1 for a zero norm, too
    return jax.tree.map(lambda g: g * scale, grads), norm


def _one_minus_power(beta: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """1 − β^t, without the cancellation that costs float32 four digits at β = 0.999, t = 1."""
    return -jnp.expm1(count * math.log(beta)) if beta > 0 else jnp.ones((), jnp.float32)


def _decay(weight_decay: float) -> optax.GradientTransformation:
    """Adds ``weight_decay · p`` but for vectors; stateless, so phases with other decays can share a state."""
    if weight_decay == 0:
        return optax.identity()

    def decayed(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, u, p: u if is_vector(path_of(path), p.shape) else u + weight_decay * p, updates, params
        )

    return optax.stateless(decayed)
