"""Losses of a language model on pairs of answers, of which people liked one better.

Every loss reads log π(y|x) of both answers of each pair, the better first, [B 2], summed over the tokens of the
answers; log π_ref of the same, unless it reads none; and how many tokens were summed. With

    h = [log π(y⁺) − log π_ref(y⁺)] − [log π(y⁻) − log π_ref(y⁻)]        rewards r = β (log π(y) − log π_ref(y))

the margin r⁺ − r⁻ is β h. Losses that read means divide log π(y) by the tokens of y first.

All are at least 0 but ``robust``, which is unbounded below. ``kto`` learns from single answers, ``sppo`` from
groups of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from annotated_types import Interval
from jaxtyping import Array, Float

from hybrid_jax.algorithms.preference import pair_loss
from hybrid_jax.core.ranges import Finite, NonNegative, Positive, settings
from hybrid_jax.core.registry import Registry

Pairs = Float[Array, "B 2"]
Noise = Annotated[float, Interval(ge=0, lt=0.5)]


class PreferenceLoss(Protocol):
    """Settings of a loss, an entry of `PREFERENCE_LOSSES`."""

    needs_reference: ClassVar[bool]  # whether it reads log π_ref
    learns_from: ClassVar[Literal["pairs", "answers", "groups"]]  # an answer is good or bad, of a group it wins
    sft_coef: ClassVar[float]  # of −log π(y⁺) a token, which the source of the loss adds to it


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("preference loss")


@settings
class PairLoss:
    """A loss of pairs: what most of them share.

    Attributes:
        beta: how closely the policy keeps to its reference; where there is none, the scale of a log-prob.
    """

    beta: Positive = 0.1

    needs_reference: ClassVar[bool] = True
    reads_means: ClassVar[bool] = False
    learns_from: ClassVar[Literal["pairs", "answers", "groups"]] = "pairs"
    sft_coef: ClassVar[float] = 0.0

    def __call__(self, policy: Pairs, reference: Pairs | None, tokens: Pairs) -> Float[Array, "B"]:
        """The loss of each pair.

        Args:
            policy: log π(y|x), summed over the tokens of each answer; the better one first.
            reference: of a frozen model, without gradient; None where the loss reads none.
            tokens: how many were summed, at least 1.
        """
        rewards = self.rewards(policy, reference, tokens)
        return self.loss(rewards[:, 0], rewards[:, 1])

    def rewards(self, policy: Pairs, reference: Pairs | None, tokens: Pairs) -> Pairs:
        """The rewards of both answers that the policy stands for: β times its log-ratios."""
        return self.beta * self.ratios(policy, reference, tokens)

    def ratios(self, policy: Pairs, reference: Pairs | None, tokens: Pairs) -> Pairs:
        """log π(y) − log π_ref(y), or log π(y); a mean over tokens where the loss reads means."""
        ratios = policy if not self.needs_reference else policy - _given(reference)
        return ratios / tokens if self.reads_means else ratios

    def loss(self, better: Float[Array, "B"], worse: Float[Array, "B"]) -> Float[Array, "B"]:
        """The loss of the rewards of each pair."""
        raise NotImplementedError


def _given(reference: Pairs | None) -> Pairs:
    if reference is None:
        raise ValueError("this loss reads log-probs of a reference, got None")
    return reference


@PREFERENCE_LOSSES.register("sigmoid")
@settings
class Sigmoid(PairLoss):
    """DPO: −(1 − ε) log σ(β h) − ε log σ(−β h). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With ε > 0 it is cDPO (Mitchell 2023, "A note on DPO with noisy preferences"), smallest at σ(β h) = 1 − ε.

    Another divergence than the reverse KL holds the policy with β [f'(u⁺) − f'(u⁻)] in place of β h,
    u = π(y) / π_ref(y) (f-DPO: Wang et al. 2023, 2309.16240):

        reverse_kl   f' = log u             forward_kl   f' = −1 / u
        js           f' = log 2u / (1 + u)  alpha        f' = (1 − u^−α) / α

    Where 1/u, or u^−α, is beyond e^30 it goes on along its tangent, since float32 ends at e^88.

    Attributes:
        label_smoothing: ε, the share of labels that is taken to be wrong.
        divergence: from the reference.
        alpha: α of the divergence ``alpha``: towards 0 it is the reverse KL, at 1 the forward KL.
    """

    label_smoothing: Noise = 0.0
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def rewards(self, policy: Pairs, reference: Pairs | None, tokens: Pairs) -> Pairs:
        """β f'(u), but for a constant."""
        log_u = self.ratios(policy, reference, tokens)
        match self.divergence:
            case "reverse_kl":
                return self.beta * log_u
            case "forward_kl":
                return -self.beta * (_expm1(-log_u) + 1.0)
            case "js":
                return self.beta * (jnp.log(2.0) + jax.nn.log_sigmoid(log_u))
        return -self.beta * _expm1(-self.alpha * log_u) / self.alpha

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return pair_loss(better - worse, label_smoothing=self.label_smoothing)


