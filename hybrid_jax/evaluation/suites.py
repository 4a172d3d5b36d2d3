"""The suites of `python -m hybrid_jax.evaluate`: each is a function of an evaluator and a policy."""

from __future__ import annotations

from collections.abc import Callable

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import Registry
from hybrid_jax.evaluation.evaluate import Evaluator
from hybrid_jax.models.base import Params

Numbers = dict[str, float]
SUITES: Registry[Callable[[Evaluator, Params], Numbers]] = Registry("suite")


@SUITES.register("held_out")
def held_out(evaluator: Evaluator, params: Params) -> Numbers:
    """Everything: the loss, the answers and what a recurrent state keeps, as training measures them."""
    return loss(evaluator, params) | answers(evaluator, params) | evaluator.memory(params)[0]


@SUITES.register("loss")
def loss(evaluator: Evaluator, params: Params) -> Numbers:
    """Cross-entropy and perplexity of the held-out responses."""
    return evaluator.loss(params)


@SUITES.register("answers")
def answers(evaluator: Evaluator, params: Params) -> Numbers:
    """Answers to held-out prompts: reward and its parts, BLEU, how they end, their length and variety."""
    return evaluator.answers(params)[0]


@SUITES.register("rewards")
def rewards(evaluator: Evaluator, params: Params) -> Numbers:
    """Scores a file, not a run: `hybrid_jax.evaluation.reward_suite`; listed here for its name."""
    raise UserError("suite 'rewards' scores a file: python -m hybrid_jax.evaluate --suite rewards --help")
