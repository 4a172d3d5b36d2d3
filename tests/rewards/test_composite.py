import json

import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.rewards.base import RewardError
from hybrid_jax.rewards.combine import Baseline, Lagrangian, Limit
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.postprocess import Affine, Group, Running
from hybrid_jax.rewards.text import Length, Repetition
from hybrid_jax.rewards.tokens import TokenLength


def number_in_response(prompts, responses):
    """The reward of these tests: a response is its own score."""
    return [float(response) for response in responses]


def run(composite, chunks):
    """Scores of successive rollouts, and the last state."""
    state, scores = composite.init(), []
    for chunk in chunks:
        values, state, _ = composite.score(state, [""] * len(chunk), [str(float(x)) for x in chunk])
        scores.append(values)
    return scores, state


def normalised(**settings):
    return CompositeReward({"number": Part(number_in_response, normalise=True, **settings)})


def normalised_beside_nothing():
    return CompositeReward(
        {"number": Part(number_in_response, normalise=True), "same": Part(number_in_response, weight=0.0)}
    )


def test_the_sum_is_weighted_and_the_parts_are_raw():
    composite = CompositeReward(
        {"number": Part(number_in_response, weight=0.5), "length": Part(Length(target=2), weight=-1.0)}
    )
    scores, state, parts = composite.score({}, ["", ""], ["3", "-1"])
    assert scores.dtype == np.float32
    assert scores.tolist() == [2.0, 0.0]  # 0.5 * 3 + 0.5, 0.5 * -1 + 0.5
    assert {name: values.tolist() for name, values in parts.items()} == {
        "number": [3.0, -1.0],
        "length": [-0.5, -0.5],
    }
    assert all(values.dtype == np.float32 for values in parts.values())
    assert state == {}


def test_the_order_is_normalise_then_clip_then_weight():
    # mean 2, variance (4 + 0 + 4) / 3 = 8/3: normalised to -1.2247, 0, 1.2247, clipped to [-1, 0.5], times 10
    (scores,), _ = run(normalised(clip=(-1.0, 0.5), weight=10.0), [[0, 2, 4]])
    assert scores.tolist() == [-10.0, 0.0, 5.0]


def test_running_statistics_over_chunks_equal_those_of_all_values():
    values = (
        np.random.default_rng(0).normal(1e4, 3.0, 1000).astype(np.float32)
    )  # a large mean, where E[x²]-E[x]² fails
    chunks = np.split(values, [1, 2, 10, 400, 990])
    _, state = run(normalised(), chunks)
    exact = values.astype(np.float64)
    moments = state["number"]
    assert moments["count"] == 1000
    assert moments["mean"] == pytest.approx(exact.mean(), rel=1e-12)
    assert moments["M2"] / moments["count"] == pytest.approx(np.var(exact), rel=1e-6)


def test_a_rollout_is_normalised_by_all_scores_up_to_and_including_itself():
    scores, _ = run(normalised(), [[0, 2], [4, 6]])
    assert scores[0] == pytest.approx([-1.0, 1.0])
    # 0 2 4 6: mean 3, variance (9 + 1 + 1 + 9) / 4 = 5
    assert scores[1] == pytest.approx([1 / 5**0.5, 3 / 5**0.5])


def test_scale_and_shift_of_a_reward_do_not_change_its_normalised_score():
    rng = np.random.default_rng(1)
    chunks = [rng.normal(size=7), rng.normal(size=1), rng.normal(size=20)]
    plain, _ = run(normalised(), chunks)
    moved, _ = run(normalised(), [250.0 * chunk - 40.0 for chunk in chunks])
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.7, -3.0, 1e7])
def test_a_constant_reward_normalises_to_zero(constant):
    scores, _ = run(normalised(), [[constant] * 3, [constant], [constant] * 5])
    assert np.abs(np.concatenate(scores)).max() < 1e-6


def test_an_empty_rollout_changes_nothing():
    scores, state = run(normalised(), [[1, 2], []])
    assert len(scores[1]) == 0
    assert state["number"]["count"] == 2


