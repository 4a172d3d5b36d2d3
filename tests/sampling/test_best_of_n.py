"""Best of n, particles and beams, against laws and sums over all responses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import RowCache
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling import catalogue  # noqa: F401  registers all samplers
from hybrid_jax.sampling.ancestral import generate
from hybrid_jax.sampling.base import SAMPLERS, sample
from hybrid_jax.sampling.beam import Beam
from hybrid_jax.sampling.best_of_n import BestOfN
from hybrid_jax.sampling.metropolis import Metropolis
from hybrid_jax.sampling.particles import Particles, log_constant
from hybrid_jax.sampling.rejection import Rejection, acceptance
from hybrid_jax.testing import (
    SEQUENCES,
    START,
    TRANSITION,
    PrefixTable,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)

REWARD = TokenCount(weights={2: 1.0}, first_token_weights={1: -0.5})
COUNT = {"name": "token_count", "weights": {1: 1.0}}
FOUR, WORTH = np.array([0.4, 0.3, 0.2, 0.1]), TokenCount(weights={1: 1.0, 2: 2.0, 3: -1.0})


class Four:
    """One token out of four, whatever was read."""

    vocab_size, width, max_length = 4, 1, None

    def cast(self, params):
        return params

    def init_cache(self, batch, length):
        return RowCache(jnp.zeros(batch))

    def prefill(self, params, tokens, mask, cache):
        return jnp.tile(jnp.log(jnp.asarray(FOUR, jnp.float32)), (len(tokens), 1)), cache

    def step(self, params, token, cache):
        return jnp.tile(jnp.log(jnp.asarray(FOUR, jnp.float32)), (len(token), 1)), cache


def draws(sampler, model, params, rows, seed=0, eos=()):
    prompts = jnp.zeros((rows, 1), jnp.int32)
    return sample(sampler, model, params, prompts, prompts == 0, jax.random.key(seed), eos_ids=eos)


@pytest.mark.parametrize(
    ("n", "law"),
    [
        (2, [0.24, 0.39, 0.36, 0.01]),
        (4, [0.0624, 0.3471, 0.5904, 0.0001]),
        (8, [0.5**8 - 0.1**8, 0.8**8 - 0.5**8, 1 - 0.8**8, 0.1**8]),
        (1, FOUR),
    ],
)
def test_the_best_of_n_has_its_exact_law(n, law):
    found = draws(BestOfN(max_new_tokens=1, n=n, reward=WORTH), Four(), {}, 8192).tokens[:, 0]
    counts, expected = np.bincount(found, minlength=4), 8192 * np.array(law)
    large = expected > 5
    assert (
        chisquare(
            [*counts[large], counts[~large].sum() + 1e-9], [*expected[large], expected[~large].sum() + 1e-9]
        ).pvalue
        > 1e-3
    )
    kl = float((np.array(law) * np.log(np.array(law) / FOUR)).sum())
    assert kl <= np.log(n) - (n - 1) / n + 1e-12
    assert kl == pytest.approx({1: 0, 2: 0.168301, 4: 0.573092, 8: 1.069404}[n], abs=1e-6)


def test_a_soft_choice_among_many_is_the_optimum_of_the_reward():
    """With n answers the weights exp(r/β) among them tend to π*; 64 leave a bias of some thousandths."""
    sampler = BestOfN(max_new_tokens=1, n=64, reward=WORTH, softness=0.5)
    found = np.bincount(draws(sampler, Four(), {}, 4096).tokens[:, 0], minlength=4) / 4096
    best = optimum(FOUR, np.array([0, 1, 2, -1.0]), 0.5)
    assert np.abs(found - best).sum() / 2 < 0.03
    assert np.abs(np.array([0.0624, 0.3471, 0.5904, 0.0001]) - best).sum() / 2 > 0.1


def test_a_block_as_long_as_an_answer_is_the_best_of_n_bit_for_bit():
    for settings in ({}, {"reward": REWARD, "softness": 0.5}):
        whole = BestOfN(max_new_tokens=3, n=4, **settings)
        expected = draws(whole, PrefixTable(), reference_params(), 64, eos=(1,))
        for block in (3, 5):
            found = draws(replace(whole, block=block), PrefixTable(), reference_params(), 64, eos=(1,))
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_blocks_have_the_law_of_choices_among_beginnings():
    """Each token is the best of two by the reward so far; of equal ones each as often as it is drawn."""
    rows, law = np.stack([START, *TRANSITION]), np.zeros(27)
    for number, tokens in enumerate(SEQUENCES):
        probability, before = 1.0, 0
        for t, token in enumerate(tokens):
            p = rows[before]
            worth = np.array([0, -0.5, 1]) if t == 0 else np.array([0, 0, 1.0])
            below, equal = p[worth < worth[token]].sum(), p[worth == worth[token]].sum()
            probability *= ((below + equal) ** 2 - below**2) * p[token] / equal
            before = 1 + token
        law[number] = probability
    assert law.sum() == pytest.approx(1)
    blockwise = BestOfN(max_new_tokens=3, n=2, reward=REWARD, block=1)
    counts = np.bincount(
        numbered(draws(blockwise, PrefixTable(), reference_params(), 4096).tokens), minlength=27
    )
    assert_law(counts, law)


@pytest.mark.slow
def test_blocks_read_what_was_chosen_from_the_cache():
    """The log-probs that choose are those of reading all of an answer: so are the answers."""
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=16).build(5)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    prompts, mask = jnp.asarray([[0, 1, 2], [3, 3, 4]]), jnp.asarray([[False, True, True], [True, True, True]])
    seen = []

    def reward(tokens, attention_mask, response_mask):
        logits = model.apply(params, tokens, attention_mask).logits[:, 2:-1]
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 3:, None], 2)[..., 0]
        return jnp.sum(jnp.where(response_mask, taken, 0.0), 1) / response_mask.sum(1)

    class Reading:
        score_tokens = staticmethod(reward)

    for chosen_by in (None, Reading()):
        sampler = BestOfN(max_new_tokens=6, n=3, block=2, reward=chosen_by)
        seen.append(sample(sampler, model, params, prompts, mask, jax.random.key(0), eos_ids=(4,)).tokens)
    np.testing.assert_array_equal(*seen)


def test_what_rejection_accepts_has_the_law_of_the_optimum():
    reference = sequence_probabilities(reference_params())
    accepted = np.asarray(acceptance(jnp.asarray(true_reward())[None], 0.5, 3.0)[0], np.float64)
    best = optimum(reference, true_reward(), 0.5)
    np.testing.assert_allclose(reference * accepted / (reference * accepted).sum(), best, atol=1e-6)
    np.testing.assert_allclose((reference * accepted).sum(), np.exp(3.0378307 - 6), rtol=1e-5)
    sampler = Rejection(REWARD, max_new_tokens=3, n=64, beta=1.0, most=3.0)
    found = numbered(draws(sampler, PrefixTable(), reference_params(), 1024).tokens)
    assert_law(np.bincount(found, minlength=27), optimum(reference, true_reward(), 1.0))


def test_rejection_that_accepts_nothing_takes_one_by_weights_and_says_so(caplog):
    """No reward reaches 40, so none is accepted: weights among 64 draws come near π* all the same."""
    sampler = Rejection(WORTH, max_new_tokens=1, n=64, beta=0.5, most=40.0)
    found = np.bincount(draws(sampler, Four(), {}, 2048).tokens[:, 0], minlength=4) / 2048
    assert np.abs(found - optimum(FOUR, np.array([0, 1, 2, -1.0]), 0.5)).sum() / 2 < 0.04
    assert "none of the 64 draws for 2048 of 2048 prompts was accepted" in caplog.text
    with pytest.raises(
        UserError, match=r"sampler\.most must be at least every reward, got 1.0 and a reward of 2"
    ):
        draws(replace(sampler, most=1.0), Four(), {}, 8)


def numbered(tokens):
    """The place of each response among the 27."""
    return np.asarray(tokens) @ [9, 3, 1]


def assert_law(counts, law):
    """Pearson's statistic over responses with enough weight is what draws give (p > .001)."""
    large = law * counts.sum() >= 5
    observed, expected = [*counts[large], counts[~large].sum()], [*law[large], law[~large].sum()]
    if large.all():
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, counts.sum() * np.array(expected)).pvalue > 1e-3


