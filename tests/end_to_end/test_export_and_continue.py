"""A Llama trained from scratch is exported, and a second run goes on from the export where the first ended."""

import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "llama.yaml"
STEPS = ["steps=5", "compilation_cache=null", "scheduler.warmup.sft=1"]


def _evaluations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [record for record in records if record["phase"] == "evaluation"]
    return [{k: v for k, v in record.items() if k.startswith("evaluation/")} for record in numbers]


def test_a_run_continues_from_an_export_with_the_same_numbers(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    experiment = build(load_config(CONFIG, [f"run_dir={first}", *STEPS]))
    state = train(experiment)
    folder = experiment.export(state, tmp_path / "export")

    tokens = np.arange(12, dtype=np.int64)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ours = jax.jit(experiment.model.apply)(state.train.params["model"], tokens).logits
    np.testing.assert_allclose(ours, expected, atol=1e-5)

    model = f"model={{name: pretrained, path: {folder}}}"
    tokenizer = f"tokenizer={{name: huggingface, path: {folder}}}"
    again = build(load_config(CONFIG, [f"run_dir={second}", *STEPS, "steps=1", model, tokenizer]))
    jax.tree.map(np.testing.assert_array_equal, again.init().train.params["model"], state.train.params["model"])
    train(again)
    assert len(_evaluations(second)[0]) >= 8
    assert _evaluations(second)[0] == _evaluations(first)[-1]
    assert _evaluations(second)[-1] != _evaluations(second)[0]
