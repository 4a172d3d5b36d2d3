"""Policy objectives, ratios, aggregations and corrections: literal numbers, and an independent library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.aggregation import Correction, loss_weights
from hybrid_jax.algorithms.policy_gradient import (
    Clipped,
    ScoreFunction,
    Soft,
    Truncated,
    log_ratios,
    token_losses,
)

# Two responses, of two tokens and of one.
MASK = jnp.array([[True, True], [True, False]])
NEW = jnp.array([[-0.3, -1.2], [-0.5, jnp.nan]])
OLD = jnp.array([[-0.7, -0.8], [-0.6, jnp.nan]])
ADVANTAGES = jnp.array([[1.0, -2.0], [-1.0, jnp.nan]])
GROUP = jnp.array([0, 0])


def losses(objective, level="token"):
    return token_losses(objective, NEW, OLD, ADVANTAGES, MASK, level)[0]


def aggregated(losses, kind, mask=MASK, group=GROUP):
    weights, shares = loss_weights(kind, mask, group)
    return float(jnp.sum(jnp.where(mask, weights * losses, 0.0)) / shares.sum())


def test_the_token_losses_of_every_objective_are_the_literal_numbers():
    expected = {
        Clipped(0.2, 0.28): [-1.28, 1.6, 1.1051709],
        ScoreFunction(): [0.3, -2.4, -0.5],
        Truncated(1.2): [0.36, -1.6087681, -0.5525855],
        Soft(): [-2.4821448, 3.1566702, 2.0098261],
    }
    for objective, numbers in expected.items():
        assert losses(objective)[MASK] == pytest.approx(numbers, abs=1e-6)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    # The token form has the value of the sequence and the gradient of each token alone.
    expected = {"sequence": [[0.5, 0.5], [2.0, 0.0]], "sequence_token": [[0.0, 1.0], [2.0, 0.0]]}
    factors = jnp.array([[0.0, 1.0], [2.0, 3.0]])
    for level, slopes in expected.items():
        ratios = jnp.exp(log_ratios(NEW, OLD, MASK, level))
        assert ratios[:, 0] == pytest.approx([1.0, 1.1051709], abs=1e-6)
        found = jax.grad(lambda x, level=level: jnp.sum(factors * log_ratios(x, OLD, MASK, level)))(NEW)
        np.testing.assert_allclose(found, slopes)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("token_mean", 0.4750570),
        ("sequence_mean", 0.6325855),
        ("prompt_mean", 0.4750570),
        ("sequence_sum", (1.6 - 1.28 + 1.1051709) / 2),
    ],
)
def test_an_aggregation_gives_the_literal_loss(kind, value):
    assert aggregated(losses(Clipped(0.2, 0.28)), kind) == pytest.approx(value, abs=1e-6)


def test_a_budget_divides_by_the_tokens_that_a_response_might_have():
    padded = jnp.pad(MASK, ((0, 0), (0, 2)))
    found = jnp.pad(losses(Clipped(0.2, 0.28)), ((0, 0), (0, 2)), constant_values=jnp.nan)
    assert aggregated(found, "budget", padded) == pytest.approx(0.1781464, abs=1e-6)


def test_truncation_of_a_sequence_weighs_its_tokens_alike():
    # Capped GSPO at 1 − 3e-4 and 1 + 4e-4: the first response has ratio 1, the second is above and loses.
    found = losses(Clipped(3e-4, 4e-4), "sequence")
    assert aggregated(found, "sequence_mean") == pytest.approx((0.5 * (-1 + 2) + 1.1051709) / 2, abs=1e-6)


def test_a_prompt_mean_weighs_every_prompt_alike_however_its_answers_are_divided():
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    weights, shares = loss_weights("prompt_mean", mask, jnp.array([0, 0, 2]))
    np.testing.assert_allclose(weights[:, 0], [0.2, 0.2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(shares, [0.8, 0.2, 1.0], rtol=1e-6)


def test_a_response_without_tokens_has_no_share_in_any_loss():
    mask = jnp.array([[True, True], [False, False]])
    for kind in ("token_mean", "sequence_mean", "prompt_mean", "sequence_sum", "budget"):
        weights, shares = loss_weights(kind, mask, jnp.array([0, 1]))
        assert (float(shares[1]), float(weights[1].sum())) == (0.0, 0.0), kind


def test_a_correction_truncates_tokens_or_leaves_out_whole_responses():
    behaviour = jnp.array([[-1.0, -1.0, -1.0], [-1.0, -1.0, jnp.nan]])
    now = behaviour + jnp.array([[-0.1, 0.4, 1.5], [0.2, 0.1, 0.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    truncated = Correction(cap=2.0)(now, behaviour, mask)
    np.testing.assert_allclose(truncated, [[0.904837, 1.491825, 2.0], [1.221403, 1.105171, 0.0]], rtol=1e-6)
    whole = Correction("sequence_mask", 3.0)(now, behaviour, mask)  # e^1.8 is above 3, e^0.3 is not
    np.testing.assert_allclose(whole, [[0.0, 0.0, 0.0], [1.349859, 1.349859, 0.0]], rtol=1e-6)
    of_now = jax.grad(lambda x: jnp.sum(jnp.where(mask, Correction()(x, behaviour, mask), 0.0)))(now)
    np.testing.assert_array_equal(of_now, 0.0)


# The named methods of an independent library, as an objective, a level and an aggregation of ours.
METHODS = {
    "ppo": (Clipped(0.2), "token", "token_mean"),
    "grpo": (Clipped(0.2), "token", "sequence_mean"),
    "dapo": (Clipped(0.2, 0.28), "token", "token_mean"),
    "gspo": (Clipped(3e-4, 4e-4), "sequence", "sequence_mean"),
    "gspo_token": (Clipped(3e-4, 4e-4), "sequence_token", "sequence_mean"),
    "reinforce_pp": (Clipped(0.2), "token", "sequence_mean"),
    "cispo": (Truncated(1.2), "token", "token_mean"),
    "rloo": (ScoreFunction(), "token", "sequence_sum"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_named_method_has_the_loss_and_gradient_of_polgrad(name):
    polgrad = pytest.importorskip("polgrad")
    torch = pytest.importorskip("torch")
    from polgrad.testing import assert_conforms

    objective, level, kind = METHODS[name]

    def loss(log_probs, old, advantages, mask):
        found, _ = token_losses(objective, log_probs, old, advantages, mask, level)
        weights, shares = loss_weights(kind, mask, jnp.arange(len(mask)))
        return jnp.sum(jnp.where(mask, weights * found, 0.0)) / shares.sum()

    class Ours(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            with jax.enable_x64(True):
                arrays = [jnp.asarray(tensor.detach().numpy()) for tensor in tensors]
                value, gradient = jax.value_and_grad(loss)(*arrays)
                ctx.save_for_backward(torch.from_numpy(np.array(gradient)))
                return torch.tensor(float(value), dtype=torch.float64)

        @staticmethod
        def backward(ctx, outer):
            (gradient,) = ctx.saved_tensors
            return outer * gradient, None, None, None

    def ours(*, logprobs, old_logprobs, advantages, response_mask):
        advantages = advantages[:, None].expand(response_mask.shape).contiguous()
        return Ours.apply(logprobs, old_logprobs, advantages, response_mask.bool())

    assert name in polgrad.ALGORITHMS
    # loss_weights are float32, which bounds how well the two agree.
    assert_conforms(ours, name, n_cases=8, loss_rtol=1e-6, grad_rtol=1e-6)
