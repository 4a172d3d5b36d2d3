"""Learned mixtures: planted weights come back, and EXP3's updates are those on paper."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.preferences import JsonlPreferences
from hybrid_jax.rewards.combine import COMBINERS
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.mixture import Bandit, Gated, entropy, fit_gate, gate_weights, hashed_words
from hybrid_jax.rewards.postprocess import Group, Running

PARTS = ("kind", "true", "short")
UNIT = dict.fromkeys(PARTS, 1.0)
CLUSTERS = {  # what people want, by what they ask
    "write a poem about {}": [0.7, 0.1, 0.2],
    "prove the theorem of {}": [0.05, 0.8, 0.15],
    "in one word, what is {}": [0.2, 0.2, 0.6],
}
SHARPNESS = 4.0
THINGS = ["rain", "bread", "a train", "the sea", "music", "chess", "winter", "the moon", "tea", "a garden"]


def gated(**settings):
    return Gated(preferences=JsonlPreferences(train="unread.jsonl"), **settings)  # pyright: ignore


def planted(count, seed, sharpness=SHARPNESS):
    """Preferences drawn from the planted weights: prompts, true weights, both sides' scores by part."""
    draw = np.random.default_rng(seed)
    templates = list(CLUSTERS)
    cluster = draw.integers(0, 3, count)
    prompts = [templates[c].format(THINGS[draw.integers(10)]) for c in cluster]
    truth = np.array([CLUSTERS[templates[c]] for c in cluster])
    sides = draw.normal(0, 1, (2, count, 3))
    margins = sharpness * (truth * (sides[0] - sides[1])).sum(axis=1)
    swap = draw.random(count) > 1 / (1 + np.exp(-margins))
    sides[:, swap] = sides[::-1, swap]
    chosen, rejected = ({name: side[:, i] for i, name in enumerate(PARTS)} for side in sides)
    return prompts, truth, chosen, rejected


def accuracy(weights, chosen, rejected):
    differences = np.stack([chosen[name] - rejected[name] for name in PARTS], axis=1)
    return np.mean((weights * differences).sum(axis=1) > 0)


@pytest.fixture(scope="module")
def fitted():
    gate = gated(bits=8, floor=0.0)
    prompts, _, chosen, rejected = planted(8000, seed=0)
    return gate, gate.fit(chosen, rejected, UNIT, prompts)


def test_planted_weights_are_found_within_5_percent_and_decide_as_well_as_the_truth(fitted):
    gate, state = fitted
    prompts, truth, chosen, rejected = planted(20000, seed=1)
    found = gate.weights(state, prompts, 3)
    for template, weights in CLUSTERS.items():
        here = [i for i, prompt in enumerate(prompts) if prompt.startswith(template[:8])]
        np.testing.assert_allclose(found[here].mean(axis=0), weights, atol=0.05)
    bayes = accuracy(truth, chosen, rejected)
    assert 0.7 < bayes < 0.97
    assert accuracy(found, chosen, rejected) == pytest.approx(bayes, abs=0.01)
    assert accuracy(np.full_like(truth, 1 / 3), chosen, rejected) < bayes - 0.03
    assert entropy(found).min() > 0.3  # the truth has 0.61 to 0.95 nats
    assert float(state["accuracy"]) == pytest.approx(bayes, abs=0.02)


def test_the_score_is_the_sum_of_coefficients_and_parts(fitted):
    gate, state = fitted
    prompts, _, values, _ = planted(50, seed=2)
    weighing, same = gate.combine(state, values, UNIT, prompts)
    by_hand = [
        sum(weighing.coefficients[name][i] * values[name][i] for name in PARTS) for i in range(50)
    ]  # ArmoRM's identity
    np.testing.assert_allclose(weighing.score(values), by_hand, atol=1e-9)
    assert same is state
    mixture = np.stack([weighing.coefficients[name] for name in PARTS], axis=1) * state["scale"]
    np.testing.assert_allclose(mixture.sum(axis=1), 1.0)
    assert weighing.metrics["gate_entropy"] == pytest.approx(-(mixture * np.log(mixture)).sum(axis=1).mean())


