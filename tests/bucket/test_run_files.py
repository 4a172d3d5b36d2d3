"""The files of a run in a bucket, by the packages that speak to Google's storage."""

import importlib
import logging
import sys

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.runs.files import fetched, run_files
from hybrid_jax.training.loggers import open_loggers

RUN = "gs://bucket/runs/one"


def test_a_folder_on_this_machine_is_the_run_itself(tmp_path):
    files = fetched(tmp_path / "run")
    assert (files.folder, files.checkpoints) == (tmp_path / "run", tmp_path / "run" / "checkpoints")
    files.upload()
    assert not files.folder.exists()


def test_a_file_goes_up_once_and_again_when_it_has_changed(bucket):
    files = run_files(RUN)
    (files.folder / "metrics.jsonl").write_bytes(b"1\r\n\r\n\n")
    (files.folder / "tokenizer").mkdir()
    (files.folder / "tokenizer" / "vocab.json").write_text("{}")
    files.upload()
    assert bucket["runs/one/metrics.jsonl"] == b"1\r\n\r\n\n"
    assert bucket["runs/one/tokenizer/vocab.json"] == b"{}"
    generations = {name: generation for name, (_, generation) in bucket.objects.items()}
    files.upload()
    assert {name: generation for name, (_, generation) in bucket.objects.items()} == generations
    with (files.folder / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    files.upload()
    changed = {name for name, (_, generation) in bucket.objects.items() if generation != generations[name]}
    assert changed == {"runs/one/metrics.jsonl"}
    assert bucket["runs/one/metrics.jsonl"] == b"1\r\n\r\n\n2\n"


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, of what gcsfs does
def test_a_file_of_many_megabytes_goes_up_in_chunks_and_comes_back(bucket, other_machine):
    content = bytes(range(256)) * 24_000  # 6.1 MB: more than gcsfs sends at once
    (run_files(RUN).folder / "metrics.jsonl").write_bytes(content)
    run_files(RUN).upload()
    assert bucket["runs/one/metrics.jsonl"] == content
    other_machine()
    assert (fetched(RUN).folder / "metrics.jsonl").read_bytes() == content


def test_another_machine_fetches_the_files_of_the_run_but_no_checkpoint_and_no_export(bucket):
    for name in ("config.yaml", "tokenizer/a.json", "checkpoints/3/d/0", "exports/step_3/model", "profile/x"):
        bucket.put(f"runs/one/{name}", name.encode())
    bucket.put("runs/one_more/config.yaml", b"of another run")
    folder = fetched(RUN).folder
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {"config.yaml", "tokenizer/a.json"}
    assert (folder / "tokenizer" / "a.json").read_text() == "tokenizer/a.json"
    assert folder.name == "one"


def test_what_changes_in_the_bucket_is_fetched_again_and_nothing_else(bucket):
    bucket.put("runs/one/metrics.jsonl", b"1\n")
    bucket.put("runs/one/config.yaml", b"a: 1\n")
    folder = fetched(RUN).folder
    bucket.put("runs/one/metrics.jsonl", b"1\n2\n")
    bucket.log.clear()
    assert fetched(RUN).folder == folder
    assert (folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert ("GET", "runs/one/metrics.jsonl") in bucket.log
    assert ("GET", "runs/one/config.yaml") not in bucket.log


def test_what_this_process_writes_is_never_fetched_over_its_own(bucket):
    files = run_files(RUN)
    (files.folder / "metrics.jsonl").write_text("1\n")
    files.upload()
    (files.folder / "metrics.jsonl").write_text("1\n2\n")
    assert (fetched(RUN).folder / "metrics.jsonl").read_text() == "1\n2\n"


def test_half_written_files_and_links_stay_here(bucket):
    folder = run_files(RUN).folder
    (folder / "config.yaml.new").write_text("half")
    (folder / "metrics.kept").write_text("half")
    (folder / "tokenizer.new").mkdir()
    (folder / "tokenizer.new" / "a.json").write_text("half")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "run").write_text("whole")
    (folder / "wandb" / "latest").symlink_to(folder / "wandb" / "run")
    run_files(RUN).upload()
    assert bucket.names() == ["runs/one/wandb/run"]


def test_a_folder_that_is_removed_is_gone_here_and_in_the_bucket_and_goes_up_anew(bucket):
    bucket.put("runs/one/tokenizer/old.json", b"old")
    bucket.put("runs/one/tokenizer/same.json", b"same")
    files = fetched(RUN)
    files.remove("tokenizer")
    assert bucket.names() == []
    assert not (files.folder / "tokenizer").exists()
    (files.folder / "tokenizer").mkdir()
    (files.folder / "tokenizer" / "same.json").write_text("same")
    files.upload()
    assert bucket.names() == ["runs/one/tokenizer/same.json"]


def test_records_go_up_with_the_samples_of_an_evaluation_and_at_the_end(bucket):
    files = run_files(RUN)
    logger = open_loggers((files,), files.folder, {}, None)
    logger.metrics({"step": 0, "phase": "sft", "sft/loss": 1.5})
    assert bucket.names() == []
    logger.samples([])
    assert bucket["runs/one/metrics.jsonl"] == b'{"step": 0, "phase": "sft", "sft/loss": 1.5}\n'
    logger.metrics({"step": 1, "phase": "sft", "sft/loss": 1.25})
    logger.close()
    assert bucket["runs/one/metrics.jsonl"].count(b"\n") == 2


def test_a_bucket_that_refuses_the_last_upload_does_not_hide_why_a_run_ended(bucket, caplog):
    files = run_files(RUN)
    logger = open_loggers((files,), files.folder, {}, None)
    logger.metrics({"step": 0, "phase": "sft"})
    bucket.refusal = (403, "no access")
    with caplog.at_level(logging.WARNING):
        logger.close()
    assert "gs://bucket/runs/one cannot be written: Forbidden" in caplog.text


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            (403, "no storage.objects.list access"),
            "give this machine's account the roles storage.objectUser and",
        ),
        ((401, "Anonymous caller has no access"), "log in by `gcloud auth application-default login`"),
    ],
)
def test_a_bucket_that_refuses_is_one_line_with_what_to_do(bucket, refusal, message):
    bucket.refusal = refusal
    with pytest.raises(UserError, match="gs://bucket/runs/one cannot be read: ") as caught:
        fetched(RUN)
    assert refusal[1] in str(caught.value)
    assert message in str(caught.value)
    (run_files(RUN).folder / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="gs://bucket/runs/one cannot be written: "):
        run_files(RUN).upload()


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(
        UserError, match=r"gs://bukcet/runs/one cannot be read: .*; is there a bucket gs://bukcet\?"
    ):
        fetched("gs://bukcet/runs/one")


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "gs://bucket", "gs://", "gs://bucket/a b?c", "gs:/bucket/run"]
)
def test_a_url_that_is_none_of_a_run_in_a_bucket_is_refused(url):
    with pytest.raises(UserError, match="must be a folder or a URL gs://bucket/path, got"):
        run_files(url)


@pytest.mark.parametrize("package", ["gcsfs", "google.cloud.storage"])
def test_a_missing_package_is_one_line_that_names_the_extra(package, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "gs", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"gs://bucket/x needs gcsfs.*: pip install -e '\.\[gcs\]'"):
        run_files("gs://bucket/x")
    assert not list(tmp_path.iterdir())
