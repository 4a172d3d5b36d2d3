"""Start tokens: those that a tokenizer of ``transformers`` puts in front of every text, often its BOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from hybrid_jax.core.errors import UserError

AddBos = Literal["auto", True, False]

_PROBES = ("a", "1", "\u4e00")  # a vocabulary may lack some


def start_ids(backend: Any) -> tuple[int, ...]:
    """The tokens that ``backend(text)`` puts in front of the text's own."""
    return _frame(backend)[0]


def force_bos(backend: Any, wanted: bool, path: str) -> None:
    """Changes whether ``backend(text)`` begins with BOS, so that it is also saved like that.

    Args:
        backend: a tokenizer of ``transformers``.
        wanted: whether a text begins with BOS.
        path: of the folder, for errors.

    Raises:
        UserError: there is no BOS token, or a slow tokenizer would have to change.
    """
    bos, end = backend.bos_token_id, backend.eos_token_id
    if wanted and bos is None:
        raise UserError(
            f"tokenizer.add_bos must not be true for {path!r}, whose tokenizer has no BOS token; take auto, or "
            "set bos_token in its tokenizer_config.json"
        )
    front, behind = _frame(backend)
    target = (bos,) if wanted else ()
    if front == target:
        return
    if not backend.is_fast:
        raise UserError(
            f"tokenizer.add_bos must be auto for {path!r}: {type(backend).__name__} is a slow tokenizer, whose "
            "frame cannot be changed; convert it into a tokenizer.json"
        )
    from tokenizers import processors

    named = {token: f"{backend.convert_ids_to_tokens(token)}" for token in (*target, *behind)}
    single = [*(named[token] for token in target), "$A", *(named[token] for token in behind)]
    pair = [*single, *(named[token] for token in target), "$B:1", *(named[token] for token in behind)]
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(name, token) for token, name in named.items()]
    )
    # transformers writes these into tokenizer_config.json and makes the frame from them when it loads
    backend.init_kwargs |= {"add_bos_token": wanted, "add_eos_token": behind == (end,)}
    for name, value in (("_add_bos_token", wanted), ("_add_eos_token", behind == (end,))):
        object.__setattr__(backend, name, value)


def _frame(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that are put in front of and behind a text."""
    for probe in _PROBES:
        own = backend.encode(probe, add_special_tokens=False)
        whole = backend.encode(probe)
        if own and (place := _place_of(own, whole)) is not None:
            return tuple(whole[:place]), tuple(whole[place + len(own) :])
    whole = backend.encode("")
    front = whole[:1] if backend.bos_token_id in whole[:1] else []
    return tuple(front), tuple(whole[len(front) :])


def _place_of(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """The index at which the last occurrence of ``part`` in ``whole`` begins."""
    places = range(len(whole) - len(part), -1, -1)
    return next((place for place in places if list(whole[place : place + len(part)]) == list(part)), None)