def test_the_unit_of_a_part_changes_nothing_and_a_penalty_is_learnt_as_one(fitted):
    gate, state = fitted
    prompts, _, chosen, rejected = planted(8000, seed=0)
    bent = [{**side, "kind": -1000 * side["kind"]} for side in (chosen, rejected)]
    weights = {**UNIT, "kind": -1.0}
    other = gate.fit(*bent, weights, prompts)
    asked, _, values, _ = planted(20, seed=3)
    expected = gate.combine(state, values, UNIT, asked)[0].score(values)
    values = {**values, "kind": -1000 * values["kind"]}
    np.testing.assert_allclose(
        gate.combine(other, values, weights, asked)[0].score(values), expected, atol=2e-3
    )


def test_a_floor_keeps_every_part_in_the_mixture():
    prompts, _, chosen, rejected = planted(500, seed=0)
    only = {name: np.zeros(500) for name in PARTS} | {"true": chosen["true"] - rejected["true"]}
    won = {"true": np.abs(only["true"])}
    zeros = {name: np.zeros(500) for name in PARTS}
    gate = gated(bits=4, floor=0.05, l2=0.0)
    found = gate.weights(gate.fit({**zeros, **won}, zeros, UNIT, prompts), prompts, 3)
    assert found.min() >= 0.05
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert found[:, 1].mean() > 0.85


def test_the_fit_is_a_minimum_of_the_loss_that_it_states():
    draw = np.random.default_rng(0)
    features, differences = draw.normal(0, 1, (40, 3)), draw.normal(0.3, 1, (40, 2))
    kernel, bias, sharpness, loss = fit_gate(features, differences, floor=0.1, l2=0.05)

    def stated(kernel, bias, log_sharpness):
        weights = 0.1 + 0.8 * jax.nn.softmax(features @ kernel + bias)
        margins = jnp.exp(log_sharpness) * (weights * differences).sum(axis=1)
        return jnp.mean(-jax.nn.log_sigmoid(margins)) + 0.025 * jnp.sum(kernel**2)

    inputs = jnp.asarray(kernel), jnp.asarray(bias), jnp.log(sharpness)
    value, gradients = jax.jit(jax.value_and_grad(stated, argnums=(0, 1, 2)))(*inputs)
    assert float(value) == pytest.approx(loss + 0.025 * (kernel**2).sum(), rel=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-4)


def test_words_are_hashed_to_unit_rows_and_prompts_without_any_get_the_bias():
    features = hashed_words(["The sea, the SEA!", "the sea the sea", "", "🙂"], bits=6)
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), [1, 1, 0, 0])
    bias = np.log([0.2, 0.3, 0.5])
    found = gate_weights(features, np.zeros((64, 3)), bias, 0.0)
    np.testing.assert_allclose(found[3], [0.2, 0.3, 0.5])


def test_all_parts_weigh_the_same_until_the_gate_is_fitted():
    gate = gated(bits=4)
    state = gate.init(PARTS)
    assert not gate.is_fitted(state)
    values = {name: np.array([1.0, 2.0]) for name in PARTS}
    for unfitted in (state, {}):
        weighing, _ = gate.combine(unfitted, values, UNIT, ["a", "b"])
        np.testing.assert_allclose(weighing.score(values), [1.0, 2.0])
        assert weighing.metrics["gate_fitted"] == 0.0
    fitted = gate.fit(*[{name: np.ones(2) * k for name in PARTS} for k in (1, 0)], UNIT, ["a", "b"])
    assert {name: x.shape for name, x in fitted.items()} == {name: x.shape for name, x in state.items()}


def test_the_first_updates_of_exp3_are_those_on_paper():
    bandit = Bandit("taste", exploration=0.3, gain_range=2.0, seed=0)
    state = bandit.init(PARTS)
    np.testing.assert_allclose(bandit.probabilities(state), [1 / 3] * 3)
    first = bandit.arm(state)
    state = bandit.observe(state, 1.0)  # x = (1/2 + 1)/2 = 0.75, x/p = 2.25, ω = exp(0.3 · 2.25 / 3) = e^0.225
    weights = np.ones(3)
    weights[first] = math.exp(0.225)
    chances = 0.7 * weights / weights.sum() + 0.1
    np.testing.assert_allclose(bandit.probabilities(state), chances)
    second = bandit.arm(state)
    state = bandit.observe(state, -9.0)  # clipped to −2: x = 0, nothing is learnt
    np.testing.assert_allclose(bandit.probabilities(state), chances)
    third = bandit.arm(state)
    state = bandit.observe(state, 9.0)  # clipped to 2: x = 1
    weights[third] *= math.exp(0.3 / (3 * chances[third]))
    np.testing.assert_allclose(bandit.probabilities(state), 0.7 * weights / weights.sum() + 0.1)
    assert int(state["round"]) == 3
    assert {first, second, third} <= {0, 1, 2}
    with pytest.raises(ValueError, match="gain must be finite, got nan"):
        bandit.observe(state, math.nan)


