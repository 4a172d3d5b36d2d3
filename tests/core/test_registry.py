"""Names in a config: the nearest one, and code of the user's own."""

import re
import sys

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING, Registry


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_rewards.right",
            "unknown reward 'my_rewards.right'; code of your own has a colon: 'my_rewards:right'; known",
        ),
        ("lenght", "unknown reward 'lenght'; did you mean 'length'? known: length"),
        (
            "my/rewards.py:right",
            "cannot be imported: before the colon stands a module, not a file: my.rewards:right",
        ),
    ],
)
def test_a_name_that_is_unknown_says_how_it_was_probably_meant(name, message):
    rewards = Registry("reward")
    rewards.register("length")(object)
    with pytest.raises(UserError, match=re.escape(message)):
        rewards.find(name, trust={name})


DECORATED = """
import functools

def base(prompts, responses):
    return [4.0] * len(responses)

@functools.wraps(base)
def safe(prompts, responses):
    return [100.0] * len(responses)

lam = lambda prompts, responses: [7.0] * len(responses)
alias = base
"""


@pytest.mark.parametrize(("attribute", "value"), [("safe", 100.0), ("lam", 7.0), ("alias", 4.0), ("base", 4.0)])
def test_the_name_of_what_a_config_named_finds_the_same_again(tmp_path, monkeypatch, attribute, value):
    (tmp_path / "decorated_rewards.py").write_text(DECORATED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "decorated_rewards", raising=False)
    registry = Registry("reward")
    found = registry.find(f"decorated_rewards:{attribute}", EVERYTHING)
    again = registry.find(registry.name_of(found), EVERYTHING)
    assert again is found
    assert again([""], [""]) == [value]
    # given as an object, it is found under its name or said to live only there, and never exchanged for another
    name = Registry("reward").name_of(found)
    assert name == "decorated_rewards:base" if value == 4.0 else "<" in name
