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
    "mfu": (
        "Model FLOPs utilisation: the arithmetic that a step needs by formula, over the peak of its devices.",
        "Far below 0.3 on an accelerator: small batches, short rows, or waiting for the input or the rewards.",
    ),
    "loss_scale": (
        "What the loss is multiplied by, so that float16 gradients do not vanish.",
        "Falling to 1: gradients overflow by themselves; use bfloat16 or a smaller learning rate.",
    ),
    "input_seconds": (
        "Time of the host to make a batch and send it, often while the device still works on the last one.",
        "As large as the step: the data source is the bottleneck.",
    ),
    "rollout_seconds": (
        "Time until the sampled responses were there.",
        "Usually the largest part; where it is the rewards, they are the bottleneck.",
    ),
    "reward_seconds": (
        "Time of the host to score the responses, while the device computes values and references.",
        "Larger than the rollout: the rewards are the bottleneck.",
    ),
    "score_seconds": (
        "How much longer than the rewards the device needed for values and references.",
        "Large: the references cost more than the rewards; fewer of them help.",
    ),
    "update_seconds": (
        "The rest of a step: waiting for the device to finish the gradient steps.",
        "Larger than the rollout: fewer epochs or larger minibatches help.",
    ),
    "dispatch_seconds": (
        "Time until the whole step had been handed to the device.",
        "Nearly the whole step: the device waits for the host.",
    ),
    "time/evaluation_seconds": ("Time of an evaluation between two steps.", "Large: evaluate less often."),
    "time/checkpoint_seconds": (
        "Time of the loop to start a checkpoint, which is then written in the background.",
        "Large: the disk is slower than the steps between two checkpoints.",
    ),
    "memory/peak_bytes": (
        "The most memory that was in use on a device so far.",
        "Near the device's memory: more microbatches, or rematerialisation.",
    ),
    "memory/host_peak_bytes": (
        "The most resident memory of the process so far: on a CPU, model and data and all else together.",
        "Growing without end: something is kept.",
    ),
    "compile/count": (
        "Programs that XLA compiled, or read from its cache, since the process began.",
        "Growing during the run: shapes keep changing, and every new one is compiled.",
    ),
    "compile/seconds": ("Time that it took.", "A large part of the run: keep the compilation cache."),
    "seconds": ("Time of a whole step.", "Single spikes: compilation or a checkpoint."),
    "judge": (
        "A held-out judge: measured, never trained on.",
        "Falling while the score rises: the policy games the reward.",
    ),
    "score_length_slope": (
        "What a token more goes with in the held-out score: the least-squares slope.",
        "Far from 0, and growing: the score pays for length (above 0) or for brevity (below).",
    ),
    "reward/gate_open_fraction": (
        "Share of responses that pass the gate.",
        "Near 0: nothing is left to learn from; near 1: the gate asks for nothing.",
    ),
    "reward/aspects_fraction": (
        "Share of responses good enough as a whole for their aspects to count.",
        "Near 0: the threshold is out of reach; near 1: it asks for nothing.",
    ),
    "reward/gate_entropy": (
        "Entropy of the gate's weights, in nats; at most log of the number of parts.",
        "Near 0: one part has all the weight.",
    ),
    "reward/gate_fitted": ("1 once the gate has learnt its preferences.", "0: all parts weigh the same."),
    "reward/gate_accuracy": (
        "Share of the gate's preferences that its weights explain.",
        "Near 0.5: no weighting of these parts explains them.",
    ),
    "reward/gate_loss": ("Mean negative log-likelihood of those preferences.", "Near 0.69: chance."),
    "reward/bandit_entropy": (
        "Entropy of the bandit's chances, in nats; at most log of the number of parts.",
        "Near 0: it tries one part only.",
    ),
    "reward/bandit_arm": ("The part that the bandit tries, counted from 0.", "Never changing: no exploration."),
}
# The same for the metrics that each part has, by how they end.
PART_GLOSSARY = {
    "_std": ("Spread of a part within a rollout.", "0: every response earns the same, it teaches nothing."),
    "_p10": ("A tenth of the responses earn less from this part.", "Rising least: the worst are left behind."),
    "_p50": (
        "Half of the responses earn less from this part.",
        "Far from the mean: a few responses decide it.",
    ),
    "_p90": ("A tenth of the responses earn more from this part.", "Met by the others: the part is saturated."),
    "_clip_fraction": (
        "Share of rows in which a part was clipped.",
        "Above a half: the part says the same of most responses; widen its clip.",
    ),
    "_weight": (
        "Mean coefficient of a part in the score.",
        "0: the part does not count; growing without end: nothing else does.",
    ),
    "_multiplier": (
        "Lagrange multiplier: the price of breaking a limit.",
        "Growing without end: the limit cannot be met.",
    ),
    "_excess": (
        "By how much a limit is broken on average; below 0 it holds.",
        "Staying above 0: see its price.",
    ),
    "_gate": (
        "Mean share of the gate that a part has.",
        "Near 1: the others count for nothing.",
    ),
    "_probability": (
        "The bandit's chance of trying a part.",
        "All alike to the end: no part moved the metric that it watches.",
    ),
    "_swap_consistency": (
        "How often a judge says the same with both answers swapped.",
        "Below 0.7: it judges by position.",
    ),
    "_uncertainty": (
        "Disagreement of the members of an ensemble.",
        "Growing: the policy writes what the reward model never saw.",
    ),
    "~": (
        "Correlation over a rollout.",
        "Score with length near 1 or -1: the reward counts length; two parts below 0: they fight.",
    ),
}


