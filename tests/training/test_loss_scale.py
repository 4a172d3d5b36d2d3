"""Loss scaling: the scale against a simulation, overflows that skip one update, a float16 model that learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.phases.sft import sft_objective
from hybrid_jax.training.loss_scale import DynamicLossScale, initial_loss_scale, loss_scale_of
from hybrid_jax.training.nonfinite import FINE
from hybrid_jax.training.optimizers import SGD, AdamW, Constant
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective, gradients, update_state

SGD_STEP = SGD(learning_rate=1.0, schedule=Constant(), max_grad_norm=None)


def simulated(finite, initial, interval, factor, minimum, maximum):
    scale, good, seen = initial, 0, []
    for fine in finite:
        if not fine:
            scale, good = max(scale / factor, minimum), 0
        else:
            good += 1
            if good == interval:
                scale, good = min(scale * factor, maximum), 0
        seen.append((scale, good))
    return seen


@pytest.mark.parametrize("share_finite", [0.3, 0.7, 0.95, 1.0])
def test_the_scale_follows_a_simulation(share_finite):
    finite = np.random.default_rng(0).random(120) < share_finite
    scaling = DynamicLossScale(initial=8.0, growth_interval=4, factor=2.0, minimum=0.5, maximum=64.0)

    def step(state, fine):
        state = scaling.update(state, fine)
        return state, (state.scale, state.good_steps)

    _, (scales, good) = jax.lax.scan(step, scaling.init(), jnp.asarray(finite))
    expected = simulated(finite, 8.0, 4, 2.0, 0.5, 64.0)
    assert list(zip(scales.tolist(), good.tolist(), strict=True)) == expected


def test_the_defaults_halve_from_32768_and_double_after_2000_good_updates():
    scaling = DynamicLossScale()
    state = scaling.init()
    assert float(state.scale) == 32768
    assert float(scaling.update(state, jnp.asarray(False)).scale) == 16384
    almost = state.replace(good_steps=jnp.asarray(1998))
    once, twice = (
        (almost := scaling.update(almost, jnp.asarray(True))),
        scaling.update(almost, jnp.asarray(True)),
    )
    assert (float(once.scale), float(twice.scale), int(twice.good_steps)) == (32768, 65536, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimum": 0.0}, "minimum must be above 0, got 0.0"),
        ({"initial": 0.5}, r"initial must be in \[minimum, maximum\]"),
        ({"growth_interval": 0}, "growth_interval must be at least 1, got 0"),
        ({"factor": 1.0}, "factor must be above 1, got 1.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**settings)


def half_precision_loss(trained, batch, key):
    """mean over rows of w · x · y, in float16: its gradient goes through x · y / B in float16."""
    product = trained["model"]["w"].astype(jnp.float16) * batch["x"] * batch["y"]
    return {
        "loss": Sum(total=product.astype(jnp.float32).sum(), weight=jnp.asarray(len(batch["x"]), jnp.float32))
    }, {}


HALF = Objective(half_precision_loss, lambda batch: {"loss": len(batch["x"])}, {"loss": 1.0})


def halves(x, y):
    return {"x": jnp.full(4, x, jnp.float16), "y": jnp.full(4, y, jnp.float16)}


def half_state(scaling=None, w=0.0):
    params = {"model": {"w": jnp.asarray(w)}}
    opt_state = {"sft": {"model": SGD_STEP.transform().init(params["model"])}}
    return TrainState(
        params=params, opt_state=opt_state, extra={"loss_scale": scaling.init()} if scaling else {}
    )


def test_a_gradient_below_float16_survives_only_with_a_scale():
    # 2⁻¹² · 2⁻¹⁴ = 2⁻²⁶ is below the smallest float16, 2⁻²⁴; the mean over 4 rows has the same gradient.
    batch, params, key = halves(2.0**-12, 2.0**-14), half_state().params, jax.random.key(0)
    ours = jax.jit(functools.partial(gradients, HALF))
    without, _ = ours(params, batch, key)
    scaled, metrics = ours(params, batch, key, scale=jnp.asarray(2.0**15))
    assert float(without["model"]["w"]) == 0
    assert float(scaled["model"]["w"]) == 2.0**-26
    assert float(metrics["loss"]) == 0  # w is 0, and the loss that is logged bears no scale


@functools.partial(jax.jit, static_argnums=2)
def take(state, batch, scaling):
    key = jax.random.key(0)
    return update_state(HALF, SGD_STEP, state, batch, key, 1.0, optimizer_key="sft", scaling=scaling)


def test_an_overflow_skips_that_update_and_no_other():
    scaling = DynamicLossScale(initial=2.0**15, growth_interval=100)
    sizes = [0.25, 0.5, 8.0, 0.125, 1.0]  # 8 · 2¹⁵ / 4 = 65,536 is above the largest float16, 65,504
    state, after, scales, reported = half_state(scaling), [], [], []
    for size in sizes:
        state, metrics, _ = take(state, halves(1.0, size), scaling)
        after.append(float(state.params["model"]["w"]))
        scales.append(float(metrics["loss_scale"]))
        reported.append(int(metrics["nonfinite"]))
    assert after == [-0.25, -0.75, -0.75, -0.875, -1.875]
    assert scales == [2.0**15] * 3 + [2.0**14] * 2
    assert reported == [FINE] * 5  # nothing is wrong
    assert float(state.extra["loss_scale"].scale) == 2.0**14


def test_an_overflow_at_the_smallest_scale_is_an_error_of_its_own():
    scaling = DynamicLossScale(initial=1.0)
    _, metrics, taken = take(half_state(scaling), halves(60000.0, 60000.0), scaling)
    assert (int(metrics["nonfinite"]), bool(taken)) == (0, False)  # named


def test_a_loss_that_overflows_is_an_error_at_any_scale():
    scaling = DynamicLossScale()
    _, metrics, taken = take(half_state(scaling, w=60000.0), halves(2.0, 1.0), scaling)
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["nonfinite"]) != FINE
    assert not taken


def test_only_a_model_in_float16_is_scaled():
    models = {
        dtype: DecoderConfig(vocab_size=8, dtype=dtype).build() for dtype in ("float32", "bfloat16", "float16")
    }
    assert {dtype for dtype, model in models.items() if loss_scale_of(model)} == {"float16"}
    assert list(initial_loss_scale(models["float16"])) == ["loss_scale"]
    assert initial_loss_scale(models["bfloat16"]) == {}


def test_a_float16_model_learns_like_a_float32_one():
    random = np.random.default_rng(0)
    tokens = np.cumsum(random.integers(1, 3, (8, 16)), axis=1) % 11
    batch = TokenBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        segment_ids=jnp.ones((8, 16), jnp.int32),
        loss_mask=jnp.ones((8, 16), bool),
    )
    optimizer = AdamW(learning_rate=1e-2, schedule=Constant())

    def losses(dtype):
        model = DecoderConfig(
            num_layers=2, width=32, num_heads=2, max_length=16, vocab_size=11, dtype=dtype
        ).build()
        params = {"model": model.init(jax.random.key(0))}
        opt_state = {"sft": {"model": optimizer.transform().init(params["model"])}}
        state = TrainState(params=params, opt_state=opt_state, extra=initial_loss_scale(model))

        def step(state, _):
            new, metrics, taken = update_state(
                sft_objective(model),
                optimizer,
                state,
                batch,
                jax.random.key(0),
                1e-2,
                optimizer_key="sft",
                scaling=loss_scale_of(model),
            )
            return new, (metrics["loss"], taken)

        return jax.jit(lambda state: jax.lax.scan(step, state, length=20)[1])(state)

    (full, _), (half, taken) = losses("float32"), losses("float16")
    assert full[0] > 2.3
    assert full[-1] < 0.85
    assert taken.all()
    np.testing.assert_allclose(half, full, rtol=2e-3)  # float16 has 11 bits: 5e-4