def test_parts_are_normalised_apart_so_that_none_drowns_the_others():
    tiny = Part(lambda prompts, responses: [-1e-3 * float(r) for r in responses], normalise=True)
    composite = CompositeReward({"large": Part(number_in_response, normalise=True), "tiny": tiny})
    scores, _, _ = composite.score(composite.init(), [""] * 3, ["1000", "2000", "6000"])
    np.testing.assert_allclose(scores, 0.0, atol=1e-4)  # equal and opposite once on one scale


def test_a_state_saved_and_restored_continues_identically():
    chunks = [[1.0, 5.0], [2.0, 2.5, 9.0], [0.1, 7.0]]
    whole, whole_state = run(normalised(), chunks)
    composite = normalised()
    _, state = run(composite, chunks[:2])
    saved = json.dumps({part: {key: float(x) for key, x in moments.items()} for part, moments in state.items()})
    restored = {
        part: {k: np.asarray(x) for k, x in moments.items()} for part, moments in json.loads(saved).items()
    }
    scores, new_state, _ = composite.score(restored, [""] * 2, [str(x) for x in chunks[2]])
    assert scores.tobytes() == whole[2].tobytes()
    assert new_state == whole_state


def test_the_state_is_float64_scalars_and_is_not_changed_in_place():
    composite = normalised()
    state = composite.init()
    assert {key: (x.dtype, x.shape) for key, x in state["number"].items()} == {
        key: (np.dtype(np.float64), ()) for key in ("count", "mean", "M2")
    }
    composite.score(state, [""], ["3"])
    assert state["number"]["count"] == 0


def test_metrics_tell_mean_spread_and_how_much_was_clipped():
    composite = normalised(clip=(-1.0, 1.0))
    raw = composite.raw([""] * 4, ["0", "1", "1", "6"])
    # mean 2, variance (4 + 1 + 1 + 16) / 4 = 5.5: -0.85 -0.43 -0.43 1.71
    scores, _ = composite.weigh(composite.init(), raw, [""] * 4, lengths=np.array([0.0, 1.0, 1.0, 9.0]))
    assert scores.metrics == pytest.approx(
        {
            "number_mean": 2.0,
            "number_std": 5.5**0.5,
            **{"number_p10": 0.3, "number_p50": 1.0, "number_p90": 4.5},
            "number_clip_fraction": 0.25,
            "score~response_length": 0.99806,  # of the raw 0 1 1 6 and 0 1 1 9
        },
        abs=1e-5,
    )


def test_parts_are_correlated_with_each_other_with_the_score_and_with_the_length():
    composite = CompositeReward(
        {
            "number": Part(number_in_response),
            "minus": Part(lambda prompts, responses: [-2 * float(r) for r in responses]),
            "same": Part(lambda prompts, responses: [7.0] * len(responses)),
        }
    )
    raw = composite.raw([""] * 3, ["1", "2", "6"])
    found = composite.weigh({}, raw, [""] * 3, lengths=np.array([3, 3, 1]))[0].metrics
    pairs = {name: value for name, value in found.items() if "~" in name}
    assert set(pairs) == {  # none with what is the same in every row
        *("number~minus", "number~score", "number~response_length"),
        *("minus~score", "minus~response_length", "score~response_length"),
    }
    assert pairs["number~minus"] == pytest.approx(-1.0)
    # deviations -2 -1 3 and 2/3 2/3 -4/3: -6 / sqrt(14 * 8/3)
    assert pairs["number~response_length"] == pytest.approx(-6 / (14 * 8 / 3) ** 0.5)


def test_no_correlation_is_above_1():
    """The logged score is rounded to float32; its square must not be."""
    values = np.random.default_rng(0).uniform(size=(50, 8)).astype(np.float32)
    normalised = normalised_beside_nothing()
    found = [
        normalised.weigh(normalised.init(), {"number": row, "same": np.ones(8)}, [""] * 8)[0].metrics
        for row in values
    ]
    assert max(metrics["number~score"] for metrics in found) <= 1.0
    assert min(metrics["number~score"] for metrics in found) > 1.0 - 1e-9


