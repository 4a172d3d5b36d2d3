"""A whole run whose directory is a bucket, through the commands."""

import json
import os
import re

import jax
import numpy as np
import pytest
import yaml

from hybrid_jax import evaluate, export, generate, report
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.loggers import without_timings
from hybrid_jax.training.loop import train

SETTINGS = {
    "run_dir": "gs://bucket/runs/one",
    "steps": 6,
    "model": {"name": "decoder", "num_layers": 1, "width": 16, "num_heads": 2, "max_length": 48},
    "tokenizer": "bytes",
    "phases": {"sft": {"batch_size": 4, "length": 32}},
    "scheduler": {"name": "alternation", "cycle": {"sft": 1}},
    "evaluation": {
        **{"num_prompts": 4, "num_examples": 8, "batch_size": 4, "length": 32},
        "sampler": {"max_new_tokens": 4},
    },
    "checkpoint": {"every": 2, "keep": 2, "export_every": 6},
    "compilation_cache": None,  # that of the tests
}
LOST = "runs/one/checkpoints/4/_CHECKPOINT_METADATA"  # written while checkpoint 4 is still being saved


def config(folder, *overrides):
    rows = ({"prompt": f"say {i}:", "completion": f"{i} it is"} for i in range(40))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out_fraction": 0.2}
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": data}))
    return load_config(folder / "config.yaml", overrides)


def records(lines):
    return [without_timings(json.loads(line)) for line in lines.splitlines()]


def test_a_machine_that_is_lost_while_it_saves_is_replaced_by_another_to_the_last_bit(
    bucket, tmp_path, other_machine, capsys
):
    here = train(build(config(tmp_path, f"run_dir={tmp_path / 'here'}")))
    bucket.snapshots[LOST] = {}
    bucket.put("runs/one/environment.json", b'{"packages": {"hybrid_jax": "0.4.0"}}')
    bucket.put("runs/one/tokenizer/old.json", b"{}")  # of a start that came to nothing
    train(build(config(tmp_path)))
    bucket.objects = dict(bucket.snapshots.pop(LOST))
    assert records(bucket["runs/one/metrics.jsonl"])[-1]["step"] == 3  # of what was saved, all was there

    other_machine()
    there = train(build(config(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, there.train, here.train)
    assert (there.step, there.schedule, there.cursors) == (here.step, here.schedule, here.cursors)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(bucket[f"runs/one/{name}"]) == records((tmp_path / "here" / name).read_text())
    beside = {name.removeprefix("runs/one/") for name in bucket.names() if "/checkpoints/" not in name}
    on_disk = (path for path in (tmp_path / "here").rglob("*") if path.is_file())
    on_disk = {path.relative_to(tmp_path / "here").as_posix() for path in on_disk}
    assert beside == {name for name in on_disk if not name.startswith("checkpoints/")}
    steps = {int(name.split("/")[3]) for name in bucket.names("runs/one/checkpoints/")}
    assert steps == {4, 6}

    other_machine()
    generate.main(["--run", "gs://bucket/runs/one", "--prompt", "say 1:", "sampler.temperature=0"])
    answer = capsys.readouterr().out
    generate.main(["--run", str(tmp_path / "here"), "--prompt", "say 1:", "sampler.temperature=0"])
    assert answer == capsys.readouterr().out != ""
    evaluate.main(["--run", "gs://bucket/runs/one", "--suite", "loss"])
    last = [r for r in records(bucket["runs/one/metrics.jsonl"]) if r["phase"] == "evaluation"][-1]
    shown = capsys.readouterr().out
    assert "loss of gs://bucket/runs/one at step 6" in shown
    loss = float(re.search(r"loss +([\d.]+)\n", shown)[1])
    assert loss == pytest.approx(last["evaluation/loss"], rel=1e-4)
    export.main(["--run", "gs://bucket/runs/one", "--output", str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (
        bucket["runs/one/exports/step_6/model.safetensors"]
    )
    del bucket.objects["runs/one/report.html"]
    report.main(["--run", "gs://bucket/runs/one/"])
    assert capsys.readouterr().out.splitlines()[-1] == "gs://bucket/runs/one/report.html"
    assert b"<html" in bucket["runs/one/report.html"]
    assert not os.path.exists("gs:")

    with pytest.raises(
        UserError, match="run_dir gs://bucket/runs/one holds a run of another config: seed is 0"
    ):
        build(config(tmp_path, "seed=1"))


def test_a_bucket_without_such_a_run_is_one_line(bucket, tmp_path):
    for main in (generate.main, evaluate.main):
        with pytest.raises(UserError, match=r"gs://bucket/none is no run directory: it holds no config\.yaml"):
            main(["--run", "gs://bucket/none"])
    with pytest.raises(UserError, match=r"gs://bucket/none/metrics\.jsonl holds no metrics yet"):
        report.main(["--run", "gs://bucket/none"])


def test_a_bucket_that_cannot_be_written_ends_a_run_before_its_first_step(bucket, tmp_path, monkeypatch):
    experiment = build(config(tmp_path))
    bucket.refusal = (403, "no storage.objects.create access")
    with pytest.raises(UserError, match=r"no storage\.objects\.create access"):
        train(experiment)
    assert not bucket.names()


def test_an_export_goes_to_a_folder_on_this_machine(tmp_path, monkeypatch):
    from hybrid_jax.runs.policy import Policy

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="to export to must be a path on this machine, got the URL 'gs://b/x'"):
        Policy.save_pretrained(None, "gs://b/x")  # type: ignore  refused before anything is looked at
    assert not list(tmp_path.iterdir())