LARGEST_EXPONENT = 30.0  # e^30 squared, and summed over parameters, is still a float32


def _expm1(x: Pairs) -> Pairs:
    """exp(x) − 1, beyond the largest exponent its tangent: finite, and with a gradient."""
    near, slope = jnp.minimum(x, LARGEST_EXPONENT), jnp.exp(LARGEST_EXPONENT)
    return jnp.where(x <= LARGEST_EXPONENT, jnp.expm1(near), slope * (1.0 + x - LARGEST_EXPONENT))


@PREFERENCE_LOSSES.register("sigmoid_norm")
@settings
class SigmoidNorm(PairLoss):
    """DPO on means over tokens: −log σ(β [mean log-ratio of y⁺ − that of y⁻]).

    Length-normalised DPO of Lambert et al. 2024 (Tülu 3, arXiv 2411.15124).
    """

    beta: Positive = 5.0  # a mean is smaller than a sum
    reads_means: ClassVar[bool] = True

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.softplus(worse - better)


@PREFERENCE_LOSSES.register("robust")
@settings
class Robust(PairLoss):
    """[(1 − ε) L(β h) − ε L(−β h)] / (1 − 2ε), L = −log σ: of flipped labels, the mean is DPO on the true ones.

    Chowdhury et al. 2024 (arXiv 2403.00409). Unbounded below: β h → −∞ is no danger, but β h → ∞ gives
    −ε β h / (1 − 2ε) → −∞, so stop early.

    Attributes:
        label_smoothing: ε, the share of labels that is known to be flipped.
    """

    label_smoothing: Noise = 0.1

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        right, wrong = jax.nn.softplus(worse - better), jax.nn.softplus(better - worse)
        noise = self.label_smoothing
        return ((1.0 - noise) * right - noise * wrong) / (1.0 - 2.0 * noise)


@PREFERENCE_LOSSES.register("ipo")
@settings
class IPO(PairLoss):
    """(h − 1 / (2β))²: Azar et al. 2023 (arXiv 2310.12036), eq. 17. With certain preferences h → 1 / (2β).

    Attributes:
        token_mean: means over tokens in place of sums, as some trainers have it; h is then of another size.
    """

    token_mean: bool = False

    @property
    def reads_means(self) -> bool:  # type: ignore
        """Tells whether log-probs are means over the tokens of an answer."""
        return self.token_mean

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jnp.square((better - worse - 0.5) / self.beta)


@PREFERENCE_LOSSES.register("hinge")
@settings
class Hinge(PairLoss):
    """max(0, 1 − β h): Zhao et al. 2023 (SLiC, arXiv 2305.10425), on log-ratios to the reference."""

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.relu(1.0 - (better - worse))


@PREFERENCE_LOSSES.register("exo")
@settings
class EXO(PairLoss):
    """KL(σ(±β h) ‖ (1 − ε, ε)): Ji et al. 2024 (arXiv 2402.00856), for a pair.

    Infinite at ε = 0.

    Attributes:
        label_smoothing: ε, above 0.
    """

    label_smoothing: Annotated[float, Interval(gt=0, lt=0.5)] = 1e-3

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        margin, noise = better - worse, self.label_smoothing
        right = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-noise))
        return right + jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(noise))


@PREFERENCE_LOSSES.register("nca")
@settings
class NCA(PairLoss):
    """−log σ(r⁺) − ½ log σ(−r⁺) − ½ log σ(−r⁻): Chen et al. 2024 (arXiv 2402.05369), for a pair.

    The better answer gains likelihood, where DPO may lower both.
    """

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        softplus = jax.nn.softplus
        return softplus(-better) + 0.5 * softplus(better) + 0.5 * softplus(worse)


