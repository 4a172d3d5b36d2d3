"""Learned mixtures of rewards: a gate that reads the prompt, and a bandit that watches a held-out metric.

Neither is trained to maximise the score: it is linear in the weights, so all weight would go to the part that
is easiest to satisfy. The gate learns people's preferences, the bandit the gain of a metric.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from jaxtyping import Float

from hybrid_jax.core.ranges import NonNegative, Positive, Seed, Share, settings
from hybrid_jax.data.preferences import PREFERENCES
from hybrid_jax.metrics.text import ngrams, words
from hybrid_jax.rewards.combine import COMBINERS, Values, Weighing
from hybrid_jax.rewards.model_based import start_embeddings, text_encoder

State = Mapping[str, np.ndarray]

_LOG_SHARPNESS = 5.0  # bound on |log β|, which has no finite optimum where preferences have no noise


@COMBINERS.register("gated")
@settings
class Gated:
    """Parts weighed by the prompt: ``Σ_i g_i(x) w_i v_i / s_i``.

        g(x) = floor + (1 − K · floor) softmax(W φ(x) + b)                     of K parts
        P(chosen before rejected | x) = σ(β Σ_i g_i(x) w_i (v_i(chosen) − v_i(rejected)) / s_i)

    The gate of ArmoRM (Wang et al. 2024, 2406.12845), as one linear layer. W, b and β are fitted once, before
    the first rollout, by the negative log-likelihood of preferences over the parts' own scores, plus
    ``l2 / 2 · ‖W‖²``; s_i is the standard deviation of part i over those responses. What the policy does never
    changes them. Until they are fitted all parts weigh the same (``gate_fitted`` is 0).

    Attributes:
        preferences: what the gate learns: pairs that neither policy nor reward models have learnt.
        encoder: folder of a sentence encoder, whose embedding of the prompt is φ; None hashes its words.
        bits: 2^bits buckets for words and pairs of neighbours, φ of length 1; for prompts in plain words.
        floor: the least weight of a part, in [0, 1/K): keeps the entropy of g above 0.
        l2: of W; the larger, the less a prompt matters.
        steps: of L-BFGS, at most.
    """

    preferences: Annotated[Any, PREFERENCES]
    encoder: str | None = None
    bits: Annotated[int, Interval(ge=1, le=20)] = 10
    floor: Annotated[float, Interval(ge=0, lt=0.5)] = 0.01
    l2: NonNegative = 1e-3
    steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 500

    keeps_places: ClassVar[bool] = True

    def check(self, names: Sequence[str]) -> None:
        """Refuses fewer than two parts, or a floor that leaves nothing to divide."""
        if len(names) < 2:
            raise ValueError("parts must be two or more for a gate, got one")
        if self.floor * len(names) >= 1:
            raise ValueError(f"floor must be below 1 / {len(names)} parts, got {self.floor}")

    def init(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """A gate that is not fitted yet: equal weights for every prompt."""
        count = len(names)
        width = 2**self.bits if self.encoder is None else text_encoder(self.encoder).model.config.width
        zeros = {"kernel": np.zeros((width, count)), "bias": np.zeros(count), "scale": np.ones(count)}
        return zeros | {name: np.zeros(()) for name in ("fitted", "accuracy", "loss")}

    def is_fitted(self, state: State) -> bool:
        """Tells whether `fit` has been called: before the first rollout it has to be."""
        return bool(state and state["fitted"])

    def fit(
        self, chosen: Values, rejected: Values, weights: Mapping[str, float], prompts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The state that explains preferences best.

        Args:
            chosen: of each part, its values of the chosen responses, [N]; on the scale that `combine` will see.
            rejected: the same of the rejected ones.
            weights: of the parts.
            prompts: N texts.
        """
        names = list(chosen)
        scale = np.array([np.std([chosen[name], rejected[name]]) for name in names])
        scale = np.where(scale > 0, scale, 1.0)  # a constant part tells nothing, whatever its weight
        signed = np.array([weights[name] for name in names]) / scale
        differences = np.stack([chosen[name] - rejected[name] for name in names], axis=1) * signed
        features = self.features(prompts)
        kernel, bias, _, loss = fit_gate(features, differences, floor=self.floor, l2=self.l2, steps=self.steps)
        margins = (gate_weights(features, kernel, bias, self.floor) * differences).sum(axis=1)
        accuracy = np.mean(0.5 * (np.sign(margins) + 1.0))
        numbers = {"fitted": 1.0, "accuracy": accuracy, "loss": loss}
        state = {"kernel": kernel, "bias": bias, "scale": scale}
        return state | {name: np.asarray(number, np.float64) for name, number in numbers.items()}

    def weights(self, state: State, prompts: Sequence[str], count: int) -> Float[np.ndarray, "B K"]:
        """g of each prompt: at least ``floor``, the sum is 1."""
        if not self.is_fitted(state):
            return np.full((len(prompts), count), 1.0 / count)
        return gate_weights(self.features(prompts), state["kernel"], state["bias"], self.floor)

    def features(self, prompts: Sequence[str]) -> Float[np.ndarray, "B F"]:
        """φ of each prompt, float64."""
        if self.encoder is None:
            return hashed_words(prompts, self.bits)
        encoder = text_encoder(self.encoder)
        vectors = start_embeddings(encoder, prompts, batch_size=32)()
        return np.array([vectors[prompt] for prompt in prompts]).reshape(
            len(prompts), encoder.model.config.width
        )

    def combine(self, state, values, weights, prompts):
        """Weighs the parts of each row by what the gate gives its prompt."""
        names = list(values)
        gate = self.weights(state, prompts, len(names))
        scale = state["scale"] if self.is_fitted(state) else np.ones(len(names))
        coefficients = {n: gate[:, i] * weights[n] / scale[i] for i, n in enumerate(names)}
        metrics = {f"{name}_gate": _mean(gate[:, i]) for i, name in enumerate(names)}
        metrics |= {"gate_entropy": _mean(entropy(gate)), "gate_fitted": float(self.is_fitted(state))}
        if self.is_fitted(state):
            metrics |= {f"gate_{name}": float(state[name]) for name in ("accuracy", "loss")}
        return Weighing(coefficients, metrics=metrics), state