@pytest.mark.parametrize("settings", [{}, {"guided": True}, {"guided": True, "resample_below": 1.0}], ids=str)
def test_particles_estimate_the_constant_without_bias(settings):
    """log Z = J*/β = 3.0378307; the mean of Z over 2,048 swarms lies within four of its standard errors."""
    sampler = Particles(max_new_tokens=3, n=8, reward=REWARD, beta=0.5, **settings)
    prompts = jnp.zeros((2048, 1), jnp.int32)
    swarm = sampler.swarm(PrefixTable(), reference_params(), prompts, prompts == 0, jax.random.key(0))
    z = np.exp(np.asarray(log_constant(swarm), np.float64))
    assert abs(z.mean() - np.exp(3.0378307)) < 4 * z.std() / np.sqrt(len(z))
    assert abs(z.mean() / np.exp(3.0378307) - 1) < 0.1


@pytest.mark.parametrize(
    ("settings", "alpha", "beta"), [({"reward": REWARD, "guided": True}, 1.0, 0.5), ({}, 4.0, 1.0)]
)
def test_many_particles_draw_from_the_target(settings, alpha, beta):
    sampler = Particles(max_new_tokens=3, n=64, alpha=alpha, beta=beta, **settings)
    found = numbered(draws(sampler, PrefixTable(), reference_params(), 2048).tokens)
    weights = sequence_probabilities(reference_params()) ** alpha
    weights = weights * np.exp(true_reward() / beta) if settings else weights
    expected, counts = weights / weights.sum(), np.bincount(found, minlength=27) / 2048
    assert np.abs(counts - expected).sum() / 2 < 0.06
    assert np.abs(sequence_probabilities(reference_params()) - expected).sum() / 2 > 0.2


