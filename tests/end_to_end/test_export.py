"""What an export holds beside the policy, and in which type its weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from hybrid_jax import export
from hybrid_jax.models.classifier import load_classifier
from hybrid_jax.models.heads import init_value_head, value
from hybrid_jax.runs.policy import load_policy
from hybrid_jax.training.checkpoint import newest_params


def test_the_value_is_a_classifier_that_transformers_loads(run_dir, command, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    code, out, _ = command(export.main, "--run", run_dir, "--output", tmp_path / "out", "--value")
    assert (code, out.splitlines()[-1]) == (0, f"{tmp_path / 'out' / 'value'}  (value)")
    policy = load_policy(run_dir)
    shape = {"ppo/value": {"head": jax.eval_shape(lambda: init_value_head(16))}}
    head = newest_params(run_dir / "checkpoints", shape)[1]["ppo/value"]["head"]
    tokens = np.array([[65, 66, 67], [256, 1, 2]])
    expected = value(head, jax.jit(policy.model.hidden)(policy.params, tokens))[:, -1]
    assert np.abs(expected).min() > 0  # it has learned something

    classifier, loaded = load_classifier(tmp_path / "out" / "value")
    assert classifier.labels == ("value",)
    np.testing.assert_allclose(jax.jit(classifier.apply)(loaded, tokens)[:, 0], expected, rtol=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "value").eval()
    with torch.no_grad():
        scores = theirs(torch.as_tensor(tokens[:1])).logits.numpy()[:, 0]
    np.testing.assert_allclose(scores + np.asarray(loaded["score"]["bias"]), expected[:1], rtol=1e-4)

    assert command(export.main, "--run", run_dir, "--output", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "value").exists()  # it would be that of another step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_has_the_type_that_is_asked_for(run_dir, command, tmp_path, dtype):
    assert command(export.main, "--run", run_dir, "--output", tmp_path / "out", "--dtype", dtype)[0] == 0
    params = load_policy(run_dir).params
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        stored = file.get_tensor("transformer.wte.weight")
    ours = np.asarray(params["token_embedding"]["embedding"]).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(stored, ours, strict=True)


def test_a_separate_value_network_is_written_with_its_own_weights(run_dir, tmp_path, monkeypatch):
    """The one of the run shares the policy's; a checkpoint with a network of its own is put in its place."""
    from hybrid_jax.runs import value as module

    model = load_policy(run_dir).model
    network = model.init(jax.random.key(7))
    head = {"kernel": jnp.arange(16.0)[:, None], "bias": jnp.ones(1)}
    params = {"ppo/value": {"model": network, "head": head}}
    groups = {"model", "ppo/value", "ppo/value/model", "heads/value"}  # a head of that name is none
    monkeypatch.setattr(module, "param_groups", lambda progress: groups)
    monkeypatch.setattr(module, "newest_params", lambda folder, groups, base: (3, params))
    classifier, params = load_classifier(module.save_value(run_dir, tmp_path))
    tokens = jnp.asarray([[65, 66, 67]])
    expected = jax.jit(model.hidden)(network, tokens)[:, -1] @ head["kernel"] + 1
    np.testing.assert_allclose(jax.jit(classifier.apply)(params, tokens), expected, rtol=1e-5)


def test_a_run_without_a_value_says_so(run_dir, tmp_path, monkeypatch):
    from hybrid_jax.core.errors import UserError
    from hybrid_jax.runs import value as module

    monkeypatch.setattr(module, "param_groups", lambda progress: {"model"})
    with pytest.raises(UserError, match="has no value: none of its phases sft, ppo trains one"):
        module.save_value(run_dir, tmp_path)
