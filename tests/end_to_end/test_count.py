"""python -m hybrid_jax.count: what it says and writes, against the n-gram model in numpy."""

import re

import numpy as np
import pytest
import yaml

from hybrid_jax import build, count, load_config
from hybrid_jax.core.config import to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.metrics.ngram_lm import NgramModel
from hybrid_jax.models.folders.ours import save_ours
from hybrid_jax.models.markov.counts import count_tokens
from hybrid_jax.runs.policy import load_pretrained_policy


@pytest.fixture
def config(tmp_path):
    rows = [
        f'{{"prompt": "{"ab" * (n % 5)}c", "completion": "{"xyz"[n % 3] * (n % 7 + 1)}"}}' for n in range(300)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:250]))
    (tmp_path / "held_out.jsonl").write_text(
        "\n".join([*rows[250:], f'{{"prompt": "c", "completion": "{"zy" * 700}"}}'])
    )
    data = {"name": "jsonl", **{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "held_out")}}
    sft = {"phases": {"sft": {}}, "scheduler": {"name": "alternation", "cycle": {"sft": 1}}}
    settings = {
        "run_dir": str(tmp_path / "run"),
        "steps": 1,
        "model": "decoder",
        "tokenizer": "bytes",
        "data": data,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, **sft}))
    return tmp_path


def tokens(file):
    tokenizer = Bytes().build()
    rows = [yaml.safe_load(line) for line in file.read_text().splitlines()]
    pairs = [
        [tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), tokenizer.eos_id]]
        for row in rows
    ]
    return pairs, tokenizer.vocab_size


def test_it_predicts_as_the_counts_do_and_the_folder_answers(config, capsys):
    folder = config / "counted"
    given = ["--config", str(config / "config.yaml"), "--order", "3", "--smoothing", "witten_bell"]
    count.main([*given, "--output", str(folder)])
    said = capsys.readouterr().out
    train, vocab_size = tokens(config / "train.jsonl")
    model = NgramModel.train([p + r for p, r in train], vocab_size, 3, "witten_bell")
    held_out, _ = tokens(config / "held_out.jsonl")
    nats = np.concatenate([-model.log_probs(p + r)[len(p) :] for p, r in held_out])
    found = re.search(r"held out: ([\d.]+) nats a token, perplexity ([\d.]+), over ([\d,]+) tokens", said)
    assert float(found[1]) == pytest.approx(nats.mean(), abs=1e-4)
    assert float(found[2]) == pytest.approx(np.exp(nats.mean()), abs=0.01)
    assert int(found[3].replace(",", "")) == len(nats)
    policy = load_pretrained_policy(folder, ["sampler.temperature=0", "sampler.max_new_tokens=8"])
    (answer,) = policy.generate(["ababc"])
    assert re.fullmatch("x+|y+|z+", answer.response)
    assert policy.model.order == 3


def test_training_a_model_of_counts_or_a_folder_of_ours_is_one_line(config):
    model, params = count_tokens([[1, 2, 3]], 1, 300)
    save_ours(config / "counted", model, params)
    settings = {"name": "counts", **to_dict(model.settings)}
    with pytest.raises(UserError, match="holds whole numbers, which no phase can train"):
        build(load_config(config / "config.yaml", [f"model={settings}"])).init()
    path = f"model={{name: pretrained, path: {config / 'counted'}}}"
    with pytest.raises(UserError, match="is a folder of hybrid_jax, which generate --model, references and"):
        build(load_config(config / "config.yaml", [path]))


def test_what_cannot_be_scored_or_written_is_found_before_anything_is_counted(config, monkeypatch):
    monkeypatch.setattr("hybrid_jax.models.markov.counts.count_tokens", None)  # whose call would raise
    given = ["--config", str(config / "config.yaml"), "--output"]
    (config / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a folder to export to"):
        count.main([*given, str(config / "file")])
    (config / "held_out.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no held-out examples|is empty"):
        count.main([*given, str(config / "counted")])
    assert not (config / "counted").exists()
    assert (config / "file").read_text() == "mine"


@pytest.mark.parametrize("order", ["0", "9"])
def test_an_order_that_there_is_not_is_one_line(config, order):
    with pytest.raises(UserError, match=rf"--order must be in \[1, 8\], got {order}"):
        count.main(["--config", str(config / "config.yaml"), "--order", order, "--output", str(config / "x")])
