"""Settings that are paths or URLs: `Path("gs://a/b")` is the folder gs:/a/b, and must never be made."""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import pytest
import yaml

from hybrid_jax.core.config import Url, is_url, local_path, parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.training.compilation import keep_compiled


@dataclass(frozen=True)
class Settings:
    train: Path = Path("data")
    run_dir: Path | Url = Path("runs/one")
    cache: Path | Url | None = None
    more: dict[str, tuple[Path, ...]] = field(default_factory=dict)


@pytest.mark.parametrize("value", ["gs://bucket/a", "s3://bucket/a", "https://host/a", "file:///a"])
def test_a_path_setting_refuses_a_url(value):
    with pytest.raises(UserError, match=f"train must be a path on this machine, got the URL '{value}'"):
        parse(Settings, {"train": value})
    with pytest.raises(UserError, match=r"more.x\[0\] must be a path on this machine"):
        parse(Settings, {"more": {"x": [value]}})


@pytest.mark.parametrize("name", ["train", "run_dir"])
def test_a_url_that_path_has_spoilt_already_is_refused(name):
    with pytest.raises(UserError, match=rf"{name} must be a path.*gs:/bucket/a"):
        parse(Settings, {name: Path("gs://bucket/a")})


def test_a_setting_that_may_be_a_url_keeps_it_to_the_letter_through_yaml_and_back():
    settings = parse(Settings, {"run_dir": "gs://bucket/a//b", "cache": Url("gs://bucket/c")})
    assert (settings.run_dir, settings.cache) == ("gs://bucket/a//b", "gs://bucket/c")
    assert type(settings.run_dir) is type(settings.cache) is Url
    text = yaml.safe_dump(to_dict(settings, Settings))
    assert parse(Settings, yaml.safe_load(text)) == settings


@pytest.mark.parametrize("value", ["runs/a", "/runs/a", "C:/runs", "a:b/c", "gs", "./gs:/a"])
def test_a_path_stays_a_path(value):
    assert parse(Settings, {"run_dir": value, "train": value}) == Settings(Path(value), Path(value))
    assert not is_url(value)
    assert local_path(value, "x") == Path(value)


def test_the_compilation_cache_in_a_bucket_reaches_jax_as_it_was_written():
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled(parse(Settings, {"cache": "gs://bucket/compiled"}).cache)
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_path_may_begin_with_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/runs/one", "run_dir") == Path("/home/me/runs/one")
    assert local_path("a/~b", "run_dir") == Path("a/~b")
    with pytest.raises(UserError, match="run_dir begins with the home of a user whom this machine lacks"):
        local_path("~nobody-of-this-name/x", "run_dir")
