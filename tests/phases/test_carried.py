"""Truncated backpropagation through time: a loop by hand, exact resume, and a gradient that is known."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.recurrent.cell import Cell
from hybrid_jax.phases.sft import SFT
from hybrid_jax.training.loop import train


@dataclass(frozen=True)
class Linear(Cell):
    """h ← w h + x."""

    width: int = 1

    def init(self, key, inputs):
        """w = 0.9."""
        return {"w": jnp.float32(0.9)}

    def start(self, rows):
        """Nothing."""
        return jnp.zeros((rows, 1))

    def step(self, params, state, inputs):
        """One token."""
        h = params["w"] * state + inputs
        return h, h


def test_the_gradient_of_a_linear_network_is_the_known_one_whole_and_cut_before_its_last_two_steps():
    """w = .9, x = 1, T = 5: h = 4.0951, dh/dw = Σ k w^{k−1} = 8.146, and h_4 + w h_3 = 5.878 of two steps."""
    cell = Linear()
    x = jnp.ones((5, 1, 1))

    def last(params, cut):
        _, state = cell.read(params, x[:cut], cell.start(1))
        return cell.read(params, x[cut:], jax.lax.stop_gradient(state))[1].sum()

    params = cell.init(jax.random.key(0), 1)
    assert float(last(params, 3)) == pytest.approx(4.0951, abs=1e-5)
    assert float(jax.grad(last)(params, 0)["w"]) == pytest.approx(8.146, abs=1e-5)
    assert float(jax.grad(last)(params, 3)["w"]) == pytest.approx(5.878, abs=1e-5)


LENGTH, ROWS = 9, 2


def settings(folder, *more):
    (folder / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog ran"}\n' * 3)
    return [
        f"run_dir={folder / 'run'}",
        "tokenizer=bytes",
        f"data={{name: jsonl, train: {folder / 'texts.jsonl'}, held_out: {folder / 'texts.jsonl'}}}",
        "data.response_field=text",
        "data.prompt_field=null",
        "model={name: elman, width: 8}",
        f"phases={{sft: {{length: {LENGTH}, batch_size: {ROWS}, carry_state: true, dropout: false}}}}",
        "phases.sft.optimizer={name: sgd, learning_rate: 0.5, max_grad_norm: null, schedule: constant}",
        "scheduler={name: alternation, warmup: {}, cycle: {sft: 1}}",
        "evaluation={num_prompts: 0, num_examples: 0}",
        "compilation_cache=null",
        *more,
    ]


def experiment(folder, *more):
    return build(load_config("configs/debug/hybrid.yaml", settings(folder, *more)))


@pytest.mark.parametrize("stride", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_steps_are_those_of_a_loop_over_the_text_by_hand(tmp_path, stride):
    """The states are those of the whole lane so far, under the parameters that each step had."""
    made = experiment(tmp_path, "steps=4", f"phases.sft.stride={stride or 'null'}")
    ids = [
        [*made.tokenizer.encode(text), made.tokenizer.eos_id]
        for text in (["the cat sat on the mat", "a dog ran"] * 3)
    ]
    tokens, number = np.concatenate(ids), np.repeat(np.arange(6), [len(one) for one in ids])
    k1, lane = stride or LENGTH - 1, len(tokens) // ROWS
    params = made.init().train.params["model"]

    def hidden(params, row, token, h, position):
        cell = params["layer_0"]["cell"]
        at = row * lane + position
        if position == 0 or number[at] != number[at - 1]:
            h = jnp.zeros(8)
        x = params["token_embedding"]["embedding"][token]
        return jnp.tanh(x @ cell["input"]["kernel"] + cell["input"]["bias"] + h @ cell["recurrent"]["kernel"])

    def run(params, state, row, begin, end):
        """The states before each position."""
        states = {begin: state}
        for position in range(begin, end):
            states[position + 1] = hidden(
                params, row, tokens[row * lane + position], states[position], position
            )
        return states

    states, first = [jnp.zeros(8)] * ROWS, lambda step: max(step * k1 - (LENGTH - 1 - k1), 0)
    for step in range(4):
        begin, end = first(step), (step + 1) * k1

        def loss(params, states=states, begin=begin, end=end):
            total, count = 0.0, 0
            for row in range(ROWS):
                h = run(params, states[row], row, begin, end)
                for position in range(end - k1, end):
                    at = row * lane + position
                    if number[at + 1] == number[at]:
                        scores = h[position + 1] @ params["lm_head"]["kernel"] + params["lm_head"]["bias"]
                        total -= jax.nn.log_softmax(scores)[tokens[at + 1]]
                        count += 1
            return total / count

        grads = jax.grad(loss)(params)
        states = [run(params, states[row], row, begin, end)[first(step + 1)] for row in range(ROWS)]
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    found = train(made).train.params["model"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, params)


def test_a_resumed_run_goes_on_from_the_state_that_the_checkpoint_holds(tmp_path):
    def end(name, *stops):
        (tmp_path / name).mkdir()
        for stop in stops:
            state = train(experiment(tmp_path / name, f"steps={stop}"))
        return jax.tree.leaves(state.train)

    whole, cut = end("whole", 5), end("cut", 2, 5)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 3}, "stride needs carry_state: true"),
        ({"stride": 9, "carry_state": True, "length": 9}, "stride must be at most length - 1 = 8, got 9"),
        ({"carry_state": True, "microbatches": 2}, "carry_state needs microbatches: 1"),
    ],
)
def test_what_does_not_fit_together_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        SFT(**changes)


def test_a_model_without_a_state_and_too_little_text_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"phases\.sft: carry_state needs a recurrent model, such as lstm"):
        experiment(tmp_path, "model={name: decoder, num_layers: 1, width: 8, num_heads: 2}")
    with pytest.raises(UserError, match=r"carry_state needs more than batch_size · 8 = 800 tokens, got"):
        experiment(tmp_path, "phases.sft.batch_size=100")
