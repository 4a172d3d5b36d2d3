"""Imitation: what the settings allow."""

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.phases.imitation import Imitation

REWARD = {"parts": {"length": {"reward": {"name": "length", "target": 3}}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learns": "best", "reward": REWARD}, "samples_per_prompt must be at least 2 for learns: best, got 1"),
        (
            {"learns": "weighted", "samples_per_prompt": 2},
            "reward must be given for learns: weighted, got none",
        ),
        ({"at_least": 0.5}, "reward must be given for at_least, got none"),
        ({"beta": 0}, "beta must be above 0, got 0"),
        (
            {
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "learns": "best",
                "reward": REWARD,
                "minibatches": 8,
            },
            "minibatches × microbatches must divide the 4 answers that a step learns, got 8 × 1",
        ),
        ({"environment": {"name": "booking"}}, "environment must be left out"),
    ],
)
def test_settings_that_fit_nothing_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        parse(Imitation, {"sampler": {"max_new_tokens": 4}, **settings})


def test_any_sampler_may_find_what_is_imitated():
    sampler = {"name": "best_of_n", "max_new_tokens": 4}
    assert parse(Imitation, {"sampler": sampler}).flops(None, 4, 4) == {}
    assert parse(Imitation, {"sampler": {"name": "ancestral", "temperature": 0}}).needs_distribution is False
