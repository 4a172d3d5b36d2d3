"""The extra `envs` is named where a package of it is missing."""

import sys

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.data.reasoning_gym import ReasoningGym
from hybrid_jax.environments.gymnasium import Gymnasium
from hybrid_jax.environments.skyrl_gym import SkyRLGym
from hybrid_jax.environments.textworld import TextWorld

EXTRA = r"pip install -e '\.\[envs\]'"


@pytest.mark.parametrize(
    ("package", "begin"),
    [
        ("textworld", lambda: TextWorld().make().reset(0)),
        ("gymnasium", lambda: Gymnasium(id="FrozenLake-v1").make()),
        ("skyrl_gym", lambda: SkyRLGym(id="gsm8k").make().reset(0, prompt="1 + 1?")),
        ("reasoning_gym.factory", lambda: ReasoningGym(task="chain_sum").load("train")),
    ],
)
def test_a_missing_package_names_the_extra(package, begin, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=EXTRA):
        begin()


@pytest.mark.parametrize("cls", [Gymnasium, SkyRLGym])
def test_code_of_ones_own_needs_trust_and_no_id_is_code(cls):
    """A factory is a class or a function, given as it is; any class will do."""
    settings = {"factory": "collections:Counter"}
    with pytest.raises(Untrusted, match="factory of environments 'collections:Counter' runs code of its own"):
        parse(cls, settings, "environment")
    from collections import Counter

    assert parse(cls, settings, "environment", trust=EVERYTHING).factory is Counter
    with pytest.raises(UserError, match="id must be a name without a colon, got 'os:system'"):
        parse(cls, {"id": "os:system"}, "environment", trust=EVERYTHING)
    with pytest.raises(UserError, match="id must be given, or factory in its place, got neither"):
        parse(cls, {}, "environment")
    with pytest.raises(UserError, match="id must be given, or factory in its place, got both"):
        parse(cls, {"id": "a", **settings}, "environment", trust=EVERYTHING)
    with pytest.raises(UserError, match="'collections:abc' must be a function or a class, got an object"):
        parse(cls, {"factory": "collections:abc"}, "environment", trust=EVERYTHING)
