"""A hybrid run above a frozen base: what trains, what is saved, the invariants, resuming, and the ways out."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import export
from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders.hf import Pretrained, load_pretrained, save_pretrained
from hybrid_jax.models.lora import ADAPTER, Lora
from hybrid_jax.runs.policy import load_policy, load_pretrained_policy
from hybrid_jax.training.loop import take_step

RANK, WIDTH = 2, 16
# query, key, value, output: 16 × 16; up 16 × 64; down 64 × 16: r (I + O) numbers each, float32
ADAPTER_BYTES = 4 * RANK * (4 * (16 + 16) + 2 * (16 + 64))


def save_base(folder, seed):
    model = DecoderConfig(num_layers=1, width=WIDTH, num_heads=2, max_length=48).build(
        Bytes().build([]).vocab_size
    )
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(seed)))
    save_pretrained(folder, model, params)


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_base(folder / "base", seed=0)
    overrides = [
        f"run_dir={folder / 'run'}",
        f"model={{name: pretrained, path: {folder / 'base'}, lora: {{rank: {RANK}, dropout: 0.2}}}}",
        "steps=9",  # a horizon; four are taken
        "phases.ppo.references={sft: {}, start: {frozen_at: start, weight: 0.0}}",
        "phases.ppo.value_network=separate",
        "phases.ppo.sampler.temperature=0.7",
    ]
    return build(load_config(tiny / "config.yaml", overrides))


class Kept(list):
    """The metrics of each step."""

    def step(self, number, phase, shapes_setting=None, stage=""):
        return contextlib.nullcontext()

    def add(self, step, phase, kind, metrics, params):
        self.append(metrics)


@pytest.fixture(scope="module")
def run(built):
    """The state before each step and after the last, and the metrics; the second and the last are saved."""
    with built.owned():
        state, checkpoints, recorder = built.open()
        states, metrics = [copied(state)], Kept()
        for number in range(4):  # sft ppo sft ppo
            state = take_step(built, built.phases[built.scheduler.choose(state.schedule)], state, metrics)
            states.append(copied(state))
            if number in (1, 3):
                checkpoints.save(state)
        checkpoints.close()
        recorder.close()
    return states, metrics


def copied(state):
    """A step consumes what it is given."""
    return replace(state, train=jax.tree.map(jnp.copy, state.train))


def bits(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_only_adapters_have_gradients_optimizer_state_and_reference_copies(built, run):
    states, _ = run
    state, head = states[-1], 4 * (WIDTH + 1)
    assert size(state.train.params["model"]) == ADAPTER_BYTES
    assert size(state.train.params["ppo/value"]) == ADAPTER_BYTES + head
    counts = 4 * len(state.train.opt_state["ppo"])  # of the updates, one a group
    assert size(state.train.opt_state["sft"]) == 2 * ADAPTER_BYTES + 4  # two moments
    assert size(state.train.opt_state["ppo"]) == 2 * (2 * ADAPTER_BYTES + head) + counts
    assert {name: size(tree) for name, tree in state.references.items()} == {
        "ppo/sft": ADAPTER_BYTES,
        "ppo/start": ADAPTER_BYTES,
    }
    assert len({digest(s.train.params["model"]) for s in states}) == 5  # every step changes the adapter
    assert all(s.base is states[0].base for s in states)
    assert bits(states[-1].base) == bits(load_pretrained(built.model.folder)[1])


def logits(model, params):
    read = jnp.arange(40, 56)[None]
    return jax.jit(lambda params: model.apply(params, read).logits)(params)


def test_the_first_loss_is_that_of_the_bare_base(built, run):
    _, metrics = run
    batch = built.phases["sft"].stream.batch(0, 4)
    read = jax.jit(lambda params: built.model.apply(params, batch.tokens, batch.segment_ids).logits)
    scores = np.asarray(read(load_pretrained(built.model.folder)[1]), np.float64)[:, :-1]
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, batch.tokens[:, 1:, None], 2)[..., 0]
    assert float(metrics[0]["sft/loss"]) == pytest.approx(-chosen[batch.loss_mask[:, 1:]].mean(), rel=1e-5)


def digest(tree):
    return b"".join(bits(tree).values())


def test_the_first_ratio_is_one_the_kl_to_the_own_reference_zero_and_the_start_is_the_bare_base(built, run):
    states, metrics = run
    first = metrics[1]  # ppo, after a step of sft
    assert float(first["ppo/first_ratio"]) == pytest.approx(1.0, abs=2e-6)
    assert float(first["ppo/kl"]) == pytest.approx(0.0, abs=2e-5)
    assert abs(float(metrics[3]["ppo/kl"])) > 1e-3  # by then the policy has left its reference
    start = states[-1].references["ppo/start"][ADAPTER]
    assert not any(
        np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(start) if path[-1].key == "b"
    )


def test_the_value_network_is_another_adapter_above_the_same_base(built, run):
    state = run[0][3]  # a step of sft has moved the policy since
    value = state.train.params["ppo/value"]
    assert list(value["model"]) == [ADAPTER]
    ppo = replace(built.phases["ppo"].functions, base=state.base)
    prompt, response = jnp.arange(40, 52).reshape(2, 6), jnp.arange(60, 66).reshape(2, 3)
    mask = jnp.ones((2, 3), bool)

    references = built.phases["ppo"].rollouts.references.of(state)

    def both(params, references, base):
        samples = Samples.chosen(response, jnp.zeros((2, 3)), mask)
        scored = ppo.score(params, references, prompt, jnp.ones((2, 6), bool), samples)
        read = jnp.concatenate([prompt, response], 1)
        return scored.values, built.model.hidden({**base, **params["ppo/value"]["model"]}, read)

    values, hidden = jax.jit(both)(state.train.params, references, state.base)
    head = jax.tree.map(np.asarray, value["head"])
    assert np.abs(values).max() > 1e-6
    np.testing.assert_allclose(
        values, (hidden @ head["kernel"] + head["bias"])[:, 5:8, 0], rtol=1e-4, atol=1e-9
    )


def test_a_checkpoint_holds_no_base_and_resumes_to_the_same_bits(built, run):
    states, _ = run
    folder = built.config.run_dir / "checkpoints"
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert any(b"layer_0" in text for text in texts)
    assert not any(b"token_embedding" in text for text in texts)
    (folder / "4").rename(folder.parent / "newest")
    try:
        with built.owned():
            state, checkpoints, recorder = built.open()
            checkpoints.close()
            recorder.close()
    finally:
        (folder.parent / "newest").rename(folder / "4")
    assert state.step == 2
    assert bits(state.train) == bits(states[2].train)
    for _ in range(2):
        state = take_step(built, built.phases[built.scheduler.choose(state.schedule)], state)
    assert bits(state.train) == bits(states[4].train)
    assert bits(dict(state.references)) == bits(dict(states[4].references))


def test_the_policy_is_exported_merged_or_as_an_adapter_and_both_go_on(built, run, command, tmp_path):
    run_dir = built.config.run_dir
    policy = load_policy(run_dir)
    assert bits(policy.params) == bits(run[0][-1].policy)
    expected = logits(policy.model, policy.params)
    for name, flags in {"adapter": (), "merged": ("--adapter",)}.items():  # written over, nothing of them stays
        policy.save_pretrained(tmp_path / name, adapter=bool(flags))
    for name, flags in {"merged": (), "adapter": ("--adapter",)}.items():
        code, out, err = command(export.main, "--run", run_dir, "--output", tmp_path / name, *flags)
        assert (code, out, err) == (0, f"{tmp_path / name}  (language model, step 4)\n", "")
    model, params = load_pretrained(tmp_path / "merged")
    assert ADAPTER not in params
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()  # transformers would load it
    again = load_pretrained_policy(tmp_path / "adapter")
    assert (again.eos_ids, again.sampler) == (policy.eos_ids, policy.sampler)
    assert bits(again.params) == bits(policy.params)
    model = Pretrained(built.model.folder, lora=Lora(path=str(tmp_path / "adapter"))).build()
    assert (model.config.lora.alpha, model.config.lora.dropout) == (16, 0.2)
    params = model.init(jax.random.key(0))
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-5, atol=1e-5)


def test_another_base_below_the_adapter_is_noticed(built, run, tmp_path):
    base = built.model.folder
    save_base(base, seed=1)
    try:
        for attempt in (lambda: load_policy(built.config.run_dir), built.open):
            with pytest.raises(
                UserError, match="the model below the adapter is no longer the one that the run"
            ):
                attempt()
    finally:
        save_base(base, seed=0)


@pytest.mark.slow
def test_a_base_from_scratch_is_made_again_from_the_seed(tiny, tmp_path):
    model = f"model={{name: decoder, num_layers: 1, width: {WIDTH}, num_heads: 2, max_length: 48, lora: {{}}}}"
    built = build(load_config(tiny / "config.yaml", [f"run_dir={tmp_path}", "seed=5", model]))
    with built.owned():
        state, checkpoints, recorder = built.open()
        checkpoints.save(state)
        checkpoints.close()
        recorder.close()
    policy = load_policy(tmp_path)
    assert bits(policy.params) == bits(state.policy)
    with pytest.raises(UserError, match="an adapter needs its base, and this one came from no folder"):
        policy.save_pretrained(tmp_path / "adapter", adapter=True)
