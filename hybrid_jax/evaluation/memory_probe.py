"""Diagnostics of a recurrent state: how far gradients reach, how gates stand, what is recalled.

    gradient_L    ‖∂ loss(t) / ∂ x(t − L)‖, of the last token of a row by what was read L tokens before
    LAYER/GATE    the mean of a gate
    recall_L      the share of tokens read L before that a linear map of the state tells right
    chance_L      the same of always saying the commonest one
    last_token_L  the same of the best guess from the last token alone; what recall is above it is memory

The map is a ridge regression onto one-hot tokens, fitted in closed form on every other row and tested on the
rest (probing: Alain & Bengio 2016, arXiv:1610.01644). The norms show vanishing gradients (Bengio et al. 1994,
doi:10.1109/72.279181).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import choose_rows, masked_mean, segment_positions
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.models.base import Params
from hybrid_jax.models.memory.cell import MemoryCell
from hybrid_jax.models.recurrent.cell import State
from hybrid_jax.models.recurrent.model import RecurrentModel, flow_of

LAGS = (1, 2, 4, 8, 16, 32, 64)
_TOKENS = 64  # the probe tells the commonest ones apart
_WIDEST = 1024  # a wider state is seen through that many sums
_RIDGE = 0.1  # for each token that is fitted, on features of variance 1
Heads = dict[str, Float[Array, "T H M"]]


def probe(
    model: RecurrentModel, params: Params, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[dict[str, Float[Array, ""]], list[Heads]]:
    """Measures rows: numbers by name, NaN where no row is long enough, and the heads of each layer.

    Args:
        model: whose states they are.
        params: of the model.
        tokens: rows, packed or not.
        segments: the numbers of the sequences in a row; 0 is padding.

    Returns:
        The numbers, and for each layer with a memory where its heads were at each token of the first row.
    """
    states, gates, heads = watched(model, params, tokens, segments)
    numbers = gradients(model, params, tokens, segments)
    return {**numbers, **gates, **recalls(states, tokens, segments, model.vocab_size)}, heads


def watched(
    model: RecurrentModel, params: Params, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T S"], dict[str, Float[Array, ""]], list[Heads]]:
    """The state of all layers after each token, the means of gates, and where heads are in the first row."""
    cell = model.config.cell()
    flow, start = flow_of(segments), model.start(len(tokens))

    def one(states: State, now: Any):
        token, real, begins = now
        states, gates = choose_rows(begins, start, states), []

        def layer(own: Params, x: Array, state: State):
            inputs = cell.prepared(own, x)
            of_layer = cell.gates(own, state, inputs)
            gates.append({name: gate.reshape(len(gate), -1).mean(axis=1) for name, gate in of_layer.items()})
            state, y = cell.step(own, state, inputs)
            return y, state

        after = choose_rows(real, model.stack(params, model.embed(params, token), states, layer)[1], states)
        heads = [cell.weights(memory) for _, memory in after] if isinstance(cell, MemoryCell) else []
        return after, (_features(after), gates, jax.tree.map(lambda x: x[0], heads))

    _, (states, gates, heads) = lax.scan(one, start, (tokens.T, flow.real, flow.begins))
    means = {
        f"layer_{i}/{name}": masked_mean(gate, flow.real)
        for i, of_layer in enumerate(gates)
        for name, gate in of_layer.items()
    }
    return states.swapaxes(0, 1), means, heads


def _features(states: State) -> Float[Array, "B S"]:
    """All numbers of a state side by side; many are summed, with random signs, in random groups.

    This count sketch (Charikar et al. 2002, doi:10.1007/3-540-45465-9_59) keeps inner products on average, at
    a cost linear in the numbers.
    """
    flat = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(states)], axis=1)
    if jnp.iscomplexobj(flat):
        flat = jnp.concatenate([flat.real, flat.imag], axis=1)
    if (width := flat.shape[1]) <= _WIDEST:
        return flat
    # The same groups each time, so that evaluations and runs compare.
    of_groups, of_signs = jax.random.split(root_key(0, Purpose.EVALUATION))
    group = jax.random.randint(of_groups, (width,), 0, _WIDEST)
    sign = jax.random.rademacher(of_signs, (width,), flat.dtype)
    return jnp.zeros((len(flat), _WIDEST), flat.dtype).at[:, group].add(sign * flat)


def gradients(
    model: RecurrentModel, params: Params, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """``gradient_L``: how the loss of the last token of each row depends on what was read L before."""
    flow, start = flow_of(segments), model.start(len(tokens))
    real = segments > 0
    last = jnp.max(jnp.where(real, jnp.arange(tokens.shape[1]), 0), axis=1)
    rows, at = jnp.arange(len(tokens)), jnp.maximum(last - 1, 0)

    def loss(x: Float[Array, "T B I"]) -> Float[Array, "B"]:
        hidden, _ = model.read_embedded(params, x, start, flow)
        log_probs = jax.nn.log_softmax(model.logits(params, hidden[rows, at]))
        return -log_probs[rows, tokens[rows, last]]

    norms = norms_by_distance(loss, model.embed(params, tokens.T), at)
    # The predicted token must go on with the sequence that is read.
    age = jnp.where(segments[rows, last] == segments[rows, at], segment_positions(segments)[rows, at], -1)
    return {
        f"gradient_{lag}": jnp.mean(norms[:, lag], where=age >= lag) for lag in LAGS if lag < norms.shape[1]
    }


def norms_by_distance(
    loss: Callable[[Array], Float[Array, "B"]], x: Float[Array, "T B I"], at: Int[Array, "B"]
) -> Float[Array, "B T"]:
    """``‖∂ loss / ∂ x(at − L)‖`` of each row, item L for each distance L; 0 before the row begins.

    Args:
        loss: of each row, which depends on no other.
        x: what is read.
        at: the place in each row that distances are counted from.
    """
    norms = jnp.linalg.norm(jax.grad(lambda x: loss(x).sum())(x), axis=-1).T
    places = at[:, None] - jnp.arange(norms.shape[1])
    return jnp.where(places >= 0, jnp.take_along_axis(norms, jnp.maximum(places, 0), axis=1), 0.0)


def recalls(
    states: Float[Array, "B T S"], tokens: Int[Array, "B T"], segments: Int[Array, "B T"], vocab_size: int
) -> dict[str, Float[Array, ""]]:
    """``recall_L``, ``chance_L`` and ``last_token_L``, the shares that are right.

    All are of the `_TOKENS` commonest tokens of these rows alone, and L counts from the last token read. In
    text the last token tells much of those before: a state that holds it alone reaches ``last_token_L``.
    """
    real = segments > 0
    counts = jnp.zeros(vocab_size).at[tokens].add(real)
    common = jnp.argsort(-counts)[:_TOKENS]
    fitted = (jnp.arange(len(tokens)) % 2 == 0)[:, None] & real
    where = fitted[..., None]
    mean = jnp.mean(states, axis=(0, 1), where=where)
    deviation = jnp.std(states, axis=(0, 1), where=where)
    features = (states - mean) / (deviation + 1e-6)
    features = jnp.concatenate([features, jnp.ones_like(features[..., :1])], axis=-1)
    numbers = {}
    for lag in (lag for lag in LAGS if lag < tokens.shape[1]):
        earlier = (tokens[:, :-lag, None] == common).astype(jnp.float32)
        counted = (segments[:, lag:] == segments[:, :-lag]) & real[:, lag:] & (earlier.sum(axis=-1) > 0)
        fit, test = counted & fitted[:, lag:], counted & ~fitted[:, lag:]
        told = features[:, lag:] @ _ridge(features[:, lag:], earlier, fit)
        seen = jnp.zeros((vocab_size, len(common))).at[tokens[:, lag:]].add(earlier * fit[..., None])
        share = seen.sum(axis=0) / jnp.maximum(seen.sum(), 1)
        by_last = jnp.argmax(seen + share, axis=-1)[tokens[:, lag:]]  # the commonest token if it is new
        right, token = jnp.argmax(earlier, axis=-1), jnp.argmax(told, axis=-1)
        numbers[f"recall_{lag}"] = jnp.mean(token == right, where=test)
        numbers[f"chance_{lag}"] = jnp.mean(jnp.argmax(share) == right, where=test)
        numbers[f"last_token_{lag}"] = jnp.mean(by_last == right, where=test)
    return numbers


def _ridge(
    x: Float[Array, "B T S"], y: Float[Array, "B T Y"], where: Bool[Array, "B T"]
) -> Float[Array, "S Y"]:
    """``(Xᵀ X + λ n)⁻¹ Xᵀ Y`` over the n places that count."""
    x = x * where[..., None]
    products, sums = (jnp.einsum("bts,btk->sk", x, other, precision=lax.Precision.HIGHEST) for other in (x, y))
    return jax.scipy.linalg.solve(products + _RIDGE * (1 + where.sum()) * jnp.eye(len(products)), sums)
