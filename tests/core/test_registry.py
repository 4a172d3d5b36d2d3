"""Names in a config: the nearest one, and code of the user's own."""

import re

import pytest

from hybrid_jax.core.registry import Registry, UserError


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