def test_arms_are_drawn_with_their_probabilities():
    bandit = Bandit("taste", exploration=0.2, seed=5)
    log_weights = np.log([0.6, 0.3, 0.1])
    arms = [bandit.arm({"log_weights": log_weights, "round": np.int64(i)}) for i in range(4000)]
    expected = 0.8 * np.array([0.6, 0.3, 0.1]) + 0.2 / 3
    np.testing.assert_allclose(np.bincount(arms) / 4000, expected, atol=0.025)  # 3 deviations


def test_exp3_finds_the_part_that_gains_within_its_bound_of_regret():
    means, rounds = np.array([-0.4, 0.0, 0.6]), 1500  # of gains that are −1 or 1; x has half of it, plus ½
    exploration = min(1.0, math.sqrt(3 * math.log(3) / ((math.e - 1) * rounds)))
    bound = 2 * math.sqrt(math.e - 1) * math.sqrt(rounds * 3 * math.log(3))  # Auer et al. 2002, corollary 3.2
    regrets, chances = [], []
    for seed in range(3):
        bandit, draw = Bandit("taste", exploration=exploration, seed=seed), np.random.default_rng(seed)
        state, total = bandit.init(PARTS), 0.0
        for _ in range(rounds):
            mean = means[bandit.arm(state)]
            total += (mean + 1) / 2
            state = bandit.observe(state, 1.0 if draw.random() < (mean + 1) / 2 else -1.0)
        regrets.append(rounds * (means.max() + 1) / 2 - total)
        chances.append(bandit.probabilities(state)[2])
    assert np.mean(regrets) < bound
    assert np.mean(regrets) < 0.5 * rounds * (0.8 - 0.5333)  # half of what drawing evenly loses
    assert min(chances) > 0.6


def test_a_bandit_weighs_the_arm_and_the_mixture():
    bandit = Bandit("taste", exploration=0.3, focus=0.5)
    state = {"log_weights": np.log([1.0, 2.0, 4.0]), "round": np.int64(7)}
    chances = 0.7 * np.array([1, 2, 4]) / 7 + 0.1
    values = {name: np.arange(2.0) for name in PARTS}
    weighing, same = bandit.combine(state, values, {**UNIT, "short": -2.0}, ["a", "b"])
    expected = 0.5 * chances + 0.5 * (np.arange(3) == bandit.arm(state))
    found = [weighing.coefficients[name][0] for name in PARTS]
    np.testing.assert_allclose(found, expected * [1, 1, -2])
    assert same is state
    assert weighing.metrics["true_probability"] == pytest.approx(chances[1])
    assert weighing.metrics["bandit_entropy"] == pytest.approx(-(chances * np.log(chances)).sum())


def test_the_score_that_is_logged_knows_no_arm_of_a_bandit():
    """An arm of the first round would weigh one part more for all time: which one, the seed would say."""
    for seed in range(4):
        parts = {name: Part(lambda prompts, responses: [0.0] * len(responses)) for name in ("a", "b")}
        reward = CompositeReward(parts, combine=Bandit("taste", seed=seed))
        raw = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}
        assert reward.plain_scores(raw, ["", ""]).tolist() == [0.5, 0.5]
        assert reward.weigh(reward.init(), raw, ["", ""])[0].totals.tolist() != [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandit("taste", exploration=0.0), r"exploration must be in \(0, 1\], got 0.0"),
        (lambda: Bandit("taste", gain_range=0.0), "gain_range must be above 0"),
        (lambda: Bandit("taste", focus=1.5), r"focus must be in \[0, 1\]"),
        (lambda: Bandit("taste").check(["one"]), "parts must be two or more for a bandit"),
        (lambda: gated().check(["one"]), "parts must be two or more for a gate"),
        (lambda: gated(floor=0.4).check(PARTS), "floor must be below 1 / 3 parts, got 0.4"),
        (lambda: gated(bits=0), r"bits must be in \[1, 20\]"),
    ],
)
def test_a_wrong_setting_is_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_both_are_named_in_a_config():
    settings = {"preferences": {"name": "jsonl", "train": "x.jsonl"}, "bits": 6}
    gate = parse(COMBINERS["gated"], settings)
    assert parse(COMBINERS["gated"], to_dict(gate)) == gate
    assert COMBINERS.name_of(Bandit("taste")) == "bandit"


