import dataclasses
import typing

import pytest

from hybrid_jax.core.cli import _exit_code
from hybrid_jax.core.config import apply_overrides, parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.merging import registry_of, without_extras, without_none
from hybrid_jax.core.secrets import is_secret_name, text_without_secrets, without_secrets
from hybrid_jax.experiment_config import ExperimentConfig


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "api-key", "apiKey", "API_KEY", "apikey", "x-api-key", "X-Api-Key", "hfToken", "HF_TOKEN"),
        *("auth", "x.auth", "passwd", "password", "dbPassword", "secret", "clientSecret", "credentials", "pwd"),
        *("Authorization", "accessToken", "accesstoken", "cookie", "private_key"),
    ],
)
def test_a_name_that_holds_a_credential_is_known_in_any_spelling(name):
    assert is_secret_name(name)
    assert without_secrets({"a": [{name: "hunter2"}, {name: ["hunter2"]}]}) == {
        "a": [{name: "***"}, {name: ["***"]}]
    }


def test_words_of_a_vocabulary_numbers_and_names_of_variables_are_no_secrets():
    plain = {
        "tokenizer": {"eos_token": "</s>", "pad_token": "<pad>", "stop_token": "x", "name": "bytes"},
        "max_new_tokens": 64,
        "api_key_env": "OPENAI_API_KEY",
        "sort_keys": True,
        "key": 5,
        "parts": {"token": {"reward": {"name": "token_count"}, "weight": 1.0}},
        "author": "me",
        "monkey": "ape",
        "secret": None,
    }
    assert without_secrets(plain) == plain
    assert without_secrets({"password": 1234, "judge": {"auth": {"user": "me", "pass": "x"}}}) == {
        "password": "***",
        "judge": {"auth": {"user": "me", "pass": "***"}},
    }


def test_urls_and_headers_in_any_text_lose_their_credentials():
    for text, shown in [
        ("https://me:pass@host/v1", "https://***@host/v1"),
        ("https://h/v1?api_key=abc&model=m#x", "https://h/v1?api_key=***&model=m#x"),
        ("https://h/?x=1&hfToken=abc is busy", "https://h/?x=1&hfToken=*** is busy"),
        ("Authorization: Bearer sk-12345", "Authorization: Bearer ***"),
        ("the basic settings of token=3, a bearer of news", "the basic settings of token=3, a bearer of news"),
    ]:
        assert text_without_secrets(text) == shown
        assert without_secrets({"url": [text]}) == {"url": [shown]}


def test_no_error_shows_a_credential(capsys):
    @dataclasses.dataclass(frozen=True)
    class Service:
        api_key: int = 0
        url: int = 0
        mode: typing.Literal["a", "b"] = "a"

    for settings in (
        {"api_key": "hunter2"},
        {"url": "https://me:hunter2@h"},
        {"mode": "https://h?auth=hunter2"},
    ):
        with pytest.raises(UserError, match=r"\*\*\*") as caught:
            parse(Service, settings)
        assert "hunter2" not in str(caught.value)
    for override in ("https://h/?api_key:hunter2", "x.api_key=[hunter2"):
        with pytest.raises(UserError) as caught:
            apply_overrides({}, [override])
        assert "[hunter2" not in str(caught.value)

    def fails(arguments):
        raise UserError("no answer from https://me:hunter2@h/?token=hunter2")

    assert _exit_code(fails, []) == 2
    assert capsys.readouterr().err == "error: no answer from https://***@h/?token=***\n"


def names_of(hint, seen, found):
    """Every setting of the package, by the type hints and the registries in them."""
    hint = without_none(hint)
    if (registry := registry_of(hint)) is not None:
        for name in registry:
            names_of(registry[name], seen, found)
    elif dataclasses.is_dataclass(bare := without_extras(hint)) and bare not in seen:
        seen.add(bare)
        found.update(field.name for field in dataclasses.fields(bare))
        for inner in typing.get_type_hints(bare, include_extras=True).values():
            names_of(inner, seen, found)
    for argument in typing.get_args(without_extras(hint)):
        names_of(argument, seen, found)
    return found


def test_no_setting_of_ours_holds_a_credential_so_a_run_s_config_is_whole():
    names = names_of(ExperimentConfig, set(), set())
    assert len(names) > 150
    assert [name for name in sorted(names) if is_secret_name(name)] == []
