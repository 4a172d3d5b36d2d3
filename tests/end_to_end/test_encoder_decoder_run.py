"""An encoder-decoder learns by supervised fine-tuning, is exported, and goes on from there; PPO refuses it."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.runs.policy import load_policy, load_pretrained_policy
from hybrid_jax.training.loop import train

MODEL = {"name": "encoder_decoder", "num_layers": 1, "width": 32, "num_heads": 2, "start_id": 256}
SETTINGS = {
    "steps": 150,
    "tokenizer": "bytes",
    "model": MODEL,
    "phases": {"sft": {"batch_size": 8, "length": 24, "optimizer": {"name": "adamw", "learning_rate": 1e-2}}},
    "scheduler": {"name": "alternation", "cycle": {"sft": 1}},
    "evaluation": {
        "every": 150,
        "num_prompts": 4,
        "batch_size": 4,
        "length": 24,
        "sampler": {"max_new_tokens": 4},
    },
    "compilation_cache": None,
}
WORDS = ["ab", "cd", "ef", "gh"]  # the response is the prompt the other way round


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": word, "completion": word[::-1]} for word in WORDS * 8]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out": str(folder / "data.jsonl")}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"run_dir": str(folder / "run"), "data": data, **SETTINGS})
    )
    return folder / "config.yaml"


def _evaluations(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["evaluation/loss"] for record in records if record["phase"] == "evaluation"]


def test_it_learns_is_exported_and_continues_with_the_same_numbers(config, tmp_path):
    experiment = build(load_config(config))
    state = train(experiment)
    losses = _evaluations(config.parent / "run")
    assert losses[0] > 4  # of 257 tokens, knowing nothing
    assert losses[-1] < 0.05  # the target follows from the source alone, so the encoder is read
    answers = load_policy(config.parent / "run", ["sampler.temperature=0"]).generate(WORDS)
    assert [answer.response for answer in answers] == ["ba", "dc", "fe", "hg"]
    assert all(answer.complete for answer in answers)

    folder = experiment.export(state, tmp_path / "export")
    assert load_pretrained_policy(folder, ["sampler.temperature=0"]).generate(WORDS) == answers
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    sources = np.array([list(word.encode()) for word in WORDS])
    written = theirs.generate(input_ids=torch.as_tensor(sources), do_sample=False, max_new_tokens=4)
    assert written[:, 1:4].tolist() == [[*word[::-1].encode(), 256] for word in WORDS]

    model = f"model={{name: pretrained_encoder_decoder, path: {folder}}}"
    again = build(load_config(config, [f"run_dir={tmp_path / 'again'}", model]))
    jax.tree.map(np.testing.assert_array_equal, again.init().train.params["model"], state.train.params["model"])


def test_ppo_and_examples_without_a_prompt_are_refused(config, tmp_path):
    new = f"run_dir={tmp_path / 'run'}"
    ppo = "phases.ppo={reward: {parts: {length: {reward: {name: length, target: 6}}}}}"
    with pytest.raises(
        UserError, match=r"phases\.ppo: a rollout needs a decoder; an encoder-decoder learns by sft alone"
    ):
        build(load_config(config, [new, ppo, "scheduler={name: alternation, cycle: {sft: 1, ppo: 1}}"]))
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "only this"}\n' * 8)
    texts = f"data={{name: text, train: {documents}, held_out_fraction: 0.5}}"
    with pytest.raises(
        UserError, match=r"documents\.jsonl: an encoder-decoder needs a prompt to encode, got none"
    ):
        build(load_config(config, [new, texts]))