def test_a_beam_as_wide_as_there_are_beginnings_finds_the_likeliest_response():
    random = np.random.default_rng(0)
    for seed in range(4):
        params = {"table": jnp.asarray(random.normal(0, 2, (13, 3)), jnp.float32)}
        widest, greedy = (
            draws(Beam(max_new_tokens=3, width=w), PrefixTable(), params, 2).tokens[0] for w in (27, 1)
        )
        np.testing.assert_array_equal(
            widest, SEQUENCES[np.argmax(sequence_probabilities(params))], err_msg=str(seed)
        )
        prompts = jnp.zeros((1, 1), jnp.int32)
        likeliest = generate(
            PrefixTable(), params, prompts, prompts == 0, jax.random.key(0), max_new_tokens=3, temperature=0
        )
        np.testing.assert_array_equal(greedy, likeliest.tokens[0])


def test_a_beam_over_responses_that_end_compares_them_by_length():
    """Every response is enumerated; token 2 ends one."""
    random = np.random.default_rng(1)
    for power in (0.0, 1.0):
        params = {"table": jnp.asarray(random.normal(0, 2, (13, 3)), jnp.float32)}
        log_probs = np.log(np.exp(params["table"]) / np.exp(params["table"]).sum(1, keepdims=True))
        best = (-np.inf, ())
        for tokens in [
            (2,),
            *[(a, 2) for a in (0, 1)],
            *[(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)],
        ]:
            total, prefix = 0.0, 0
            for token in tokens:
                total += log_probs[prefix, token]
                prefix = 3 * prefix + 1 + token
            best = max(best, (total / len(tokens) ** power, tokens))
        found = draws(Beam(max_new_tokens=3, width=16, length_power=power), PrefixTable(), params, 1, eos=(2,))
        assert tuple(np.asarray(found.tokens[0])[np.asarray(found.action_mask[0])].tolist()) == best[1]


def test_a_chain_of_a_cached_transformer_ends_where_a_wide_beam_does():
    """At a high power only the likeliest response is left."""
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=16).build(5)
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    prompts = jnp.asarray([[0, 1, 2], [3, 3, 4]])
    mask = jnp.asarray([[False, True, True], [True, True, True]])
    inputs = (model, params, prompts, mask, jax.random.key(0))
    beam = sample(Beam(max_new_tokens=4, width=625), *inputs, eos_ids=(4,))
    chain = Metropolis(max_new_tokens=4, alpha=40.0, proposal_temperature=0.5, moves=300)
    found = sample(chain, *inputs, eos_ids=(4,))
    np.testing.assert_array_equal(found.tokens, beam.tokens)
    np.testing.assert_array_equal(found.action_mask, beam.action_mask)


class Forbidding:
    """Minus infinity for a response with a token 1 in it; NaN for one with a token 2, where it is asked for."""

    def __init__(self, nan=False):
        self.nan = nan

    def score_tokens(self, tokens, attention_mask, response_mask):
        response = tokens[:, -response_mask.shape[1] :]
        has = lambda token: jnp.any(response_mask & (response == token), axis=1)  # noqa: E731
        return jnp.where(has(1), -jnp.inf, jnp.where(self.nan & has(2), jnp.nan, 0.0))