def test_a_failing_part_is_named():
    composite = CompositeReward({"fine": Part(Repetition()), "broken": Part(number_in_response)})
    with pytest.raises(
        RewardError, match=r"reward 'broken' raised ValueError: could not .* at .*test_composite"
    ):
        composite.score({}, [""], ["three"])


def test_a_config_names_parts_of_the_package_and_of_the_user(tmp_path, monkeypatch):
    source = (
        "from dataclasses import dataclass\n\n"
        "def shout(prompts, responses):\n    return [float(r.isupper()) for r in responses]\n\n"
        "@dataclass(frozen=True)\nclass Mentions:\n    word: str\n\n"
        "    def __call__(self, prompts, responses):\n"
        "        return [float(self.word in r) for r in responses]\n"
    )
    (tmp_path / "rewards_of_a_user.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "parts": {
            "length": {"reward": {"name": "length", "target": 2}, "weight": 2, "clip": [-1, 0]},
            "loud": {"reward": {"name": "rewards_of_a_user:shout"}},
            "eagle": {"reward": {"name": "rewards_of_a_user:Mentions", "word": "EAGLE"}, "normalise": True},
            "stutter": {"reward": "repetition"},
        }
    }
    composite = parse(CompositeReward, settings, trust=EVERYTHING)
    assert composite.parts["length"] == Part(Length(target=2), weight=2.0, clip=(-1.0, 0.0))
    scores, _, _ = composite.score(composite.init(), ["", ""], ["THE EAGLE", "the owl"])
    assert scores.tolist() == [2.0, -1.0]
    written = to_dict(composite, CompositeReward)
    assert written["parts"]["eagle"]["reward"] == {"name": "rewards_of_a_user:Mentions", "word": "EAGLE"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parts": {}}, "parts must not be empty"),
        ({"parts": {"score": {"reward": "repetition"}}}, "parts must not be called 'score'"),
        ({"parts": {"a": {"reward": {"name": "lenght", "target": 2}}}}, "did you mean 'length'"),
        ({"parts": {"a": {"reward": {"name": "length"}}}}, "parts.a.reward.target is missing"),
        ({"parts": {"a": {"reward": "repetition", "wieght": 2}}}, "unknown setting 'parts.a.wieght'"),
        (
            {"parts": {"a": {"reward": "repetition", "clip": [1, -1]}}},
            r"clip must be \(lowest, highest\), got \(1.0, -1.0\)",
        ),
        ({"parts": {"a": {"reward": "repetition", "weight": float("nan")}}}, "weight must be finite, got nan"),
        (
            {"parts": {"a": {"reward": {"name": "token_length", "target": 2}, "normalise": True}}},
            "parts.a.normalise must be false for a reward on tokens",
        ),
        (
            {"parts": {"a": {"reward": {"name": "token_length", "target": 2}}, "b": {"reward": "repetition"}}},
            "parts must all score texts or all score tokens, got a on tokens, b on texts",
        ),
    ],
)
def test_a_wrong_config_is_one_line(settings, said):
    with pytest.raises(UserError, match=said) as caught:
        parse(CompositeReward, settings)
    assert "\n" not in str(caught.value)


def test_on_device_is_true_for_token_rewards_only():
    assert CompositeReward({"a": Part(TokenLength(2))}).on_device
    assert CompositeReward({"a": Part(TokenLength(2))}).init() == {}
    assert not CompositeReward({"a": Part(Repetition())}).on_device


def test_token_rewards_are_clipped_before_they_are_weighted():
    masks = np.arange(4)[None] < np.array([0, 1, 3, 4])[:, None]
    composite = CompositeReward({"length": Part(TokenLength(target=3), weight=2.0, clip=(-1.5, 0.0))})
    scores = composite.score_tokens(np.zeros((4, 6), np.int32), np.ones((4, 6), bool), masks)
    assert scores.tolist() == [-3.0, -3.0, 0.0, -2.0]


def test_a_part_that_is_no_reward_is_refused():
    with pytest.raises(ValueError, match="reward must be callable or have start or score_tokens, got 3"):
        Part(3)


