"""The guard against NaN and infinity: what is skipped, what is named, and what a run leaves behind."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.arrays import Sum
from hybrid_jax.training.checkpoint import CheckpointConfig, Checkpoints
from hybrid_jax.training.loggers import open_loggers, read_records
from hybrid_jax.training.loop import train
from hybrid_jax.training.nonfinite import FINE, NonFiniteError, first_nonfinite, tensor_names
from hybrid_jax.training.optimizers import AdamW, Constant
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.recorder import Recorder
from hybrid_jax.training.scheduler import Alternation
from hybrid_jax.training.state import RunState, TrainState
from hybrid_jax.training.update import Objective, update_state

OPTIMIZER = AdamW(learning_rate=0.1, schedule=Constant())
NAMES = [  # from the loss to the tokens
    "final_norm/scale",
    "value/head/kernel",
    "layer_10/mlp/kernel",
    "layer_2/attention/kernel",
    "layer_2/mlp/kernel",
    "token_embedding/embedding",
]


def fresh_params():
    leaf = jnp.array([1.0, 2.0])
    model = {
        "token_embedding": {"embedding": leaf},
        "layer_2": {"attention": {"kernel": leaf}, "mlp": {"kernel": leaf}},
        "layer_10": {"mlp": {"kernel": leaf}},
        "final_norm": {"scale": leaf},
    }
    return {"model": model, "value": {"head": {"kernel": leaf}}}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path).removeprefix("model/"): leaf for path, leaf in leaves}


def loss(trained, batch, key):
    """Σ √(w − b) for each tensor: where b is w, its value is 0 and its gradient infinite. And a constant."""
    total = batch["constant"]
    for name, leaf in flat(trained).items():
        base = jnp.where(batch["bad"][name], jax.lax.stop_gradient(leaf), -1.0)
        total += jnp.sqrt(leaf - base).sum()
    return {"loss": Sum(total=total, weight=jnp.ones((), jnp.float32))}, {}


OBJECTIVE = Objective(loss, lambda batch: {"loss": 1}, {"loss": 1.0})


def batch_with(bad=(), constant=0.0):
    """A batch on which one element of the gradient of each ``bad`` tensor is infinite."""
    return {"bad": {n: jnp.array([n in bad, False]) for n in NAMES}, "constant": jnp.asarray(constant)}


def fresh_state(groups=("model", "value")):
    params = fresh_params()
    opt_state = {group: OPTIMIZER.transform().init(params[group]) for group in groups}
    return TrainState(params=params, opt_state={"sft": opt_state}, extra={})


@jax.jit
def one_update(state, batch):
    key = jax.random.key(0)
    return update_state(
        OBJECTIVE, OPTIMIZER, state, batch, key, 0.1, optimizer_key="sft", groups=("model", "value")
    )


def assert_same_bits(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_tensors_are_named_in_the_order_in_which_gradients_reach_them():
    assert sorted(tensor_names(fresh_params())[:2]) == sorted(NAMES[:2])
    assert tensor_names(fresh_params())[2:] == NAMES[2:]


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_gradient_is_found_and_its_update_changes_nothing(name):
    state = fresh_state()
    new, metrics, taken = one_update(state, batch_with(bad=[name]))
    assert tensor_names(state.params)[int(metrics["nonfinite"])] == name
    assert np.isfinite(metrics["loss"])
    assert not taken
    assert_same_bits(new, state)


def test_a_finite_update_is_taken():
    state = fresh_state()
    new, metrics, taken = one_update(state, batch_with())
    assert (int(metrics["nonfinite"]), bool(taken)) == (FINE, True)
    for leaf in jax.tree.leaves(new.params):  # Adam's first step is the sign of the gradient
        np.testing.assert_allclose(leaf, [0.9, 1.9], atol=1e-6)


def test_of_several_the_one_that_is_nearest_to_the_loss_is_named():
    _, metrics, _ = one_update(fresh_state(), batch_with(bad=NAMES[3:]))
    assert NAMES[int(metrics["nonfinite"])] == "layer_2/attention/kernel"


@pytest.mark.parametrize("constant", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing_even_where_its_gradient_is(constant):
    state = fresh_state()
    new, metrics, taken = one_update(state, batch_with(constant=constant))
    assert int(metrics["nonfinite"]) == len(NAMES)
    assert np.isfinite(metrics["grad_norm"])
    assert not taken
    assert_same_bits(new, state)


def test_groups_at_rest_do_not_shift_the_names():
    state = fresh_state()
    squares = {"value": {"head": {"kernel": jnp.asarray(jnp.inf)}}}
    place = int(first_nonfinite(state.params, squares, jnp.zeros(1)))
    assert tensor_names(state.params)[place] == "value/head/kernel"


def test_within_a_scan_a_bad_update_is_as_if_it_had_not_been():
    good = batch_with()
    batches = [batch_with(bad=["layer_2/mlp/kernel"]), good, batch_with(constant=np.nan), good]

    def step(state, batch):
        new, metrics, taken = one_update(state, batch)
        return new, (metrics["nonfinite"], taken)

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    got, (places, taken) = jax.lax.scan(step, fresh_state(), stacked)
    expected, _, _ = one_update(one_update(fresh_state(), good)[0], good)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    assert taken.tolist() == [False, True, False, True]
    assert places.tolist() == [NAMES.index("layer_2/mlp/kernel"), FINE, len(NAMES), FINE]


@dataclass
class Learning:
    """A phase of one guarded update a step; at ``bad_step`` it meets a bad batch."""

    name: str = "sft"
    kind: str = "sft"
    optimizer_key: str = "sft"
    waits_for_device: bool = False
    bad_step: int | None = None
    bad_batch: object = field(default_factory=lambda: batch_with(["layer_2/mlp/kernel"]))

    def step(self, state, key):
        batch = self.bad_batch if state.step == self.bad_step else batch_with()
        train, metrics, _ = one_update(state.train, batch)
        return dataclasses.replace(state, train=train), {f"sft/{k}": v for k, v in metrics.items()}


@dataclass
class Run:
    """What `train` needs of an experiment."""

    folder: object
    phase: Learning
    steps: int = 6
    offload = ()
    key = jax.random.key(0)
    scheduler = Alternation(cycle={"sft": 1})
    checkpoint = CheckpointConfig(every=2)

    @property
    def phases(self):
        return {"sft": self.phase}

    def open(self):
        checkpoints = Checkpoints(self.folder / "checkpoints", 3)
        fresh = RunState(step=0, train=fresh_state())
        state = checkpoints.newest(fresh)
        logger = open_loggers((), self.folder, {}, state and state.step)
        with open(os.devnull, "w") as nowhere:
            progress = Progress(self.steps, stream=nowhere)
        progress._write = lambda text: None
        return state or fresh, checkpoints, Recorder(logger, progress)

    def evaluation_is_due(self, state, next_phase):
        return False

    def evaluate(self, state):
        raise AssertionError("no evaluation was asked for")

    def export(self, state, folder=None):
        raise AssertionError("no export was asked for")

    def owned(self):
        return contextlib.nullcontext()

    def observe(self, state, numbers):
        return state

    def finish(self, state):
        pass


@pytest.mark.parametrize("waits_for_device", [False, True])
@pytest.mark.parametrize("step", [2, 3, 5])  # just after a checkpoint, just before one, the last
def test_a_run_ends_with_one_line_that_names_the_tensor_and_a_rerun_repeats_the_step(
    tmp_path, step, waits_for_device
):
    with pytest.raises(NonFiniteError) as error:
        train(Run(tmp_path, Learning(bad_step=step, waits_for_device=waits_for_device)))
    assert str(error.value) == (
        f"step {step} (sft): the gradient of layer_2/mlp/kernel is not finite; the update was left out and "
        "nothing saved after it: a rerun repeats this step; go on with a smaller "
        "phases.sft.optimizer.learning_rate or max_grad_norm by --allow-change (in Python allow_change=True), "
        "or in another run_dir by start_from; model.dtype needs a new run"
    )
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(step + 1))  # the bad step is in the log, too
    assert not any("sft/nonfinite" in record for record in records)
    saved, checkpoints, recorder = Run(tmp_path, Learning()).open()
    recorder.close()
    checkpoints.close()
    assert saved.step == step - step % 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.train.params))
    unbroken = train(Run(tmp_path / "unbroken", Learning()))
    assert_same_bits(train(Run(tmp_path, Learning())).train, unbroken.train)


def test_a_loss_that_is_not_finite_is_said_to_be_the_loss(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1 \(sft\): loss is nan; the update was left out"):
        train(Run(tmp_path, Learning(bad_step=1, bad_batch=batch_with(constant=np.nan))))


def test_a_parameter_that_is_not_finite_is_named_before_all_that_follows_from_it(tmp_path):
    run = Run(tmp_path, Learning())
    state, checkpoints, recorder = run.open()
    layer = state.train.params["model"]["layer_10"]["mlp"]
    layer["kernel"] = layer["kernel"].at[1].set(jnp.nan)
    run.open = lambda: (state, checkpoints, recorder)
    with pytest.raises(NonFiniteError, match="the parameter layer_10/mlp/kernel is not finite"):
        train(run)