ALL = {
    "best_of_n": BestOfN(max_new_tokens=3, n=24, reward=Forbidding()),
    "rejection": Rejection(Forbidding(), max_new_tokens=3, n=24),
    "metropolis": Metropolis(max_new_tokens=3, moves=40, reward=Forbidding()),
    "particles": Particles(max_new_tokens=3, n=24, reward=Forbidding()),
    "guided": Particles(max_new_tokens=3, n=24, reward=Forbidding(), guided=True),
}


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)
def test_what_has_a_reward_of_minus_infinity_is_never_given(sampler):
    tokens = np.asarray(draws(sampler, PrefixTable(), reference_params(), 64).tokens)
    assert not np.any(tokens == 1)
    assert len(np.unique(numbered(tokens))) > 3  # and yet it is drawn


def test_guiding_particles_past_what_is_forbidden_estimates_the_constant():
    """Z is what the reference gives to responses without a token 1."""
    allowed = ~np.any(SEQUENCES == 1, axis=1)
    exact = sequence_probabilities(reference_params())[allowed].sum()
    prompts = jnp.zeros((2048, 1), jnp.int32)
    for guided in (False, True):
        sampler = Particles(max_new_tokens=3, n=8, reward=Forbidding(), guided=guided)
        swarm = sampler.swarm(PrefixTable(), reference_params(), prompts, prompts == 0, jax.random.key(0))
        z = np.exp(np.asarray(log_constant(swarm), np.float64))
        assert abs(z.mean() - exact) < 4 * z.std() / np.sqrt(len(z))


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)
def test_rewards_that_leave_no_answer_or_are_no_number_are_one_line(sampler):
    only_ones = {"table": jnp.tile(jnp.array([-40.0, 0.0, -40.0]), (13, 1))}
    with pytest.raises(UserError, match=r"sampler\.reward is -inf for every answer that was tried"):
        draws(sampler, PrefixTable(), only_ones, 4)
    with pytest.raises(UserError, match=r"sampler\.reward must give numbers, got nan"):
        draws(replace(sampler, reward=Forbidding(nan=True)), PrefixTable(), reference_params(), 4)


@pytest.mark.parametrize("sampler", [Beam(max_new_tokens=3, width=2), *ALL.values()], ids=["beam", *ALL])
def test_what_does_not_fit_is_one_line(sampler):
    model = DecoderConfig(num_layers=1, width=8, num_heads=1, max_length=4).build(3)
    inputs = (model, model.init(jax.random.key(0)), jnp.zeros((2, 2), jnp.int32), jnp.ones((2, 2), bool))
    with pytest.raises(UserError, match=r"max_new_tokens must be at most 2 .*max_length 4.*, got 3"):
        sample(sampler, *inputs, jax.random.key(0))
    short = replace(sampler, max_new_tokens=2)
    with pytest.raises(UserError, match="eos_ids must be tokens below the vocabulary's 3, got 9"):
        sample(short, *inputs, jax.random.key(0), eos_ids=(9,))


@pytest.mark.parametrize("name", ["beam", "guided"])
def test_an_answer_does_not_depend_on_how_many_prompts_there_are(name):
    sampler = Particles(max_new_tokens=3, n=8, reward=REWARD, beta=0.5, guided=True, resample_below=1.0)
    sampler = sampler if name == "guided" else Beam(max_new_tokens=3, width=3)
    few, many = (draws(sampler, PrefixTable(), reference_params(), rows).tokens for rows in (3, 40))
    np.testing.assert_array_equal(few, many[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "metropolis", "alpha": 0}, "alpha must be above 0, got 0"),
        ({"name": "best_of_n", "n": 0}, "n must be in .1, 1048576., got 0"),
        ({"name": "best_of_n", "block": 0}, "block must be at least 1, got 0"),
        ({"name": "rejection", "reward": COUNT, "beta": 0}, "beta must be above 0, got 0"),
        ({"name": "rejection"}, "reward"),
        ({"name": "guidance"}, "guidance needs a reward or a value, one of them"),
        (
            {"name": "guidance", "reward": COUNT, "value": "a"},
            "guidance needs a reward or a value, one of them",
        ),
        ({"name": "guidance", "reward": COUNT, "beta": -1}, "beta must be above 0, got -1"),
        ({"name": "guidance", "reward": COUNT, "candidates": 0}, "candidates must be in .1, 1048576., got 0"),
        ({"name": "particles", "guided": True}, "guided needs a reward on tokens"),
        ({"name": "beam", "width": 0}, "width must be in .1, 1048576., got 0"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    from dataclasses import dataclass
    from typing import Annotated, Any

    @dataclass(frozen=True)
    class Holder:
        sampler: Annotated[Any, SAMPLERS]

    with pytest.raises(UserError, match=message):
        parse(Holder, {"sampler": settings})
