"""Metropolis-Hastings over responses: the transition matrix of its kernel, and what chains end with."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.continuing import Responses, continue_from, read_prompts
from hybrid_jax.sampling.metropolis import Chain, Metropolis, log_acceptance
from hybrid_jax.testing import START, TRANSITION, PrefixTable, true_reward

R, END = 3, 2


def responses(eos):
    """All responses of up to three tokens: 27, or 15 where token 2 ends one."""
    found = []
    for length in range(1, R + 1):
        for tokens in itertools.product(range(3), repeat=length):
            ends = [i for i, token in enumerate(tokens) if eos and token == END]
            if (ends == [] and length == R) or ends == [length - 1]:
                found.append(tokens)
    return found


def token_log_probs(tokens, temperature=1.0):
    rows = np.stack([START, *TRANSITION]) ** (1 / temperature)
    rows = np.log(rows / rows.sum(1, keepdims=True))
    return [rows[0 if i == 0 else 1 + tokens[i - 1], token] for i, token in enumerate(tokens)]


def chain_of(all_tokens, alpha, scores):
    """The state of a chain in every response, in float64."""
    pad = lambda rows, kind: np.array([[*row, *[0] * (R - len(row))] for row in rows], kind)  # noqa: E731
    return Chain(
        Responses(
            jnp.asarray(pad(all_tokens, int)),
            jnp.asarray(pad([[1] * len(t) for t in all_tokens], bool)),
            jnp.asarray(pad([token_log_probs(t) for t in all_tokens], float)),
            jnp.asarray(pad([token_log_probs(t, 1 / alpha) for t in all_tokens], float)),
        ),
        jnp.asarray(scores),
    )


def transitions(all_tokens, alpha, beta, scores, acceptance=log_acceptance):
    """K[y, y'] of one move, every cut and every proposal counted with its probability."""
    chain, count = chain_of(all_tokens, alpha, scores), len(all_tokens)
    moves = [
        (y, other, cut)
        for y, tokens in enumerate(all_tokens)
        for cut in range(len(tokens))
        for other, new in enumerate(all_tokens)
        if new[:cut] == tokens[:cut]
    ]
    old, new, cuts = (jnp.array(column) for column in zip(*moves, strict=True))
    now, proposal = (jax.tree.map(lambda x: x[rows], chain) for rows in (old, new))  # noqa: B023
    taken = np.minimum(1.0, np.exp(acceptance(now, proposal, cuts, alpha, beta)))
    K = np.zeros((count, count))
    for (y, other, cut), share in zip(moves, taken, strict=True):
        drawn = np.exp(sum(token_log_probs(all_tokens[other], 1 / alpha)[cut:]))
        K[y, other] += drawn * share / len(all_tokens[y])
    return K + np.diag(1 - K.sum(axis=1))


def target(all_tokens, alpha, beta, scores):
    weights = np.exp(
        [alpha * sum(token_log_probs(t)) + s / beta for t, s in zip(all_tokens, scores, strict=True)]
    )
    return weights / weights.sum()


def stationary(K):
    values, vectors = np.linalg.eig(K.T)
    found = np.real(vectors[:, np.argmax(np.real(values))])
    return found / found.sum()


@pytest.mark.parametrize(("eos", "alpha", "beta"), [(False, 4.0, 1.0), (True, 4.0, 1.0), (True, 1.0, 0.5)])
def test_a_move_leaves_the_target_as_it_is(eos, alpha, beta):
    with jax.enable_x64():
        states = responses(eos)
        assert len(states) == (15 if eos else 27)
        scores = np.zeros(len(states)) if alpha == 4 else np.array([float(t.count(1)) for t in states])
        pi = target(states, alpha, beta, scores)
        K = transitions(states, alpha, beta, scores)
        assert np.abs(pi @ K - pi).sum() < 1e-12
    if eos and alpha == 4:
        of_length = [pi[[len(t) == n for t in states]].sum() for n in (1, 2, 3)]
        np.testing.assert_allclose(of_length, [0.5588683, 0.0251002, 0.4160315], atol=1e-7)


def without_the_cut(now, proposal, *rest):
    """Published code leaves out the probability of the cut."""
    cut = jnp.log(now.response.lengths) - jnp.log(proposal.response.lengths)
    return log_acceptance(now, proposal, *rest) - cut


def never_longer(now, proposal, *rest):
    """Published code also proposes at most as many tokens as there are."""
    longer = proposal.response.lengths > now.response.lengths
    return jnp.where(longer, -jnp.inf, log_acceptance(now, proposal, *rest))


@pytest.mark.parametrize(
    ("acceptance", "moved", "away"),
    [(without_the_cut, 0.014723416, 0.257943), (never_longer, 0.011007763, 0.441132)],
)
def test_moves_of_published_code_do_not(acceptance, moved, away):
    with jax.enable_x64():
        states = responses(eos=True)
        zeros = np.zeros(len(states))
        pi = target(states, 4.0, 1.0, zeros)
        K = transitions(states, 4.0, 1.0, zeros, acceptance)
        assert np.abs(pi @ K - pi).sum() == pytest.approx(moved, abs=1e-9)
        assert np.abs(stationary(K) - pi).sum() / 2 == pytest.approx(away, abs=1e-6)


def test_powers_of_whole_responses_are_not_a_low_temperature():
    states = responses(eos=False)
    for alpha, first in ((2.0, [0.7366589, 0.1879350, 0.0754060]), (4.0, [0.9620249, 0.0342757, 0.0036994])):
        pi = target(states, alpha, 1.0, np.zeros(27))
        np.testing.assert_allclose([pi[[t[0] == i for t in states]].sum() for i in range(3)], first, atol=1e-7)


def drawn(sampler, rows=4096, seed=0, eos=()):
    model = PrefixTable()
    prompts = jnp.zeros((rows, 1), jnp.int32)
    inputs = (model, model.init(jax.random.key(0)), prompts, jnp.ones((rows, 1), bool), jax.random.key(seed))
    found = sample(sampler, *inputs, eos_ids=eos)
    return [
        tuple(row[mask].tolist())
        for row, mask in zip(np.asarray(found.tokens), np.asarray(found.action_mask), strict=True)
    ]


def assert_from(found, states, pi):
    """Pearson's statistic over the states with enough weight is what draws from π give (p > .001)."""
    from scipy.stats import chisquare

    counts = np.array([found.count(state) for state in states])
    assert counts.sum() == len(found)
    large = pi * len(found) >= 5
    observed = [*counts[large], counts[~large].sum()]
    expected = [*(pi * len(found))[large], (pi * len(found))[~large].sum()]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected).pvalue > 0.001


