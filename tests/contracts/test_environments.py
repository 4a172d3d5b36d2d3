"""Every registered environment keeps the contract: valid beginnings, and the same seed says the same."""

import pytest

from hybrid_jax.environments import catalogue  # noqa: F401  registers them
from hybrid_jax.environments.base import ENVIRONMENTS
from hybrid_jax.environments.replies import said_at_reset, said_at_step, tools_of
from hybrid_jax.environments.tools import Calculator

NEED_A_PACKAGE = {"gymnasium", "openenv", "skyrl_gym", "textarena", "textworld", "trl"}
GIVEN = {"tools": {"tools": {"calculator": Calculator()}}, "user": {"answered_by": "other"}}
ROW = {"prompt": "What is 2 + 2?", "response": "4", "messages": ()}


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_it_says_what_it_is(name):
    assert (ENVIRONMENTS[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", sorted(set(ENVIRONMENTS) - NEED_A_PACKAGE))
def test_the_same_seed_and_answers_get_the_same_replies(name):
    settings = ENVIRONMENTS[name](**GIVEN.get(name, {}))
    row = ROW if getattr(settings, "reads_rows", False) else {}
    talks = []
    for _ in range(2):
        world = settings.make(*([lambda messages: f"{len(messages)} so far"] if name == "user" else []))
        said = [said_at_reset(world.reset(7, **row), 1000)]
        for text in ("big?", "ask cuisine", ""):
            said.append(said_at_step(world.step(text), 1000))
            if said[-1].terminated:
                break
        talks.append((said, tools_of(world)))
    assert talks[0] == talks[1]
