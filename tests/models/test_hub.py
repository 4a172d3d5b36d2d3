"""Models by their id: which files are asked for, and one clear line for each way in which the hub says no."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained
from hybrid_jax.models.folders.hub import find_folder

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(a folder, its parameters)"""
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(11)
    shapes, random = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("stored")
    save_pretrained(folder, model, params)
    return folder, params


@pytest.fixture
def hub(monkeypatch):
    """What the hub answers: set ``answer``; ``calls`` holds what it was asked."""

    class Hub:
        calls: list = []  # noqa: RUF012
        answer = None

        def download(self, repo, **settings):
            self.calls.append((repo, settings))
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    fake = Hub()
    fake.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake


def _is_asked_for(name, settings):
    asked = huggingface_hub.utils.filter_repo_objects
    kinds = {"allow_patterns": settings["allow_patterns"], "ignore_patterns": settings["ignore_patterns"]}
    return list(asked([name], **kinds)) == [name]


def test_an_id_loads_like_the_folder_that_the_hub_gives(stored, hub):
    hub.answer, params = stored
    jax.tree.map(np.testing.assert_array_equal, load_pretrained("org/name")[1], params)
    model = parse(BACKBONES["pretrained"], {"path": "org/name@v1.0"}).build(9)
    assert model.folder == str(stored[0])
    assert [(repo, settings["revision"]) for repo, settings in hub.calls] == [
        ("org/name", None),
        ("org/name", "v1.0"),
    ]
    wanted = (
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
        "merges.txt",
    )
    assert all(_is_asked_for(name, hub.calls[0][1]) for name in (*wanted, "tokenizer.model"))
    other = (
        "pytorch_model.bin",
        "original/params.json",
        "consolidated.safetensors",
        "flax_model.msgpack",
    )
    assert not any(_is_asked_for(name, hub.calls[0][1]) for name in (*other, "modeling.py"))


def test_torch_files_are_fetched_only_where_there_are_no_others(stored, hub, tmp_path):
    shutil.copy(stored[0] / "config.json", tmp_path)
    hub.answer = tmp_path
    find_folder("name")
    assert [_is_asked_for("pytorch_model.bin", settings) for _, settings in hub.calls] == [False, True]


def test_a_folder_is_a_folder_whatever_it_is_called(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(find_folder("org/name")) == "org/name"
    for path in ("/no/such/folder", "./name", "a/b/c", "~/model", "../model", Path("no/folder")):
        assert find_folder(path) == Path(path)
    assert hub.calls == []


def _response(status):
    """What the hub's errors read of a response, whichever HTTP client it came through."""
    url = f"https://huggingface.co/?token={TOKEN}"
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url=url))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            errors.GatedRepoError("403", response=_response(403)),
            "is gated: ask for access at https://",
        ),
        (errors.RepositoryNotFoundError("404", response=_response(404)), "is not on the Hugging Face hub"),
        (errors.RevisionNotFoundError("404", response=_response(404)), "has no revision 'main'"),
        (
            errors.HfHubHTTPError(f"500 {TOKEN}\nmore", response=_response(500)),
            "cannot be downloaded: HfHubHTTPError",
        ),
        (OSError(28, "No space left on device"), "cannot be downloaded: OSError"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(hub, answer, message):
    hub.answer = answer
    with pytest.raises(UserError) as caught:
        load_pretrained("org/name@main")
    assert str(caught.value).startswith("no folder is called 'org/name', and the model of that id " + message)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_real_hub_client_fails_in_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="that id is not in the cache, and HF_HUB_OFFLINE is set"):
        load_pretrained("org/no_such_model")


def test_a_cached_model_loads_offline(stored, monkeypatch, tmp_path):
    """The real client, on a cache as it lays it out."""
    from huggingface_hub import constants

    commit, cached = "0" * 40, tmp_path / "models--org--name"
    shutil.copytree(stored[0], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained("org/name")[1], stored[1])