def length_of(prompts, responses):
    return [float(len(response)) for response in responses]


def vowels_of(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


def test_the_composite_fits_its_gate_once_on_preferences_and_never_again(tmp_path):
    """Prompts that ask for "short" prefer fewer letters, others more vowels; the rollout has no say."""
    draw, rows = np.random.default_rng(0), []
    for i in range(200):
        short = i % 2 == 0
        texts = ["".join(draw.choice(list("aeiouxyz"), draw.integers(3, 30))) for _ in range(2)]
        key = (lambda t: -len(t)) if short else (lambda t: sum(c in "aeiou" for c in t))
        better, worse = sorted(texts, key=key, reverse=True)
        prompt = "be short" if short else "sing loud"
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    composite = CompositeReward(
        {"length": Part(length_of, weight=-1.0), "vowels": Part(vowels_of)},
        Gated(JsonlPreferences(train=path), l2=1e-4),
    )
    state = composite.init()
    _, state, _ = composite.score(state, ["be short", "sing loud"], ["aaa", "xyz"])
    gate = composite.combine.weights(state["combiner/"], ["be short", "sing loud"], 2)
    assert gate[0, 0] > 0.75
    assert gate[1, 1] > 0.75
    path.unlink()  # not read again
    _, after, _ = composite.score(state, ["be short"], ["aaaaaaaaaa"])
    assert after["combiner/"]["kernel"].tobytes() == state["combiner/"]["kernel"].tobytes()


def test_the_composite_hands_the_bandit_the_change_of_its_metric():
    composite = CompositeReward(
        {"length": Part(length_of), "vowels": Part(vowels_of)}, Bandit("judge/taste", gain_range=1.0)
    )
    first = composite.observe(composite.init(), {"evaluation/judge/taste": 0.25})
    assert first["combiner/"]["round"] == 0  # a change needs two
    second = composite.observe(first, {"evaluation/judge/taste": 0.75})
    alone = composite.combine.observe(first["combiner/"], 0.5)
    assert second["combiner/"]["log_weights"].tolist() == alone["log_weights"].tolist()
    assert second["combiner/"]["last"] == 0.75
    with pytest.raises(UserError, match="did you mean 'evaluation/judge/tase'"):
        composite.observe(first, {"evaluation/judge/tase": 1.0})


@pytest.mark.parametrize("normaliser", [Group(), Running()])
def test_a_gate_is_fitted_on_values_that_a_normaliser_has_not_emptied(tmp_path, normaliser):
    """The better answer has more vowels and as many letters, plus noise. Each response alone in a group of its
    own would be 0, of which the gate learns nothing: accuracy ½ and weights ½."""
    draw, rows = np.random.default_rng(0), []
    for _ in range(60):
        vowels = draw.permutation(12)[:2]
        better, worse = ("a" * v + "x" * int(draw.integers(3, 20)) for v in sorted(vowels, reverse=True))
        rows.append({"prompt": "sing", "chosen": better, "rejected": worse})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))

    def fitted(normalise):
        parts = {"length": Part(length_of, normalise=normalise), "vowels": Part(vowels_of, normalise=normalise)}
        composite = CompositeReward(parts, Gated(JsonlPreferences(train=path)))
        state = composite.score(composite.init(), ["sing"] * 2, ["aaa", "xy"], groups=np.array([0, 0]))[1]
        return state["combiner/"], composite.combine.weights(state["combiner/"], ["sing"], 2)[0]

    (plain, plain_weights), (state, weights) = fitted(None), fitted(normaliser)
    assert (plain["accuracy"], state["accuracy"]) == (1.0, 1.0)
    np.testing.assert_allclose(weights, plain_weights, atol=1e-3)
    assert weights.round(3).tolist() == [0.088, 0.912]
    if normaliser == Group():  # the scale on which `combine` will see the values
        assert state["scale"].tolist() == pytest.approx([1.0, 1.0])
