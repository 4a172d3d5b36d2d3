"""Transforms and normalisers against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.postprocess import Affine, Ema, Group, Logit, LogSigmoid, Running


def number_in_response(prompts, responses):
    return [float(response) for response in responses]


def composite(**settings):
    return CompositeReward({"number": Part(number_in_response, **settings)})


def scores_of(reward, chunks, groups=None):
    state, found = reward.init(), []
    for chunk in chunks:
        responses = [repr(float(x)) for x in chunk]
        scores, state, _ = reward.score(state, [""] * len(chunk), responses, groups=groups)
        found.append(scores)
    return found, state


def test_log_sigmoid_has_its_published_values_and_no_overflow():
    transform = LogSigmoid(reference=0.5)
    assert transform(np.array([2.0, -1.0])) == pytest.approx([-0.2014133, -1.7014133], abs=1e-7)
    assert transform(np.array([1e4, -1e4])) == pytest.approx([0.0, -10000.5])
    wide = LogSigmoid(reference=0.5, scale=2.0)
    assert wide(np.array([3.5])) == pytest.approx([-0.2014133], abs=1e-7)
    inside = jax.jit(transform)(jnp.array([2.0, -1.0]))
    assert np.asarray(inside) == pytest.approx([-0.2014133, -1.7014133], abs=1e-6)


def test_logit_and_affine_have_their_values():
    assert Logit()(np.array([0.5, 0.9, 0.0])) == pytest.approx([0.0, np.log(9.0), np.log(1e-6 / (1 - 1e-6))])
    assert Affine(scale=-2.0, shift=1.0)(np.array([3.0])).tolist() == [-5.0]


def test_the_exponential_mean_is_corrected_for_its_start():
    # A constant 4 at d = 0.9: uncorrected 0.4, 0.76, 1.084; corrected 4, 4, 4 (and so a normalised 0).
    normaliser, state = Ema(decay=0.9), Ema(decay=0.9).init()
    means, weights = [], []
    for _ in range(3):
        state = normaliser.update(state, np.array([4.0]))
        means.append(float(state["mean"]))
        weights.append(float(state["weight"]))
    assert means == pytest.approx([4.0, 4.0, 4.0])
    assert [m * w for m, w in zip(means, weights, strict=True)] == pytest.approx([0.4, 0.76, 1.084])


def test_the_running_moments_are_those_of_all_rollouts_however_their_means_move():
    chunks = [np.array([0.0, 2.0]), np.array([10.0]), np.array([5.0, 5.0, 8.0])]
    normaliser, state = Running(), Running().init()
    for chunk in chunks:
        state = normaliser.update(state, chunk)
    assert (float(state["count"]), float(state["mean"]), float(state["M2"])) == pytest.approx((6, 5.0, 68.0))
    # 25 + 9 + 25 + 0 + 0 + 9 about the mean of 5, so the deviation is √(68/6).
    assert normaliser.apply(state, np.array([10.0]), np.zeros(1, int)) == pytest.approx([5 / (68 / 6) ** 0.5])


def test_the_exponential_moments_are_those_of_the_weighted_sample():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(1e4 + i, 1 + i, 5) for i in range(4)]  # a large mean, where E[x²] − E[x]² fails
    normaliser, state = Ema(decay=0.7), Ema(decay=0.7).init()
    for chunk in chunks:
        state = normaliser.update(state, chunk)
    weights = np.repeat([0.7**3, 0.7**2, 0.7, 1.0], 5)
    values = np.concatenate(chunks)
    mean = np.average(values, weights=weights)
    assert state["mean"] == pytest.approx(mean, rel=1e-12)
    assert state["spread"] == pytest.approx(np.average((values - mean) ** 2, weights=weights), rel=1e-9)
    applied = normaliser.apply(state, values, np.zeros(20, int))
    assert np.average(applied**2, weights=weights) == pytest.approx(1.0)


def test_a_group_is_normalised_among_the_responses_to_its_prompt():
    groups = np.array([0, 1, 0, 1, 2])
    (scores,), state = scores_of(composite(normalise=Group()), [[1, 5, 3, 5, 9]], groups)
    assert scores.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    assert state == {"number": {}}


@pytest.mark.parametrize("normaliser", [Running(), Ema(decay=0.5), Group()])
def test_an_affine_change_leaves_what_is_normalised_as_it_was(normaliser):
    rng = np.random.default_rng(1)
    chunks, groups = [rng.normal(size=6) for _ in range(4)], np.array([0, 0, 1, 1, 2, 2])
    plain, _ = scores_of(composite(normalise=normaliser), chunks, groups)
    moved, _ = scores_of(composite(normalise=normaliser), [37.0 * c - 400.0 for c in chunks], groups)
    np.testing.assert_allclose(moved, plain, atol=1e-5)


@pytest.mark.parametrize("normaliser", [Running(), Ema(), Group()])
@pytest.mark.parametrize("constant", [0.0, 0.7, 1e7])
def test_a_constant_reward_normalises_to_zero(normaliser, constant):
    found, _ = scores_of(composite(normalise=normaliser), [[constant] * 3, [constant], [constant] * 5])
    assert np.abs(np.concatenate(found)).max() < 1e-6


def test_the_order_is_transform_normalise_clip_weight():
    part = {
        "transform": Affine(shift=100.0, scale=3.0),
        "normalise": Running(),
        "clip": (-1.0, 0.5),
        "weight": 10.0,
    }
    (scores,), _ = scores_of(composite(**part), [[0, 2, 4]])
    assert scores.tolist() == [-10.0, 0.0, 5.0]  # normalised to -1.2247, 0, 1.2247


def test_a_config_may_say_true_a_name_or_settings():
    def normaliser(value):
        return parse(Part, {"reward": "repetition", "normalise": value}).normalise

    assert normaliser(True) == Running()
    assert normaliser(False) is None
    assert normaliser("group") == Group()
    assert normaliser({"name": "ema", "decay": 0.8}) == Ema(decay=0.8)
    written = to_dict(composite(normalise=Ema(decay=0.8)), CompositeReward)
    assert written["parts"]["number"]["normalise"] == {"name": "ema", "decay": 0.8}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"normalise": {"name": "ema", "decay": 1.0}}, r"decay must be in \[0, 1\), got 1.0"),
        ({"normalise": "rnning"}, "did you mean 'running'"),
        ({"transform": {"name": "log_sigmoid", "scale": 0}}, "scale must be above 0, got 0"),
        ({"transform": {"name": "logit", "margin": 0.5}}, r"margin must be in \(0, 0.5\), got 0.5"),
        ({"transform": "sigmoid"}, "did you mean 'log_sigmoid'"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        parse(CompositeReward, {"parts": {"a": {"reward": "repetition", **settings}}})
