"""Explains each metric of the report, and what to think of when it looks wrong."""

from __future__ import annotations

# Metric: what it is, and what to think of when it looks wrong.
GLOSSARY = {
    "score": (
        "Mean reward of the responses: all parts as they are, before normalisers, penalty and baseline.",
        "Flat: the reward has no signal yet, or the KL coefficient holds the policy back.",
    ),
    "score_std": (
        "Spread of the scores within a batch.",
        "Near zero: all responses earn the same, nothing is left to learn from.",
    ),
    "shaped_score": (
        "What training received: the score after normalisers, less penalty and baseline.",
        "Far below the score: the penalty weighs more than the reward.",
    ),
    "penalty": (
        "What was taken for responses that did not end by themselves, on average over all responses.",
        "Staying up: responses run to max_new_tokens; raise it, or the penalty.",
    ),
    "baseline": (
        "What was taken from every score for comparison; it changes no optimum.",
        "Far from the score: responses differ much from what was usual until now.",
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
        "Rising while a reward is trained on: language is traded for it.",
    ),
    "policy_loss": (
        "The objective of the policy gradient, negated.",
        "Its size means little; large swings mean updates that are too big.",
    ),
    "kl_loss": (
        "The KL to the references as a part of the loss, by the estimator that kl_penalty names.",
        "Growing without end: the policy ignores it; raise the coefficient of kl_control.",
    ),
    "correction": (
        "How much a token counts on average that another policy sampled than the one that learns from it.",
        "Far from 1: responses are of too old a policy.",
    ),
    "staleness": (
        "Updates between the copy of the parameters that sampled and the update that learned from it.",
        "Near max_staleness: one actor is far slower than the others, which wait for it.",
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
    "return": (
        "All that an environment gives in one conversation, on average.",
        "Below the best that is known: look at the conversations where it is lost.",
    ),
    "turns": (
        "Answers of the policy in one conversation.",
        "At conversation.max_turns: conversations are broken off before they end.",
    ),
    "truncated_fraction": (
        "Share of conversations that were broken off: by a limit, or by the environment.",
        "High: raise conversation.max_turns or conversation.max_tokens.",
    ),
    "failed_fraction": (
        "Share of conversations whose environment raised, hung or replied with nonsense; they are left out.",
        "Above 0: the first failure is in the log.",
    ),
    "world/tool_errors": (
        "Calls of tools that went wrong, in one conversation.",
        "Not falling: the policy does not learn how a tool is called.",
    ),
    "distinct_2": (
        "Different pairs of neighbouring words among all, over the answers to the held-out prompts.",
        "Falling: answers become alike.",
    ),
    "bleu": (
        "BLEU-4 of those answers against the data's own, 0 to 100.",
        "Falling while the score rises: the reward asks for something else than the examples.",
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
    "accuracy": (
        "Share of the held-out texts, or pairs, that the model gets right; ties count half.",
        "No better than the longer wins: a reward model that counts length.",
    ),
    "scorer_loss": (
        "Cross-entropy of the labels, or of the preferences, in nats.",
        "Held-out rising while training falls: overfitting.",
    ),
    "score_length_slope": (
        "How much the held-out score changes with one more token: the least-squares slope.",
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
    "learned_score": (
        "Mean score of the answers that are imitated, each with its weight.",
        "No better than the score: nothing is chosen, so nothing gets better.",
    ),
    "learned": ("Share of the chosen answers that teach.", "Near 0: at_least is out of reach."),
    "token_chain/spectral_gap": (
        "How fast the Markov chain over tokens that the answers make forgets where it was; 1 is at once.",
        "Near 0: answers run in loops, or fall into kinds that share no tokens.",
    ),
    "token_chain/period": (
        "Greatest common divisor of the lengths of closed walks of that chain; 1 is ergodic.",
        "Above 1: answers of one length, or of few words.",
    ),
    "token_chain/stationary_entropy": (
        "Entropy of the tokens that answers use, in nats; exploration raises it.",
        "Falling: fewer tokens are used, ever more often.",
    ),
    "token_chain/entropy_rate": (
        "How undecided the next token is once the last one is known, in nats.",
        "Falling to 0: answers become one.",
    ),
    "memory/gradient": (
        "Norm of the gradient of a row's last loss by what was read so many tokens before; mean over rows.",
        "Falling steeply with the distance: what lies further back is not learned from.",
    ),
    "memory/recall": (
        "Share of held-out tokens, read so many tokens before, that a linear map of the state tells right.",
        "Not above the guess from the last token: the state keeps nothing more, or not in a linear way.",
    ),
    "memory/chance": (
        "The same share of one who always guesses the commonest token.",
        "Recall near it says nothing of the state.",
    ),
    "memory/last": (
        "The same share of the best guess from the last token alone.",
        "Only recall above it is memory: in text, a token tells much of those before it.",
    ),
    "memory/gates": (
        "Mean of each gate over tokens and channels.",
        "Near 0 or 1: the gate is stuck; a forget gate near 1 keeps, near 0 empties.",
    ),
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


def glossary_entry(name: str) -> tuple[str, str] | None:
    """Explains a metric by its name without a phase: its meaning and what to think of; None if unknown."""
    kind = name.partition("/")[0]
    if found := GLOSSARY.get(name):
        return found
    before, _, number = name.rpartition("_")
    if before == "staleness" and number.isdigit():
        return (
            f"Share of the updates so far with a staleness of {number}; the last share holds all above, too.",
            "All at 0 with several actors: they run one after another.",
        )
    if kind == "memory":
        found = name.split("/")[1].partition("_")[0]
        return GLOSSARY.get(f"memory/{'gates' if found == 'layer' else found}")
    endings = [ending for ending in PART_GLOSSARY if name.endswith(ending)] if kind == "reward" else []
    if kind == "reward" and "~" in name:
        endings = ["~"]
    return PART_GLOSSARY[endings[0]] if endings else GLOSSARY.get(kind)
