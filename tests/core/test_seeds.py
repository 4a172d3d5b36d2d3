import jax
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import MOST_SEED
from hybrid_jax.core.seeds import check_seed
from hybrid_jax.data.sources import Restaurants
from hybrid_jax.rewards.mixture import Bandit
from hybrid_jax.runs.policy import Policy


def test_a_seed_that_would_repeat_another_is_refused_wherever_one_is_taken():
    assert (jax.random.key_data(jax.random.key(2**32)) == jax.random.key_data(jax.random.key(0))).all()
    check_seed(MOST_SEED)
    policy = Policy(None, {}, None, None, (0,))  # type: ignore
    for seed, shown in [(2**32, "4294967296"), (-1, "-1"), (10**30, "one of 100 bits")]:
        expected = rf"seed must be in \[0, 4294967295\], got {shown}$"
        for refused in (lambda s=seed: Restaurants(seed=s), lambda s=seed: Bandit(metric="judge/a", seed=s)):
            with pytest.raises(ValueError, match=expected):
                refused()
        with pytest.raises(UserError, match=expected):
            policy.generate(["a"], seed=seed)