def fit_gate(
    features: Float[np.ndarray, "N F"],
    differences: Float[np.ndarray, "N K"],
    *,
    floor: float = 0.0,
    l2: float = 0.0,
    steps: int = 500,
) -> tuple[Float[np.ndarray, "F K"], Float[np.ndarray, "K"], float, float]:
    """W, b, β and the mean loss that minimise ``mean_n −log σ(β g(x_n) · d_n) + l2 / 2 ‖W‖²``; see `Gated`.

    Not convex, so it starts from equal weights and always ends in the same place.

    Args:
        features: φ(x_n).
        differences: d_n, of each part the better response's score less the worse one's.
        floor, l2, steps: see `Gated`.
    """
    from scipy.optimize import minimize

    (count, width), parts = features.shape, differences.shape[1]
    free = 1.0 - parts * floor

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias, sharpness = _unpacked(flat, width, parts)
        soft = _softmax(features @ kernel + bias)
        mixed = ((floor + free * soft) * differences).sum(axis=1)
        margins = sharpness * mixed
        value = np.mean(np.logaddexp(0.0, -margins)) + 0.5 * l2 * np.square(kernel).sum()
        slope = -_sigmoid(-margins) / count  # of the loss by the margins
        inner = (soft * differences).sum(axis=1, keepdims=True)
        logits = (slope * sharpness * free)[:, None] * soft * (differences - inner)
        gradient = [(features.T @ logits + l2 * kernel).ravel(), logits.sum(axis=0), [slope @ margins]]
        return float(value), np.concatenate(gradient)

    bounds = [(None, None)] * (width * parts + parts) + [(-_LOG_SHARPNESS, _LOG_SHARPNESS)]
    start = np.zeros(len(bounds))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
    kernel, bias, sharpness = _unpacked(found.x, width, parts)
    penalty = 0.5 * l2 * np.square(kernel).sum()
    return kernel, bias, sharpness, float(found.fun - penalty)


def gate_weights(
    features: Float[np.ndarray, "N F"], kernel: np.ndarray, bias: np.ndarray, floor: float
) -> Float[np.ndarray, "N K"]:
    """``floor + (1 − K · floor) softmax(φ W + b)``."""
    return floor + (1.0 - len(bias) * floor) * _softmax(features @ kernel + bias)


def hashed_words(texts: Sequence[str], bits: int) -> Float[np.ndarray, "B F"]:
    """Counts of words and of pairs of neighbours in 2^bits buckets, each row of length 1 (0 without words)."""
    counts = np.zeros((len(texts), 2**bits))
    for row, text in enumerate(texts):
        found = words(text)
        for gram in [*ngrams(found, 1), *ngrams(found, 2)]:
            digest = hashlib.blake2b("\t".join(gram).encode("utf-8", "replace"), digest_size=8).digest()
            counts[row, int.from_bytes(digest, "little") % 2**bits] += 1.0
    norms = np.linalg.norm(counts, axis=1, keepdims=True)
    return counts / np.where(norms > 0, norms, 1.0)