def test_the_cache_gives_kept_and_drawn_tokens_the_log_probs_of_the_table():
    model, states = PrefixTable(), responses(eos=True)
    tokens = jnp.array([[*t, *[0] * (R - len(t))] for t in states])
    prompts = jnp.zeros((len(states), 1), jnp.int32)
    params = model.init(jax.random.key(0))
    prompted = read_prompts(model, params, prompts, prompts == 0, R)
    noise = jnp.zeros((*tokens.shape, 2))
    said = continue_from(model, params, prompted, tokens, jnp.full(len(states), R), noise, 0.25, (END,))
    chain = chain_of(states, 4.0, np.zeros(len(states))).response
    np.testing.assert_array_equal(said.tokens, tokens)
    np.testing.assert_array_equal(said.mask, chain.mask)
    np.testing.assert_allclose(said.log_probs, chain.log_probs, atol=1e-5)
    np.testing.assert_allclose(said.drawn_log_probs, chain.drawn_log_probs, atol=1e-5)


def after(states, moves, alpha, beta, scores):
    """The law of a chain's state after so many moves: it begins with a draw from the proposal."""
    start = np.exp([sum(token_log_probs(t, 1 / alpha)) for t in states])
    with jax.enable_x64():
        return start @ np.linalg.matrix_power(transitions(states, alpha, beta, scores), moves)


@pytest.mark.parametrize("moves", [1, 6])
def test_chains_of_powers_have_the_law_of_their_matrix_with_responses_that_end(moves):
    states = responses(eos=True)
    found = drawn(Metropolis(max_new_tokens=R, moves=moves, alpha=2.0), eos=(END,))
    assert_from(found, states, after(states, moves, 2.0, 1.0, np.zeros(len(states))))


def test_chains_of_a_reward_have_the_law_of_their_matrix_and_end_at_its_optimum():
    states = responses(eos=False)
    reward = TokenCount(weights={2: 1.0}, first_token_weights={1: -0.5})
    law = after(states, 12, 1.0, 0.5, true_reward())
    assert_from(drawn(Metropolis(max_new_tokens=R, moves=12, reward=reward, beta=0.5)), states, law)
    pi = target(states, 1.0, 0.5, true_reward())
    assert np.abs(after(states, 400, 1.0, 0.5, true_reward()) - pi).sum() < 1e-6


class Twos:
    """Reads digits."""

    def decode(self, tokens, *args, **kwargs):
        return "".join(str(token) for token in tokens)


def test_a_reward_of_texts_gives_the_same_chains_on_the_host():
    by_tokens = TokenCount(weights={2: 1.0})

    def by_text(prompts, responses):
        return [float(text.count("2")) for text in responses]

    model, rows = PrefixTable(), 64
    prompts = jnp.zeros((rows, 1), jnp.int32)
    inputs = (model, model.init(jax.random.key(0)), prompts, prompts == 0, jax.random.key(3))
    settings = {"max_new_tokens": R, "moves": 5, "beta": 0.5}
    device = sample(Metropolis(**settings, reward=by_tokens), *inputs)
    host = sample(Metropolis(**settings, reward=by_text), *inputs, tokenizer=Twos())
    np.testing.assert_array_equal(device.tokens, host.tokens)
