"""Replaces credentials by ``***``: values under names that hold them, and those in URLs and headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PASSWORDS = frozenset(("password", "passwd", "passphrase", "pwd", "pass"))  # which may be numbers
_SECRET_WORDS = _PASSWORDS | {
    *("key", "token", "secret", "secrets", "passwords", "credential", "credentials", "authorization", "auth"),
    *("bearer", "cookie", "cookies", "apikey", "accesskey", "secretkey", "privatekey", "authkey"),
    *("accesstoken", "authtoken", "apitoken"),
}
_OF_TEXTS = frozenset(("per", "eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "start", "end"))
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_QUERY = re.compile(r"(?<=[?&;])([^=&;?#\s]+)=([^&;#\s'\"]+)")
_HEADER = re.compile(r"(?i)\b(bearer|basic)\s+(?=\S*\d)[^\s'\",;]{6,}")


def is_secret_name(name: str) -> bool:
    """Tells whether a setting of this name holds a credential: ``api-key`` does, ``eos_token`` does not."""
    return _secret_word(name) is not None


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of settings, or of a text, in which every credential reads ``***``.

    Args:
        value: plain values, nested to any depth.
        name: of the setting that holds them.
    """
    if isinstance(value, Mapping):  # its own names say what is secret: a part of a reward may be called "token"
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    word = _secret_word(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (word and isinstance(value, str)) or (word in _PASSWORDS and is_number):
        return HIDDEN
    return text_without_secrets(value) if isinstance(value, str) else value


def text_without_secrets(text: str) -> str:
    """A text in which logins and secret queries of URLs, and credentials of headers, read ``***``."""
    text = _HEADER.sub(rf"\1 {HIDDEN}", _URL_LOGIN.sub(f"{HIDDEN}@", text))
    return _URL_QUERY.sub(lambda m: f"{m[1]}={HIDDEN}" if is_secret_name(m[1]) else m[0], text)


def _secret_word(name: str) -> str | None:
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] not in _SECRET_WORDS:
        return None
    is_of_texts = words[-1] == "token" and len(words) > 1 and words[-2] in _OF_TEXTS
    return None if is_of_texts else words[-1]