@COMBINERS.register("bandit")
@settings
class Bandit:
    """Parts weighed by how much they improved a held-out metric: EXP3 (Auer et al. 2002, "The nonstochastic
    multiarmed bandit problem", section 3), one round from an evaluation to the next.

        p_i = (1 − γ) ω_i / Σ_j ω_j + γ / K           the chance of part i to be the arm of the round, K parts
        coefficient_i = ((1 − focus) p_i + focus · [i is the arm]) w_i            during the round
        x = (clip(gain, −gain_range, gain_range) / gain_range + 1) / 2            at its end, in [0, 1]
        ω_arm ← ω_arm exp(γ x / (K p_arm))

    The gain is the change of the metric over the round. Dividing by p makes the estimate of every part's gain
    unbiased, though only one is seen. The arm is drawn from the seed and the number of the round alone, so a
    resumed run draws the same.

    Attributes:
        metric: of the evaluation, such as ``judge/taste``; the larger the better.
        exploration: γ in (0, 1].
        gain_range: gains beyond this count as this; in units of the metric, above 0.
        focus: in [0, 1]; 0 mixes the parts by their chances, which leaves the gain to all of them alike, 1 uses
            the arm alone.
        seed: of the arms.
    """

    metric: str
    exploration: Annotated[float, Interval(gt=0, le=1)] = 0.1
    gain_range: Positive = 1.0
    focus: Share = 0.5
    seed: Seed = 0

    keeps_places: ClassVar[bool] = True

    @property
    def without_arm(self) -> Bandit:
        """The same mixture without the arm of the round, which is random and not a quality of any response."""
        return replace(self, focus=0.0)

    def check(self, names: Sequence[str]) -> None:
        """Refuses fewer than two parts."""
        if len(names) < 2:
            raise ValueError("parts must be two or more for a bandit, got one")

    def init(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Equal log-weights and no round played."""
        return {
            "log_weights": np.zeros(len(names)),
            "round": np.zeros((), np.int64),
            "last": np.asarray(np.nan),  # the metric when the round began
        }

    def probabilities(self, state: State) -> Float[np.ndarray, "K"]:
        """p: at least γ / K, the sum is 1."""
        soft = _softmax(np.asarray(state["log_weights"])[None])[0]
        return (1.0 - self.exploration) * soft + self.exploration / len(soft)

    def arm(self, state: State) -> int:
        """The part that this round tries."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, int(state["round"])]))
        chances = np.cumsum(self.probabilities(state))
        return int(min(np.searchsorted(chances, generator.random(), side="right"), len(chances) - 1))

    def measured(self, state: State, value: float) -> dict[str, np.ndarray]:
        """Ends the round with the metric at ``value``; the first value only begins a round."""
        began = bool(np.isnan(state["last"]))
        observed = dict(state) if began else self.observe(state, value - float(state["last"]))
        return {**observed, "last": np.asarray(value, np.float64)}

    def observe(self, state: State, gain: float) -> dict[str, np.ndarray]:
        """Ends a round that has changed the held-out metric by ``gain``, and begins the next.

        Raises:
            ValueError: the gain is not finite.
        """
        if not math.isfinite(gain):
            raise ValueError(f"gain must be finite, got {gain}")
        seen = 0.5 * (min(max(gain / self.gain_range, -1.0), 1.0) + 1.0)
        arm, chances = self.arm(state), self.probabilities(state)
        log_weights = np.array(state["log_weights"], np.float64)
        log_weights[arm] += self.exploration * seen / (len(chances) * chances[arm])
        return {
            "log_weights": log_weights - log_weights.max(),  # only their differences matter
            "round": np.asarray(state["round"] + 1, np.int64),
            "last": state["last"],
        }

    def combine(self, state, values, weights, prompts):
        """Weighs the parts by their probabilities, the arm of this round most."""
        names = list(values)
        state = state or self.init(names)
        chances, arm = self.probabilities(state), self.arm(state)
        mixture = (1.0 - self.focus) * chances
        mixture[arm] += self.focus
        coefficients = {
            n: np.full(value.shape, mixture[i] * weights[n]) for i, (n, value) in enumerate(values.items())
        }
        metrics = {f"{name}_probability": float(chances[i]) for i, name in enumerate(names)}
        metrics |= {"bandit_entropy": float(entropy(chances[None])[0]), "bandit_arm": float(arm)}
        return Weighing(coefficients, metrics=metrics), state


def entropy(weights: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B"]:
    """−Σ_i g_i log g_i of each row, in nats, in [0, log K]."""
    return -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=1)


def _unpacked(flat: np.ndarray, width: int, parts: int) -> tuple[np.ndarray, np.ndarray, float]:
    kernel, bias = flat[: width * parts].reshape(width, parts), flat[width * parts : -1]
    return kernel, bias, float(np.exp(flat[-1]))


def _softmax(logits: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B K"]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else 0.0