@PREFERENCE_LOSSES.register("bco")
@settings
class BCO(PairLoss):
    """−log σ(r⁺ − δ) − log σ(−(r⁻ − δ)): a classifier of answers. Jung et al. 2024 (arXiv 2404.04656).

    Attributes:
        shift: δ, what separates good rewards from bad ones: near the mean of both, which is logged.
    """

    shift: Finite = 0.0

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.softplus(self.shift - better) + jax.nn.softplus(worse - self.shift)


@PREFERENCE_LOSSES.register("sppo_hard")
@settings
class SPPOHard(PairLoss):
    """(log-ratio of y⁺ − 1/(2β))² + (log-ratio of y⁻ + 1/(2β))²: Wu et al. 2024 (arXiv 2405.00675),
    where the better answer wins for certain."""

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jnp.square((better - 0.5) / self.beta) + jnp.square((worse + 0.5) / self.beta)


@PREFERENCE_LOSSES.register("apo_zero")
@settings
class APOZero(PairLoss):
    """1 − σ(r⁺) + σ(r⁻), in (0, 2): D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    For answers better than those of the policy: the likelihood of y⁺ rises, that of y⁻ falls.
    """

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.sigmoid(-better) + jax.nn.sigmoid(worse)


@PREFERENCE_LOSSES.register("apo_down")
@settings
class APODown(PairLoss):
    """σ(r⁺) + 1 − σ(r⁺ − r⁻), in (0, 2): D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    For answers worse than those of the policy: both likelihoods fall, that of y⁻ more.
    """

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.sigmoid(better) + jax.nn.sigmoid(worse - better)


@PREFERENCE_LOSSES.register("discopop")
@settings
class DiscoPOP(PairLoss):
    """(1 − m) (−log σ(β h)) + m exp(−β h), m = σ(β h / τ): Lu et al. 2024 (arXiv 2406.08414).

    Attributes:
        temperature: τ.
    """

    temperature: Positive = 0.05

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        margin = better - worse
        share = jax.nn.sigmoid(margin / self.temperature)
        # m exp(−βh) as one exponential: apart they are 0 × ∞ where h is far below 0.
        exponential = jnp.exp(jax.nn.log_sigmoid(margin / self.temperature) - margin)
        return (1.0 - share) * jax.nn.softplus(-margin) + exponential


@PREFERENCE_LOSSES.register("cpo")
@settings
class CPO(PairLoss):
    """−log σ(β [log π(y⁺) − log π(y⁻)]) + SFT: Xu et al. 2024 (arXiv 2401.08417). No reference."""

    needs_reference: ClassVar[bool] = False
    sft_coef: ClassVar[float] = 1.0

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.softplus(worse - better)


@PREFERENCE_LOSSES.register("simpo")
@settings
class SimPO(PairLoss):
    """−log σ(β [mean log π(y⁺) − mean log π(y⁻)] − γ): Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    It reads no reference.

    Attributes:
        beta: scale of a mean over tokens.
        margin: γ, by how much the better reward must be ahead.
    """

    beta: Positive = 2.0
    margin: NonNegative = 1.0
    needs_reference: ClassVar[bool] = False
    reads_means: ClassVar[bool] = True

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        return jax.nn.softplus(self.margin + worse - better)


@PREFERENCE_LOSSES.register("orpo")
@settings
class ORPO(PairLoss):
    """−β log σ(log odds(y⁺) − log odds(y⁻)) + SFT, odds p / (1 − p): Hong et al. 2024 (2403.07691), eq. 6.

    p is exp of the mean of log π over tokens: of a sum, 1 − p would be 1 in any precision. No reference.

    Attributes:
        beta: what the odds count beside the SFT term.
    """

    needs_reference: ClassVar[bool] = False
    reads_means: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 1.0

    def loss(self, better, worse):
        """`PairLoss.loss`."""
        odds = [mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -_SURE))) for mean in (better, worse)]
        return self.beta * jax.nn.softplus(odds[1] - odds[0])

    def rewards(self, policy: Pairs, reference: Pairs | None, tokens: Pairs) -> Pairs:
        """Means of log π(y) over tokens: β scales the loss, not them."""
        return self.ratios(policy, reference, tokens)


_SURE = 1e-6  # a mean of log π above −1e-6 has the odds, and no gradient, of one there: 1 − p is not yet 0