def glossary_entry(metric: str) -> tuple[str, str] | None:
    """What a metric is and what to think of when it looks wrong, where that is known."""
    name = metric.partition("/")[2]
    kind = name.partition("/")[0]
    if found := GLOSSARY.get(metric) or GLOSSARY.get(name):
        return found
    endings = [ending for ending in PART_GLOSSARY if name.endswith(ending)] if kind == "reward" else []
    if kind == "reward" and "~" in name:
        endings = ["~"]
    return PART_GLOSSARY[endings[0]] if endings else GLOSSARY.get(kind)


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
    band: tuple[str, str] | None = None  # metrics: the area between them is shaded in the first panel


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
    Chart("Loss scale", [(_both("loss_scale"), None)], "loss_scale"),
]
SPEED_CHARTS = [
    Chart("Throughput, tokens a second", [(_both("tokens_per_second"), 0.0)], "tokens_per_second"),
    Chart("Utilisation (MFU)", [(_both("mfu"), 0.0)], "mfu"),
    Chart("Seconds a step", [(_both("seconds"), 0.0)], "seconds"),
    Chart(
        "Where a PPO step goes, seconds",
        [
            (
                [
                    Line("ppo/rollout_seconds", "rollout"),
                    Line("ppo/update_seconds", "update", "sft"),
                    Line("ppo/reward_seconds", "rewards", "fourth"),
                    Line("ppo/score_seconds", "score", "eval"),
                    Line("ppo/input_seconds", "input", "other"),
                ],
                0.0,
            )
        ],
        "rollout_seconds",
    ),
    Chart(
        "Where an SFT step goes, seconds",
        [([Line("sft/update_seconds", "update"), Line("sft/input_seconds", "input", "other")], 0.0)],
        "input_seconds",
    ),
    Chart(
        "Peak memory of a device, bytes", [([Line("memory/peak_bytes", "device")], 0.0)], "memory/peak_bytes"
    ),
    Chart(
        "Peak memory of the process, bytes",
        [([Line("memory/host_peak_bytes", "host")], 0.0)],
        "memory/host_peak_bytes",
    ),
    Chart(
        "Compilation",
        [([Line("compile/count", "programs")], 0.0), ([Line("compile/seconds", "seconds", "fourth")], 0.0)],
        "compile/count",
    ),
    Chart(
        "Between two steps, seconds",
        [
            (
                [
                    Line("time/evaluation_seconds", "evaluation", "eval"),
                    Line("time/checkpoint_seconds", "checkpoint", "fourth"),
                ],
                0.0,
            )
        ],
        "time/checkpoint_seconds",
    ),
]
_MANY = ("ppo", "sft", "fourth", "eval", "other")  # the colours of lines that only their names tell apart


def part_chart(part: str) -> Chart:
    """A part's mean in training and held-out, within the distribution over the responses of a rollout."""
    name = f"reward/{part}"
    lines = [*pair(name), Line(f"ppo/{name}_p50", "median", "ppo median")]
    return Chart(part, [(lines, None)], None, band=(f"ppo/{name}_p10", f"ppo/{name}_p90"))


def judge_chart(judge: str) -> Chart:
    return Chart(f"Judge: {judge}", [([Line(f"evaluation/judge/{judge}", "held-out")], None)], "judge")


def combination_charts(parts: Sequence[str]) -> list[Chart]:
    """How the parts became one score: whatever the run's combiner logged."""

    def of_each(ending: str) -> list[Line]:
        return [Line(f"ppo/reward/{part}{ending}", part, many_colour(i)) for i, part in enumerate(parts)]

    def entropy(name: str) -> list[Line]:
        return [Line(f"ppo/reward/{name}_entropy", "entropy", "fourth")]

    arm = Line("ppo/reward/bandit_arm", "part that it tries, from 0", "other")
    bandit = [(entropy("bandit"), 0.0), ([arm], 0.0)]
    shares = [
        Line("ppo/reward/gate_open_fraction", "gate open"),
        Line("ppo/reward/aspects_fraction", "aspects count", "fourth"),
    ]
    return [
        Chart("Weights", [(of_each("_weight"), 0.0)], "_weight"),
        Chart("The gate's shares", [(of_each("_gate"), 0.0), (entropy("gate"), 0.0)], "_gate"),
        Chart("The bandit's chances", [(of_each("_probability"), 0.0), *bandit], "_probability"),
        Chart("Multipliers", [(of_each("_multiplier"), 0.0), (of_each("_excess"), None)], "_multiplier"),
        Chart("Responses let through", [(shares, 0.0)], "reward/gate_open_fraction"),
        Chart("Spread within a rollout", [(of_each("_std"), 0.0)], "_std"),
        Chart("Clipped rows", [(of_each("_clip_fraction"), 0.0)], "_clip_fraction"),
        _alone("Score for a token more", "score_length_slope"),
    ]


def many_colour(number: int) -> str:
    """A second round of the same colours is dashed."""
    return _MANY[number % len(_MANY)] + (" dashed" if number >= len(_MANY) else "")
