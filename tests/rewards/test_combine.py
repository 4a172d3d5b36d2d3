"""How parts are combined, against numbers worked out by hand."""

import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.rewards.combine import (
    COMBINERS,
    Baseline,
    Gate,
    Hierarchy,
    Lagrangian,
    Limit,
    Product,
    WeightedSum,
)
from hybrid_jax.rewards.composite import CompositeReward, Part


def first(prompts, responses):
    return [float(response.split()[0]) for response in responses]


def second(prompts, responses):
    return [float(response.split()[1]) for response in responses]


def composite(combine, baseline=None, **second_settings):
    parts = {"good": Part(first, weight=2.0), "toxic": Part(second, **second_settings)}
    return CompositeReward(parts, combine, baseline)


def run(reward, rows, state=None, groups=None):
    state = reward.init() if state is None else state
    raw = reward.raw([""] * len(rows), rows)
    return reward.weigh(state, raw, [""] * len(rows), groups)


def test_a_product_is_zero_where_a_part_is():
    scores, _ = run(composite(Product()), ["3 2", "3 0", "-1 5"])
    assert scores.totals.tolist() == [18.0, 0.0, 0.0]  # 3² · 2


def test_a_gate_lets_the_others_through_above_its_threshold():
    scores, _ = run(composite(Gate(by="toxic", threshold=0.5, otherwise=-3.0)), ["1 0.6", "1 0.5", "9 0.1"])
    assert scores.totals.tolist() == [2.0, -3.0, -3.0]
    assert scores.metrics["gate_open_fraction"] == pytest.approx(1 / 3)


def test_aspects_count_once_the_whole_is_good_enough():
    rows = ["1 5", "0 5", "-1 5", "1 -5"]  # good above 0.5: 2·good + aspect; else 2·good
    scores, _ = run(composite(Hierarchy(holistic="good", threshold=0.5)), rows)
    assert scores.totals.tolist() == [7.0, 0.0, -2.0, -3.0]
    assert scores.metrics["aspects_fraction"] == 0.5


def test_a_multiplier_grows_while_its_limit_is_broken_and_sinks_to_zero_when_it_holds():
    reward = composite(Lagrangian({"toxic": Limit(at_most=0.25)}, learning_rate=2.0))
    scores, state = run(reward, ["1 0.5", "1 1.0"])
    assert scores.totals.tolist() == [2.0, 2.0]  # λ is 0 yet
    assert scores.metrics["toxic_excess"] == pytest.approx(0.5)
    # λ = 0 + 2 · (0.75 − 0.25) = 1: (2·1 − 1·(v − 0.25)) / 2
    scores, state = run(reward, ["1 0.25", "1 1.25"], state)
    assert scores.totals == pytest.approx([1.0, 0.5])
    assert scores.metrics["toxic_multiplier"] == 1.0
    for _ in range(5):  # now it holds: λ = 1 + 2·0.5 = 2, then −0.5 each time
        _, state = run(reward, ["1 0", "1 0"], state)
    assert state["combiner/"]["toxic"] == 0.0
    at_least = composite(Lagrangian({"toxic": Limit(at_least=1.0)}, learning_rate=1.0, start=1.0))
    scores, _ = run(at_least, ["1 0.5"])
    assert scores.totals == pytest.approx([(2.0 - 0.5) / 2])


def test_a_multiplier_finds_the_policy_that_just_keeps_the_limit():
    """Two answers, reward and toxicity 1 and 0, limit 0.3: the best policy takes the first in 30 %."""
    combine = Lagrangian({"toxic": Limit(at_most=0.3)}, learning_rate=0.05)
    state, logit, shares, weights = combine.init(["good", "toxic"]), 0.0, [], {"good": 1.0, "toxic": 1.0}
    for _ in range(4000):
        share = 1 / (1 + np.exp(-logit))
        taken = (np.arange(1000) < round(1000 * share)).astype(float)
        values = {"good": taken, "toxic": taken}
        weighing, state = combine.combine(state, values, weights, [])
        scores = weighing.score(values)
        advantage = scores[0] - scores[-1] if 0 < taken.sum() < 1000 else 0.0
        logit += 0.2 * (advantage - 0.02 * logit)
        shares.append(share)
    assert np.mean(shares[-1000:]) == pytest.approx(0.3, abs=0.02)