def test_the_score_is_the_raw_reward_in_training_as_in_the_evaluation():
    """Rewards in [0, 1.2]: normalised they sum to 0, clipped in the normaliser's units they say even less."""
    number = Part(number_in_response, normalise=Running(), clip=(-0.5, 0.5), weight=2.0)
    bounded = Part(number_in_response, transform=Affine(shift=1.0), clip=(0.0, 1.5))
    composite = CompositeReward({"a": number, "b": bounded}, baseline=Baseline("ema"))
    raw = composite.raw([""] * 3, ["0", "0.6", "1.2"])
    first, state = composite.weigh(composite.init(), raw, [""] * 3)
    expected = [2 * 0.0 + 1.0, 2 * 0.6 + 1.5, 2 * 1.2 + 1.5]
    assert first.plain == pytest.approx(expected)
    assert first.totals + first.baseline == pytest.approx([-1.0 + 1.0, 0.0 + 1.5, 1.0 + 1.5])
    later, _ = composite.weigh(state, composite.raw([""] * 3, ["5", "7", "9"]), [""] * 3)
    assert later.plain == pytest.approx([11.5, 15.5, 19.5])
    assert composite.plain_scores(raw, [""] * 3) == pytest.approx(expected)  # the same before, now and later


def test_a_multiplier_that_has_moved_does_not_move_the_score():
    combine = Lagrangian({"b": Limit(at_most=0.0)}, learning_rate=10.0)
    composite = CompositeReward({"a": Part(number_in_response), "b": Part(number_in_response)}, combine)
    raw = composite.raw([""], ["1"])
    (first, state), found = composite.weigh(composite.init(), raw, [""]), []
    found = [first, composite.weigh(state, raw, [""])[0]]
    assert [scores.plain.tolist() for scores in found] == [[1.0], [1.0]]
    assert [scores.totals.tolist() for scores in found] == [[1.0], [pytest.approx((1 - 10 * 1) / 11)]]


PENALTIES = np.array([1.0, 0.0, 0.0, 1.0])  # of four responses, two to each of two prompts
ASKED = np.array([0, 0, 1, 1])


def penalised(raw, penalties=PENALTIES, baseline=None, **part):
    """What training receives."""
    composite = CompositeReward({"a": Part(number_in_response, **part)}, baseline=baseline)
    given = {"a": np.array(raw, np.float32)}
    scores, _ = composite.weigh(composite.init(), given, [""] * 4, ASKED, penalties=penalties)
    return scores.totals.tolist()


def test_a_baseline_sees_the_penalty():
    """4 2 | 1 1 less 1 0 | 0 1 is 3 2 | 1 0; the other answer gives 2 3 | 0 1, and what is left sums to 0."""
    assert penalised([4, 2, 1, 1], baseline=Baseline("others")) == [1.0, -1.0, 1.0, -1.0]
    moving = penalised([4, 2, 1, 1], baseline=Baseline("ema", decay=0.5))
    assert moving == [1.5, 0.5, -0.5, -1.5]  # less their mean, 1.5


def test_where_answers_to_one_prompt_are_compared_so_are_their_penalties():
    """Standardised 4 2 | 1 1 is 1 -1 | 0 0; the penalties less their means are 0.5 -0.5 | -0.5 0.5."""
    assert penalised([4, 2, 1, 1], normalise=Group()) == [0.5, -0.5, 0.5, -0.5]
    scaled = penalised([400, 200, 100, 100], normalise=Group())
    assert scaled == [0.5, -0.5, 0.5, -0.5]  # a penalty is in units of the score that is received
    assert penalised([4, 2, 1, 1], np.ones(4), normalise=Group()) == [1.0, -1.0, 0.0, 0.0]  # all pay alike


def test_a_penalty_alone_is_taken_behind_normaliser_and_clip():
    assert penalised([4, 2, 1, 1]) == [3.0, 2.0, 1.0, 0.0]
    # 4 2 1 1 has the mean 2 and the standard deviation √1.5; its clip at 1 does not see the penalty.
    got = penalised([4, 2, 1, 1], normalise=True, clip=(-1, 1))
    assert got == pytest.approx([1.0 - 1.0, 0.0, -1 / 1.5**0.5, -1 / 1.5**0.5 - 1.0], abs=1e-6)
