"""Losses on pairs of answers: literal numbers, published ones where there are, and where they are smallest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kto import KTO, kto_baseline
from hybrid_jax.algorithms.preference_losses import ORPO, PREFERENCE_LOSSES, DiscoPOP, PairLoss, Sigmoid
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError

# log-ratios 1 and -0.5, so h = 1.5
POLICY = jnp.array([[-10.0, -12.0]])
REFERENCE = jnp.array([[-11.0, -11.5]])
TOKENS = jnp.array([[5.0, 8.0]])

GOLDEN = [
    ("sigmoid", {}, 0.6209570),
    ("sigmoid", {"label_smoothing": 0.1}, 0.6359570),
    ("sigmoid", {"label_smoothing": 0.25}, 0.6584570),
    ("sigmoid", {"divergence": "forward_kl"}, 0.6311544),
    ("sigmoid", {"divergence": "js"}, 0.6606522),
    ("sigmoid", {"divergence": "alpha", "alpha": 0.5}, 0.6276909),
    ("robust", {"label_smoothing": 0.1}, 0.6022070),
    ("robust", {"label_smoothing": 0.25}, 0.5459570),
    ("hinge", {}, 0.85),
    ("ipo", {}, 12.25),
    ("ipo", {"token_mean": True}, 22.4439062),
    ("sigmoid_norm", {"beta": 0.1}, 0.6801083),
    ("exo", {"label_smoothing": 1e-3}, 2.5055166),
    ("exo", {"label_smoothing": 0.1}, 0.4313885),
    ("nca", {}, 1.3508248),
    ("bco", {}, 1.3128563),
    ("sppo_hard", {}, 36.25),
    ("apo_zero", {}, 0.9625234),
    ("apo_down", {}, 0.9875493),
    ("discopop", {"temperature": 0.05}, 0.8493376),
    ("orpo", {}, 0.1042058),
    ("cpo", {}, 0.5981389),
    ("simpo", {"beta": 2.0, "margin": 1.0}, 2.1269280),
    ("simpo", {"beta": 2.5, "margin": 1.25}, 2.5788897),
]


def made(name, **settings):
    return parse(PREFERENCE_LOSSES[name], settings)


def pair_losses():
    return {name: loss for name in list(PREFERENCE_LOSSES) if isinstance(loss := made(name), PairLoss)}


@pytest.mark.parametrize(("name", "settings", "value"), GOLDEN)
def test_the_loss_of_a_pair_is_the_literal_number(name, settings, value):
    loss = made(name, **settings)
    reference = REFERENCE if loss.needs_reference else None
    with jax.enable_x64(True):
        inputs = [
            x if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (POLICY, reference, TOKENS)
        ]
        assert float(loss(*inputs)[0]) == pytest.approx(value, abs=1e-6)
    assert float(loss(POLICY, reference, TOKENS)[0]) == pytest.approx(value, rel=1e-6)


def test_every_loss_of_pairs_has_a_literal_number():
    assert {name for name, *_ in GOLDEN} == set(pair_losses())


def test_the_loss_of_one_answer_is_the_literal_number():
    loss, desirable = KTO(beta=0.1), jnp.array([True, False])
    for baseline, expected in ((0.0, [0.4750208, 0.4875026]), (0.4, [0.4850045, 0.4775152])):
        found = loss(jnp.array([1.0, -0.5]), desirable, jnp.asarray(baseline))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    weighted = KTO(beta=0.1, desirable_weight=2.0, undesirable_weight=0.5)
    np.testing.assert_allclose(
        weighted(jnp.array([1.0, -0.5]), desirable, jnp.asarray(0.0)), [0.9500416, 0.2437513], atol=1e-6
    )


def test_the_kl_baseline_is_a_mean_at_least_0_without_gradient():
    value, slope = jax.value_and_grad(kto_baseline)(jnp.array([1.0, -0.25, 0.0]))
    assert float(value) == 0.25
    np.testing.assert_array_equal(slope, 0.0)
    assert float(kto_baseline(jnp.array([-1.0, 0.5]))) == 0.0


def test_the_odds_of_means_are_finite_where_those_of_sums_underflow():
    long = jnp.array([[-0.0, -900.0]]), None, jnp.array([[300.0, 300.0]])
    value, slope = jax.value_and_grad(lambda x: ORPO()(x, *long[1:])[0])(long[0])
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    two = jnp.array([[-2.0, -1.5]]), None, jnp.ones((1, 2))
    odds = np.log(np.exp(-2) / (1 - np.exp(-2))) - np.log(np.exp(-1.5) / (1 - np.exp(-1.5)))
    assert odds == pytest.approx(-0.6070690, abs=1e-6)
    assert float(ORPO()(*two)[0]) == pytest.approx(0.1 * np.log1p(np.exp(-odds)), abs=1e-6)


@pytest.mark.parametrize("name", list(PREFERENCE_LOSSES))
def test_a_reference_is_read_where_and_only_where_a_loss_says_so(name):
    loss = made(name)
    if not isinstance(loss, PairLoss):
        return
    values = [float(loss(POLICY, REFERENCE + shift, TOKENS)[0]) for shift in (0.0, jnp.array([[0.0, 1.0]]))]
    assert (values[0] != values[1]) == loss.needs_reference
    if loss.needs_reference:
        with pytest.raises(ValueError, match="reads log-probs of a reference"):
            loss(POLICY, None, TOKENS)


@pytest.mark.parametrize("name", list(PREFERENCE_LOSSES))
def test_tokens_are_counted_where_and_only_where_a_loss_reads_means(name):
    for loss in (made(name), made("ipo", token_mean=True)):
        if isinstance(loss, PairLoss):
            values = [float(loss(POLICY, REFERENCE, TOKENS * n)[0]) for n in (1, 2)]
            assert (values[0] != values[1]) == loss.reads_means


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        ({"divergence": "forward_kl"}, lambda u: 1 / u),
        ({"divergence": "alpha", "alpha": 1.0}, lambda u: 1 / u),
        ({"divergence": "alpha", "alpha": 0.5}, lambda u: u**-0.5),
    ],
    ids=["forward KL", "alpha 1", "alpha 0.5"],
)
def test_a_divergence_has_its_gradient_near_the_reference_and_a_finite_one_far_away(loss, slope):
    divergence = Sigmoid(beta=0.1, **loss)

    def found(log_ratios):
        answers = jnp.array([log_ratios])
        nothing, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
        return jax.value_and_grad(lambda x: divergence(x, nothing, one)[0])(answers)

    value, gradient = found([0.3, -0.2])
    wrong = 1 - np.exp(-float(value))  # σ(−margin)
    expected = -0.1 * wrong * np.array([slope(np.exp(0.3)), -slope(np.exp(-0.2))])
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)
    # Two answers that are told apart; the better one lost, by far; both lost.
    for log_ratios, sign in (([1.0, -90.0], 0), ([-90.0, -1.0], -1), ([-120.0, -100.0], -1)):
        value, gradient = found(log_ratios)
        assert np.isfinite([value, *gradient[0], jnp.square(gradient).sum()]).all()
        assert np.sign(gradient[0, 0]) == sign


def test_discopop_is_dpo_where_the_worse_answer_is_far_ahead():
    read = DiscoPOP(beta=5.0)
    for h in (-18.0, -100.0):
        loss = float(read(jnp.array([[h, 0.0]]), jnp.zeros((1, 2)), jnp.ones((1, 2)))[0])
        assert loss == pytest.approx(-5 * h, rel=1e-6)


@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_label_smoothing_moves_the_minimum_to_the_odds_of_right_labels(noise):
    # Where labels are wrong with probability ε, σ(βh) = 1 − ε is the truth; without ε the loss falls for ever.
    margin = float(np.log((1 - noise) / noise))
    one, nothing = jnp.ones((1, 2)), jnp.zeros((1, 2))

    def slope(loss, beta_h):
        return float(
            jax.grad(lambda h: loss(jnp.stack([h, 0 * h], 1), nothing, one)[0])(jnp.array([beta_h]))[0]
        )

    assert slope(made("sigmoid", beta=1.0, label_smoothing=noise), margin) == pytest.approx(0.0, abs=1e-6)
    assert slope(made("sigmoid", beta=1.0), margin) == pytest.approx(-noise, abs=1e-6)
    # EXO has its minimum there, too; robust has none and falls below any bound.
    assert slope(made("exo", beta=1.0, label_smoothing=noise), margin) == pytest.approx(0.0, abs=1e-6)
    far = jnp.array([[1e6, 0.0]])
    assert float(made("robust", beta=1.0, label_smoothing=noise)(far, nothing, one)[0]) < -1e4


def test_robust_is_dpo_on_the_true_labels_in_the_mean_over_flips():
    noise, flipped = 0.2, POLICY[:, ::-1] - REFERENCE[:, ::-1]
    loss, nothing = made("robust", label_smoothing=noise), jnp.zeros((1, 2))
    straight = POLICY - REFERENCE
    mean = (1 - noise) * loss(straight, nothing, TOKENS) + noise * loss(flipped, nothing, TOKENS)
    assert float(mean[0]) == pytest.approx(0.6209570, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("exo", {"label_smoothing": 0.0}, r"label_smoothing must be in \(0, 0.5\), got 0"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ("sigmoid", {"label_smoothing": 0.6}, r"label_smoothing must be in \[0, 0.5\), got 0.6"),
        ("sigmoid", {"beta": 0.0}, "beta must be above 0, got 0"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_one_line(name, settings, line):
    with pytest.raises((UserError, ValueError), match=line):
        made(name, **settings)
