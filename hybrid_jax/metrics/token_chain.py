"""The Markov chain of order 1 that answers make: how evenly it visits tokens, and how fast it forgets.

Answers are walks from a boundary to the boundary, which is one more state, so that the chain never ends:

    P_ij = n_ij / n_i      n_ij: how often j followed i; n_i: how often i was visited
    π    = n_i / Σ n       the stationary distribution π P = π, exactly, as every walk comes back
    gap  = 1 − max |λ|     over the eigenvalues of P but λ = 1: near 0 the chain hardly leaves where it is
    rate = −Σ_i π_i Σ_j P_ij log P_ij     nats a token

The period is the greatest common divisor of the lengths of all closed walks. Every state reaches every other
one through the boundary, so the chain is ergodic if it is 1. The entropy of π is what maximum-entropy
exploration raises (Hazan et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MOST_STATES = 1024  # the eigenvalues of so many take about a second
OTHERS = -1  # the tokens beyond, as one state


@dataclass(frozen=True)
class TokenChain:
    """The chain of some answers; state 0 is the boundary.

    Attributes:
        tokens: of the states behind it, by how often they were visited; `OTHERS` is all rarer ones.
        counts: how often a state followed another one, n_ij.
    """

    tokens: tuple[int, ...]
    counts: Float[np.ndarray, "S S"]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], most: int = MOST_STATES) -> TokenChain:
        """Counts the pairs of neighbouring tokens of answers, the boundary before and behind each.

        Raises:
            ValueError: no answer has a token.
        """
        tokens, visits = np.unique([token for answer in answers for token in answer], return_counts=True)
        if not len(tokens):
            raise ValueError("answers must have a token, got none")
        known = [int(token) for token in tokens[np.argsort(-visits, kind="stable")]]
        if len(known) > most - 1:
            known = [*known[: most - 2], OTHERS]
        place = {token: state for state, token in enumerate(known, start=1)}
        rare = place.get(OTHERS, 0)
        counts = np.zeros((len(known) + 1,) * 2)
        for answer in answers:
            walk = [0, *(place.get(token, rare) for token in answer), 0]
            np.add.at(counts, (walk[:-1], walk[1:]), len(answer) > 0)
        return cls(tuple(known), counts)

    @property
    def transitions(self) -> Float[np.ndarray, "S S"]:
        """P."""
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    @property
    def stationary(self) -> Float[np.ndarray, "S"]:
        """π."""
        return self.counts.sum(axis=1) / self.counts.sum()

    @property
    def spectral_gap(self) -> float:
        """1 − the second largest modulus of an eigenvalue, in [0, 1]."""
        moduli = np.sort(np.abs(np.linalg.eigvals(self.transitions)))[::-1]
        return float(np.clip(1 - moduli[1], 0.0, 1.0))

    @property
    def period(self) -> int:
        """The greatest common divisor of the lengths of closed walks; 1: the chain is ergodic."""
        follows = self.counts > 0
        distance = np.full(len(follows), -1)
        distance[0], found, divisor = 0, [0], 0
        while found:
            state = found.pop(0)
            for other in np.flatnonzero(follows[state]):
                if distance[other] < 0:
                    distance[other] = distance[state] + 1
                    found.append(int(other))
                divisor = math.gcd(divisor, int(distance[state]) + 1 - int(distance[other]))
        return divisor

    def numbers(self) -> dict[str, float]:
        """Its four numbers by name, as they are logged."""
        p, pi = self.transitions, self.stationary
        return {
            "spectral_gap": self.spectral_gap,
            "period": float(self.period),
            "stationary_entropy": float(pi @ -_log(pi)),
            "entropy_rate": float(pi @ (p * -_log(p)).sum(axis=1)),
        }


def _log(p: np.ndarray) -> np.ndarray:
    """log p, and 0 of 0."""
    return np.log(np.where(p > 0, p, 1.0))
