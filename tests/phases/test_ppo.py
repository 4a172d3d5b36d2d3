"""The rules of PPO that peers break, on a real decoder and real left-padded prompts."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl import AdaptiveKL, FixedKL
from hybrid_jax.core.batches import Samples, TokenBatch
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.parallel.mesh import MeshConfig, put_rows
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.references import Reference
from hybrid_jax.phases.sft import sft_objective
from hybrid_jax.phases.sft_mix import SFTMix
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training.optimizers import Adam, Constant
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import gradients

VOCABULARY, PROMPT, RESPONSE, ROWS, EOS = 11, 5, 7, 8, 3
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=32).build(VOCABULARY)
REWARD = CompositeReward({"count": Part(TokenCount(weights={2: 1.0, 5: -0.7}))})


class Compiled(PolicyGradientFunctions):
    """Every function one program, where operation by operation would compile hundreds."""

    __eq__, __hash__ = object.__eq__, object.__hash__
    sample = jax.jit(PolicyGradientFunctions.sample, static_argnums=0)
    score = jax.jit(PolicyGradientFunctions.score, static_argnums=0)
    learn = jax.jit(PolicyGradientFunctions.learn, static_argnums=0, static_argnames="groups")
    advantages = jax.jit(PolicyGradientFunctions.advantages, static_argnums=0)

    @functools.partial(jax.jit, static_argnums=0, static_argnames="microbatches")
    def gradients(self, params, batch, key, microbatches=1):
        return gradients(self.objective({}), params, batch, key, microbatches)


class Constantly:
    """The same score for every response, on the device."""

    def __init__(self, score):
        self.score = score

    def score_tokens(self, tokens, attention_mask, response_mask):
        return jnp.full(len(tokens), self.score)


QUARTER, SEVEN_TENTHS = (CompositeReward({"same": Part(Constantly(score))}) for score in (0.25, 0.7))


def rewarded(scored, scores=None):
    """A rollout whose scores are given; its rows are worth 0, 1, 2, … if none are."""
    scores = jnp.arange(float(len(scored.tokens))) if scores is None else scores
    return scored.replace(scores=scores, plain_scores=scores)


initial = jax.jit(Decoder.init, static_argnums=0)
apply = jax.jit(Decoder.apply, static_argnums=0)


@functools.cache
def plain(model, sampler) -> PolicyGradientFunctions:
    """Samples and scores for all settings that matter only to learning."""
    return functions(model, sampler=sampler)


def functions(model=MODEL, **settings) -> PolicyGradientFunctions:
    config = PPO(
        **{
            "reward": REWARD,
            "prompts_per_step": ROWS,
            "sampler": Ancestral(max_new_tokens=RESPONSE),
            "epochs": 2,
            "optimizer": Adam(learning_rate=1e-2, schedule=Constant()),
            **settings,
        }
    )
    return Compiled(config, model, eos_ids=(EOS,), name="ppo", optimizer_key="ppo")


def state_of(ppo: PolicyGradientFunctions, seed=0, scale=3.0) -> TrainState:
    """A policy away from the uniform one, so that no test passes because everything is alike."""
    model = jax.tree.map(lambda x: x * scale, initial(ppo.model, jax.random.key(seed)))
    params = {"model": model, **ppo.init_value(model)}
    head = {"kernel": jnp.full((ppo.model.width, 1), 0.1), "bias": jnp.full((1,), 0.2)}
    params["ppo/value"] = {**params["ppo/value"], "head": head}
    transform = ppo.config.optimizer.transform()
    return TrainState(
        params=params,
        opt_state={"ppo": {group: transform.init(tree) for group, tree in params.items()}},
        extra={ppo.kl_key: ppo.config.kl_control.init()},
    )


def prompts(rows=ROWS, seed=0):
    draw = np.random.default_rng(seed)
    lengths = np.arange(rows) % PROMPT + 1
    mask = np.arange(PROMPT)[None] >= PROMPT - lengths[:, None]
    return jnp.asarray(draw.integers(0, VOCABULARY, (rows, PROMPT)) * mask), jnp.asarray(mask)


def rolled_out(ppo, state, key=0, references=None):
    tokens, mask = prompts()
    alike = plain(ppo.model, ppo.config.sampler)
    samples = alike.sample(state.params["model"], tokens, mask, jax.random.key(key))
    references = references or {name: state.params["model"] for name in ppo.config.references}
    scoring = alike if set(references) == set(alike.config.references) else ppo
    return samples, scoring.score(state.params, references, tokens, mask, samples)


@pytest.mark.parametrize("temperature", [0.7, 1.3, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("minibatches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_ratio_of_a_fresh_policy_is_one_and_its_kl_to_itself_zero(temperature, minibatches):
    ppo = functions(
        sampler=Ancestral(max_new_tokens=RESPONSE, temperature=temperature), minibatches=minibatches
    )
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    mask = np.asarray(scored.action_mask)
    assert mask.sum() < mask.size  # some rows have ended early
    difference = np.asarray(scored.log_probs - scored.reference_log_probs["sft"])[mask]
    assert np.abs(difference).max() < 2e-6  # cached decoding against one pass, float32
    _, metrics = ppo.learn(state, rewarded(scored, jnp.zeros(ROWS)), None, jax.random.key(1), 0.0)
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=2e-6)
    assert metrics["kl"] == pytest.approx(0.0, abs=2e-5)
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_log_probs_are_those_of_the_tempered_distribution():
    ppo = functions(sampler=Ancestral(max_new_tokens=RESPONSE, temperature=0.7))
    state = state_of(ppo)
    samples, scored = jax.device_get(rolled_out(ppo, state))
    checked = 0
    for row in range(ROWS):
        prompt = scored.tokens[row, :PROMPT][np.asarray(prompts()[1][row])]
        for t in range(int(samples.action_mask[row].sum())):
            before = np.concatenate([prompt, samples.tokens[row, :t]])
            # What follows is not seen, so that one length serves all.
            whole = np.pad(before, (0, PROMPT + RESPONSE - len(before)))
            logits = np.asarray(apply(MODEL, state.params["model"], whole[None]).logits, np.float64)
            scores = logits[0, len(before) - 1] / 0.7
            expected = scores[int(samples.tokens[row, t])] - np.log(np.exp(scores).sum())
            assert samples.log_probs[row, t] == pytest.approx(expected, abs=1e-5)
            assert scored.reference_log_probs["sft"][row, t] == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked > ROWS


def test_values_belong_to_the_state_before_the_token():
    ppo = functions()
    state = state_of(ppo)
    # Hidden states have a mean of 0, so that a head of equal numbers would say the same of each.
    state.params["ppo/value"]["head"]["kernel"] = jnp.linspace(-1.0, 1.0, ppo.model.width)[:, None]
    _, scored = rolled_out(ppo, state)
    row = 4  # a prompt without padding
    hidden = apply(MODEL, state.params["model"], scored.tokens[row : row + 1]).hidden[0]
    head = state.params["ppo/value"]["head"]
    expected = np.asarray(hidden @ head["kernel"])[:, 0] + 0.2
    for t in range(int(scored.action_mask[row].sum())):
        assert scored.values[row, t] == pytest.approx(expected[PROMPT + t - 1], abs=1e-5)


def test_padding_and_what_stands_in_it_change_nothing():
    ppo = functions()
    state = state_of(ppo)
    samples, scored = rolled_out(ppo, state)
    scores = jnp.arange(float(ROWS))

    def learning(scored):
        rollout, metrics = ppo.advantages(rewarded(scored, scores), jnp.asarray(0.1))
        grads, losses = ppo.gradients(state.params, (rollout, None), jax.random.key(0))
        return grads, {**metrics, **losses}

    expected, metrics = learning(scored)
    tokens, mask = prompts()
    wide = jnp.concatenate([jnp.full((ROWS, 3), 9), jnp.where(mask, tokens, 7)], axis=1)
    wide_mask = jnp.concatenate([jnp.zeros((ROWS, 3), bool), mask], axis=1)
    longer = Samples.chosen(
        jnp.pad(jnp.where(samples.action_mask, samples.tokens, EOS), ((0, 0), (0, 2)), constant_values=2),
        jnp.pad(samples.log_probs, ((0, 0), (0, 2))),
        jnp.pad(samples.action_mask, ((0, 0), (0, 2))),
    )
    rescored = ppo.score(state.params, {"sft": state.params["model"]}, wide, wide_mask, longer)
    garbage = replace_masked(rescored, jnp.nan)
    got, got_metrics = learning(garbage)
    assert_trees_close(expected, got, 1e-5)
    for name, number in metrics.items():
        assert got_metrics[name] == pytest.approx(float(number), rel=1e-4, abs=1e-5), name


def replace_masked(scored, garbage):
    blank = lambda x: jnp.where(scored.action_mask, x, garbage)  # noqa: E731
    return scored.replace(
        values=blank(scored.values),
        log_probs=blank(scored.log_probs),
        reference_log_probs={name: blank(x) for name, x in scored.reference_log_probs.items()},
    )


def test_the_score_lands_on_the_end_token_and_only_there():
    ppo = functions(kl_control=FixedKL(0.0), discount=1.0, trace=1.0, whiten_advantages=False)
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    scores = jnp.arange(1.0, ROWS + 1)
    rollout, _ = ppo.advantages(rewarded(scored, scores), jnp.asarray(0.0))
    for row in range(ROWS):
        length = int(scored.action_mask[row].sum())
        # With γ = λ = 1 the return of every response token is the score that comes at the end.
        np.testing.assert_allclose(rollout.returns[row, :length], float(scores[row]), rtol=1e-6)
        np.testing.assert_array_equal(rollout.returns[row, length:], 0)


def test_a_response_that_does_not_end_pays_the_penalty():
    ppo = functions(missing_eos_penalty=0.7)
    tokens = jnp.array([[1, 2, EOS, 0], [1, 2, 4, EOS], [1, EOS, EOS, EOS]])
    mask = jnp.array([[True] * 3 + [False], [True] * 3 + [False], [True, True, False, False]])
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    scored = scored.replace(tokens=jnp.pad(tokens, ((0, 0), (2, 0))), action_mask=mask)
    got = replace(ppo, config=replace(ppo.config, reward=QUARTER)).rewarded(scored)
    np.testing.assert_allclose(got.scores, [0.25, -0.45, 0.25], atol=1e-7)
    np.testing.assert_allclose(got.plain_scores, [0.25, 0.25, 0.25], atol=1e-7)
    metrics = ppo.score_metrics(got)
    assert metrics["penalty"] == pytest.approx(0.7 / 3)
    assert metrics["eos_fraction"] == pytest.approx(2 / 3)
    assert metrics["response_length"] == pytest.approx(8 / 3)


def test_fractional_scores_stay_float32():
    ppo = functions(missing_eos_penalty=None)
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    got = replace(ppo, config=replace(ppo.config, reward=SEVEN_TENTHS)).rewarded(scored)
    np.testing.assert_array_equal(got.scores, np.full(ROWS, 0.7, np.float32))


@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_do_not_change_the_gradient(microbatches):
    ppo = functions(entropy_coef=0.01)
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    rollout, _ = ppo.advantages(rewarded(scored), jnp.asarray(0.1))
    whole, _ = ppo.gradients(state.params, (rollout, None), jax.random.key(0))
    parts, _ = ppo.gradients(state.params, (rollout, None), jax.random.key(0), microbatches=microbatches)
    assert_trees_close(whole, parts, 1e-6)


def test_eight_devices_give_the_samples_and_the_gradient_of_one():
    ppo = functions()
    state = state_of(ppo)
    tokens, mask = prompts()
    placement = MeshConfig(data=8).placement()

    def step(state, tokens, mask):
        samples = ppo.sample(state.params["model"], tokens, mask, jax.random.key(5))
        scored = ppo.score(state.params, {"sft": state.params["model"]}, tokens, mask, samples)
        rollout, _ = ppo.advantages(rewarded(scored), jnp.asarray(0.1))
        grads, _ = ppo.gradients(state.params, (rollout, None), jax.random.key(0))
        return samples, grads

    one, one_grads = jax.jit(step)(state, tokens, mask)
    many, many_grads = jax.jit(under(placement, step))(
        jax.device_put(state, placement.sharding((), ())), *put_rows(placement, (tokens, mask))
    )
    assert len(many.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.log_probs, many.log_probs, atol=1e-5)
    assert_trees_close(one_grads, many_grads, 1e-5)


def test_two_rollouts_and_two_rows_never_share_their_noise():
    ppo = replace(functions(), eos_ids=())
    state = state_of(ppo, scale=0.1)  # almost uniform, so equal draws would be no accident of a peaked policy
    tokens, mask = jnp.full((64, 1), 4), jnp.ones((64, 1), bool)
    first, second = (
        ppo.sample(state.params["model"], tokens, mask, jax.random.fold_in(jax.random.key(0), step))
        for step in range(2)
    )
    assert len(np.unique(np.asarray(first.tokens), axis=0)) == 64  # of 11^7 possibilities
    same = (np.asarray(first.tokens) == np.asarray(second.tokens)).mean()
    assert same == pytest.approx(1 / VOCABULARY, abs=0.06)  # 448 draws: four standard deviations


def test_the_value_warm_up_trains_the_value_and_nothing_else():
    for network in ("shared", "separate"):
        ppo = functions(value_network=network, kl_control=AdaptiveKL(horizon=100.0))
        state = state_of(ppo)
        _, scored = rolled_out(ppo, state, references={"sft": initial(MODEL, jax.random.key(9))})
        new, _ = ppo.learn(state, rewarded(scored), None, jax.random.key(0), 1e-2, groups=("ppo/value",))
        assert_trees_equal(new.params["model"], state.params["model"])
        assert not trees_equal(new.params["ppo/value"], state.params["ppo/value"])
        assert float(new.extra[ppo.kl_key]) == float(state.extra[ppo.kl_key])


def test_a_separate_value_network_leaves_the_policy_gradient_alone():
    shared, separate = functions(value_coef=0.0), functions(value_network="separate", value_coef=5.0)
    state, own = state_of(shared), state_of(separate)
    _, scored = rolled_out(shared, state)
    rollout, _ = shared.advantages(rewarded(scored), jnp.asarray(0.1))
    expected, _ = shared.gradients(state.params, (rollout, None), jax.random.key(0))
    got, _ = separate.gradients(own.params, (rollout, None), jax.random.key(0))
    assert_trees_close(expected["model"], got["model"], 1e-6)
    assert not trees_equal(got["ppo/value"]["model"], jax.tree.map(jnp.zeros_like, got["ppo/value"]["model"]))


def test_updates_stop_once_the_policy_has_moved_far_enough():
    ppo = functions(epochs=6, target_kl=0.01)
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    stopped, metrics = ppo.learn(state, rewarded(scored), None, jax.random.key(0), 0.05)
    taken = int(metrics["updates"])
    assert 1 <= taken < 6
    free = functions(epochs=6)
    _, unstopped = free.learn(state, rewarded(scored), None, jax.random.key(0), 0.05)
    assert int(unstopped["updates"]) == 6
    count = jax.tree.leaves(stopped.opt_state["ppo"]["model"])[0]
    assert int(count) == taken  # the optimizer has not counted what was not done
    assert metrics["approx_kl"] <= 0.01


def test_the_mixed_objective_is_the_weighted_sum_of_both_gradients():
    ppo = functions(sft_mix=SFTMix(coef=0.3, batch_size=4, length=6))
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    rollout, _ = ppo.advantages(rewarded(scored), jnp.asarray(0.1))
    draw = np.random.default_rng(1)
    examples = TokenBatch(
        tokens=jnp.asarray(draw.integers(0, VOCABULARY, (4, 6))),
        segment_ids=jnp.ones((4, 6), jnp.int32),
        loss_mask=jnp.asarray(draw.random((4, 6)) < 0.6).at[:, 0].set(False),
    )
    key = jax.random.key(0)
    mixed, _ = ppo.gradients(state.params, (rollout, examples), key, microbatches=2)
    alone, _ = functions().gradients(state.params, (rollout, None), key)
    sft_alone = jax.jit(lambda params: gradients(sft_objective(MODEL), {"model": params}, examples, key))
    sft, _ = sft_alone(state.params["model"])
    expected = jax.tree.map(lambda a, b: a + 0.3 * b, alone["model"], sft["model"])
    assert_trees_close(expected, mixed["model"], 1e-5)


def test_an_adaptive_coefficient_follows_the_sequence_kl():
    ppo = functions(kl_control=AdaptiveKL(initial=0.2, target=6.0, horizon=1000.0))
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state, references={"sft": initial(MODEL, jax.random.key(9))})
    new, metrics = ppo.learn(state, rewarded(scored, jnp.zeros(ROWS)), None, jax.random.key(0), 0.0)
    mask = np.asarray(scored.action_mask)
    k1 = np.asarray(scored.log_probs, np.float64) - np.asarray(scored.reference_log_probs["sft"], np.float64)
    kl = (k1 * mask).sum(axis=1).mean()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    error = np.clip(kl / 6.0 - 1, -0.2, 0.2)
    assert new.extra[ppo.kl_key] == pytest.approx(0.2 * (1 + error * ROWS / 1000), rel=1e-6)


def test_references_weigh_as_named():
    ppo = functions(references={"a": Reference(weight=0.25), "b": Reference(weight=0.5)})
    state = state_of(ppo)
    trees = {"a": initial(MODEL, jax.random.key(1)), "b": initial(MODEL, jax.random.key(2))}
    _, scored = rolled_out(ppo, state, references=trees)
    _, metrics = ppo.advantages(rewarded(scored, jnp.zeros(ROWS)), jnp.asarray(1.0))
    mask = np.asarray(scored.action_mask)
    k1 = {
        n: (np.asarray(scored.log_probs - x) * mask).sum(1).mean()
        for n, x in scored.reference_log_probs.items()
    }
    assert metrics["kl"] == pytest.approx(0.25 * k1["a"] + 0.5 * k1["b"], rel=1e-5)


def test_no_dropout_reaches_ppo():
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=32, dropout=0.5).build(VOCABULARY)
    ppo = functions(model)
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    _, metrics = ppo.learn(state, rewarded(scored, jnp.zeros(ROWS)), None, jax.random.key(1), 0.0)
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=2e-6)


def test_a_learning_rate_of_zero_changes_no_bit():
    ppo = functions()
    state = state_of(ppo)
    _, scored = rolled_out(ppo, state)
    new, _ = ppo.learn(state, rewarded(scored), None, jax.random.key(0), 0.0)
    assert_trees_equal(new.params, state.params)


def test_truncated_sampling_is_refused():
    with pytest.raises(ValueError, match="sampler must not truncate"):
        functions(sampler=Ancestral(max_new_tokens=4, top_k=5))
    with pytest.raises(ValueError, match="sampler must not truncate"):
        functions(sampler=Ancestral(max_new_tokens=4, temperature=0.0))


def test_references_are_refreshed_when_due():
    reference = Reference(refresh_every_cycles=2)
    due = [reference.is_due(cycle, entered=True) for cycle in range(5)]
    assert due == [False, False, True, False, True]  # at the first entry it is frozen, or was at the start
    assert not reference.is_due(2, entered=False)
    assert not replace(reference, refresh_every_cycles=None).is_due(2, entered=True)


def trees_equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_trees_equal(a, b):
    assert trees_equal(a, b)


def assert_trees_close(a, b, relative):
    """Relative to the largest entry of the tree: a key's bias, for one, has no gradient but rounding."""
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    others = dict(jax.tree_util.tree_leaves_with_path(b))
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        np.testing.assert_allclose(x, others[path], rtol=0, atol=relative * largest, err_msg=str(path))
