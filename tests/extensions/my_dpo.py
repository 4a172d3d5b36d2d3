"""Direct preference optimisation: a language model learns from pairs of answers, without a reward model.

    L = −log σ(β [log π(y⁺|x) − log π_ref(y⁺|x) − log π(y⁻|x) + log π_ref(y⁻|x)])

Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
"""

from collections.abc import Mapping
from dataclasses import field
from functools import partial

import jax
import jax.numpy as jnp

import hybrid_jax as hj


@hj.settings
class DPO(hj.Supervised):
    """Settings of direct preference optimisation."""

    length: hj.Count = 64  # tokens of a prompt with an answer; pairs with longer ones are left out
    beta: hj.Positive = 0.1  # how closely the reference is kept
    references: Mapping[str, hj.Reference] = field(default_factory=lambda: {"sft": hj.Reference()})  # one

    def build(self, resources: hj.Resources) -> hj.SupervisedPhase:
        """Makes the phase: pairs of answers, the loss, the shapes of a batch and the reference."""
        rows = [hj.Preference.of(example) for example in resources.examples or ()]
        return hj.SupervisedPhase(
            self,
            resources,
            stream=hj.PairStream(rows, resources.tokenizer, self.length, resources.seed) if rows else None,
            objective=hj.Objective(partial(self.loss, resources.model), num_pairs, coefs={"loss": 1.0}),
            shapes=lambda: hj.example_shapes(resources.placement, self.batch_size, 2, self.length),
            references=self.references,
        )

    def loss(self, model, params, batch, key):
        """Sums over the pairs of a batch: the loss, the margin, and how often the better answer is ahead."""
        (reference,) = (params[f"references/{name}"] for name in self.references)
        policy = log_probs(model, params["model"], batch)
        gains = self.beta * (policy - jax.lax.stop_gradient(log_probs(model, reference, batch)))
        margin = gains[:, 0] - gains[:, 1]
        mean = partial(hj.Sum.of, mask=jnp.ones(len(margin), bool))
        metrics = {"accuracy": mean(jnp.sign(margin) / 2 + 0.5), "margin": mean(margin)}
        return {"loss": mean(-jax.nn.log_sigmoid(margin))}, metrics


def log_probs(model, params, batch):
    """log π(y|x) of both answers of each pair, [B 2]."""
    tokens, segments, learned = (x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(batch))
    found = hj.next_token_log_probs(model, params, tokens, segments)
    return jnp.where(learned[:, 1:], found, 0.0).sum(axis=1).reshape(-1, 2)


def num_pairs(batch):
    """What the sum of the loss is divided by."""
    return {"loss": len(batch.tokens)}