def test_the_exponential_baseline_is_corrected_for_its_start():
    reward = CompositeReward({"good": Part(first)}, baseline=Baseline(decay=0.9))
    state, found = reward.init(), []
    for _ in range(3):
        scores, state = run(reward, ["4", "4"], state)
        assert scores.totals.tolist() == [0.0, 0.0]
        found.append(scores.baseline[0])
    assert found == pytest.approx([4.0, 4.0, 4.0])  # 0.4, 0.76 and 1.084 without


def test_a_baseline_of_the_others_leaves_each_response_out_of_its_own():
    reward = CompositeReward({"good": Part(first)}, baseline=Baseline(kind="others"))
    scores, _ = run(reward, ["1", "2", "6", "5"], groups=np.array([0, 0, 0, 1]))
    assert scores.baseline.tolist() == [4.0, 3.5, 1.5, 0.0]


def test_prompts_of_one_text_are_two_prompts():
    """All prompts here are "", as the last turns of two chats may be alike; by text: [3.3 3.3 6.7 6.7]."""
    reward = CompositeReward({"good": Part(first)}, baseline=Baseline(kind="others"))
    scores, _ = run(reward, ["10", "10", "0", "0"], groups=np.array([0, 0, 1, 1]))
    assert scores.baseline.tolist() == [10.0, 10.0, 0.0, 0.0]
    scores, _ = run(reward, ["10", "10", "0", "0"])  # each response answers a prompt of its own
    assert scores.baseline.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "combine", [WeightedSum(), Gate(by="toxic"), Hierarchy(holistic="good"), Lagrangian({"toxic": Limit(0.1)})]
)
def test_the_score_is_the_offset_and_the_coefficients_times_the_parts(combine):
    rng = np.random.default_rng(0)
    values = {"good": rng.normal(size=5), "toxic": rng.normal(size=5)}
    weighing, _ = combine.combine(combine.init(list(values)), values, {"good": 2.0, "toxic": 1.0}, [""] * 5)
    by_hand = np.zeros(5) + weighing.offset
    for row in range(5):
        for name, value in values.items():
            by_hand[row] += weighing.coefficients[name][row] * value[row]
    assert weighing.score(values) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"combine": {"name": "gate", "by": "b"}}, "by must name one of the parts a, got 'b'"),
        ({"combine": {"name": "gate", "by": "a"}}, "the gate alone"),
        ({"combine": {"name": "lagrangian", "limits": {"a": {"at_most": 1}}}}, "a reward besides those"),
        ({"combine": {"name": "lagrangian", "limits": {}}}, "limits must not be empty"),
        ({"combine": {"name": "lagrangian", "limits": {"a": {}}}}, "limit must set at_most or at_least"),
        ({"combine": "weighted_summ"}, "did you mean 'weighted_sum'"),
        ({"baseline": {"decay": 2}}, r"decay must be in \[0, 1\), got 2"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        parse(CompositeReward, {"parts": {"a": {"reward": "repetition"}}, **settings})


def test_a_limit_is_in_the_units_of_its_part():
    with pytest.raises(ValueError, match=r"parts.toxic.normalise must be false"):
        composite(Lagrangian({"toxic": Limit(at_most=0.1)}), normalise=True)


def test_every_combiner_survives_a_round_trip():
    made = [WeightedSum(), Product(), Gate(by="toxic"), Hierarchy("good"), Lagrangian({"toxic": Limit(0.1)})]
    for combine in made:
        reward = composite(combine, Baseline())
        assert parse(CompositeReward, to_dict(reward, CompositeReward), trust=EVERYTHING) == reward
        assert COMBINERS.name_of(combine) in list(COMBINERS)
