"""Numbers that say how far to trust chains and particles, and what they cost."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_WINDOW = 5.0  # Sokal's c: lags are summed up to c times the sum


def autocorrelation_time(series: Float[np.ndarray, "M B"]) -> float:
    """τ = 1 + 2 Σ ρ_k over the lags k: so many states of a chain are worth one independent draw.

    ρ is the mean of the chains' autocorrelations; lags are summed up to the first of at least 5 τ (Sokal 1997).
    A chain of fewer than 50 τ states gives too small a number.

    Args:
        series: a number of each of M states of B chains. Those that never change do not count.

    Returns:
        τ; inf where no chain changes, nan for fewer than two states.
    """
    series = np.asarray(series, np.float64)
    if len(series) < 2:
        return math.nan
    centred = series - series.mean(axis=0)
    centred = centred[:, np.ptp(series, axis=0) > 0]
    if centred.shape[1] == 0:
        return math.inf
    count = len(centred)
    spectrum = np.abs(np.fft.rfft(centred, 2 * count, axis=0)) ** 2
    covariance = np.fft.irfft(spectrum, axis=0)[:count]
    times = 2 * np.cumsum((covariance / covariance[0]).mean(axis=1)) - 1
    enough = np.arange(count) >= _WINDOW * times
    return float(times[np.argmax(enough) if enough.any() else -1])


def split_r_hat(series: Float[np.ndarray, "M B"]) -> float:
    """√(variance of all states / variance within half chains): 1 where chains have forgotten their start.

    Each of B chains with one law is cut into halves of n states (Gelman et al. 2013, section 11.4): with W the
    mean of their variances and V the variance of their means, R̂² = ((n − 1)/n · W + V) / W. Of fewer than four
    states it is nan.
    """
    series = np.asarray(series, np.float64)
    size = len(series) // 2
    if size < 2:
        return math.nan
    halves = np.concatenate([series[:size], series[-size:]], axis=1)
    within, between = halves.var(axis=0, ddof=1).mean(), halves.mean(axis=0).var(ddof=1)
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((size - 1) / size + between / within)


def r_hat_of_prompts(series: Float[np.ndarray, "M B"], prompts: np.ndarray) -> float | None:
    """The largest R̂ among prompts [B P] that several chains answer; None where each has one."""
    _, group, sizes = np.unique(prompts, axis=0, return_inverse=True, return_counts=True)
    found = [split_r_hat(series[:, group.reshape(-1) == number]) for number in np.flatnonzero(sizes > 1)]
    return max(found, default=None)


def effective_number(log_weights: Float[Array, "... n"]) -> Float[Array, "..."]:
    """(Σ w)² / Σ w²: so many particles of equal weight are worth these."""
    return 1.0 / jnp.sum(jax.nn.softmax(log_weights, axis=-1) ** 2, axis=-1)
