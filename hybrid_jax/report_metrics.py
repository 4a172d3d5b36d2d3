"""Which metrics share a chart of the report, and what each of them means when it looks wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Metric: what it is, and what to think of when it looks wrong.
GLOSSARY = {
    "score": (
        "Mean reward of the sampled responses.",
        "Flat: the reward has no signal yet, or the KL coefficient holds the policy back.",
    ),
    "score_std": (
        "Spread of the scores within a batch.",
        "Near zero: all responses earn the same, nothing is left to learn from.",
    ),
    "reward": (
        "One part of the score, before weighting.",
        "One part rising while the others fall: the policy trades them; look at the weights.",
    ),
    "kl": (
        "Distance from the reference: log-ratio summed over a response, in nats.",
        "Rising fast with the score: the policy may be gaming the reward; read the samples.",
    ),
    "kl_k3": (
        "The same distance by an estimator with less noise (k3).",
        "Far from the KL above: the estimate is noisy, sample more.",
    ),
    "kl_coef": (
        "The price of a nat of KL in the reward.",
        "Growing without end: the policy ignores the price; lower the learning rate.",
    ),
    "loss": (
        "Mean negative log-likelihood of the target tokens, in nats.",
        "Held-out rising while training falls: overfitting.",
    ),
    "perplexity": (
        "exp of the held-out loss: among how many tokens the model hesitates.",
        "Rising during PPO: language is traded for reward.",
    ),
    "policy_loss": (
        "The clipped PPO objective, negated.",
        "Its size means little; large swings mean updates that are too big.",
    ),
    "value_loss": (
        "Squared error of the value estimates.",
        "Growing: rewards changed scale, or the value learning rate is too high.",
    ),
    "clip_fraction": (
        "Share of tokens whose probability ratio met the clip.",
        "Above 0.3: updates too large; at 0: too timid.",
    ),
    "approx_kl": (
        "How far one update moved the policy, in nats a token.",
        "Above 0.05: fewer epochs or a smaller learning rate.",
    ),
    "explained_variance": (
        "How much of the returns the value estimates explain; 1 is all.",
        "Below 0: the estimates are worse than a constant.",
    ),
    "entropy": (
        "How undecided the policy is at each token, in nats.",
        "Falling to 0: responses collapse into one.",
    ),
    "eos_fraction": (
        "Share of responses that end by themselves.",
        "Falling: the policy rambles up to the length limit.",
    ),
    "response_length": (
        "Mean tokens of a response.",
        "Drifting up or down with the score: the reward may be counting length.",
    ),
    "learning_rate": (
        "The optimizer's step size.",
        "At 0 before the end: the schedule is shorter than the run.",
    ),
    "grad_norm": (
        "Length of the gradient before clipping.",
        "Spikes: bad batches, or a learning rate at its limit.",
    ),
    "tokens_per_second": (
        "Tokens handled in a second.",
        "Sinking: longer responses, or something else on the machine.",
    ),
    "rollout_seconds": (
        "Time to sample the responses.",
        "Usually the largest part; where it is the rewards, they are the bottleneck.",
    ),
    "reward_seconds": (
        "Time to score the responses.",
        "Larger than the rollout: the rewards are the bottleneck.",
    ),
    "update_seconds": (
        "Time for the gradient steps.",
        "Larger than the rollout: fewer epochs or larger minibatches help.",
    ),
    "seconds": ("Time of a whole step.", "Single spikes: compilation or a checkpoint."),
}


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    colour: str = ""  # that of its phase unless said


@dataclass(frozen=True)
class Chart:
    """A chart's title and its panels: the lines of each and a value that its axis must reach down to."""

    title: str
    panels: Sequence[tuple[Sequence[Line], float | None]]
    glossary: str | None  # the entry that is printed beneath


def pair(name: str) -> list[Line]:
    return [Line(f"ppo/{name}", "training"), Line(f"evaluation/{name}", "held-out")]


def _both(name: str) -> list[Line]:
    return [Line(f"sft/{name}", "SFT"), Line(f"ppo/{name}", "PPO")]


def _alone(title: str, name: str, floor: float | None = None) -> Chart:
    return Chart(title, [(pair(name), floor)], name)


HEADLINE_CHARTS = [
    _alone("Score", "score"),
    Chart(
        "KL to the reference",
        [(pair("kl"), 0.0), ([Line("ppo/kl_coef", "coefficient", "fourth")], 0.0)],
        "kl",
    ),
]
CHARTS = [
    Chart(
        "Language-model loss",
        [([Line("sft/loss", "training"), Line("evaluation/loss", "held-out")], None)],
        "loss",
    ),
    _alone("Perplexity", "perplexity"),
    _alone("Policy loss", "policy_loss"),
    _alone("Value loss", "value_loss", 0.0),
    _alone("Explained variance", "explained_variance"),
    _alone("Clip fraction", "clip_fraction", 0.0),
    _alone("Size of an update", "approx_kl", 0.0),
    _alone("Entropy", "entropy", 0.0),
    _alone("Response length", "response_length"),
    _alone("Responses that end", "eos_fraction"),
    _alone("Spread of the scores", "score_std", 0.0),
    _alone("KL, k3 estimate", "kl_k3", 0.0),
    Chart("Learning rate", [(_both("learning_rate"), 0.0)], "learning_rate"),
    Chart("Gradient norm", [(_both("grad_norm"), 0.0)], "grad_norm"),
    Chart("Throughput, tokens a second", [(_both("tokens_per_second"), 0.0)], "tokens_per_second"),
    Chart("Seconds a step", [(_both("seconds"), 0.0)], "seconds"),
    Chart(
        "Where a PPO step goes, seconds",
        [
            (
                [
                    Line("ppo/rollout_seconds", "rollout"),
                    Line("ppo/update_seconds", "update", "fourth"),
                    Line("ppo/reward_seconds", "rewards", "other"),
                ],
                0.0,
            )
        ],
        "rollout_seconds",
    ),
]
